"""How PHP's release runs its audio encoder, which never leaves training mode (reference table of quirks: 1, 2, 21)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TIME_WIDTH, MEL_WIDTH, STRIPES = 64, 8, 2  # SpecAugment as in torchlibrosa: widths are drawn below these


def noisy_stem(
  module: Any,
  wave: jax.Array,
  keys: jax.Array | None,
  *,
  noise: bool,
  mix: bool,
  repeats: int | None,
  mask: jax.Array | None,
) -> Any:
  """The stem of an audio encoder with what its training mode adds.

  Args:
    module: a bound encoder with log_mel, normalise, embed_normalised and drop_path_rate.
    wave: [N, samples], the seconds of all clips.
    keys: random keys [groups], one for each of so many groups of consecutive rows (one: the whole batch); None for no noise.
    noise: batch norm by each group's own statistics, SpecAugment and drop-path.
    mix: blend every row with its mirror image in its group (quirk 2).
    repeats: how often a second is repeated; None: as the encoder wants it.
    mask: float32 [N], 0 for rows that pad the batch, which neither count in statistics nor are mixed in; None: none pads.
  """
  mel = module.log_mel(wave, repeats)
  if keys is None:
    return module.embed_normalised(module.normalise(mel))
  groups, rows = len(keys), len(mel) // len(keys)
  mask = jnp.ones(len(mel)) if mask is None else mask
  grouped, real = mel.shape[1:], mask.reshape(groups, rows)
  stripes, weights, paths = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
  mel = module.normalise(mel, groups, mask) if noise else module.normalise(mel)
  mel = mel.reshape(groups, rows, *grouped)
  mel = jax.vmap(spec_augment)(stripes, mel) if noise else mel
  mel = jax.vmap(mix_mirrored)(weights, mel, real) if mix else mel
  stream = module.embed_normalised(mel.reshape(-1, *grouped))
  if not (noise and module.drop_path_rate):
    return stream
  scale = jax.vmap(lambda key: drop_path(key, module.depth, module.drop_path_rate, rows), out_axes=2)(paths)
  return stream.replace(branch_scale=scale.reshape(module.depth, 2, -1))


def clip_keys(wave: jax.Array) -> jax.Array:
  """A random key for every clip [B, ...], read off its samples: its noise at test does not depend on its neighbours."""
  whole = wave.dtype == jnp.int16
  bits = wave.astype(jnp.int32) if whole else jax.lax.bitcast_convert_type(wave.astype(jnp.float32), jnp.int32)
  return jax.vmap(lambda content: jax.random.fold_in(jax.random.key(0), content))(bits.sum(axis=tuple(range(1, wave.ndim))))


def spec_augment(rng: jax.Array, mel: jax.Array) -> jax.Array:
  """Zeroes stripes of time and of frequency, drawn for every row: float32 [N, frames, mels] (Park et al. 2019, 1904.08779)."""
  for axis, width in ((1, TIME_WIDTH), (2, MEL_WIDTH)):
    size = mel.shape[axis]
    for _ in range(STRIPES):
      rng, rng_width, rng_start = jax.random.split(rng, 3)
      lengths = jax.random.randint(rng_width, (len(mel),), 0, min(width, size))
      first = jnp.floor(jax.random.uniform(rng_start, (len(mel),)) * (size - lengths)).astype(jnp.int32)
      place = jnp.arange(size)
      hidden = (place >= first[:, None]) & (place < (first + lengths)[:, None])  # [N, size]
      mel = jnp.where(jnp.expand_dims(hidden, 3 - axis), 0.0, mel)
  return mel


def mix_mirrored(rng: jax.Array, mel: jax.Array, mask: jax.Array) -> jax.Array:
  """Row i of n blended with row n - 1 - i, a weight from Beta(1/2, 1/2) for each: [N, frames, mels]; mask [N], real rows first.

  The release does not touch the labels. How its weights of neighbouring rows depend on one another is not known here: ours
  do not.
  """
  weight = jax.random.beta(rng, 0.5, 0.5, (len(mel), 1, 1))
  mirror = (mask.sum().astype(jnp.int32) - 1 - jnp.arange(len(mel))).clip(0)
  return weight * mel + (1 - weight) * mel[mirror]


def drop_path(rng: jax.Array, depth: int, last_rate: float, rows: int) -> jax.Array:
  """Factors on the two residual branches of every layer, [depth, 2, rows]: 0 or 1 / (1 - rate)."""
  keep = 1 - np.linspace(0, last_rate, depth, dtype=np.float32)[:, None, None]
  return jax.random.bernoulli(rng, keep, (depth, 2, rows)) / keep
