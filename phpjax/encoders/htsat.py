"""HTS-AT: a Swin transformer on a spectrogram folded into a square picture; the audio tower of CLAP."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from phpjax.encoders import audio_frontend
from phpjax.encoders.base import LOGIT_SCALE, Attention, Encoder, Features, PrefixLike, Stream, activation
from phpjax.encoders.bert import ProjectionMLP
from phpjax.encoders.resize import resize

MASKED = -100.0  # what the original adds to scores between regions that only the cyclic shift made neighbours


class WindowAttention(Attention):
  """Attention inside square windows with a learned bias per offset (Liu et al. 2021, arXiv 2103.14030).

  A prefix joins every window of its row, with zero bias.
  """

  window: int = 8
  shift: int = 0
  resolution: int = 64

  def setup(self) -> None:
    super().setup()
    rows = (2 * self.window - 1) ** 2
    self.position_bias = self.param("position_bias", nn.initializers.normal(0.02), (rows, self.num_heads))

  def __call__(
    self, normed: jax.Array, norm: Any, prefix: PrefixLike | None = None, mask: jax.Array | None = None
  ) -> jax.Array:
    """normed [B, side * side, D], prefix keys and values [B, P, D] -> [B, side * side, D]; there is no mask of tokens."""
    del mask
    windows = to_windows(normed, self.resolution, self.window, self.shift)  # [B, W, N, D]
    split = lambda x: x.reshape(*x.shape[:-1], self.num_heads, -1)
    query, key, value = (split(f(windows)) for f in (self.query, self.key, self.value))
    query = query * query.shape[-1] ** -0.5
    bias = jnp.asarray(self.position_bias)[offsets(self.window)].transpose(2, 0, 1)  # [H, N, N]
    scores = jnp.einsum("bwnhd,bwmhd->bwhnm", query, key) + bias.astype(query.dtype)
    if self.shift:
      scores = scores + shift_mask(self.resolution, self.window, self.shift)[:, None].astype(scores.dtype)
    if prefix is not None:
      extra_key, extra_value = (split(x.astype(normed.dtype)) for x in self.project(prefix, norm))  # [B, P, H, D / H]
      extra = jnp.einsum("bwnhd,bphd->bwhnp", query, extra_key)
      joined = extra.shape[-1] - prefix.num_gated
      scores = jnp.concatenate([extra[..., :joined], scores], axis=-1)
    weights = nn.softmax(scores.astype(jnp.float32), axis=-1).astype(normed.dtype)
    mixed = jnp.einsum("bwhnm,bwmhd->bwnhd", weights if prefix is None else weights[..., joined:], value)
    if prefix is not None:
      on_extra = weights[..., :joined]
      if prefix.num_gated:
        gated = prefix.gate * nn.softmax(extra[..., joined:].astype(jnp.float32), axis=-1)
        on_extra = jnp.concatenate([on_extra, gated.astype(on_extra.dtype)], axis=-1)
      mixed = mixed + jnp.einsum("bwhnp,bphd->bwnhd", on_extra, extra_value)
    return self.out(from_windows(mixed.reshape(windows.shape), self.resolution, self.window, self.shift))


def to_windows(tokens: jax.Array, side: int, window: int, shift: int) -> jax.Array:
  """[B, side * side, D] -> [B, windows, window * window, D], the picture first rolled by `shift` up and left."""
  x = tokens.reshape(tokens.shape[0], side, side, -1)
  x = jnp.roll(x, (-shift, -shift), axis=(1, 2)) if shift else x
  x = x.reshape(x.shape[0], side // window, window, side // window, window, -1).swapaxes(2, 3)
  return x.reshape(x.shape[0], -1, window * window, x.shape[-1])


def from_windows(windows: jax.Array, side: int, window: int, shift: int) -> jax.Array:
  """The inverse of `to_windows`."""
  x = windows.reshape(windows.shape[0], side // window, side // window, window, window, -1).swapaxes(2, 3)
  x = x.reshape(x.shape[0], side, side, -1)
  x = jnp.roll(x, (shift, shift), axis=(1, 2)) if shift else x
  return x.reshape(x.shape[0], side * side, -1)


def offsets(window: int) -> np.ndarray:
  """Row of the bias table for every pair of places in a window, int [N, N]."""
  place = np.stack(np.meshgrid(np.arange(window), np.arange(window), indexing="ij")).reshape(2, -1)
  difference = place[:, :, None] - place[:, None] + window - 1
  return difference[0] * (2 * window - 1) + difference[1]


def shift_mask(side: int, window: int, shift: int) -> np.ndarray:
  """0 within a region of the rolled picture, -100 between regions: float32 [windows, N, N]."""
  strip = np.repeat([0, 1, 2], [side - window, window - shift, shift])
  region = (3 * strip[:, None] + strip)[None, :, :, None]
  region = np.asarray(to_windows(region.reshape(1, -1, 1), side, window, 0))[0, :, :, 0]
  return np.where(region[:, None] == region[:, :, None], 0.0, MASKED).astype(np.float32)


class SwinBlock(nn.Module):
  """Pre-norm window attention and MLP, as one."""

  width: int
  num_heads: int
  mlp_width: int
  window: int
  shift: int
  resolution: int
  activation: str
  eps: float
  dtype: Any

  def setup(self) -> None:
    self.ln_1 = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype)
    self.attn = WindowAttention(
      self.width, self.num_heads, self.dtype, window=self.window, shift=self.shift, resolution=self.resolution
    )
    self.ln_2 = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype)
    self.fc_1 = nn.Dense(self.mlp_width, dtype=self.dtype)
    self.fc_2 = nn.Dense(self.width, dtype=self.dtype)

  def __call__(self, tokens: jax.Array, prefix: PrefixLike | None = None, scale: jax.Array | None = None) -> jax.Array:
    """[B, side * side, D], factors on the two residual branches [2, B] -> [B, side * side, D]."""
    branch = lambda x, i: x if scale is None else x * scale[i, :, None, None].astype(x.dtype)
    tokens = tokens + branch(self.attn(self.ln_1(tokens), self.ln_1, prefix), 0)
    return tokens + branch(self.fc_2(activation(self.activation, self.fc_1(self.ln_2(tokens)))), 1)


class PatchMerging(nn.Module):
  """Four neighbours become one token of twice the width: [B, side * side, C] -> [B, side * side / 4, 2 C]."""

  resolution: int
  eps: float
  dtype: Any

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    side, width = self.resolution, tokens.shape[-1]
    x = tokens.reshape(-1, side, side, width)
    x = jnp.concatenate([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], axis=-1)
    x = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype, name="norm")(x.reshape(x.shape[0], -1, 4 * width))
    return nn.Dense(2 * width, use_bias=False, dtype=self.dtype, name="reduction")(x)


class MelFrontend(nn.Module):
  """Log-mel of a wave, then a batch norm over mel bins with stored statistics. Always float32.

  The mel matrix is a parameter: CLAP's checkpoints carry their own.
  """

  num_fft: int
  hop: int
  num_mels: int
  sample_rate_hz: int
  low_hz: float
  high_hz: float

  def setup(self) -> None:
    bank = lambda rng: jnp.asarray(
      audio_frontend.slaney_mel_bank(self.num_mels, self.num_fft, self.sample_rate_hz, self.low_hz, self.high_hz)
    )
    self.mel = self.param("mel", bank)
    self.scale = self.param("scale", nn.initializers.ones, (self.num_mels,))
    self.bias = self.param("bias", nn.initializers.zeros, (self.num_mels,))
    self.mean = self.param("mean", nn.initializers.zeros, (self.num_mels,))
    self.var = self.param("var", nn.initializers.ones, (self.num_mels,))

  def log_mel(self, wave: jax.Array, mel: jax.Array | None = None) -> jax.Array:
    """float [B, samples], another mel matrix [num_fft / 2 + 1, mels] if any -> decibels, float32 [B, frames, mels]."""
    return audio_frontend.log_mel(wave, self.mel if mel is None else mel, self.num_fft, self.hop)

  def __call__(self, log_mel: jax.Array, groups: int | None = None, mask: jax.Array | None = None) -> jax.Array:
    """The batch norm; `groups`: by the statistics of each of so many groups of consecutive rows (training mode), where `mask`
    [B] is not 0."""
    mean, var, x = self.mean, self.var, log_mel
    if groups is not None:
      x = log_mel.reshape(groups, -1, log_mel.shape[-1])
      frames = jnp.ones(x.shape[:2]) if mask is None else jnp.repeat(mask, log_mel.shape[1]).reshape(x.shape[:2])
      mean = x.mean(axis=1, keepdims=True, where=frames[..., None] > 0)
      var = jnp.square(x - mean).mean(axis=1, keepdims=True, where=frames[..., None] > 0)
    return ((x - mean) * (jax.lax.rsqrt(var + 1e-5) * self.scale) + self.bias).reshape(log_mel.shape)


class HTSAT(Encoder):
  """HTS-AT (Chen et al. 2022, arXiv 2202.00874), with CLAP's projection (Wu et al. 2023, arXiv 2211.06687).

  A layer is a whole Swin block: `attention` runs it, `mlp` is the identity, because PHP and DG-SCT read audio behind whole
  blocks. `enter` merges patches where a stage begins: tokens become fewer and wider (`layer_tokens`, `layer_width`).

  Attributes:
    width: of the last stage; the first is narrower by 2 ** (stages - 1).
    depths, heads: of the stages; their sum is `depth`. num_heads is the last stage's.
    repeats: how often a clip is repeated before the spectrogram; CLAP wants ten seconds, PHP feeds it one second ten times.
    mel_rate_hz: of the mel matrix that random weights get; CLAP's own was built for 48 kHz, and PHP feeds it 32 kHz.
    mel_source: "checkpoint" takes the mel matrix of the weights, "rate" one that is built for `sample_rate_hz`.
  """

  modality: ClassVar[str] = "audio"
  depths: tuple[int, ...] = (2, 2, 6, 2)
  heads: tuple[int, ...] = (4, 8, 16, 32)
  window: int = 8
  patch_size: int = 4
  image_size: int = 256
  seconds: float = 1.0
  repeats: int = 10
  sample_rate_hz: int = 32_000
  num_fft: int = 1024
  hop: int = 320
  num_mels: int = 64
  low_hz: float = 50.0
  high_hz: float = 14_000.0
  mel_rate_hz: int = 48_000
  mel_source: str = "checkpoint"
  drop_path_rate: ClassVar[float] = 0.1  # of the last layer, in training mode; rises linearly from 0
  num_special: ClassVar[int] = 0

  @property
  def num_tokens(self) -> int:
    """Of the first stage."""
    return (self.image_size // self.patch_size) ** 2

  def stage(self, layer: int) -> tuple[int, int]:
    """(stage, index in it) of a layer."""
    for number, depth in enumerate(self.depths):
      if layer < depth:
        return number, layer
      layer -= depth
    raise ValueError(f"HTS-AT has {self.depth} layers")

  def side(self, stage: int) -> int:
    """Tokens along one side of the picture."""
    return self.image_size // self.patch_size >> stage

  def layer_width(self, layer: int) -> int:
    """Channels of the stage."""
    return self.width >> (len(self.depths) - 1 - self.stage(layer)[0])

  def layer_tokens(self, layer: int) -> int:
    """Tokens of the stage."""
    return self.side(self.stage(layer)[0]) ** 2

  def setup(self) -> None:
    if sum(self.depths) != self.depth or self.heads[-1] != self.num_heads:
      raise ValueError(f"HTS-AT of depth {self.depth} and {self.num_heads} heads: stages say {self.depths}, {self.heads}")
    if self.mel_source not in ("checkpoint", "rate"):
      raise ValueError(f"mel_source is checkpoint or rate, not {self.mel_source!r}")
    self.frontend = MelFrontend(self.num_fft, self.hop, self.num_mels, self.mel_rate_hz, self.low_hz, self.high_hz)
    patch = (self.patch_size, self.patch_size)
    self.patch_embedding = nn.Conv(self.layer_width(0), patch, patch, padding="VALID", dtype=self.dtype)
    self.ln_patch = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype)
    self.blocks = [self._block(layer) for layer in range(self.depth)]
    self.merges = [PatchMerging(self.side(stage), self.eps, self.dtype) for stage in range(len(self.depths) - 1)]
    self.ln_post = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype)
    self.projection = ProjectionMLP(self.embed_dim, self.dtype)
    self.logit_scale = self.param("logit_scale", nn.initializers.constant(LOGIT_SCALE), ())  # CLAP's logit_scale_a

  def _block(self, layer: int) -> SwinBlock:
    stage, index = self.stage(layer)
    side, width = self.side(stage), self.layer_width(layer)
    window = min(self.window, side)
    shift = window // 2 if index % 2 and window < side else 0
    mlp_width = int(width * self.mlp_ratio)
    return SwinBlock(width, self.heads[stage], mlp_width, window, shift, side, self.activation, self.eps, self.dtype)

  def stem(self, wave: jax.Array) -> Stream:
    """int16 or float [B, samples] -> tokens [B, 4096, 96]."""
    return self.embed_mel(self.log_mel(wave))

  def log_mel(self, wave: jax.Array, repeats: int | None = None) -> jax.Array:
    """int16 or float [B, samples] -> decibels, float32 [B, frames, mels]."""
    bank = None
    if self.mel_source == "rate":
      args = (self.num_mels, self.num_fft, self.sample_rate_hz, self.low_hz, self.high_hz)
      bank = jnp.asarray(audio_frontend.slaney_mel_bank(*args))
    return self.frontend.log_mel(jnp.tile(audio_frontend.to_float(wave), (1, repeats or self.repeats)), bank)

  def embed_mel(self, log_mel: jax.Array) -> Stream:
    """Decibels, float32 [B, frames, mels] -> tokens of the first stage."""
    return self.embed_normalised(self.normalise(log_mel))

  def normalise(self, log_mel: jax.Array, groups: int | None = None, mask: jax.Array | None = None) -> jax.Array:
    """The batch norm over mel bins; with `groups` in training mode, each group of rows by the statistics of its real ones."""
    return self.frontend(log_mel, groups, mask)

  def embed_normalised(self, mel: jax.Array) -> Stream:
    """What `normalise` gives -> tokens of the first stage."""
    return self.embed_picture(self.fold(mel))

  def embed_picture(self, picture: jax.Array) -> Stream:
    """A folded spectrogram, float32 [B, image_size, image_size] -> tokens of the first stage."""
    patches = self.patch_embedding(picture[..., None].astype(self.dtype))
    return Stream(self.ln_patch(patches.reshape(patches.shape[0], -1, patches.shape[-1])))

  def fold(self, mel: jax.Array) -> jax.Array:
    """[B, frames, mels] -> [B, image_size, image_size]: time stretched, cut into pieces that lie one below the other."""
    pieces = self.image_size // self.num_mels
    frames = pieces * self.image_size
    if mel.shape[1] > frames:
      raise ValueError(f"{mel.shape[1]} frames of sound do not fit HTS-AT's {frames}: shorten seconds or repeats")
    mel = resize(mel, 1, frames, align_corners=True)
    mel = mel.reshape(mel.shape[0], pieces, self.image_size, self.num_mels)
    return mel.swapaxes(2, 3).reshape(mel.shape[0], self.image_size, self.image_size)

  def enter(self, layer: int, stream: Stream) -> Stream:
    """Merges patches where a stage begins."""
    stage, index = self.stage(layer)
    return stream.replace(tokens=self.merges[stage - 1](stream.tokens)) if stage and not index else stream

  def attention(self, layer: int, stream: Stream, prefix: PrefixLike | None = None) -> Stream:
    """The whole block."""
    scale = None if stream.branch_scale is None else stream.branch_scale[layer]
    return stream.replace(tokens=self.blocks[layer](stream.tokens, prefix, scale))

  def mlp(self, layer: int, stream: Stream) -> Stream:
    """The identity: `attention` has run the whole block."""
    del layer
    return stream

  def pool(self, stream: Stream) -> Features:
    """Mean of the tokens after the last norm, projected into CLAP's space; and the raw last-layer tokens."""
    pooled = self.ln_post(stream.tokens).mean(axis=1)
    return Features(self.projection(pooled).astype(jnp.float32), stream.tokens, num_special=self.num_special)
