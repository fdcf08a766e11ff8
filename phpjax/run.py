"""A run at work: its objects and where it is; phpjax/opening.py makes one."""

from __future__ import annotations

import ctypes
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines import Dataset, loader
from data_pipelines.base import ClipCache
from phpjax import (
  checkpoint,
  distributed,
  drift,
  experiment,
  lease,
  partition,
  sharding,
  watchdog,
)
from phpjax.answers import Answers
from phpjax.benchmarks import BENCHMARKS
from phpjax.logs import MetricsLog
from phpjax.progress import Progress
from phpjax.steps import Live, Old, Steps

Tree = dict[str, Any]
HISTORY = ("matrix", "unseen", "per_task", "drift")  # of results.json, a row or more for each task


@dataclasses.dataclass
class Best:
  """The epoch of the current task that validation prefers so far: what it scored there, and what had been learned by its end.

  Attributes:
    score: the task's main score on the validation split, in [0, 1].
    epoch: its number, from 0.
    trainable: as in `Live`, on the host.
    state: as in `Live`, on the host.
    saved: the checkpoint that holds the two, 0 until it is written.
  """

  score: float
  epoch: int
  trainable: Tree
  state: Tree
  saved: int = 0


@dataclasses.dataclass
class Position:
  """How far a run is: `batch` batches of `epoch` of task `task` are done, `step` steps in all, `saves` checkpoints."""

  task: int = 0
  epoch: int = 0
  batch: int = 0
  step: int = 0
  saves: int = 0
  seconds: float = 0.0


def new_history() -> Tree:
  """Of HISTORY nothing yet; {task: {split: ...}} of the trivial predictors and of what was evaluated; {task: the scores of its
  epochs on validation}; steps left out."""
  return {**{name: [] for name in HISTORY}, "trivial": {}, "evaluated": {}, "validation": {}, "skipped": 0}


