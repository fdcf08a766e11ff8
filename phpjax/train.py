"""Learns one task after another and evaluates all tasks seen so far; a run that stopped goes on where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from data_pipelines import DataError
from phpjax import checks, distributed, nonfinite, optimizer, partition, queries, results, resume, routing, sharding, workdir
from phpjax.errors import UserError
from phpjax.fisher import squared_gradients
from phpjax.logs import MetricsLog
from phpjax.methods import TrainingClips
from phpjax.opening import open_run
from phpjax.run import Run, add_task, anchor_of, begin, return_freed_memory
from phpjax.scoring import choose, evaluate_seen
from phpjax.signals import BOTH, Stopped

Tree = dict[str, Any]


def train_and_evaluate(config: ConfigDict, folder: pathlib.Path) -> Tree:
  """Runs, or continues, the whole sequence; returns results.json's content. Raises UserError and Stopped."""
  with open_run(config, folder) as run:
    found = resume.restore(run)
    if found and run.position.task == len(run.names) and (folder / workdir.RESULTS).is_file():
      run.progress.note(
        f"--workdir={folder} is finished: see {folder / workdir.RESULTS}, or evaluate it again (--mode=evaluate)"
      )
      return workdir.read_json(folder / workdir.RESULTS)
    workdir.update(folder, run.config, primary=distributed.is_primary())
    run.log = MetricsLog(run.folder, resume_step=run.position.step, primary=distributed.is_primary())
    announce(run, found)
    with stop_on_signal(run):
      learn_all(run)
    return results.finish(run)


def learn_all(run: Run) -> None:
  """All tasks that are left; when it returns, all of them are saved, on all processes."""
  for index in range(run.position.task, len(run.names)):
    if run.names[index] not in run.learned:
      (learn if run.num_epochs(run.stage(index)) else look)(run, index)
    with saved_if_stopped(run):
      evaluate_seen(run, index, on_scored=lambda: resume.save(run))
    run.position = dataclasses.replace(run.position, task=index + 1, epoch=0, batch=0)
    resume.save(run)
  run.checkpoints.wait()
  if run.should_stop():
    raise Stopped
  distributed.wait_for_all()  # process 0 has sealed the last checkpoint: from here on a signal may end them all at once


@contextlib.contextmanager
def stop_on_signal(run: Run) -> Iterator[None]:
  """SIGTERM or SIGINT asks the run to save after the current step; a second one stops at once. For the time in which there is
  something to save: see phpjax/signals.py for the rest of it.

  With several processes it asks them all, and `Run.should_stop` says which step is the last.
  """

  def ask(number: int, frame: Any) -> None:
    del frame
    for each in BOTH:
      signal.signal(each, signal.SIG_DFL)
    if jax.process_count() > 1:
      return distributed.ask_to_stop(signal.Signals(number).name)
    run.stop = True
    run.progress.note(f"{signal.Signals(number).name}: saving after this step; the same command continues")

  try:
    old = {number: signal.signal(number, ask) for number in BOTH}
  except ValueError:  # not the main thread (a notebook's worker, a test): signals stay with their owner
    old = {}
  try:
    yield
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


def announce(run: Run, found: bool) -> None:
  """Says where a continued run goes on, and starts the bar over all tasks."""
  at, costs = run.position, [run.num_steps(name) * run.seconds(name) for name in run.stages]
  done = sum(costs[: len(run.learned)])
  if run.live:
    done += run.done_steps() * run.seconds(run.stage(at.task))
  if found and at.task < len(run.names):
    doing = "its training clips"  # that end it, or are all that it has
    if at.epoch < run.num_epochs(run.stage(at.task)):
      doing = f"epoch {at.epoch + 1}, step {at.step + 1}"
    doing = "evaluation" if run.names[at.task] in run.learned else doing
    run.progress.note(f"continuing at task {at.task + 1}/{len(run.names)}, {doing}")
  for note in (*checks.notes(run.config), *run.experiment.method.notes(run.experiment.tasks)):
    run.progress.note(note)
  run.progress.start(sum(costs), done)


