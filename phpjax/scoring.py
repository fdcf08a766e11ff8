"""Scores a run: every task learned so far, and on validation the epoch of a task that counts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from data_pipelines import DataError
from phpjax import distributed, drift, evaluate, queries, results
from phpjax.answers import ORACLE, ROUTED
from phpjax.benchmarks import BENCHMARKS, Benchmark
from phpjax.metrics import rows
from phpjax.run import Best, Run, return_freed_memory
from phpjax.signals import Stopped

Tree = dict[str, Any]


def score(run: Run, name: str, split: str, *, title: str = "", infer: bool = True) -> dict[str, float]:
  """Every score of a task on a split, told in a line that begins with `title`.

  Where tasks are inferred (and `infer`): `routing_accuracy`, the share of clips whose task was found, and as `oracle_...` what
  the main score would be if the task were given.

  Raises:
    DataError: no row can be scored, as when all clips are bad.
    Stopped: a signal came; nothing of this evaluation is kept.
  """
  benchmark, total, scored = BENCHMARKS[name], run.num_batches(name, split), 0

  def on_batch(done: int) -> None:
    if done:
      run.progress.evaluation(f"{name} {split}", done, total)
    if done < total and run.should_stop():
      raise Stopped

  on_batch(0)

  def summarise(parts: Sequence[Tree]) -> dict[str, float]:
    nonlocal scored
    parts = distributed.gather(parts)
    scored = sum(len(next(iter(part.values()))) for part in parts)
    if not scored:
      hint = ": --config.data.on_bad_clip=error says why" if run.config.data.on_bad_clip == "skip" else ""
      raise DataError(f"no clip of {name} {split} can be scored{hint}")
    return summary(benchmark, parts)

  scores = evaluate.evaluate(
    run.predictor(name, infer=infer),
    queries.added(
      run, name, split, run.batches(name, split, batch_size=run.config.eval_batch_size, shuffle=False), infer=infer
    ),
    functools.partial(statistics, benchmark),
    summarise,
    on_batch=on_batch,
  )
  run.progress.note(title + results.statement(run, name, split, scores, scored))
  return scores


def statistics(benchmark: Benchmark, outputs: Tree, batch: Tree) -> Tree:
  """What the benchmark's metric needs of a batch; where the task was inferred, the same under `oracle/` with the task given."""
  plain = {key: x for key, x in outputs.items() if key != ROUTED and not key.startswith(ORACLE)}
  found = benchmark.statistics(plain, batch)
  if ROUTED not in outputs:
    return found
  given = benchmark.statistics({key.removeprefix(ORACLE): x for key, x in outputs.items() if key.startswith(ORACLE)}, batch)
  (routed,) = rows.keep(batch["mask"], outputs[ROUTED])
  return {**found, ROUTED: routed, **{f"{ORACLE}{key}": x for key, x in given.items()}}


def summary(benchmark: Benchmark, parts: Sequence[Tree]) -> dict[str, float]:
  """Statistics of all batches -> every score; see `score`."""
  pick = lambda chosen: [{k.removeprefix(ORACLE): x for k, x in part.items() if chosen(k)} for part in parts]
  scores = benchmark.summarise(pick(lambda k: k != ROUTED and not k.startswith(ORACLE)))
  if ROUTED not in parts[0]:
    return scores
  oracle = benchmark.summarise(pick(lambda k: k.startswith(ORACLE)))[benchmark.main]
  found = rows.mean(np.concatenate([part[ROUTED] for part in parts]))
  return {**scores, "routing_accuracy": found, f"oracle_{benchmark.main}": oracle}


def choose(run: Run, epoch: int) -> None:
  """Scores the current stage on validation after an epoch, and keeps the epoch if none before was better.

  What counts is the mean over the stage's tasks.
  """
  stage, found = run.stage(run.position.task), []
  if run.selection_split(stage) is None:
    return
  run.absorb()
  for name in run.members(stage):
    split = run.selection_split(name)
    scores = score(run, name, split, title=f"epoch {epoch + 1}/{run.num_epochs(name)}, ", infer=False)
    run.log.evaluation(run.position.step, name, scores, split=split)
    found.append(scores[BENCHMARKS[name].main])
  value = sum(found) / len(found)
  for name in run.members(stage):
    run.history["validation"][name] = [*run.history["validation"].get(name, ()), value]
  if run.best is None or value >= run.best.score:
    run.best = Best(value, epoch, *jax.device_get((run.live.trainable, run.live.state)))


def evaluate_seen(run: Run, index: int, *, on_scored: Callable[[], None] = lambda: None) -> None:
  """Every task learned so far, on every evaluation split that its data has: one more row of the accuracy matrix.

  What a run that was stopped here has scored already is not scored again, nor what the same model has. Raises as `score`.

  Args:
    run: at work.
    index: of the task that was learned last.
    on_scored: called when all splits of a task are scored, but for the last task: then the row is whole.
  """
  after, main = run.names[index], {split: {} for split in run.evaluation_splits}
  rows = [
    row for row in run.history["per_task"] if row["after"] == after or run.experiment.method.joint
  ]  # one model for all rows
  known = {(row["task"], row["split"]): row["scores"] for row in rows}
  told = {(row["task"], row["split"]) for row in rows if row["after"] == after}
  for name in run.names[: index + 1]:
    new = False
    for split in (s for s in run.used_splits(name) if s in main):
      if (scores := known.get((name, split))) is None:
        scores, new = score(run, name, split), True
      if (name, split) not in told:
        run.history["per_task"].append({"after": after, "task": name, "split": split, "scores": scores})
        run.log.evaluation(run.position.step, name, scores, split=split)
      main[split][name] = scores[BENCHMARKS[name].main]
    if new and name != after:
      on_scored()
    return_freed_memory()
  _add_rows(run, index, main)


def _add_rows(run: Run, index: int, main: dict[str, dict[str, float]]) -> None:
  """The accuracy matrix, that of unseen objects where all tasks have some, and drift; shown and kept."""
  split, *_ = run.evaluation_splits
  run.history["matrix"] = evaluate.add_row(run.history["matrix"], main[split], run.names, index)
  run.history["drift"] += drift.record(run.anchors, run.params["shared"], run.history["matrix"], run.names, index)
  if len(main.get("unseen", ())) == index + 1:
    run.history["unseen"] = evaluate.add_row(run.history["unseen"], main["unseen"], run.names, index)
  metrics = {name: BENCHMARKS[name].main for name in run.names}
  title = f"accuracy matrix on {split}, percent; model: {results.selection_of(run)}"
  run.progress.matrix(run.names, run.history["matrix"], metrics, title=title)
  if len(run.history["unseen"]) == index + 1:
    run.progress.matrix(run.names, run.history["unseen"], metrics, title="the same on unseen objects, percent")
