"""Config -> optax: one rate, decay and clip per label of `partition`, nothing at all for what is frozen."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from phpjax import partition


class Group(NamedTuple):
  """Settings of one label."""

  lr: float
  weight_decay: float


class Settings(NamedTuple):
  """Hashable form of `config.opt`; `decay` and `clip` as in the table of phpjax/compat.py."""

  groups: tuple[tuple[str, Group], ...]
  clip_norm: float
  b1: float
  b2: float
  eps: float
  decay: str = "decoupled"
  clip: str = "label"


def settings(opt: Any) -> Settings:
  """Reads `config.opt`: lr and weight_decay per label, clip_norm, b1, b2, eps, and where decay and clipping come in.

  Raises ValueError for a decay or clip that is none, as in a config that compat.resolve has not seen.
  """
  groups = tuple((label, Group(opt[label].lr, opt[label].weight_decay)) for label in ("shared", "prompts", "head"))
  made = Settings(groups, opt.clip_norm, opt.b1, opt.b2, opt.eps, opt.get("decay", "decoupled"), opt.get("clip", "label"))
  for field, value, known in (("decay", made.decay, ("decoupled", "l2")), ("clip", made.clip, ("label", "global"))):
    if value not in known:
      raise ValueError(f"opt.{field}={value!r} is not one of {', '.join(map(repr, known))}")
  return made


@functools.cache
def make(opt: Settings) -> optax.GradientTransformation:
  """The optimizer of the live subtree. Cached: equal settings give the same object."""
  return build(opt, partition.live_labels)


def make_masked(opt: Settings, task: str, uses: tuple[str, ...]) -> optax.GradientTransformation:
  """The same optimizer over the whole parameter tree (a notebook, joint training)."""
  return build(opt, functools.partial(partition.labels, task=task, uses=uses))


def build(opt: Settings, label_fn: Callable[[Any], Any]) -> optax.GradientTransformation:
  """Adam per label; `set_to_zero` for "frozen" (no update, no state).

  By default the gradient is clipped by norm per label, so that a loud head does not silence the generators; clip="global"
  has one norm over all labels, as released, where it does (quirk 34). The schedule is not in here: the train step multiplies
  the updates by `lr_scale(...)`, traced numbers, so that tasks of different lengths share one compiled step.
  """
  transforms: dict[str, optax.GradientTransformation] = {"frozen": optax.set_to_zero()}
  for label, group in opt.groups:
    transforms[label] = flat(adam(opt, group))
  labelled = optax.partition(transforms, label_fn)
  return clipped_together(labelled, opt.clip_norm, label_fn) if opt.clip == "global" else labelled


def adam(opt: Settings, group: Group) -> optax.GradientTransformation:
  """Clipping, Adam and weight decay of one label.

  decay="decoupled" is AdamW's (Loshchilov and Hutter 2019, arXiv 1711.05101). decay="l2" adds weight_decay * parameter to
  the clipped gradient, in front of Adam's moments: torch.optim.Adam's `weight_decay` behind clip_grad_norm_, as released.
  """
  clip = multiply_by_factor() if opt.clip == "global" else optax.clip_by_global_norm(opt.clip_norm)
  moments, decay = optax.scale_by_adam(opt.b1, opt.b2, opt.eps), optax.add_decayed_weights(group.weight_decay)
  return optax.chain(clip, *((decay, moments) if opt.decay == "l2" else (moments, decay)), optax.scale(-group.lr))


def clipped_together(
  inner: optax.GradientTransformationExtraArgs, max_norm: float, label_fn: Callable[[Any], Any]
) -> optax.GradientTransformation:
  """Clips everything but "frozen" leaves by one norm, with torch's clip_grad_norm_: factor max_norm / (norm + 1e-6), at most 1.

  The labels' own vectors are multiplied (`multiply_by_factor`), not the leaves: those are hundreds of small arrays.
  """

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    live = jax.tree.map(lambda u, label: None if label == "frozen" else u, updates, label_fn(updates))
    norm = jnp.linalg.norm(ravel_pytree(live)[0])
    return inner.update(updates, state, params, factor=jnp.minimum(1.0, max_norm / (norm + 1e-6)))

  return optax.GradientTransformation(inner.init, update)


def multiply_by_factor() -> optax.GradientTransformationExtraArgs:
  """Multiplies by the `factor` that `clipped_together` hands down."""

  def update(updates: jax.Array, state: Any, params: Any = None, *, factor: jax.Array, **_: Any) -> tuple[jax.Array, Any]:
    del params
    return updates * factor, state

  return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def flat(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """Runs `inner` on one vector of all leaves instead of hundreds of small ones, which XLA would compile one by one.

  As optax.flatten, but a label without leaves is allowed.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params: Any) -> Any:
    return inner.init(ravel_pytree(params)[0]) if jax.tree.leaves(params) else optax.EmptyState()

  def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
    if not jax.tree.leaves(updates):
      return updates, state
    vector, unravel = ravel_pytree(updates)
    vector, state = inner.update(vector, state, ravel_pytree(params)[0], **extra)
    return unravel(vector), state

  return optax.GradientTransformationExtraArgs(init, update)


def lr_scale(epoch: int, num_epochs: int, min_scale: float, shared_scale: float) -> dict[str, float]:
  """Factors on the updates of {"shared", "task"}: cosine per epoch from 1 to `min_scale`, as released.

  `shared_scale` slows the shared parameters down further (config: after the first task), because old tasks read them.
  """
  cosine = min_scale + (1 - min_scale) * 0.5 * (1 + math.cos(math.pi * epoch / max(num_epochs, 1)))
  return {"shared": cosine * shared_scale, "task": cosine}