def evaluate_again(config: ConfigDict, folder: pathlib.Path) -> Tree:
  """Evaluates every task that the workdir's newest checkpoint has learned; writes evaluation.json."""
  if not (folder / workdir.CONFIG).is_file():
    raise UserError(f"--workdir={folder} holds no run: train first (--mode=train)")
  with open_run(config, folder) as run:
    if not resume.restore(run) or not (learned := len(run.learned)):
      raise UserError(f"--workdir={folder} has no learned task to evaluate: train first (--mode=train)")
    keep = lambda trees: {
      **trees,
      "tasks": {name: trees["tasks"][name] for name in run.learned},
    }  # not one that is half learned
    run.params, run.state = keep(run.params), keep(run.state)
    # All that is scored now: other clips may be there, or left out, than when the run trained.
    run.history = {**run.history, "per_task": [], "drift": [], "trivial": {}, "evaluated": {}}
    evaluate_seen(run, learned - 1)
    stopped_in = None if run.live is None else {"task": run.names[learned], "step": run.position.step}
    shown = {"tasks": run.names[:learned], "stopped_in": stopped_in, "model_selection": results.selection(run)}
    found = {**shown, **{key: run.history[key] for key in ("per_task", "trivial", "evaluated")}}
    if distributed.is_primary():
      workdir.write_json(folder / "evaluation.json", found)
    return run.history


@contextlib.contextmanager
def saved_if_stopped(run: Run, *, again: bool = True) -> Iterator[None]:
  """What was done before a signal, a clip that cannot be read or a step that is not finite is not lost.

  again: False where everything that counts is saved already, and what is done since is begun again.
  """
  try:
    yield
  except (DataError, nonfinite.StepRefused, Stopped) as error:
    if isinstance(error, DataError) and jax.process_count() > 1:
      raise DataError(  # the other processes have no such error and would not save with this one
        f"{error}; one of several processes met it, so what came after the newest checkpoint is not saved: the same command "
        "continues there"
      ) from error
    if again:
      resume.save(run)
    run.checkpoints.wait()
    if isinstance(error, DataError) and run.stop:  # a decoding process that the same signal has ended
      raise Stopped from error
    if not isinstance(error, DataError):
      distributed.wait_for_all()  # process 0 seals what is saved: none may end the others before
    raise


def learn(run: Run, index: int) -> None:
  """Trains one stage from where the run is, with a checkpoint after every epoch, and one that stays when it is learned."""
  name, config = run.stage(index), run.config
  if run.live is None:
    begin(run, name)
  num_epochs = run.num_epochs(name)
  run.progress.task(name, index, len(run.stages), run.num_steps(name), run.done_steps(), cost=run.seconds(name))
  inputs = run.train_inputs(name)
  for epoch in range(run.position.epoch, num_epochs):
    scale = optimizer.lr_scale(epoch, num_epochs, config.opt.min_scale, config.opt.later_shared_scale if index else 1.0)
    with saved_if_stopped(run):
      train_epoch(run, name, epoch, inputs, scale)
      choose(run, epoch)
    run.position = dataclasses.replace(run.position, epoch=epoch + 1, batch=0)
    resume.save(run)  # behind the last epoch too: what ends a task may run over all of its clips
  with saved_if_stopped(run, again=False):
    finish_task(run, name, functools.partial(heard_features, run))


def look(run: Run, index: int) -> None:
  """A task on which the method takes no gradient steps: at most one pass over its clips, begun again if it was cut."""
  name = run.names[index]
  if name not in run.params["tasks"]:
    add_task(run, name)
  run.progress.task(name, index, len(run.names), run.num_steps(name), cost=run.seconds(name), unit="batches")
  with saved_if_stopped(run, again=False):
    finish_task(run, name, functools.partial(told_features, run))


def heard_features(run: Run, name: str, prompted: bool) -> Iterator[tuple[Tree, Tree]]:
  """`queries.features` that stops between two batches."""
  for found in queries.features(run, name, prompted):
    yield found
    if run.should_stop():
      raise Stopped


