"""DualPrompt: prompts for all tasks and prompts for one (Wang et al., ECCV 2022, arXiv 2204.04799)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from phpjax.methods.base import Method, Tree
from phpjax.methods.prompts import (
  broadcast_prefix,
  check_text,
  cosine,
  mean_of_real,
  option_problems,
  read_by,
  towers,
  width_at,
)

INIT_RANGE = 0.01  # of prompts and keys, as in the authors' code


@dataclasses.dataclass(frozen=True)
class DualPrompt(Method):
  """DualPrompt: G-Prompts shared by all tasks in the first layers, E-Prompts per task behind them, a key per task.

  Prefix tuning (the paper's Pre-T): keys and values are concatenated behind the projections. A length counts keys, and as many
  values, as in the authors' code (the paper's text halves a prompt, which its length of 5 forbids). G-Prompts learn on
  every task; a task's E-Prompts and key never change once it is learned.

  While a task learns, and at test where the task is given, its own E-Prompts are taken. Where it is inferred, the paper takes
  the task whose key is nearest to the query (`task_match`); here the trainer infers it for all methods alike, by centroids
  of frozen features.

  Parameters, over the modalities with widths D_s in step s and feature size E: shared 2 general_length sum of D_s over
  `general`; per task 2 expert_length sum of D_s over `expert`, and E.

  Raises ValueError for lengths below 1, steps that the encoders lack, and two prompts in one step.

  Attributes:
    general, expert: steps with G-Prompts and with E-Prompts; empty switches them off.
    general_length, expert_length: keys of a prompt, and values.
    match_weight: of the loss that draws the task's key to the query.
    warm_start: a task's E-Prompts begin where those of the task before ended, as in the authors' code; its key is fresh.
  """

  needs_query: ClassVar[bool] = True
  routed_head: ClassVar[bool] = False  # one classifier over all classes, as in the paper
  general: tuple[int, ...] = (0, 1)
  expert: tuple[int, ...] = (2, 3, 4)
  general_length: int = 5
  expert_length: int = 20
  match_weight: float = 1.0
  warm_start: bool = True

  def __post_init__(self) -> None:
    if problems := [*option_problems(self, ("general_length", "expert_length"), ("general", "expert"))]:
      raise ValueError("method dualprompt " + "; ".join(problems))

  def _prompts(self, rng: jax.Array, modality: str, steps: tuple[int, ...], length: int) -> Tree:
    """{step: [2, P, D], keys and values}, uniform in [0, 0.01)."""
    shape = lambda step: (2, length, width_at(self.backbone, modality, step))
    draw = lambda step: jax.random.uniform(jax.random.fold_in(rng, step), shape(step), maxval=INIT_RANGE)
    return {f"step_{step}": draw(step) for step in steps}

  def init_shared(self, rng: jax.Array) -> Tree:
    """G-Prompts {modality: {step: [2, P, D]}}."""
    keys = jax.random.split(rng, len(towers(self.backbone)))
    if not self.general:
      return {}
    return {m: self._prompts(k, m, self.general, self.general_length) for m, k in zip(towers(self.backbone), keys, strict=True)}

  def init_task(self, rng: jax.Array, task: Any, previous: Tree | None) -> Tree:
    """{modality: {"key" [E], "prompts": {step: [2, P, D]}}}."""
    del task
    tree = {}
    for i, m in enumerate(towers(self.backbone)):
      key, prompts = jax.random.split(jax.random.fold_in(rng, i))
      warm = previous is not None and self.warm_start
      tree[m] = {
        "key": jax.random.uniform(key, (getattr(self.backbone, m).embed_dim,), maxval=INIT_RANGE),
        "prompts": jax.tree.map(jnp.copy, previous[m]["prompts"])
        if warm
        else self._prompts(prompts, m, self.expert, self.expert_length),
      }
    return tree

  def uses(self, task: Any) -> tuple[str, ...]:
    """The G-Prompts of the task's modalities."""
    return read_by(task, self.backbone) if self.general else ()

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
    """Lays out both kinds of prompts, and compares the query with the task's key."""
    del task, frozen, state, past, mask, rng, train
    check_text(self.backbone, streams)
    prefixes: dict[str, Tree] = {}
    distance = {}
    for m, own in ((m, own) for m, own in trainable["task"]["prompts"].items() if m in streams):
      for step, prompt in {**trainable["shared"].get(m, {}), **own["prompts"]}.items():
        prefixes.setdefault(step, {})[m] = broadcast_prefix(prompt, len(streams[m].tokens), "projected")
      distance[m] = 1 - task_match(query[m].pooled, own["key"][None])[:, 0]
    return {"prefixes": prefixes, "distance": distance}

  def prefix(self, context: Tree, step: int) -> Tree:
    """The prompts of this step."""
    return context["prefixes"].get(f"step_{step}", {})

  def losses(self, task: Any, context: Tree, features: Tree, outputs: Tree, batch: Tree) -> Tree:
    """Cosine distance of query and key, summed over modalities, a mean over the seconds of real clips."""
    del task, features, outputs
    total = sum(mean_of_real(d, batch.get("mask")) for d in context["distance"].values())
    return {"match": self.match_weight * total}


def task_match(query: jax.Array, keys: jax.Array) -> jax.Array:
  """Features [B, E] of one modality, the keys of all tasks [num_tasks, E] -> cosines float32 [B, num_tasks]; the largest says
  which task a row belongs to."""
  return cosine(query, keys)
