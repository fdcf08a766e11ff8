"""Filter banks in JAX: batched, jitted, on the device. librosa and HF processors serve as references in tests only."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

FRAME_SECONDS = 0.025
HOP_SECONDS = 0.010


def to_float(wave: jax.Array) -> jax.Array:
  """int16 samples -> float32 in [-1, 1); float samples are kept."""
  return wave.astype(jnp.float32) / 32768 if wave.dtype == jnp.int16 else wave.astype(jnp.float32)


def num_frames(samples: int, sample_rate_hz: int) -> int:
  """Frames that fit wholly into `samples` (Kaldi's snip_edges)."""
  frame, hop = round(FRAME_SECONDS * sample_rate_hz), round(HOP_SECONDS * sample_rate_hz)
  return 1 + (samples - frame) // hop


@functools.cache
def kaldi_mel_bank(num_mels: int, num_fft: int, sample_rate_hz: int, low_hz: float, high_hz: float) -> np.ndarray:
  """Kaldi's triangular filters, float32 [num_mels, num_fft // 2 + 1]; the last FFT bin stays out of the triangles."""
  mel = lambda hz: 1127.0 * np.log1p(hz / 700.0)
  points, low = mel(sample_rate_hz / num_fft * np.arange(num_fft // 2)), mel(low_hz)
  step = (mel(high_hz) - low) / (num_mels + 1)
  left = low + np.arange(num_mels)[:, None] * step
  centre, right = left + step, left + 2 * step
  bank = np.maximum(0.0, np.minimum((points - left) / (centre - left), (right - points) / (right - centre)))
  return np.pad(bank, ((0, 0), (0, 1))).astype(np.float32)


def kaldi_fbank(wave: jax.Array, sample_rate_hz: int = 16_000, num_mels: int = 128) -> jax.Array:
  """Kaldi log filter bank as AST takes it: float [B, samples] in [-1, 1] -> float32 [B, frames, num_mels].

  25 ms frames every 10 ms, DC removed per frame, pre-emphasis 0.97, symmetric Hann, power spectrum, 20 Hz to Nyquist.
  """
  frame, hop = round(FRAME_SECONDS * sample_rate_hz), round(HOP_SECONDS * sample_rate_hz)
  num_fft = 1 << (frame - 1).bit_length()
  index = np.arange(frame)[None] + hop * np.arange(num_frames(wave.shape[-1], sample_rate_hz))[:, None]
  x = wave[..., index]
  x = x - x.mean(axis=-1, keepdims=True)
  x = x - 0.97 * jnp.concatenate([x[..., :1], x[..., :-1]], axis=-1)
  window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(frame) / (frame - 1))
  power = jnp.abs(jnp.fft.rfft(x * window.astype(np.float32), n=num_fft, axis=-1)) ** 2
  bank = kaldi_mel_bank(num_mels, num_fft, sample_rate_hz, 20.0, sample_rate_hz / 2)
  mel = jnp.einsum("...f,mf->...m", power, bank, precision=jax.lax.Precision.HIGHEST)
  return jnp.log(jnp.maximum(mel, 1.1920928955078125e-07))