def told_features(run: Run, name: str, prompted: bool) -> Iterator[tuple[Tree, Tree]]:
  """The same that tells how far it is."""
  asked = time.monotonic()
  for done, (features, batch) in enumerate(heard_features(run, name, prompted), start=1):
    yield features, batch
    run.progress.batch(done, float(batch["mask"].sum()) / max(time.monotonic() - asked, 1e-9))
    asked = time.monotonic()


def finish_task(run: Run, name: str, features: Callable[[str, bool], Iterator[tuple[Tree, Tree]]]) -> None:
  """The epoch that counts becomes the stage's, the method has its last word, and all of it is written for good.

  `features` is `queries.features`, or what tells of it. Raises RuntimeError, of which nothing is written, when the method has
  changed what is not a task's own: a programmer's error.
  """
  if run.best is not None:
    resume.put_best(run)
  run.absorb()
  run.live, run.best = None, None
  method = run.experiment.method
  for task in run.members(name):
    before = partition.settled(run.params, run.state, task)
    clips = TrainingClips(functools.partial(features, task), functools.partial(squared_gradients, run, task))
    run.params, run.state = method.end_task(run.params, run.state, run.experiment.tasks[task], clips)
    if changed := partition.replaced(before, partition.settled(run.params, run.state, task)):
      raise RuntimeError(
        f"{type(method).__name__}.end_task, after {task}, replaced what it must leave as it is: {', '.join(changed[:5])}"
      )
    remember_looks(run, task, features)
  run.state = sharding.put_replicated(run.state, run.mesh)  # where the steps want it: elsewhere, it would be another compile
  run.anchors |= {task: anchor_of(run, task) for task in run.members(name)}
  resume.save(run, learned=run.members(name))


def remember_looks(run: Run, name: str, features: Callable[[str, bool], Iterator[tuple[Tree, Tree]]]) -> None:
  """Where tasks are inferred: what the clips of this one look like to the frozen encoders."""
  if "centroids" not in run.state["tasks"][name]:
    return
  real = lambda features, batch: routing.vectors(features, len(batch["mask"]))[np.asarray(batch["mask"]) > 0]
  rows = np.concatenate([real(found, batch) for found, batch in features(name, False)])
  looks = sharding.put_replicated(routing.looks(rows, routing.metric_of(run.config)), run.mesh)
  own = {**run.state["tasks"][name], **looks}
  run.state = {**run.state, "tasks": {**run.state["tasks"], name: own}}


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
  task, key, pending = run.task(name), run.experiment.key("train", name), None
  always = go = sharding.put_replicated(np.bool_(True), run.mesh)
  batches = run.batches(name, "train", batch_size=run.config.batch_size, shuffle=True, epoch=epoch, start=run.position.batch)
  batches = queries.added(run, name, "train", batches, fixed=name not in run.config.data.mirrored)
  ahead = sharding.put_ahead(batches, run.mesh, task.device_keys)
  run.reported = time.monotonic()
  while not run.should_stop():
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
    if run.position.step % run.config.save_every_steps == 0:
      report(run, name, epoch, scale, pending)
      pending = None
      resume.save(run)
  if pending:
    report(run, name, epoch, scale, pending)
  if run.stop:
    raise Stopped


def report(run: Run, name: str, epoch: int, scale: Tree, done: Dispatched) -> None:
  """Shows and logs one step; stops where its loss or gradient is not finite, or where the workdir is another run's by now."""
  metrics, config = jax.device_get(done.metrics), run.config
  if run.held is not None:
    run.held.check()
  run.checkpoints.check()
  losses = {k: float(v) for k, v in metrics["losses"].items()}
  if not metrics["finite"]:
    refused(run, name, epoch, done, metrics)
  now = time.monotonic()
  rate, run.reported = float(done.batch["mask"].sum()) * jax.process_count() / max(now - run.reported, 1e-9), now
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
