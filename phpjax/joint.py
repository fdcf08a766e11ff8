"""A run that learns all tasks at once instead of one after another, for methods that say `joint`.

It has one stage, called "joint", in whose epoch the longest task's batches are seen once. A shorter task starts over, in the
orders of its own epochs, so that a step takes one batch of every task. All else, as a checkpoint, holds the tasks one by one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from phpjax import partition
from phpjax.run import Run
from phpjax.tasks import Together

Tree = dict[str, Any]
STAGE = Together.name


@dataclasses.dataclass
class JointRun(Run):
  """A run at work; where `Run` takes the name of a task, this one takes that of its stage too."""

  @functools.cached_property
  def together(self) -> Together:
    """All tasks as one."""
    return Together(tuple(self.experiment.tasks.values()))

  @property
  def stages(self) -> list[str]:
    """The only one."""
    return [STAGE]

  def stage(self, index: int) -> str:
    """All tasks are learned in it."""
    del index
    return STAGE

  def members(self, stage: str) -> list[str]:
    """All tasks, or the one so called."""
    return self.names if stage == STAGE else [stage]

  def task(self, name: str) -> Any:
    """A task, or all as one."""
    return self.together if name == STAGE else super().task(name)

  def num_epochs(self, name: str) -> int:
    """Of the task that has most, for all."""
    del name
    return max(super(JointRun, self).num_epochs(member) for member in self.names)

  def selection_split(self, name: str) -> str | None:
    """Only a split that all tasks have can choose an epoch of all."""
    splits = {member: super(JointRun, self).selection_split(member) for member in self.names}
    return None if None in splits.values() else splits[self.members(name)[0]]

  def num_batches(self, name: str, split: str = "train") -> int:
    """Of the longest task, if all are meant."""
    return max(super(JointRun, self).num_batches(member, split) for member in self.members(name))

  def seconds(self, name: str) -> int:
    """The sum over tasks, if all are meant."""
    return sum(super(JointRun, self).seconds(member) for member in self.members(name))

  def batches(
    self, name: str, split: str, *, batch_size: int, shuffle: bool, epoch: int = 0, start: int = 0, workers: bool = True
  ) -> Iterator[Tree]:
    """One epoch; of the stage, the batches of all tasks side by side."""
    options = {"batch_size": batch_size, "shuffle": shuffle, "workers": workers}
    if name != STAGE:
      return super().batches(name, split, epoch=epoch, start=start, **options)
    total = self.num_batches(STAGE, split)
    members = [self._on_and_on(member, split, epoch * total + start, **options) for member in self.names]
    side_by_side = itertools.islice(zip(*members, strict=True), total - start)
    return (self.together.join_batches(dict(zip(self.names, rows, strict=True))) for rows in side_by_side)

  def _on_and_on(self, name: str, split: str, done: int, **options: Any) -> Iterator[Tree]:
    """A task's batches, epoch after epoch, behind the first `done` of the run."""
    per_epoch = super().num_batches(name, split)
    epoch, start = divmod(done, per_epoch)
    while True:
      yield from super().batches(name, split, epoch=epoch, start=start, **options)
      epoch, start = epoch + 1, 0

  def parts(self, name: str) -> tuple[Tree, Tree]:
    """(trainable, frozen) of a task, or of all as one."""
    if name != STAGE:
      return super().parts(name)
    used = {key for task in self.experiment.tasks.values() for key in self.experiment.method.uses(task)}
    trainable, frozen = partition.split(self.params, self.names[0], used)
    return self.together.join(trainable, self.params["tasks"]), frozen

  def state_of(self, name: str) -> Tree:
    """What a task reads of the state, or all as one."""
    return super().state_of(name) if name != STAGE else self.together.join(self.state, self.state["tasks"])

  def train_inputs(self, name: str) -> tuple[Tree, Tree | None, Tree]:
    """(frozen, past, constants) of a training step."""
    if name != STAGE:
      return super().train_inputs(name)
    return self.parts(STAGE)[1], None, {member: self.constants(member) for member in self.names}

  def absorb(self) -> None:
    """As `Run.absorb`, of all tasks."""
    if self.live is None:
      return
    trainable, state = self.live.trainable, self.live.state
    self.params = {
      **self.params,
      "shared": {**self.params["shared"], **trainable["shared"]},
      "tasks": self.together.apart(trainable),
    }
    self.state = {"shared": state["shared"], "tasks": self.together.apart(state)}
