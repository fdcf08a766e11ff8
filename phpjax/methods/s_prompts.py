"""S-Prompts: prompts of each task's own, learned independently (Wang et al., NeurIPS 2022, arXiv 2207.12819)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from phpjax.methods.base import Tree
from phpjax.methods.prompts import InputPrompts, option_problems, towers, width_at


@dataclasses.dataclass(frozen=True)
class SPrompts(InputPrompts):
  """S-Prompts: independent input tokens per task and modality; nothing is shared, so nothing can be forgotten.

  The paper finds the task of a test sample by the nearest of its k-means centres on frozen features, and that task's head
  alone answers; this is the trainer's part (`task_id`), the same for all methods. Its language prompts need classes with
  names in every task; here the task's own head stands in their place, as in the paper's version without language.

  Parameters per task, over the modalities with width D (of the first layer): length D.

  Raises ValueError for a length below 1.

  Attributes:
    length: tokens per modality.
  """

  length: int = 10

  def __post_init__(self) -> None:
    if problems := [*option_problems(self, ("length",))]:
      raise ValueError("method s_prompts " + "; ".join(problems))

  def init_task(self, rng: jax.Array, task: Any, previous: Tree | None) -> Tree:
    """{modality: [P, D]}, uniform up to 1 / sqrt(D) as in the authors' code; never from another task's."""
    del task, previous
    prompts = {}
    for i, m in enumerate(towers(self.backbone)):
      width = width_at(self.backbone, m, 0)
      prompts[m] = jax.random.uniform(jax.random.fold_in(rng, i), (self.length, width), minval=-1, maxval=1) * width**-0.5
    return prompts

  def start(
    self,
    task: Any,
    trainable: Tree,
    frozen: Tree,
    state: Tree,
    past: Tree | None,
    streams: Tree,
    *,
    query: Tree | None,
    mask: jax.Array | None,
    rng: jax.Array | None,
    train: bool,
  ) -> Tree:
    """The same tokens for every second."""
    del task, frozen, state, past, query, mask, rng, train
    own = {m: p for m, p in trainable["task"]["prompts"].items() if m in streams}
    inputs = {m: jnp.broadcast_to(p, (len(streams[m].tokens), *p.shape)) for m, p in own.items()}
    return self.context_of(inputs, streams)
