"""Batches of one epoch, decoded by threads through grain; numpy only, so that any device layout can take
them.

The order is a pure function of (seed, epoch): neither threads nor processes change it, and an integer, the
number of batches already done, is all that a resumed run needs.
"""

from collections.abc import Iterator
from typing import Protocol

import grain
import numpy as np

from data_pipelines.schema import DataError, Example

_PADDING = -1


class RandomAccess(Protocol):
  """Anything with a length whose items are examples, safe to read from many threads."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> Example: ...


def num_batches(source: RandomAccess, batch_size: int) -> int:
  """Batches in one epoch, the padded last one included."""
  return -(-len(source) // batch_size)


def batches(
  source: RandomAccess,
  *,
  batch_size: int,
  seed: int,
  shuffle: bool,
  epoch: int = 0,
  start: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int = 2,
  prefetch: int = 2,
) -> Iterator[Example]:
  """One epoch in batches of fixed size.

  Args:
    source: examples; every key but "id" is an array, of one shape over all examples.
    batch_size: rows over all processes together.
    seed: decides the order, together with `epoch`.
    shuffle: False keeps the order of the source.
    epoch: number of this epoch.
    start: batches of the epoch that are done already; the rest is the same as without it.
    process_index: this process; it gets the rows [i * b, (i + 1) * b) of every batch, b = batch_size /
      process_count.
    process_count: number of processes.
    num_threads: decoding threads (0: decode in the calling thread).
    prefetch: batches decoded ahead.

  Returns:
    An iterator of {key: [b, ...]} and "id" (list of b str). Rows that pad the last batch are zeros with mask
    0 and id "".

  Raises:
    DataError: sizes that do not fit; and, while iterating, what the source raises.
  """
  _check(len(source), batch_size, process_index, process_count)
  rows = _rows(len(source), batch_size, seed if shuffle else None, epoch)[start:]
  rows = np.split(rows, process_count, axis=1)[process_index]  # [num_batches - start, b]

  def read(index: int) -> Example:
    # Padding copies the shapes of a real row; the first row of the data is as good as any.
    example = source[int(index)] if index != _PADDING else _zeros(source[0])
    return example if "mask" in example else {**example, "mask": np.float32(1)}

  dataset = grain.MapDataset.source(rows.reshape(-1)).map(read).batch(rows.shape[1], batch_fn=_stack)
  # grain's own default is a buffer of 500 batches, more memory than a machine has.
  options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(prefetch, num_threads) if num_threads else 0)
  return iter(dataset.to_iter_dataset(options))


def _check(num_examples: int, batch_size: int, process_index: int, process_count: int) -> None:
  if num_examples == 0:
    raise DataError("the split has no examples; check its annotation file")
  if batch_size < 1 or process_count < 1 or batch_size % process_count:
    raise DataError(f"batch_size {batch_size} does not divide by {process_count} processes; take a multiple")
  if not 0 <= process_index < process_count:
    raise DataError(f"process_index {process_index} is outside 0..{process_count - 1}")


def _rows(num_examples: int, batch_size: int, seed: int | None, epoch: int) -> np.ndarray:
  """The example of every row of the epoch, int64 [num_batches, batch_size]; seed None keeps the order."""
  order = np.arange(num_examples)
  if seed is not None:
    order = np.random.default_rng((seed, epoch)).permutation(num_examples)
  return np.pad(order, (0, -num_examples % batch_size), constant_values=_PADDING).reshape(-1, batch_size)


def _zeros(example: Example) -> Example:
  return {"mask": np.float32(0)} | {k: "" if k == "id" else np.zeros_like(v) for k, v in example.items()}


def _stack(examples: list[Example]) -> Example:
  return {key: [x[key] for x in examples] if key == "id" else np.stack([x[key] for x in examples]) for key in examples[0]}
