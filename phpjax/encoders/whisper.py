"""Whisper's encoder: speech features from a convolutional stem and fixed positions."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from phpjax.encoders import audio_frontend
from phpjax.encoders.base import Encoder, Features, Stream, activation


class Whisper(Encoder):
  """Whisper's audio encoder (Radford et al. 2022, arXiv 2212.04356).

  Two convolutions halve the 100 frames per second, fixed sinusoids are added, pre-norm blocks follow. `pool` averages the
  tokens after the last norm. Clips are cut or filled with silence to `seconds`; fewer than the published 30 cost less and use
  the first positions.
  """

  modality: ClassVar[str] = "audio"
  seconds: float = 30.0
  sample_rate_hz: int = 16_000
  num_mels: int = 80
  num_special: ClassVar[int] = 0

  @property
  def joint(self) -> bool:
    """Its counterpart is a decoder."""
    return False

  @property
  def num_tokens(self) -> int:
    """50 per second."""
    return round(self.seconds * 50)

  def setup(self) -> None:
    self.conv_1 = nn.Conv(self.width, (3,), padding=1, dtype=self.dtype)
    self.conv_2 = nn.Conv(self.width, (3,), strides=2, padding=1, dtype=self.dtype)
    self.position_embedding = self.param("position_embedding", sinusoids, (self.num_tokens, self.width))
    self.blocks = self.make_blocks(key_bias=False)
    self.ln_post = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype)

  def stem(self, wave: jax.Array) -> Stream:
    """int16 or float [B, samples] -> tokens [B, 50 seconds, D]."""
    wave, samples = audio_frontend.to_float(wave), round(self.seconds * self.sample_rate_hz)
    wave = jnp.pad(wave[:, :samples], ((0, 0), (0, max(0, samples - wave.shape[1]))))
    return self.embed_mel(audio_frontend.whisper_log_mel(wave, self.num_mels))

  def embed_mel(self, log_mel: jax.Array) -> Stream:
    """float32 [B, frames, mels] -> tokens [B, frames / 2, D]."""
    x = activation("gelu", self.conv_1(log_mel.astype(self.dtype)))
    x = activation("gelu", self.conv_2(x))
    return Stream(x + self.position_embedding.astype(x.dtype))

  def resize_positions(self, table: np.ndarray) -> np.ndarray:
    """The first rows; raises ValueError for clips longer than the table."""
    if self.num_tokens > len(table):
      raise ValueError(f"Whisper has {len(table)} positions, {self.seconds:g} seconds need {self.num_tokens}")
    return table[: self.num_tokens]

  def pool(self, stream: Stream) -> Features:
    """Mean of the tokens after the last norm, and the raw last-layer tokens."""
    pooled = self.ln_post(stream.tokens).mean(axis=1)
    return Features(pooled.astype(jnp.float32), stream.tokens, num_special=self.num_special)


def sinusoids(rng: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Whisper's fixed positions, float32 [L, D]: sines, then cosines, wavelengths from 2 pi to 20000 pi."""
  del rng
  length, width = shape
  rates = np.exp(-np.log(10_000) / (width // 2 - 1) * np.arange(width // 2))
  angle = np.arange(length)[:, None] * rates
  return jnp.asarray(np.concatenate([np.sin(angle), np.cos(angle)], axis=1), jnp.float32)
