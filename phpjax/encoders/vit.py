"""Vision transformers for pictures (CLIP) and spectrograms (AST): the same blocks behind two stems."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from phpjax.encoders import audio_frontend
from phpjax.encoders.base import LOGIT_SCALE, Encoder, Features, Stream
from phpjax.encoders.resize import resize, resize_grid

STATISTICS = {  # mean and standard deviation per colour channel, of pixels in [0, 1]
  "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def normalise(pixels: jax.Array, statistics: str) -> jax.Array:
  """uint8 [..., H, W, 3] -> float32, scaled to [0, 1] and standardised per channel."""
  mean, std = (jnp.asarray(x, jnp.float32) for x in STATISTICS[statistics])
  return (pixels.astype(jnp.float32) / 255 - mean) / std


def resize_pixels(pixels: jax.Array, size: int) -> jax.Array:
  """uint8 [B, H, W, 3] -> uint8 [B, size, size, 3], bicubic with antialiasing as Pillow does it, within one level."""
  wanted = (*pixels.shape[:-3], size, size, pixels.shape[-1])
  resized = jax.image.resize(jnp.asarray(pixels, jnp.float32), wanted, "cubic", antialias=True)
  return jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8)


class Patches(Encoder):
  """What vision towers share: a class token in front of square patches, learned positions."""

  modality: ClassVar[str] = "visual"
  image_size: int = 224
  patch_size: int = 32
  statistics: str = "imagenet"
  num_special: ClassVar[int] = 1

  @property
  def num_tokens(self) -> int:
    """Class token and patches."""
    return 1 + (self.image_size // self.patch_size) ** 2

  def make_stem(self, bias: bool) -> None:
    """Parameters of the stem, for `setup`."""
    patch = (self.patch_size, self.patch_size)
    self.patch_embedding = nn.Conv(self.width, patch, patch, padding="VALID", use_bias=bias, dtype=self.dtype)
    self.class_embedding = self.param("class_embedding", nn.initializers.normal(0.02), (self.width,))
    self.position_embedding = self.param("position_embedding", nn.initializers.normal(0.02), (self.num_tokens, self.width))

  def stem(self, pixels: jax.Array) -> Stream:
    """uint8 [B, H, W, 3] -> tokens [B, 1 + patches, D], class token first; pictures of another size are resized."""
    if pixels.shape[1:3] != (self.image_size, self.image_size):
      pixels = resize_pixels(pixels, self.image_size)
    return self.embed_pixels(normalise(pixels, self.statistics))

  def embed_pixels(self, pixels: jax.Array) -> Stream:
    """Standardised pixels, float32 [B, H, W, 3] -> tokens as `stem` gives them."""
    patches = self.patch_embedding(pixels.astype(self.dtype))
    patches = patches.reshape(patches.shape[0], -1, self.width)
    first = jnp.broadcast_to(self.class_embedding, (patches.shape[0], 1, self.width)).astype(patches.dtype)
    return Stream(jnp.concatenate([first, patches], axis=1) + self.position_embedding.astype(patches.dtype))

  def resize_positions(self, table: np.ndarray) -> np.ndarray:
    """Bicubic, a = -0.75, the class token's row kept; raises ValueError for rows that are no square."""
    before, side = round((len(table) - 1) ** 0.5), self.image_size // self.patch_size
    if before**2 != len(table) - 1:
      raise ValueError(f"{len(table)} positions are no class token and a square of patches")
    return np.concatenate([table[:1], resize_grid(table[1:], (before, before), (side, side))])


class CLIPVision(Patches):
  """CLIP's vision tower (Radford et al. 2021, arXiv 2103.00020).

  Class token, learned positions, `ln_pre`, blocks, `ln_post`, projection.

  The stem ends before `ln_pre`, because PHP and LPI read and insert there; PHP feeds it ImageNet statistics, as released.
  """

  def setup(self) -> None:
    self.make_stem(bias=False)
    self.ln_pre = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype)
    self.blocks = self.make_blocks()
    self.ln_post = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype)
    self.projection = nn.Dense(self.embed_dim, use_bias=False, dtype=self.dtype)
    self.logit_scale = self.param("logit_scale", nn.initializers.constant(LOGIT_SCALE), ())  # log of the temperature

  def enter(self, layer: int, stream: Stream) -> Stream:
    """`ln_pre` before the first layer."""
    return stream.replace(tokens=self.ln_pre(stream.tokens)) if layer == 0 else stream

  def project(self, tokens: jax.Array) -> jax.Array:
    """[..., D] -> float32 [..., E] in the joint space, as the class token is projected."""
    return self.projection(self.ln_post(tokens)).astype(jnp.float32)

  def pool(self, stream: Stream) -> Features:
    """The projected class token and the raw last-layer tokens."""
    return Features(self.project(stream.tokens[:, 0]), stream.tokens, num_special=self.num_special)


