"""What a run that has learned some tasks says about clips: under whose prompts, and by whose heads.

A task's prompts are its own, but for `task_id="inferred"`: then those of the task that the clip looks like (phpjax/routing.py).
Tasks of a growing label set answer with the heads of all of them side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from phpjax import partition, routing, sharding
from phpjax.experiment import Experiment
from phpjax.steps import Steps

Tree = dict[str, Any]
ROUTED, ORACLE = "routed", "oracle/"  # what `Answers` adds to a task's scores where the task is inferred


@dataclasses.dataclass(frozen=True)
class Answers:
  """The scores of the rows of a batch, task by task; every process passes and gets its own rows.

  Attributes:
    experiment, steps, mesh: of the run.
    params, state: the whole trees; the tasks in them are those that count as learned, in their order.
    constants: task name -> its constants, on the devices.
    infer: whether the task is inferred; while a task is being learned it is given.
  """

  experiment: Experiment
  steps: Steps
  mesh: Mesh
  params: Tree
  state: Tree
  constants: Callable[[str], Tree]
  infer: bool

  @property
  def names(self) -> tuple[str, ...]:
    """The tasks."""
    return tuple(self.params["tasks"])

  def of(self, name: str) -> Callable[[Tree], Tree]:
    """batch -> the scores of a task, arrays with a leading B.

    Where the task is inferred and its prompts are its own, there is beside them `routed` int [B], the number of the task that
    was found, and under `oracle/` the same scores with the task given.
    """
    if not self.routes(name):
      predict = self._growing(name, name) if self.experiment.tasks[name].growing else self._plain(name, name)
      return lambda batch: self._local(predict(self._rows(name, batch)), batch, name)
    router = routing.Router([self.state["tasks"][other] for other in self.rivals(name)])
    return lambda batch: self._routed(name, router, batch)

  def routes(self, name: str) -> bool:
    """Whether a task is asked about under prompts that are chosen clip by clip."""
    own = jax.tree.leaves(self.params["tasks"][name]["prompts"])
    return bool(self.infer and own and self.experiment.method.routed and len(self.rivals(name)) > 1)

  def rivals(self, name: str) -> list[str]:
    """The tasks that a clip of a task may be taken for; those of a growing label set are among themselves."""
    growing = self.experiment.tasks[name].growing
    return [other for other in self.names if self.experiment.tasks[other].growing == growing]

  def classes(self, name: str) -> tuple[str, ...]:
    """The words behind a task's scores: its own, or those of all tasks of a growing label set."""
    infos = self.experiment.infos
    if not self.experiment.tasks[name].growing:
      return infos[name].classes
    return tuple(word for other in self.rivals(name) for word in infos[other].classes)

  # -- one set of prompts --------------------------------------------------------------------------------------

  def inputs(self, name: str, prompts_of: str) -> tuple[Tree, Tree, Tree, Tree | None, Tree]:
    """(trainable, state, frozen, past, constants) of a task's step with the prompts of another one in the place of its own."""
    method, task = self.experiment.method, self.experiment.tasks[name]
    trainable, frozen = partition.split(self.params, name, method.uses(task))
    own = {"prompts": self.params["tasks"][prompts_of]["prompts"], "head": self._head(name)}
    state = {**self.state["tasks"][name], "method": self.state["tasks"][prompts_of]["method"]}
    past = partition.stack_past(self.params, prompts_of, len(self.experiment.tasks)) if method.needs_past else None
    state = {"shared": self.state["shared"], "task": state}
    return {**trainable, "task": own}, state, frozen, past, self.constants(name)

  def _head(self, name: str) -> Tree:
    """A task's head; none where the first task alone has one and is not alone any more, so that all tasks are alike."""
    alone = len(self.names) == 1 or not self.experiment.method.first_task_only
    return self.params["tasks"][name]["head"] if alone else {}

  def _plain(self, name: str, prompts_of: str) -> Callable[[Tree], Tree]:
    task, inputs = self.experiment.tasks[name], self.inputs(name, prompts_of)
    return lambda rows: self.steps.predict(task, *inputs, rows)

  def _growing(self, name: str, prompts_of: str) -> Callable[[Tree], Tree]:
    """Scores [B, K, C] of the heads of all rivals, -inf for those that do not count."""
    task, rivals, total = self.experiment.tasks[name], self.rivals(name), len(self.experiment.tasks)
    state = lambda other: self.state["tasks"][other]["head"]
    heads = [{"head": self._head(x), "state": state(x), "constants": self.constants(x)} for x in rivals]
    heads += [jax.tree.map(np.zeros_like, heads[0])] * (total - len(heads))  # as many as there will be: one compile
    heads = jax.tree.map(lambda *x: np.stack([np.asarray(y) for y in x]), *jax.device_get(heads))
    counts = np.array([other in self._counting(name, prompts_of) for other in rivals] + [False] * (total - len(rivals)))
    inputs = self.inputs(name, prompts_of)
    return lambda rows: self.steps.predict_growing(task, heads, counts, *inputs, rows)

  def _counting(self, name: str, prompts_of: str) -> list[str]:
    """The tasks whose heads count: the task's alone where it is given; else those of all, but under prompts of a task that its
    head alone was learned with, that one."""
    if not self.infer:
      return [name]
    own = jax.tree.leaves(self.params["tasks"][name]["prompts"]) and self.experiment.method.routed_head
    return [prompts_of] if own else self.rivals(name)

  # -- prompts clip by clip ------------------------------------------------------------------------------------

  def _routed(self, name: str, router: routing.Router, batch: Tree) -> Tree:
    rivals, rows, task = self.rivals(name), self._rows(name, batch), self.experiment.tasks[name]
    query = routing.vectors(batch["query"] if "query" in batch else self._unprompted(name, rows), len(batch["mask"]))
    chosen = router.nearest(query)
    # Every process runs the same programs, so all rivals that any row of any process may need.
    wanted = {name} | ({rivals[i] for i in chosen} if jax.process_count() == 1 else set(rivals))
    predict = self._growing if task.growing else self._plain
    ask = lambda other: jax.device_get(self._local(predict(name, other)(rows), batch, name))
    scores = {other: ask(other) for other in rivals if other in wanted}
    pick = lambda key: np.stack([scores[rivals[who]][key][row] for row, who in enumerate(chosen)])
    routed = {key: pick(key) for key in scores[name]}
    given = self._given(name, scores[name])
    return {**routed, ROUTED: chosen == rivals.index(name), **{f"{ORACLE}{key}": x for key, x in given.items()}}

  def _unprompted(self, name: str, rows: Tree) -> Tree:
    """{modality: Features} of this process's rows."""
    found = self.steps.encode(self.experiment.tasks[name], False, *self.inputs(name, name)[:4], rows)
    return sharding.local_rows(found, self.mesh)

  def _given(self, name: str, scores: Tree) -> Tree:
    """Scores under a task's own prompts as they were if it were given: of a growing label set, by its head alone."""
    if not self.experiment.tasks[name].growing:
      return scores
    own = np.arange(scores["scores"].shape[1])[:, None] == self.rivals(name).index(name)
    return {**scores, "scores": np.where(own, scores["scores"], -np.inf)}

  # -- rows ----------------------------------------------------------------------------------------------------

  def _rows(self, name: str, batch: Tree) -> Tree:
    keys = tuple(k for k in self.experiment.tasks[name].device_keys if k in batch and not k.startswith("label"))
    return sharding.put_batch(batch, self.mesh, keys)

  def _local(self, scores: Tree, batch: Tree, name: str) -> Tree:
    """This process's rows; of a growing label set also the place of the task among its rivals."""
    scores = sharding.local_rows(scores, self.mesh)
    if not self.experiment.tasks[name].growing:
      return scores
    return {**scores, "place": np.full(len(batch["mask"]), self.rivals(name).index(name))}
