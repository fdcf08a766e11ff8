"""How PHP's release runs its audio encoder, which never leaves training mode (reference table of quirks: 1, 2, 21)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TIME_WIDTH, MEL_WIDTH, STRIPES = 64, 8, 2  # SpecAugment as in torchlibrosa: widths are drawn below these


def noisy_stem(module: Any, wave: jax.Array, rng: jax.Array, *, groups: int, mix: bool, repeats: int | None) -> Any:
  """The stem of an audio encoder in training mode: batch norm by the statistics of the batch, SpecAugment, mix-up, drop-path.

  Args:
    module: a bound encoder with log_mel, normalise, embed_normalised and drop_path_rate.
    wave: [N, samples], the seconds of all clips.
    rng: decides the noise.
    groups: so many groups of consecutive rows are normalised each by its own statistics (1: the whole batch).
    mix: blend every row with its mirror image in its group (quirk 2).
    repeats: how often a second is repeated; None: as the encoder wants it.
  """
  rng_stripes, rng_mix, rng_path = jax.random.split(rng, 3)
  mel = module.normalise(module.log_mel(wave, repeats), groups)
  mel = spec_augment(rng_stripes, mel)
  mel = mix_mirrored(rng_mix, mel, groups) if mix else mel
  stream = module.embed_normalised(mel)
  return stream.replace(branch_scale=drop_path(rng_path, module.depth, module.drop_path_rate, len(mel)))


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


def mix_mirrored(rng: jax.Array, mel: jax.Array, groups: int) -> jax.Array:
  """Row i of a group of n blended with row n - 1 - i, a weight from Beta(1/2, 1/2) for each: [N, frames, mels].

  The release does not touch the labels. How its weights of neighbouring rows depend on one another is not known here: ours
  do not.
  """
  weight = jax.random.beta(rng, 0.5, 0.5, (len(mel), 1, 1))
  mirrored = jnp.flip(mel.reshape(groups, -1, *mel.shape[1:]), axis=1).reshape(mel.shape)
  return weight * mel + (1 - weight) * mirrored


def drop_path(rng: jax.Array, depth: int, last_rate: float, rows: int) -> jax.Array | None:
  """Factors on the two residual branches of every layer, [depth, 2, rows]: 0 or 1 / (1 - rate); None where none is dropped."""
  if not last_rate:
    return None
  keep = 1 - np.linspace(0, last_rate, depth, dtype=np.float32)[:, None, None]
  return jax.random.bernoulli(rng, keep, (depth, 2, rows)) / keep