class DINOv2(Patches):
  """DINOv2's vision transformer (Oquab et al. 2023, arXiv 2304.07193): LayerScale, exact GELU, no projection.

  `pool` gives the class token after the last norm.
  """

  patch_size: int = 14

  @property
  def joint(self) -> bool:
    """Trained on pictures alone."""
    return False

  def setup(self) -> None:
    self.make_stem(bias=True)
    self.blocks = self.make_blocks(layer_scale=True)
    self.ln_post = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype)

  def pool(self, stream: Stream) -> Features:
    """The class token after the last norm, and the raw last-layer tokens."""
    return Features(self.ln_post(stream.tokens[:, 0]).astype(jnp.float32), stream.tokens, num_special=self.num_special)


class AST(Encoder):
  """Audio Spectrogram Transformer (Gong et al. 2021, arXiv 2104.01778).

  A ViT on Kaldi filter banks with a class and a distillation token.

  `pool` averages the two tokens after the last norm and, where the encoder was trained with text, projects them.
  """

  modality: ClassVar[str] = "audio"
  seconds: float = 1.0
  sample_rate_hz: int = 16_000
  num_mels: int = 128
  patch_size: int = 16
  stride: int = 10
  mean: float = -4.2677393  # AudioSet statistics of the log filter bank
  std: float = 4.5689974
  drop_path_rate: ClassVar[float] = 0.0
  with_text: bool = True  # trained with text: has a projection and a temperature; the AudioSet weights have neither
  num_special: ClassVar[int] = 2

  @property
  def joint(self) -> bool:
    """As trained."""
    return self.with_text

  @property
  def grid(self) -> tuple[int, int]:
    """Patches along frequency and along time."""
    frames = audio_frontend.num_frames(round(self.seconds * self.sample_rate_hz), self.sample_rate_hz)
    return tuple((n - self.patch_size) // self.stride + 1 for n in (self.num_mels, frames))

  @property
  def num_tokens(self) -> int:
    """Class token, distillation token and patches."""
    return 2 + self.grid[0] * self.grid[1]

  def setup(self) -> None:
    self.patch_embedding = nn.Conv(self.width, (self.patch_size,) * 2, (self.stride,) * 2, padding="VALID", dtype=self.dtype)
    self.class_embedding = self.param("class_embedding", nn.initializers.normal(0.02), (self.width,))
    self.distillation_embedding = self.param("distillation_embedding", nn.initializers.normal(0.02), (self.width,))
    self.position_embedding = self.param("position_embedding", nn.initializers.normal(0.02), (self.num_tokens, self.width))
    self.blocks = self.make_blocks()
    self.ln_post = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype)
    if self.with_text:
      self.projection = nn.Dense(self.embed_dim, use_bias=False, dtype=self.dtype)
      self.logit_scale = self.param("logit_scale", nn.initializers.constant(LOGIT_SCALE), ())  # log of the temperature

  def stem(self, wave: jax.Array) -> Stream:
    """int16 or float [B, samples] -> tokens [B, 2 + patches, D], class and distillation token first."""
    return self.embed_normalised(self.normalise(self.log_mel(wave)))

  def log_mel(self, wave: jax.Array, repeats: int | None = None) -> jax.Array:
    """int16 or float [B, samples] -> Kaldi's log filter bank, float32 [B, frames, mels]; nothing is ever repeated here."""
    del repeats
    return audio_frontend.kaldi_fbank(audio_frontend.to_float(wave), self.sample_rate_hz, self.num_mels)

  def normalise(self, fbank: jax.Array, groups: int | None = None, mask: jax.Array | None = None) -> jax.Array:
    """By AudioSet's statistics, in training mode too."""
    del groups, mask
    return (fbank - self.mean) / (2 * self.std)

  def embed_normalised(self, fbank: jax.Array) -> Stream:
    """Standardised filter bank, float32 [B, frames, mels] -> tokens as `stem` gives them."""
    picture = fbank.swapaxes(1, 2)[..., None]  # frequency is the first image axis
    patches = self.patch_embedding(picture.astype(self.dtype))
    patches = patches.reshape(patches.shape[0], -1, self.width)
    special = jnp.stack([self.class_embedding, self.distillation_embedding]).astype(patches.dtype)
    special = jnp.broadcast_to(special, (patches.shape[0], 2, self.width))
    return Stream(jnp.concatenate([special, patches], axis=1) + self.position_embedding.astype(patches.dtype))

  def resize_positions(self, table: np.ndarray) -> np.ndarray:
    """As AST's authors do along time: a shorter clip takes the middle of the table, a longer one interpolates linearly."""
    frequencies, wanted = self.grid
    before = (len(table) - 2) // frequencies
    if before * frequencies != len(table) - 2:
      raise ValueError(f"{len(table)} positions are not two tokens and {frequencies} rows of patches")
    x = table[2:].reshape(frequencies, before, self.width)
    first = before // 2 - wanted // 2
    x = x[:, first : first + wanted] if wanted < before else resize(x, 1, wanted, "linear")
    return np.concatenate([table[:2], x.reshape(-1, self.width)])

  def pool(self, stream: Stream) -> Features:
    """Mean of the two special tokens after the last norm, projected if it can be; and the raw last-layer tokens."""
    pooled = self.ln_post(stream.tokens[:, :2]).mean(axis=1)
    pooled = self.projection(pooled) if self.with_text else pooled
    return Features(pooled.astype(jnp.float32), stream.tokens, num_special=self.num_special)
