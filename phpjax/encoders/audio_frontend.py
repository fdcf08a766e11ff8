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


@functools.cache
def slaney_mel_bank(num_mels: int, num_fft: int, sample_rate_hz: int, low_hz: float, high_hz: float) -> np.ndarray:
  """Slaney's triangles with unit area, librosa's default: float32 [num_fft // 2 + 1, num_mels]."""
  bins = np.linspace(0, sample_rate_hz / 2, num_fft // 2 + 1)
  edges = _slaney_hz(np.linspace(*_slaney_mel(np.array([low_hz, high_hz])), num_mels + 2))
  width, rise = np.diff(edges), edges[:, None] - bins
  bank = np.maximum(0, np.minimum(-rise[:-2] / width[:-1, None], rise[2:] / width[1:, None]))
  return (bank * (2 / (edges[2:] - edges[:-2]))[:, None]).T.astype(np.float32)


def _slaney_mel(hz: np.ndarray) -> np.ndarray:
  """Linear below 1 kHz (15 mel), logarithmic above."""
  return np.where(hz >= 1000, 15 + np.log(np.maximum(hz, 1e-9) / 1000) * 27 / np.log(6.4), hz * 3 / 200)


def _slaney_hz(mel: np.ndarray) -> np.ndarray:
  return np.where(mel >= 15, 1000 * np.exp(np.log(6.4) / 27 * (mel - 15)), mel * 200 / 3)


def power_spectrogram(wave: jax.Array, num_fft: int, hop: int) -> jax.Array:
  """float [B, samples] -> float32 [B, 1 + samples // hop, num_fft // 2 + 1]: centred frames, reflected ends, periodic Hann."""
  window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(num_fft) / num_fft)).astype(np.float32)
  x = jnp.pad(wave, [(0, 0)] * (wave.ndim - 1) + [(num_fft // 2,) * 2], mode="reflect")
  index = np.arange(num_fft)[None] + hop * np.arange(1 + wave.shape[-1] // hop)[:, None]
  return jnp.abs(jnp.fft.rfft(x[..., index] * window, axis=-1)) ** 2


def log_mel(wave: jax.Array, bank: jax.Array, num_fft: int, hop: int) -> jax.Array:
  """HTS-AT's and CLAP's log-mel in decibels, no ceiling: float [B, samples], bank [bins, mels] -> float32 [B, frames, mels]."""
  mel = jnp.matmul(power_spectrogram(wave, num_fft, hop), bank, precision=jax.lax.Precision.HIGHEST)
  return 10 * jnp.log10(jnp.maximum(mel, 1e-10))


def whisper_log_mel(wave: jax.Array, num_mels: int = 80) -> jax.Array:
  """Whisper's log-mel, 8 decades below the clip's loudest: float [B, samples] at 16 kHz -> float32 [B, samples / 160, mels]."""
  power = power_spectrogram(wave, 400, 160)[..., :-1, :]
  bank = slaney_mel_bank(num_mels, 400, 16_000, 0.0, 8000.0)
  log = jnp.log10(jnp.maximum(jnp.matmul(power, bank, precision=jax.lax.Precision.HIGHEST), 1e-10))
  return (jnp.maximum(log, log.max(axis=(-2, -1), keepdims=True) - 8) + 4) / 4
