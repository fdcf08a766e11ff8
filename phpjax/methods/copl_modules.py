"""The parts of CoPL as plain functions; copl.py says where they come from. B rows, N tokens, K prompts, M slots, r rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phpjax.methods.prompts import l2_normalise, similarity

Tree = dict[str, Any]


def draw(sample: Callable[..., jax.Array], rng: jax.Array, shapes: Tree) -> Tree:
  """A tree of shapes (tuples) -> arrays, all cut from one `sample(rng, (n,))`: a draw for each would compile one by one."""
  leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
  ends = np.cumsum([math.prod(shape) for shape in leaves])
  pieces = jnp.split(sample(rng, (int(ends[-1]),)), ends[:-1])
  return structure.unflatten([x.reshape(shape) for x, shape in zip(pieces, leaves, strict=True)])


def narrow(tokens: jax.Array, down: jax.Array) -> jax.Array:
  """tokens [B, N, D], down [D, r] -> float32 [B, N, r]; the product is taken in the tokens' own precision."""
  return jnp.matmul(tokens, down.astype(tokens.dtype), preferred_element_type=jnp.float32)


def read_partner(latents: jax.Array, partner: jax.Array) -> jax.Array:
  """latents Z [K, r], the other modality's narrow tokens X [B, N, r] -> Z + softmax(Z X' / sqrt r) X, [B, K, r]."""
  scores = jnp.einsum("kr,bnr->bkn", latents, partner) * latents.shape[-1] ** -0.5
  return latents + jnp.einsum("bkn,bnr->bkr", jax.nn.softmax(scores, axis=-1), partner)


def route(tokens: jax.Array, keys: jax.Array, temperature: float) -> jax.Array:
  """Narrow tokens [B, N, r], keys [M, r] -> how much of every slot a row takes, softmax(cos(mean token, key) / t), [B, M]."""
  query = l2_normalise(tokens.mean(axis=1))
  return jax.nn.softmax(similarity(query, l2_normalise(keys)) / temperature, axis=-1)


def mix(weights: jax.Array, values: jax.Array) -> jax.Array:
  """weights [B, M], values of the slots [M, K, r] -> [B, K, r]."""
  return jnp.einsum("bm,mkr->bkr", weights, values)


def coupling(visual: jax.Array, audio: jax.Array, real: jax.Array) -> jax.Array:
  """(KL(v || a) + KL(a || v)) / 2 of weights [L, B, M] each, the mean over blocks L and over the rows that are real [B]."""
  each = ((visual - audio) * (jnp.log(visual) - jnp.log(audio))).sum(axis=-1) / 2
  return mean_of_real(each, real).mean()


def orthogonality(keys: jax.Array) -> jax.Array:
  """|| K K' - I ||_F^2 of the keys [M, r] at unit length."""
  unit = l2_normalise(keys)
  return jnp.square(similarity(unit, unit) - jnp.eye(len(keys))).sum()


def collapse(weights: jax.Array, real: jax.Array) -> jax.Array:
  """ln M - H(mean weights): 0 where real rows [B] take all slots equally often; of weights [L, B, M], the mean over blocks."""
  mean = mean_of_real(weights.swapaxes(1, 2), real)  # [L, M]
  return math.log(weights.shape[-1]) + jnp.sum(mean * jnp.log(jnp.maximum(mean, 1e-12)), axis=-1).mean()


def mean_of_real(x: jax.Array, real: jax.Array) -> jax.Array:
  """x [..., B], real [B] is 0 for padding -> [...]; 0 without any real row."""
  return (x * real).sum(axis=-1) / jnp.maximum(real.sum(), 1)


def next_real(mask: jax.Array) -> jax.Array:
  """float [B], 0 for padding -> int32 [B], a permutation: every real clip's successor among the real ones, the last one's is
  the first; padding stays where it is."""
  real, place = mask > 0, jnp.arange(mask.shape[0])
  order = jnp.argsort(~real, stable=True)  # real clips first
  following = (jnp.cumsum(real) % jnp.maximum(real.sum(), 1)).astype(order.dtype)
  return jnp.where(real, order[following], place)
