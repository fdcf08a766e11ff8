"""LwF: learning without forgetting (Li and Hoiem, ECCV 2016, arXiv 1606.09282), on PHP's modules as one shared set."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from phpjax.methods.base import TrainingClips, Tree
from phpjax.methods.finetune import FineTune


@dataclasses.dataclass(frozen=True)
class LwF(FineTune):
  """Fine-tuning that keeps what earlier tasks' heads say of the new task's clips.

  The shared parameters as they are before a task begins are its teacher. While the task learns, the head of every earlier task
  reads the same clips twice, through the teacher and through the current parameters, and `lwf_weight` times the softened
  divergence of the two (`Task.distillation`, section 3 of the paper) is added to the loss of `finetune`, summed over tasks. An
  event task's head is the similarity to its class texts, which the shared context words and adapters make: the teacher's texts
  are made by the teacher's.

  Question answering as an earlier task is left out: its head needs questions, which other tasks' clips do not have.

  Unlike the paper, earlier heads stay as they are (a task's own parameters never change here), a head has no warm-up, and no
  teacher's answer is stored: the teacher runs in every step, with the student's noise.

  Parameters: as many as `finetune` has, shared(php) + prompts of one task(php), and a head per task. State: one number per
  shared parameter.

  Attributes:
    lwf_weight: lambda_o.
    lwf_temperature: T.
  """

  lwf_weight: float = 1.0
  lwf_temperature: float = 2.0
  needs_old: ClassVar[bool] = True

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.lwf_weight < 0 or self.lwf_temperature <= 0:
      raise ValueError(
        f"method lwf: lwf_weight={self.lwf_weight} must be at least 0, lwf_temperature={self.lwf_temperature} above 0"
      )

  def notes(self, tasks: Mapping[str, Any]) -> Iterator[str]:
    """Which tasks nothing is kept of."""
    if left := [name for name in list(tasks)[:-1] if not tasks[name].distils]:
      yield f"lwf keeps nothing of {', '.join(left)}: its head needs questions, and the clips of later tasks have none"

  def init_state(self, shared: Tree) -> Tree:
    """{"teacher": like `shared`}, zero until the first task has ended: it has no teacher."""
    return {"teacher": jax.tree.map(jnp.zeros_like, shared)}

  def teacher(self, state: Tree) -> Tree:
    """The shared parameters at the end of the task before."""
    return state["teacher"]

  def distil(self, task: Any, student: Tree, teacher: Tree, batch: Tree) -> jax.Array:
    """The weighted divergence."""
    return self.lwf_weight * task.distillation(student, teacher, self.lwf_temperature, batch)

  def end_task(self, params: Tree, state: Tree, task: Any, clips: TrainingClips) -> tuple[Tree, Tree]:
    """What has been learned teaches the next task."""
    del task, clips
    teacher = jax.tree.map(np.array, jax.device_get(params["shared"]))  # a copy
    return params, {**state, "shared": {"teacher": teacher}}
