"""Learns one task after another and evaluates all tasks seen so far; a run that stopped goes on where it was."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from data_pipelines import DataError
from phpjax import drift, evaluate, nonfinite, optimizer, results, sharding, workdir
from phpjax.benchmarks import BENCHMARKS
from phpjax.errors import UserError
from phpjax.logs import MetricsLog
from phpjax.run import Run, Stopped, anchor_of, begin, open_run, restore, return_freed_memory, stop_on_signal

Tree = dict[str, Any]


def train_and_evaluate(config: ConfigDict, folder: pathlib.Path) -> Tree:
  """Runs, or continues, the whole sequence; returns results.json's content. Raises UserError and Stopped."""
  with open_run(config, folder) as run, stop_on_signal(run):
    found = restore(run)
    run.log = MetricsLog(run.folder, resume_step=run.position.step, primary=jax.process_index() == 0)
    if found:
      if run.position.task == len(run.names) and (folder / workdir.RESULTS).is_file():
        run.progress.note(
          f"--workdir={folder} is finished: see {folder / workdir.RESULTS}, or evaluate it again (--mode=evaluate)"
        )
        return workdir.read_json(folder / workdir.RESULTS)
      at = run.position
      run.progress.note(f"continuing at task {at.task + 1}/{len(run.names)}, epoch {at.epoch + 1}, step {at.step + 1}")
    at, costs = run.position, [run.num_batches(name) * run.num_epochs(name) * run.seconds(name) for name in run.names]
    begun = run.done_steps() * run.seconds(run.names[at.task]) if run.live else 0
    run.progress.start(sum(costs), sum(costs[: at.task]) + begun)
    for index in range(run.position.task, len(run.names)):
      learn(run, index)
      evaluate_seen(run, index)
      run.live = None
      run.position = dataclasses.replace(run.position, task=index + 1, epoch=0, batch=0)
      run.save()
    run.checkpoints.wait()
    return results.finish(run)


def evaluate_again(config: ConfigDict, folder: pathlib.Path) -> Tree:
  """Evaluates every task that the workdir's newest checkpoint has learned; writes evaluation.json."""
  if not (folder / workdir.CONFIG).is_file():
    raise UserError(f"--workdir={folder} holds no run: train first (--mode=train)")
  with open_run(config, folder) as run:
    if not restore(run) or not (learned := run.position.task):
      raise UserError(f"--workdir={folder} has no learned task to evaluate: train first (--mode=train)")
    # All that is scored now: other clips may be there, or left out, than when the run trained.
    run.history = {**run.history, "per_task": [], "drift": [], "trivial": {}, "evaluated": {}}
    evaluate_seen(run, learned - 1)
    stopped_in = None if run.live is None else {"task": run.names[learned], "step": run.position.step}
    shown = {"tasks": run.names[:learned], "stopped_in": stopped_in, "model_selection": results.SELECTION}
    found = {**shown, **{key: run.history[key] for key in ("per_task", "trivial", "evaluated")}}
    workdir.write_json(folder / "evaluation.json", found)
    return run.history


def learn(run: Run, index: int) -> None:
  """Trains one task from where the run is, with a checkpoint after every epoch."""
  name, config = run.names[index], run.config
  if run.live is None:
    begin(run, name)
  per_epoch, num_epochs, position = run.num_batches(name), run.num_epochs(name), run.position
  run.progress.task(name, index, len(run.names), per_epoch * num_epochs, run.done_steps(), cost=run.seconds(name))
  inputs = run.train_inputs(name)
  for epoch in range(position.epoch, num_epochs):
    scale = optimizer.lr_scale(epoch, num_epochs, config.opt.min_scale, config.opt.later_shared_scale if index else 1.0)
    try:
      train_epoch(run, name, epoch, inputs, scale)
    except (DataError, nonfinite.StepRefused):  # a clip that cannot be read, or a bad step: those before it are not lost
      run.save()
      run.checkpoints.wait()
      raise
    if not run.stop:
      run.position = dataclasses.replace(run.position, epoch=epoch + 1, batch=0)
    run.save()
    if run.stop:
      run.checkpoints.wait()
      raise Stopped
  run.absorb()
  run.params, run.state = run.experiment.method.end_task(
    run.params, run.state, run.experiment.tasks[name], functools.partial(run.features, name)
  )
  run.anchors[name] = anchor_of(run, name)


@dataclasses.dataclass(frozen=True)
class Dispatched:
  """A step whose numbers are still on the device.

  Attributes:
    step: of the whole run; index: of the task; both count this one.
    metrics: loss, losses, grad_norm, finite.
    batch: its batch, on the host.
    waited_s: seconds the host waited for it to be decoded.
  """

  step: int
  index: int
  metrics: Tree
  batch: Tree
  waited_s: float


