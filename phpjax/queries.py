"""What the unprompted encoders say of every clip, kept for those that ask: once per run and clip, not in every step.

Pool methods ask what to choose prompts by, an inferred task is found by it, and a method that never prompts needs nothing else.
Kept are pooled features, or for the last all features, only where a clip is the same whenever it is read: at evaluation, and
while a task learns whose clips are not mirrored. Else, and where there is no room left, the encoders run in the step. The pass
over a split is always the same, in the order of the data and in evaluation batches, so that a run that goes on after a stop
finds the same bits. With `data.query_cache`, a folder, runs on one machine share it (phpjax/query_files.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flax.struct
import jax
import numpy as np

from phpjax import distributed, model, query_files, sharding
from phpjax.run import Run
from phpjax.signals import Stopped

Tree = dict[str, Any]
QUERY, FEATURES = "query", "features"  # pooled or all, the key of a batch that holds them
TOWERS = ("visual", "audio")  # a clip's; its texts differ from row to row and are read by the step


@flax.struct.dataclass
class Query:
  """All that a method may read of the unprompted features: pooled float32 [B * T, E]."""

  pooled: jax.Array | np.ndarray


def level(run: Run, *, infer: bool = False) -> str | None:
  """FEATURES where the method never prompts, QUERY where it chooses by them (or `infer`: the trainer does), else None."""
  if run.experiment.method.frozen:
    return FEATURES
  return QUERY if run.experiment.method.needs_query or (infer and run.config.task_id == "inferred") else None


def added(
  run: Run, name: str, split: str, batches: Iterator[Tree], *, fixed: bool = True, infer: bool = False
) -> Iterator[Tree]:
  """Batches of a split, with {modality: Query or Features} under QUERY or FEATURES where somebody asks.

  Args:
    run: at work.
    name: of the task.
    split: of its data.
    batches: of its clips.
    fixed: False for clips that change.
    infer: the task of the clips may have to be found.

  Raises Stopped and DataError, as reading the split does.
  """
  held = _held(run, name, split) if fixed and level(run, infer=infer) else {}
  return ({**batch, level(run, infer=infer): _rows(held, batch["id"])} for batch in batches) if held else batches


def features(run: Run, name: str, prompted: bool) -> Iterator[tuple[Tree, Tree]]:
  """({modality: Features}, batch) over a task's training clips in their order, evaluation mode; all rows on every process.

  Unprompted and kept ones are Query where no more than that is kept.
  """
  held = {} if prompted or not level(run, infer=True) else _held(run, name, "train")
  for batch in run.batches(name, "train", batch_size=run.config.eval_batch_size, shuffle=False):
    found = None if held else _encoded(run, name, prompted, batch)
    [whole] = distributed.gather([{**batch, "id": np.array(batch["id"])}])
    whole = {**whole, "id": whole["id"].tolist()}
    yield _rows(held, whole["id"]) if held else found, whole


def _encoded(run: Run, name: str, prompted: bool, batch: Tree) -> Tree:
  """{modality: Features} of a batch, all rows on every process."""
  rows = sharding.put_batch(batch, run.mesh, tuple(k for k in (*run.experiment.encoders, "mask") if k in batch))
  inputs = ({}, {}, {"encoders": run.params["encoders"]}, None)  # what the empty method reads
  if prompted:
    trainable, frozen = run.parts(name)
    inputs = (trainable, run.state_of(name), frozen, run.past(name))
  found = run.steps.encode(run.experiment.tasks[name], prompted, *inputs, rows)
  return sharding.all_rows(found, run.mesh)


# -- what is kept --------------------------------------------------------------------------------------------------


def _held(run: Run, name: str, split: str) -> Tree:
  """{clip id: {modality: Query or Features of its seconds}} of a split, on the host; empty where nothing is kept."""
  if (name, split) not in run.queries:
    run.queries[name, split] = _ask(run, name, split) if _fits(run, name, split) else {}
  return run.queries[name, split]


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
  """Of the features of a split."""
  source = run.source(name, split)
  return len(source) * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(_shapes(run, source)))


def _shapes(run: Run, source: Any) -> Tree:
  """{modality: Query or Features} of one clip of a split, shapes and dtypes."""
  clip = {m: jax.ShapeDtypeStruct((1, *source[0][m].shape), source[0][m].dtype) for m in TOWERS if m in run.experiment.encoders}
  if (key := tuple((m, x.shape) for m, x in clip.items())) in run.query_shapes:
    return run.query_shapes[key]  # tracing the encoders takes a second
  task, method = next(iter(run.experiment.tasks.values())), run.experiment.method.empty()
  encode = lambda encoders, clip: model.forward(
    run.experiment.modules, method, task, {}, {"encoders": encoders}, {}, None, clip, rng=None, train=False
  )[0]
  run.query_shapes[key] = _kept(run, jax.eval_shape(encode, run.params["encoders"], clip))
  return run.query_shapes[key]


def _kept(run: Run, found: Tree) -> Tree:
  """Of {modality: Features} what the run keeps."""
  chosen = {m: found[m] for m in TOWERS if m in found}
  return chosen if run.experiment.method.frozen else {m: Query(f.pooled) for m, f in chosen.items()}


def _ask(run: Run, name: str, split: str) -> Tree:
  """As `_held`, of all clips, on every process; "" is the id of rows that pad, zeros. Empty where one id stands for clips that
  differ."""
  file = query_files.path(run, name, split, run.experiment.method.frozen)
  if file is not None and (found := query_files.read(file, _shapes(run, run.source(name, split)))):
    return found
  held: Tree = {}
  for batch in run.batches(name, split, batch_size=run.config.eval_batch_size, shuffle=False):
    if run.should_stop():
      raise Stopped
    found = jax.device_get(_kept(run, _encoded(run, name, False, {k: batch[k] for k in (*TOWERS, "mask") if k in batch})))
    [whole] = distributed.gather([{"id": np.array(batch["id"])}])
    ids = whole["id"].tolist()
    by_clip = jax.tree.map(lambda x: x.reshape(len(ids), -1, *x.shape[1:]), found)  # noqa: B023
    for row, key in enumerate(ids):
      clip = jax.tree.map(lambda x: np.asarray(x[row]), by_clip)  # noqa: B023
      held.setdefault("", jax.tree.map(np.zeros_like, clip))
      if key and key in held and not _same(held[key], clip):
        return {}
      held.setdefault(key, clip)
  if file is not None:
    query_files.write(file, held, run.progress.note)
  return held


def _same(one: Tree, other: Tree) -> bool:
  """Whether two clips' pooled features are equal but for rounding."""
  return all(np.allclose(one[m].pooled, other[m].pooled, rtol=1e-4, atol=1e-4) for m in one)


def _rows(held: Tree, ids: list[str]) -> Tree:
  """{modality: Query or Features} of a batch's clips, second after second."""
  return jax.tree.map(lambda *clips: np.concatenate(clips), *(held[key] for key in ids))
