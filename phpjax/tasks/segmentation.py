"""Audio-visual segmentation (AVSBench, Zhou et al., ECCV 2022): the pixels of what sounds."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from phpjax.tasks import conv
from phpjax.tasks.base import Task, Tree, masked_mean, softened_binary_divergence


class PixelScore(nn.Module):
  """A 1x1 convolution to one channel of features that are first multiplied by one number per pixel, <feature, heard>.

  That is the product of two numbers per pixel, so the weighted features, the largest array of the decoder, are never made.
  """

  @nn.compact
  def __call__(self, x: jax.Array, heard: jax.Array) -> jax.Array:
    """x [N, H, W, E], heard [N, E] -> [N, H, W]."""
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 1))
    both = jnp.stack([heard, jnp.broadcast_to(kernel[:, 0], heard.shape)], axis=-1)  # [N, E, 2]
    both = jnp.einsum("nhwe,nec->nhwc", x, both)
    return both[..., 0] * both[..., 1] + self.param("bias", nn.initializers.zeros, (1,))


class SegmentationHead(nn.Module):
  """PHP's AVS decoder (as released): patches upsampled by two until they reach pixels, weighted by what the class token hears.

  Biases that cannot change an output are left out: those of keys, and of convolutions in front of a batch norm.

  Attributes:
    channels: behind each doubling of the patches' grid.
    width: visual width D; embed: width E of the joint features; num_heads: of the cross attention.
    num_special: leading visual tokens that are not patches.
  """

  channels: tuple[int, ...]
  width: int
  embed: int
  num_heads: int
  num_special: int

  @nn.compact
  def __call__(self, visual: jax.Array, audio: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
    """visual [N, L, D], audio [N, K, D'], mask [N] (1: real) -> logits [N, H, W]."""
    grid = round((visual.shape[1] - self.num_special) ** 0.5)
    x = visual[:, self.num_special :].reshape(-1, grid, grid, self.width)
    x = nn.Conv(self.width // 2, (1, 1), name="reduce")(x)
    for i, channels in enumerate(self.channels):
      x = jax.image.resize(x, (x.shape[0], 2 * x.shape[1], 2 * x.shape[2], x.shape[3]), "bilinear")
      x = self.conv_norm(x, channels, f"up_{i}", mask, train)
    x = self.conv_norm(x, self.embed, "pixels", mask, train)
    return PixelScore(name="mask")(x, self.listen(visual[:, 0], audio))

  def conv_norm(self, x: jax.Array, features: int, name: str, mask: jax.Array, train: bool) -> jax.Array:
    """3x3 convolution, batch norm (in training by the statistics of the real frames given), ReLU."""
    x = conv.Conv3x3(features, name=f"{name}_conv")(x)
    norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=f"{name}_norm")
    return nn.relu(norm(x, mask=jnp.broadcast_to(mask[:, None, None, None] > 0, x.shape)))

  def listen(self, class_token: jax.Array, audio: jax.Array) -> jax.Array:
    """Cross attention: the class token [N, D] asks, the audio tokens [N, K, D'] answer -> [N, E]."""
    context = nn.Dense(self.embed, name="context")(audio)
    split = lambda y: y.reshape(*y.shape[:2], self.num_heads, -1)
    dense = lambda name, y: split(nn.Dense(self.embed, use_bias=name != "key", name=name)(y))
    heard = jax.nn.dot_product_attention(dense("query", class_token[:, None]), dense("key", context), dense("value", context))
    return nn.Dense(self.embed, name="out")(heard.reshape(heard.shape[0], -1))


@dataclasses.dataclass(frozen=True)
class AVS(Task):
  """A mask per second; training sees those of the labelled seconds only (S4: the first; MS3: all)."""

  image_size: int = 224
  kind: ClassVar[str] = "segmentation"
  distils: ClassVar[bool] = True
  device_keys: ClassVar[tuple[str, ...]] = ("visual", "audio", "label", "label_mask", "mask")

  def label_shapes(self, seconds: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """A mask for every second, and which of them count."""
    shape = (seconds, self.image_size, self.image_size)
    return {"label": (shape, jnp.uint8), "label_mask": ((seconds,), jnp.float32)}

  def head(self) -> SegmentationHead:
    """The decoder, sized by the encoders; channels are those of the release (192, 96, 64, 64, 64) at D = 768."""
    patch = self.image_size // round(self.widths.patches**0.5)
    if patch & (patch - 1):
      raise ValueError(f"AVS doubles patches up to pixels: the patch size must be a power of two, got {patch}")
    width, heads = self.widths.visual, max(self.widths.embed // 64, 4)
    channels = tuple(max(width // 2 ** (i + 2), width // 12, 16) for i in range(patch.bit_length() - 1))
    return SegmentationHead(channels, width, self.widths.embed, heads, self.widths.visual_special)

  def uncounted_flops(self, frames: int) -> float:
    """The kernels' gradients, which `conv.kernel_gradient` sums in a loop."""
    head, side = self.head(), round(self.widths.patches**0.5)
    widths = (head.width // 2, *head.channels, head.embed)
    sides = [side * 2 ** (i + 1) for i in range(len(head.channels))]
    return sum(map(functools.partial(conv.uncounted_flops, frames), (*sides, sides[-1]), widths[:-1], widths[1:]))

  def _variables(self, rng: jax.Array) -> Tree:
    visual = jnp.zeros((1, self.widths.visual_special + self.widths.patches, self.widths.visual))
    return self.head().init(rng, visual, jnp.zeros((1, 2, self.widths.audio)), jnp.ones(1), False)

  def init_head(self, rng: jax.Array) -> Tree:
    """Parameters of the decoder."""
    return self._variables(rng)["params"]

  def init_state(self) -> Tree:
    """Running statistics of the batch norms."""
    shapes = jax.eval_shape(self._variables, jax.random.key(0))["batch_stats"]
    return {norm: {"mean": jnp.zeros(x["mean"].shape), "var": jnp.ones(x["var"].shape)} for norm, x in shapes.items()}

  def predict(
    self, head: Tree, state: Tree, features: Tree, batch: Tree, *, rng: jax.Array | None, train: bool
  ) -> tuple[Tree, Tree]:
    """-> {"mask": logits [B, T, H, W]} and the new running statistics."""
    seconds = features["visual"].tokens.shape[0] // batch["mask"].shape[0]  # training may leave out unlabelled ones
    mask = jnp.repeat(batch["mask"], seconds)
    variables = {"params": head, "batch_stats": state}
    inputs = (features["visual"].tokens, features["audio"].tokens, mask, train)
    if train:
      logits, changed = self.head().apply(variables, *inputs, mutable=["batch_stats"])
      state = changed["batch_stats"]
    else:
      logits = self.head().apply(variables, *inputs)
    return {"mask": logits.reshape(-1, seconds, *logits.shape[1:])}, state

  def loss(self, outputs: Tree, batch: Tree) -> jax.Array:
    """Binary cross-entropy, mean over the pixels of the labelled seconds, then over clips."""
    logits, label = outputs["mask"], batch["label"].astype(jnp.float32)
    entropy = (jax.nn.softplus(logits) - label * logits).mean(axis=(2, 3))  # [B, T]
    weight = batch["label_mask"]
    return masked_mean((entropy * weight).sum(1) / weight.sum(1).clip(1), batch["mask"])

  def distillation(self, student: Tree, teacher: Tree, temperature: float, batch: Tree) -> jax.Array:
    """Of every pixel, mean over pixels and seconds."""
    divergence = softened_binary_divergence(student["mask"], teacher["mask"], temperature)
    return masked_mean(divergence.mean(axis=(1, 2, 3)), batch["mask"])

  def scores(self, outputs: Tree) -> Tree:
    """Logits [B, T, H, W]."""
    return {"mask": outputs["mask"]}