def train_epoch(run: Run, name: str, epoch: int, inputs: tuple[Tree, Tree | None, Tree], scale: Tree) -> None:
  """The rest of one epoch. Numbers of a step are fetched after the next one is dispatched, and all of them before it returns.

  Raises nonfinite.StepRefused with the run as it was before the step that is refused, though the next one was dispatched too.
  """
  task, key, pending = run.experiment.tasks[name], run.experiment.key("train", name), None
  always = go = sharding.put_replicated(np.bool_(True), run.mesh)
  batches = run.batches(name, "train", batch_size=run.config.batch_size, shuffle=True, epoch=epoch, start=run.position.batch)
  ahead = sharding.put_ahead(batches, run.mesh, task.device_keys)
  run.reported = time.monotonic()
  while not run.stop:
    try:
      found = next(ahead, None)
    except DataError:
      if pending:
        report(run, name, epoch, scale, pending)
      raise
    if found is None:
      break
    batch, rows, waited_s = found
    rng = jax.random.fold_in(key, run.position.step)
    run.live, metrics = run.steps.train(task, run.live, *inputs, rows, rng, scale, go)
    go = metrics["finite"] if run.config.on_nonfinite == "stop" else always
    run.position = dataclasses.replace(run.position, step=run.position.step + 1, batch=run.position.batch + 1)
    if pending:
      report(run, name, epoch, scale, pending)
    else:
      return_freed_memory()
    pending = Dispatched(run.position.step, run.done_steps(), metrics, batch, waited_s)
  if pending:
    report(run, name, epoch, scale, pending)


def report(run: Run, name: str, epoch: int, scale: Tree, done: Dispatched) -> None:
  """Shows and logs one step; stops where its loss or gradient is not finite, or where the workdir is another run's by now."""
  metrics, config = jax.device_get(done.metrics), run.config
  if run.held is not None:
    run.held.check()
  losses = {k: float(v) for k, v in metrics["losses"].items()}
  if not metrics["finite"]:
    refused(run, name, epoch, done, metrics)
  now = time.monotonic()
  rate, run.reported = float(done.batch["mask"].sum()) / max(now - run.reported, 1e-9), now
  run.progress.step(epoch, run.num_epochs(name), done.index, float(metrics["loss"]), rate)
  if done.step % config.log_every_steps == 0:
    factor = {"shared": scale["shared"], "prompts": scale["task"], "head": scale["task"]}
    lr = {label: config.opt[label].lr * factor[label] for label in factor}
    run.log.step(
      done.step,
      task=name,
      epoch=epoch,
      loss=float(metrics["loss"]),
      losses=losses,
      lr=lr,
      examples_per_s=rate,
      data_wait_s=done.waited_s,
    )


def refused(run: Run, name: str, epoch: int, done: Dispatched, metrics: Tree) -> None:
  """Writes down and counts a step that was not applied; or raises, with the run put back to where it was before the step."""
  found = nonfinite.record(
    step=done.step, task=name, epoch=epoch, batch=done.batch, metrics=metrics, trainable=run.live.trainable
  )
  path = nonfinite.write(run.folder, found, jax.process_index())
  error = nonfinite.refuse(found, path)
  if run.config.on_nonfinite == "skip" and isinstance(error, nonfinite.StepRefused):
    run.history["skipped"] += 1
    run.progress.note(f"step {done.step} of task {name} is left out: loss or gradient is not finite; see {path}")
    return
  undone = run.position.step - (done.step - 1)  # this step, and the one dispatched behind it, which changed nothing either
  run.position = dataclasses.replace(run.position, step=run.position.step - undone, batch=run.position.batch - undone)
  raise error


def score(run: Run, name: str, split: str, predict: Callable[[Tree], Tree]) -> tuple[dict[str, float], int]:
  """(every score of a task on a split, the number of rows scored); raises DataError where that is 0, as when all are bad."""
  benchmark, total, scored = BENCHMARKS[name], run.num_batches(name, split), 0

  def summarise(parts: Sequence[Tree]) -> dict[str, float]:
    nonlocal scored
    scored = sum(len(next(iter(part.values()))) for part in parts)
    if not scored:
      hint = ": --config.data.on_bad_clip=error says why" if run.config.data.on_bad_clip == "skip" else ""
      raise DataError(f"no clip of {name} {split} can be scored{hint}")
    return benchmark.summarise(parts)

  scores = evaluate.evaluate(
    predict,
    run.batches(name, split, batch_size=run.config.eval_batch_size, shuffle=False),
    benchmark.statistics,
    summarise,
    on_batch=lambda done: run.progress.evaluation(f"{name} {split}", done, total),
  )
  return scores, scored


def evaluate_seen(run: Run, index: int) -> None:
  """Every task learned so far, on every evaluation split that its data has: one more row of the accuracy matrix."""
  main: dict[str, dict[str, float]] = {split: {} for split in run.evaluation_splits}
  for name in run.names[: index + 1]:
    predict = run.predictor(name)
    for split in (s for s in run.used_splits(name) if s in main):
      scores, scored = score(run, name, split, predict)
      main[split][name] = scores[BENCHMARKS[name].main]
      run.history["per_task"].append({"after": run.names[index], "task": name, "split": split, "scores": scores})
      run.log.evaluation(run.position.step, name, scores, split=split)
      run.progress.note(results.statement(run, name, split, scores, scored))
    return_freed_memory()
  run.history["matrix"] = evaluate.add_row(run.history["matrix"], main[run.evaluation_splits[0]], run.names, index)
  run.history["drift"] += drift.record(run.anchors, run.params["shared"], run.history["matrix"], run.names, index)
  if len(main.get("unseen", ())) == index + 1:
    run.history["unseen"] = evaluate.add_row(run.history["unseen"], main["unseen"], run.names, index)
  metrics = {name: BENCHMARKS[name].main for name in run.names}
  title = f"accuracy matrix on {run.evaluation_splits[0]}, percent; model: {results.SELECTION}"
  run.progress.matrix(run.names, run.history["matrix"], metrics, title=title)
  if len(run.history["unseen"]) == index + 1:
    run.progress.matrix(run.names, run.history["unseen"], metrics, title="the same on unseen objects, percent")
