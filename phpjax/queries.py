"""What the unprompted encoders say of every clip, kept for the methods that ask: once per run and clip, not in every step.

Only where a clip is the same whenever it is read: at evaluation, and while a task learns whose clips are not mirrored. Else,
and where there is no room left, the step runs the encoders itself (`model._query`). The pass over a split is always the same,
in the order of the data and in evaluation batches, so that a run that goes on after a stop finds the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flax.struct
import jax
import numpy as np

from phpjax import distributed, sharding
from phpjax.run import Run
from phpjax.signals import Stopped

Tree = dict[str, Any]


@flax.struct.dataclass
class Query:
  """All that a method may read of the unprompted features: pooled float32 [B * T, E]."""

  pooled: jax.Array | np.ndarray


def added(run: Run, name: str, split: str, batches: Iterator[Tree], *, fixed: bool = True) -> Iterator[Tree]:
  """Batches of a split, with "query" {modality: Query} where the method asks; `fixed` is False for clips that change.

  Raises Stopped and DataError, as reading the split does.
  """
  if not (run.experiment.method.needs_query and fixed):
    return batches
  if (name, split) not in run.queries:
    run.queries[name, split] = _ask(run, name, split) if _fits(run, name, split) else {}
  held = run.queries[name, split]
  return ({**batch, "query": _rows(held, batch["id"])} for batch in batches) if held else batches


def _fits(run: Run, name: str, split: str) -> bool:
  """Whether the features of a split fit into `data.query_cache_gb`, behind those of all splits before it in the run's order.

  A matter of the config and the data alone: what fits is the same on all processes, and in a run that goes on after a stop.
  """
  planned, limit = 0, run.config.data.query_cache_gb * 1e9
  for each in run.names:
    for one in run.used_splits(each):
      planned += _num_bytes(run, each, one)
      if (each, one) == (name, split) or planned > limit:
        return planned <= limit
  return False


def _num_bytes(run: Run, name: str, split: str) -> int:
  """Of the features of a split: one row for each second of a clip."""
  source = run.source(name, split)
  numbers = sum(
    len(source[0][m]) * module.embed_dim for m, module in run.experiment.modules.items() if m in ("visual", "audio")
  )
  return len(source) * numbers * np.dtype(np.float32).itemsize


def _ask(run: Run, name: str, split: str) -> Tree:
  """{clip id: {modality: float32 [T, E]}} of all clips, on every process; "" is the id of rows that pad, zeros.

  Empty where one id stands for clips that differ.
  """
  task, frozen, held = run.experiment.tasks[name], {"encoders": run.params["encoders"]}, {}
  for batch in run.batches(name, split, batch_size=run.config.eval_batch_size, shuffle=False):
    if run.should_stop():
      raise Stopped
    rows = sharding.put_batch(batch, run.mesh, tuple(k for k in (*run.experiment.encoders, "mask") if k in batch))
    found = run.steps.encode(task, False, {}, {}, frozen, None, rows)
    pooled = jax.device_get(sharding.all_rows({m: f.pooled for m, f in found.items()}, run.mesh))
    [whole] = distributed.gather([{"id": np.array(batch["id"])}])
    ids = whole["id"].tolist()
    by_clip = {m: x.reshape(len(ids), -1, x.shape[-1]) for m, x in pooled.items()}
    for row, key in enumerate(ids):
      clip = {m: x[row] for m, x in by_clip.items()}
      held.setdefault("", jax.tree.map(np.zeros_like, clip))
      if key and key in held and not all(np.allclose(held[key][m], x, rtol=1e-4, atol=1e-4) for m, x in clip.items()):
        return {}
      held.setdefault(key, clip)
  return held


def _rows(held: Tree, ids: list[str]) -> Tree:
  """{modality: Query} of a batch's clips, second after second."""
  return {m: Query(np.concatenate([held[key][m] for key in ids])) for m in held[""]}
