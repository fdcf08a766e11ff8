"""All tasks as one, for training on them at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from phpjax.tasks.base import Task, Tree


@dataclasses.dataclass(frozen=True)
class Together:
  """Tasks that take a step at once.

  Its trees are those of a task with one more level, {"shared", "task": {part: {name: ...}}}: part is "prompts" or "head" of
  what learns, "head" or "method" of the state. Its batches stay flat: "ave/visual" is what a batch of AVE calls "visual"; "id"
  names all clips that stand side by side in a row, and "mask" counts them.

  Attributes:
    members: the tasks, of different names.
  """

  members: tuple[Task, ...]
  name: ClassVar[str] = "joint"
  kind: ClassVar[str] = "joint"

  @property
  def device_keys(self) -> tuple[str, ...]:
    """What a step reads of a batch."""
    return tuple(f"{task.name}/{key}" for task in self.members for key in task.device_keys)

  def select(self, tree: Tree, task: Task) -> Tree:
    """What one member reads of a tree."""
    return {**tree, "task": {part: named[task.name] for part, named in tree["task"].items()}}

  def put(self, tree: Tree, task: Task, own: Tree) -> Tree:
    """The tree with what `select` gave changed to `own`."""
    return {**own, "task": {part: {**named, task.name: own["task"][part]} for part, named in tree["task"].items()}}

  def join(self, tree: Tree, tasks: Mapping[str, Tree]) -> Tree:
    """{"shared"} and {name: {part: ...}} -> a tree of all members, whose parts are called alike."""
    parts = tasks[self.members[0].name]
    return {"shared": tree["shared"], "task": {part: {t.name: tasks[t.name][part] for t in self.members} for part in parts}}

  def apart(self, tree: Tree) -> Tree:
    """{name: {part: ...}} of such a tree."""
    return {task.name: self.select(tree, task)["task"] for task in self.members}

  def batch_of(self, batch: Tree, task: Task) -> Tree:
    """One member's batch."""
    head = f"{task.name}/"
    return {key.removeprefix(head): value for key, value in batch.items() if key.startswith(head)}

  def join_batches(self, batches: Mapping[str, Tree]) -> Tree:
    """{name: batch of so many rows} -> a batch."""
    rows: dict[str, Any] = {
      f"{name}/{key}": value for name, batch in batches.items() for key, value in batch.items() if key != "id"
    }
    ids = [" ".join(filter(None, row)) for row in zip(*(batch["id"] for batch in batches.values()), strict=True)]
    return {**rows, "id": ids, "mask": sum(batch["mask"] for batch in batches.values())}
