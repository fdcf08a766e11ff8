"""CODA-Prompt: prompts as weighted sums of components (Smith et al., CVPR 2023, arXiv 2211.13218)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from phpjax.methods.base import Method, Tree
from phpjax.methods.prompts import Prefix, check_text, l2_normalise, option_problems, similarity, towers, width_at


@dataclasses.dataclass(frozen=True)
class CODAPrompt(Method):
  """CODA-Prompt: every task adds components; the prompt of a second sums those of all tasks, weighted by attention.

  Component m has a prompt P_m, a key K_m and an attention vector A_m; with the query q, weight_m = cos(q * A_m, K_m) and
  the prompt is the sum of weight_m P_m, one half of its tokens keys, the other values (prefix tuning, behind the
  projections). A penalty holds P, K and A of all tasks so far orthogonal. Components of other tasks are read and never
  changed: only a task's own learn.

  No task is named: a task that is evaluated after later ones were learned reads their components too, as in the paper. Its
  score may fall by that, though nothing of it changed. The sum does not depend on the order of tasks (but for rounding).

  The paper draws all components orthogonal before the first task; its later code orthogonalises a task's new ones against all
  before them. Here new ones are orthonormal, and orthogonal to those of the task directly before, for no others are at hand
  when a task begins; where a feature is too small for both, orthonormal among themselves as far as they fit.

  Parameters per task, over the modalities with widths D_s in step s and feature size E:
  components_per_task (length sum of D_s over `steps` + 2 E steps).

  Raises ValueError for sizes below 1, an odd length, steps that the encoders lack or that are named twice.

  Attributes:
    components_per_task: the paper's 100 divided by its number of tasks.
    length: tokens of a component, half of them keys, half values.
    steps: which take a prompt.
    orthogonality_weight: of the penalty, as the mean over pairs of components, summed over P, K, A, steps and modalities.
  """

  needs_query: ClassVar[bool] = True
  needs_past: ClassVar[bool] = True
  routed: ClassVar[bool] = False  # every task's prompt is the same sum
  routed_head: ClassVar[bool] = False
  components_per_task: int = 25
  length: int = 8
  steps: tuple[int, ...] = (0, 1, 2, 3, 4)
  orthogonality_weight: float = 0.1

  def __post_init__(self) -> None:
    problems = [*option_problems(self, ("components_per_task", "length"), ("steps",))]
    if self.length % 2:
      problems.append(f"length={self.length} must be even: half of it are keys")
    if not self.steps:
      problems.append("has no steps")
    if problems:
      raise ValueError("method coda_prompt " + "; ".join(problems))

  def init_task(self, rng: jax.Array, task: Any, previous: Tree | None) -> Tree:
    """{modality: {step: {"prompts" [M, P, D], "keys" [M, E], "attention" [M, E]}}}, rows of unit length."""
    del task
    tree: Tree = {}
    for i, m in enumerate(towers(self.backbone)):
      tree[m], embed = {}, getattr(self.backbone, m).embed_dim
      for step in self.steps:
        shapes = {"prompts": (self.length, width_at(self.backbone, m, step)), "keys": (embed,), "attention": (embed,)}
        keys = jax.random.split(jax.random.fold_in(rng, 1000 * i + step), len(shapes))
        before = previous[m][f"step_{step}"] if previous is not None else dict.fromkeys(shapes)
        tree[m][f"step_{step}"] = {
          name: orthonormal(key, (self.components_per_task, *shape), before[name])
          for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
    return tree

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
    """The prompts of every second, from own and past components."""
    del task, frozen, state, mask, rng, train
    check_text(self.backbone, streams)
    components, there = gather(trainable["task"]["prompts"], past)
    prefixes: dict[str, Tree] = {}
    for m in (m for m in components if m in streams):
      for step, parts in components[m].items():
        weights = attend(query[m].pooled, parts["keys"], parts["attention"]) * there
        prompt = jnp.einsum("bm,mpd->bpd", weights, parts["prompts"])
        key, value = jnp.split(prompt, 2, axis=1)
        prefixes.setdefault(step, {})[m] = Prefix(key, value, "projected")
    return {"prefixes": prefixes, "components": {m: c for m, c in components.items() if m in streams}, "there": there}

  def prefix(self, context: Tree, step: int) -> Tree:
    """The prompts of this step."""
    return context["prefixes"].get(f"step_{step}", {})

  def losses(self, task: Any, context: Tree, features: Tree, outputs: Tree, batch: Tree) -> Tree:
    """Orthogonality of all components there are."""
    del task, features, outputs, batch
    parts = jax.tree.leaves(context["components"])
    return {"orthogonality": self.orthogonality_weight * sum(penalty(part, context["there"]) for part in parts)}


def gather(own: Tree, past: Tree | None) -> tuple[Tree, jax.Array]:
  """Leaves [M, ...] of this task and [num_tasks, M, ...] of the others -> ([M + num_tasks M, ...], own first and alone
  differentiated; float32 [M + num_tasks M], 1 for components that exist)."""
  count = len(jax.tree.leaves(own)[0])
  if past is None:
    return own, jnp.ones(count)
  flat = lambda x: jax.lax.stop_gradient(x).reshape(-1, *x.shape[2:])
  joined = jax.tree.map(lambda x, others: jnp.concatenate([x, flat(others)]), own, past["prompts"])
  return joined, jnp.concatenate([jnp.ones(count), jnp.repeat(past["valid"], count)])


def attend(query: jax.Array, keys: jax.Array, attention: jax.Array) -> jax.Array:
  """query [B, E], keys and attention [M, E] -> cos(query * attention_m, keys_m), float32 [B, M]; 0 for components of zeros.

  As two products of matrices, so that no [B, M, E] is ever made.
  """
  query = l2_normalise(query.astype(jnp.float32))  # the cosine does not see it, and the guard against zero becomes relative
  product = similarity(query, attention * l2_normalise(keys))
  squares = similarity(query**2, attention**2)
  return product * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))


def penalty(part: jax.Array, there: jax.Array) -> jax.Array:
  """part [M, ...], there [M] -> mean square of (B B' - I) over the pairs that exist, B the flattened rows; float32 []."""
  rows = part.reshape(len(part), -1)
  pairs = there[:, None] * there[None]
  return jnp.sum(pairs * (similarity(rows, rows) - jnp.eye(len(rows))) ** 2) / jnp.maximum(pairs.sum(), 1)


def orthonormal(rng: jax.Array, shape: tuple[int, ...], before: jax.Array | None) -> jax.Array:
  """Rows of unit length, orthogonal to one another and to the rows of `before` (the same shape) where there is room for both;
  where there is none, to one another only; where there is not even room for that, the columns are orthogonal."""
  count, size = shape[0], math.prod(shape[1:])
  if before is None or 2 * count > size:
    return jax.nn.initializers.orthogonal()(rng, (count, size)).reshape(shape)
  drawn = jax.random.normal(rng, (count, size))
  basis, _ = jnp.linalg.qr(jnp.concatenate([before.reshape(count, size), drawn]).T)  # Gram-Schmidt, row after row
  return basis[:, count:].T.reshape(shape)
