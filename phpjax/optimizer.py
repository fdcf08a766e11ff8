"""Config -> optax: one rate, decay and clip per label of `partition`, nothing at all for what is frozen."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.flatten_util import ravel_pytree

from phpjax import partition


class Group(NamedTuple):
  """Settings of one label."""

  lr: float
  weight_decay: float


class Settings(NamedTuple):
  """Hashable form of `config.opt`."""

  groups: tuple[tuple[str, Group], ...]
  clip_norm: float
  b1: float
  b2: float
  eps: float


def settings(opt: Any) -> Settings:
  """Reads `config.opt`: lr and weight_decay per label, clip_norm (per label), b1, b2, eps."""
  groups = tuple((label, Group(opt[label].lr, opt[label].weight_decay)) for label in ("shared", "prompts", "head"))
  return Settings(groups, opt.clip_norm, opt.b1, opt.b2, opt.eps)


@functools.cache
def make(opt: Settings) -> optax.GradientTransformation:
  """The optimizer of the live subtree. Cached: equal settings give the same object."""
  return build(opt, partition.live_labels)


def make_masked(opt: Settings, task: str, uses: tuple[str, ...]) -> optax.GradientTransformation:
  """The same optimizer over the whole parameter tree (a notebook, joint training)."""
  return build(opt, functools.partial(partition.labels, task=task, uses=uses))


def build(opt: Settings, label_fn: Callable[[Any], Any]) -> optax.GradientTransformation:
  """Adam with decoupled weight decay per label; `set_to_zero` for "frozen" (no update, no state).

  The gradient is clipped by norm per label, so that a loud head does not silence the generators (in the release it
  does). The schedule is not in here: the train step multiplies the updates by `lr_scale(...)`, traced numbers, so that
  tasks of different lengths share one compiled step.
  """
  transforms: dict[str, optax.GradientTransformation] = {"frozen": optax.set_to_zero()}
  for label, group in opt.groups:
    transforms[label] = flat(
      optax.chain(
        optax.clip_by_global_norm(opt.clip_norm),
        optax.scale_by_adam(opt.b1, opt.b2, opt.eps),
        optax.add_decayed_weights(group.weight_decay),
        optax.scale(-group.lr),
      )
    )
  return optax.partition(transforms, label_fn)


def flat(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """Runs `inner` on one vector of all leaves instead of hundreds of small ones, which XLA would compile one by one.

  As optax.flatten, but a label without leaves is allowed.
  """

  def init(params: Any) -> Any:
    return inner.init(ravel_pytree(params)[0]) if jax.tree.leaves(params) else optax.EmptyState()

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    if not jax.tree.leaves(updates):
      return updates, state
    vector, unravel = ravel_pytree(updates)
    vector, state = inner.update(vector, state, ravel_pytree(params)[0])
    return unravel(vector), state

  return optax.GradientTransformation(init, update)


def lr_scale(epoch: int, num_epochs: int, min_scale: float, shared_scale: float) -> dict[str, float]:
  """Factors on the updates of {"shared", "task"}: cosine per epoch from 1 to `min_scale`, as released.

  `shared_scale` slows the shared parameters down further (config: after the first task), because old tasks read them.
  """
  cosine = min_scale + (1 - min_scale) * 0.5 * (1 + math.cos(math.pi * epoch / max(num_epochs, 1)))
  return {"shared": cosine * shared_scale, "task": cosine}