@dataclasses.dataclass
class Run:
  """A run at work."""

  experiment: experiment.Experiment
  datasets: dict[str, Dataset]
  steps: Steps
  mesh: Mesh
  folder: pathlib.Path | None
  checkpoints: checkpoint.Checkpoints | None
  log: MetricsLog
  progress: Progress
  params: Tree
  state: Tree
  data_identity: dict[str, str]
  live: Live | None = None
  best: Best | None = None
  learned: dict[str, int] = dataclasses.field(default_factory=dict)  # finished tasks: the checkpoint that holds each for good
  anchors: Tree = dataclasses.field(default_factory=dict)  # the shared parameters of each learned task at its end
  position: Position = dataclasses.field(default_factory=Position)
  history: Tree = dataclasses.field(default_factory=new_history)
  started: float = dataclasses.field(default_factory=time.monotonic)
  reported: float = 0.0  # when the last step was reported, for the rate
  stop: bool = False
  held: lease.Lease | None = None  # of process 0, on the workdir
  cached_constants: Tree = dataclasses.field(default_factory=dict)
  clips: ClipCache = dataclasses.field(default_factory=ClipCache)
  sources: dict[tuple[str, str], Any] = dataclasses.field(default_factory=dict)
  queries: dict[tuple[str, str], Tree] = dataclasses.field(default_factory=dict)  # see phpjax/queries.py
  query_shapes: dict[Any, Tree] = dataclasses.field(default_factory=dict)  # likewise

  @property
  def config(self) -> ConfigDict:
    return self.experiment.config

  @property
  def names(self) -> list[str]:
    return list(self.experiment.tasks)

  @property
  def stages(self) -> list[str]:
    """What is learned one after another: here the tasks; `JointRun` learns them at once."""
    return self.names

  def stage(self, index: int) -> str:
    """The stage in which the task at a place in `names` is learned."""
    return self.names[index]

  def members(self, stage: str) -> list[str]:
    """The tasks that are learned in a stage."""
    return [stage]

  def task(self, name: str) -> Any:
    """What the steps are told of a stage."""
    return self.experiment.tasks[name]

  @property
  def evaluation_splits(self) -> tuple[str, ...]:
    """See `experiment.evaluation_splits`."""
    return experiment.evaluation_splits(self.config)

  def used_splits(self, name: str) -> list[str]:
    """The splits of a task's data that this run reads."""
    return experiment.used_splits(self.config, name, self.datasets[name])

  def selection_split(self, name: str) -> str | None:
    """See `experiment.selection_split`."""
    return experiment.selection_split(self.config, name, self.datasets[name])

  def source(self, name: str, split: str) -> Any:
    """The examples of a split."""
    if (name, split) not in self.sources:
      self.sources[name, split] = self._source(name, split)
    return self.sources[name, split]

  def _source(self, name: str, split: str) -> Any:
    config = self.config.data
    source = self.datasets[name].examples(split, self.experiment.media, on_bad_clip=config.on_bad_clip, cache=self.clips)
    return BENCHMARKS[name].view(source, split, config)

  def batches(
    self, name: str, split: str, *, batch_size: int, shuffle: bool, epoch: int = 0, start: int = 0, workers: bool = True
  ) -> Iterator[Tree]:
    """This process's batches of one epoch; shuffled ones are for training, and mirrored if the config says so."""
    found = loader.batches(
      self.source(name, split),
      batch_size=batch_size,
      seed=self.config.seed,
      shuffle=shuffle,
      epoch=epoch,
      start=start,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      num_threads=self.config.data.num_threads,
      num_workers=self.config.data.num_workers if workers else 0,
      augment=BENCHMARKS[name].augmentation() if shuffle and name in self.config.data.mirrored else None,
    )
    return watchdog.beating(found, self.progress.beat)

  def num_epochs(self, name: str) -> int:
    """See `experiment.num_epochs`."""
    return experiment.num_epochs(self.config, name)

  def seconds(self, name: str) -> int:
    """Seconds per training clip that run through the encoders: what a step of this task costs."""
    return len(self.source(name, "train")[0]["visual"])

  def num_batches(self, name: str, split: str = "train") -> int:
    """Batches of an epoch."""
    return loader.num_batches(
      self.source(name, split), self.config.batch_size if split == "train" else self.config.eval_batch_size
    )

  def num_steps(self, name: str) -> int:
    """Steps of a task; where it takes none, batches of the pass over its training clips, if the method makes one."""
    if epochs := self.num_epochs(name):
      return self.num_batches(name) * epochs
    looks = self.experiment.method.looks
    return loader.num_batches(self.source(name, "train"), self.config.eval_batch_size) if looks else 0

  def done_steps(self) -> int:
    """Steps of the current task that are done."""
    return self.position.epoch * self.num_batches(self.stage(self.position.task)) + self.position.batch

  def parts(self, name: str) -> tuple[Tree, Tree]:
    """(trainable, frozen) of a task."""
    return partition.split(self.params, name, self.experiment.method.uses(self.experiment.tasks[name]))

  def past(self, name: str) -> Tree | None:
    """Other tasks' prompts, for methods that read them."""
    return partition.stack_past(self.params, name, len(self.names)) if self.experiment.method.needs_past else None

  def constants(self, name: str) -> Tree:
    """A task's constants, once per task and on every device."""
    if name not in self.cached_constants:
      self.cached_constants[name] = sharding.put_replicated(self.experiment.constants[name], self.mesh)
    return self.cached_constants[name]

  def predictor(self, name: str, *, infer: bool = True) -> Callable[[Tree], Tree]:
    """batch -> the scores of this process's rows as all that is learned so far gives them; see `Answers.of`.

    infer: False gives the task even where the config says that it is inferred.
    """
    infer = infer and self.config.task_id == "inferred"
    learned = Answers(self.experiment, self.steps, self.mesh, self.params, self.state, self.constants, infer)
    return learned.of(name)

  def state_of(self, name: str) -> Tree:
    """What a task reads of the state."""
    return {"shared": self.state["shared"], "task": self.state["tasks"][name]}

  def train_inputs(self, name: str) -> tuple[Tree, Tree | None, Tree]:
    """(frozen, past, constants) of a task's training step."""
    frozen = self.parts(name)[1]
    frozen = {**frozen, "old": self.old(name)} if self.experiment.method.needs_old else frozen
    return frozen, self.past(name), self.constants(name)

  def old(self, name: str) -> tuple[Old, ...]:
    """The tasks before this one whose heads can answer on its clips."""
    earlier = [other for other in self.names[: self.names.index(name)] if self.experiment.tasks[other].distils]
    parts = lambda other: (self.params["tasks"][other]["head"], self.state["tasks"][other]["head"], self.constants(other))
    return tuple(Old(*parts(other), self.experiment.tasks[other]) for other in earlier)

  def lower_train(self, name: str) -> jax.stages.Lowered:
    """The training step of a task, traced on a batch of the first clip, for what the compiler knows of it."""
    batch = next(self.batches(name, "train", batch_size=self.config.batch_size, shuffle=False, workers=False))
    rows = sharding.put_batch(batch, self.mesh, self.task(name).device_keys)
    scale = {"shared": 1.0, "task": 1.0}
    return self.steps.train.lower(self.task(name), self.live, *self.train_inputs(name), rows, jax.random.key(0), scale)

  def should_stop(self) -> bool:
    """Whether to save and stop now, the same on all processes; they must call it equally often, as between two steps."""
    if not self.stop and distributed.stop_agreed():
      self.stop = True
    return self.stop

  def absorb(self) -> None:
    """Puts what the current task has learned so far into the whole trees (its arrays are donated at every step)."""
    if self.live is None:
      return
    name = self.names[self.position.task]
    self.params = partition.merge(self.params, self.live.trainable, name)
    self.state = {"shared": self.live.state["shared"], "tasks": {**self.state["tasks"], name: self.live.state["task"]}}


def return_freed_memory() -> None:
  """Gives freed memory back to the system: compiling leaves glibc with hundreds of megabytes that it would keep."""
  if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
    libc.malloc_trim(0)


def anchor_of(run: Run, name: str) -> Tree:
  """The shared parameters of now that a task reads."""
  return drift.anchor(run.params["shared"], run.experiment.method.uses(run.experiment.tasks[name]))


def add_task(run: Run, name: str) -> None:
  """A task's parameters and state, on the mesh."""
  params, state = run.experiment.add_task(run.params, run.state, name)
  tree = sharding.put_replicated(params["tasks"][name], run.mesh)
  run.params = {**params, "tasks": {**params["tasks"], name: tree}}
  run.state = sharding.put_replicated(state, run.mesh)


def begin(run: Run, name: str) -> None:
  """Fresh optimizer state for a stage: momentum of those before it is forgotten."""
  for task in run.members(name):
    if task not in run.params["tasks"]:
      add_task(run, task)
  trainable, _ = run.parts(name)
  run.live = Live(trainable, run.steps.init_optimizer(trainable), run.state_of(name))
