"""L2P: prompts chosen from one pool by the input itself (Wang et al., CVPR 2022, arXiv 2112.08654)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from phpjax.methods.base import Tree
from phpjax.methods.prompts import InputPrompts, cosine, mean_of_real, option_problems, read_by, towers, width_at

INIT_RANGE = 0.01  # of prompts and keys, as in the authors' code


@dataclasses.dataclass(frozen=True)
class L2P(InputPrompts):
  """L2P: a pool of prompts per modality; each second takes those whose keys are nearest to its own frozen feature.

  Every task trains the one pool, also the prompts that earlier tasks learned: nothing protects them but the choice.

  The published code chooses one set for a whole batch by majority; here each second chooses for itself, in training and at
  test, so that no clip's result hangs on its neighbours. The paper classifies the mean of the prompts' outputs; here the
  task's own head reads what every other method's reads. The paper's optional counter of used prompts is left out.

  Parameters, all shared, per modality of width D (of the first layer) and feature size E: pool_size (length D + E).

  Raises ValueError for sizes below 1 and a `top_k` above `pool_size`.

  Attributes:
    pool_size, length, top_k: prompts of a pool, tokens of a prompt, prompts that a second takes.
    pull_weight: of the loss that draws the chosen keys to the query.
  """

  needs_query: ClassVar[bool] = True
  routed: ClassVar[bool] = False
  routed_head: ClassVar[bool] = False
  pool_size: int = 10
  length: int = 5
  top_k: int = 5
  pull_weight: float = 0.5

  def __post_init__(self) -> None:
    problems = [*option_problems(self, ("pool_size", "length", "top_k"))]
    if self.top_k > self.pool_size:
      problems.append(f"takes top_k={self.top_k} of pool_size={self.pool_size} prompts")
    if problems:
      raise ValueError("method l2p " + "; ".join(problems))

  def init_shared(self, rng: jax.Array) -> Tree:
    """{modality: {"prompts" [pool, P, D], "keys" [pool, E]}}, uniform in [0, 0.01)."""
    shared = {}
    for i, m in enumerate(towers(self.backbone)):
      shapes = {
        "prompts": (self.pool_size, self.length, width_at(self.backbone, m, 0)),
        "keys": (self.pool_size, getattr(self.backbone, m).embed_dim),
      }
      keys = jax.random.split(jax.random.fold_in(rng, i))
      shared[m] = {n: jax.random.uniform(k, s, maxval=INIT_RANGE) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    return shared

  def uses(self, task: Any) -> tuple[str, ...]:
    """The pools of the task's modalities."""
    return read_by(task, self.backbone)

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
    """Chooses for every second."""
    del task, frozen, state, past, mask, rng, train
    inputs, distance = {}, {}
    for m in (m for m in trainable["shared"] if m in streams):
      pool = trainable["shared"][m]
      chosen, distance[m] = select(query[m].pooled, pool["keys"], self.top_k)
      prompts = pool["prompts"][chosen]  # [B, top_k, P, D]
      inputs[m] = prompts.reshape(len(chosen), -1, prompts.shape[-1])
    return {**self.context_of(inputs, streams), "distance": distance}

  def losses(self, task: Any, context: Tree, features: Tree, outputs: Tree, batch: Tree) -> Tree:
    """The pull of the chosen keys to the query, summed over them and over modalities, a mean over the seconds of real clips."""
    del task, features, outputs
    total = sum(mean_of_real(d.sum(axis=1), batch.get("mask")) for d in context["distance"].values())
    return {"pull": self.pull_weight * total}


def select(query: jax.Array, keys: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
  """query [B, E], keys [M, E] -> (the nearest keys int32 [B, top_k], nearest first and of equal ones the first; their cosine
  distances float32 [B, top_k])."""
  scores = cosine(query, keys)
  chosen = jax.lax.top_k(jax.lax.stop_gradient(scores), top_k)[1]
  return chosen, 1 - jnp.take_along_axis(scores, chosen, axis=1)
