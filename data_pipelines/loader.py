"""Batches of one epoch, decoded by threads or processes through grain; numpy only, so that any device layout can take
them.

The order is a pure function of (seed, epoch), an example's augmentation one of (seed, epoch, example): threads, workers and
processes change neither, and an integer, the number of batches already done, is all that a resumed run needs.
"""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import grain
import numpy as np

from data_pipelines.processes import end_with_parent
from data_pipelines.schema import DataError, Example

Augment = Callable[[Example, np.random.Generator], Example]
_PADDING, _REASON = -1, "\0reason"  # no key of an example


class RandomAccess(Protocol):
  """Anything with a length whose items are examples, safe to read from many threads.

  With workers it is pickled, once for each. If it has the methods `found(index) -> str` and `learn(index, str)`, `learn` is
  told here what `found` says in the worker of every row that was read there.
  """

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
  num_workers: int = 0,
  prefetch: int = 2,
  augment: Augment | None = None,
) -> Iterator[Example]:
  """One epoch in batches of fixed size.

  Args:
    source: examples; every key but "id" is an array, of one shape over all examples.
    batch_size: rows over all processes together.
    seed: decides the order, together with `epoch`.
    shuffle: False keeps the order of the source.
    epoch: number of this epoch.
    start: batches of the epoch that are done already, all of them even; the rest is the same as without it.
    process_index: this process; it gets the rows [i * b, (i + 1) * b) of every batch, b = batch_size /
      process_count.
    process_count: number of processes.
    num_threads: decoding threads (0: decode in the calling thread), in each worker where there are any.
    num_workers: decoding processes (0: none); worker w of n makes the batches w, w + n, ... They start in seconds, at every
      call, and hand batches over in shared memory. The calling script needs `if __name__ == "__main__"`.
    prefetch: batches decoded ahead, by each worker where there are any (those hold one more that waits to be fetched).
    augment: changes a real example at random; the generator it gets depends on (seed, epoch, example) alone. It must
      leave the shapes as they are, and be picklable where there are workers.

  Returns:
    An iterator of {key: [b, ...]} and "id" (list of b str). Rows that pad the last batch are zeros with mask
    0 and id "".

  Raises:
    DataError: sizes that do not fit; and, while iterating, what the source raises, and a worker that was killed.
  """
  _check(len(source), batch_size, process_index, process_count)
  rows = _rows(len(source), batch_size, seed if shuffle else None, epoch)[start:]
  rows = np.split(rows, process_count, axis=1)[process_index]  # [num_batches - start, b]
  if not len(rows):
    return iter(())
  learn = getattr(source, "learn", None)
  dataset = grain.MapDataset.source(rows.reshape(-1)).map(_Read(source, augment, seed, epoch, bool(num_workers and learn)))
  dataset = dataset.batch(rows.shape[1], batch_fn=_stack)
  # grain's own default is a buffer of 500 batches, more memory than a machine has.
  options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(prefetch, num_threads) if num_threads else 0)
  dataset = dataset.to_iter_dataset(options)
  if not num_workers:
    return _deliver(dataset, rows)
  _let_grain_ask_for_flags()
  dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=1), _begin_worker)
  return _take_over(_deliver(dataset, rows), rows, learn)


def _let_grain_ask_for_flags() -> None:
  """With workers grain reads options of its own from absl's flags, which must be parsed; in a notebook nobody has done it."""
  from absl import flags  # here: nothing else of this package needs it, and grain brings it along

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


def throughput(source: RandomAccess, *, batch_size: int = 8, **options: Any) -> dict[str, float]:
  """How fast the examples of a source are read: one epoch in their order, with `options` of `batches`.

  Returns:
    `first_batch_s`, seconds until the first batch (starting workers is part of it), and `examples_per_s` of those after it.

  Raises:
    DataError: as `batches`, and where there are fewer than two batches.
  """
  if num_batches(source, batch_size) < 2:
    raise DataError(f"{len(source)} examples are fewer than two batches of {batch_size}: nothing to measure")
  begun = time.perf_counter()
  iterator = batches(source, batch_size=batch_size, seed=0, shuffle=False, **options)
  next(iterator)
  first = time.perf_counter()
  read = sum(sum(name != "" for name in batch["id"]) for batch in iterator)
  return {"first_batch_s": first - begun, "examples_per_s": read / (time.perf_counter() - first)}


@dataclasses.dataclass(frozen=True)
class _Read:
  """A row of an epoch -> its example. A class, because workers get it pickled."""

  source: RandomAccess
  augment: Augment | None
  seed: int
  epoch: int
  reports: bool

  def __call__(self, index: int) -> Example:
    # Padding copies the shapes of a real row; the first row of the data is as good as any.
    example = self.source[int(index)] if index != _PADDING else _zeros(self.source[0])
    example = example if "mask" in example else {**example, "mask": np.float32(1)}
    if self.reports:
      example = {**example, _REASON: "" if index == _PADDING else self.source.found(int(index))}
    if self.augment is None or not example["mask"]:
      return example
    # A spawn key: seeds that differ in zeros at their end alone, as (seed, epoch) of the order does, are the same to numpy.
    seeds = np.random.SeedSequence((self.seed, self.epoch), spawn_key=(int(index),))
    return self.augment(example, np.random.default_rng(seeds))


def _deliver(dataset: grain.IterDataset, rows: np.ndarray) -> Iterator[Example]:
  """The batches of `rows` [num_batches, b]; ends threads and workers when it is closed."""
  iterator = iter(dataset)
  try:
    for _ in rows:
      yield _next(iterator)
  finally:
    iterator.close()


def _take_over(delivered: Iterator[Example], rows: np.ndarray, learn: Callable[[int, str], None] | None) -> Iterator[Example]:
  """Batches of workers, out of the shared memory, which is small and is free again at once; tells `learn` what they found."""
  with contextlib.closing(delivered):
    for indices, batch in zip(rows, delivered, strict=True):
      reasons = batch.pop(_REASON, [])
      if learn is not None:
        for index, reason in zip(indices.tolist(), reasons, strict=True):
          if index != _PADDING:
            learn(index, reason)
      yield {key: np.array(value) if isinstance(value, np.ndarray) else value for key, value in batch.items()}


def _next(iterator: Iterator[Example]) -> Example:
  try:
    return next(iterator)
  except RuntimeError as error:
    if "terminated unexpectedly" not in str(error):
      raise
    raise DataError(
      f"a decoding process ended unexpectedly ({str(error).split('.')[0]}): most often the memory, or the shared memory of "
      "/dev/shm, was full; take fewer workers, smaller batches, or num_workers 0"
    ) from error


def _begin_worker(index: int, count: int) -> None:
  """Signals are for the process that trains, which ends its workers itself; one that was killed cannot."""
  del index, count
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  end_with_parent()


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
  """Arrays [b, ...]; ids, and reasons where a row has one, as lists of b str."""
  texts = [key for key in ("id", _REASON) if any(key in x for x in examples)]
  arrays = {key: np.stack([x[key] for x in examples]) for key in examples[0] if key not in texts}
  return {**arrays, **{key: [x.get(key, "") for x in examples] for key in texts}}
