"""What every frozen encoder offers, so that `model.forward` can run several of them in lock step.

An encoder is a linen module with `stem enter attention mlp pool` and the plain numbers `depth width num_tokens embed_dim`.
Between any two of these calls a method may change the stream (see phpjax/model.py). Encoders never change: their
parameters arrive as an argument and are never differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

LOGIT_SCALE = 2.659260036932778  # ln(1 / 0.07): where CLIP's and CLAP's log temperatures start


@flax.struct.dataclass
class Stream:
  """The tokens of one modality on their way through an encoder.

  Attributes:
    tokens: float [B, L, D].
    mask: bool [B, L], False where a key must not be attended to; None when all tokens are real.
    end: int32 [B], position of the end-of-text token; None for vision and audio.
    branch_scale: float [depth, 2, B], factors on both residual branches of every layer (stochastic depth, arXiv 1603.09382);
      only HTS-AT was trained with it and reads it.
    aside: float [B, L, D], what a method keeps beside the tokens; no encoder reads it.
  """

  tokens: jax.Array
  mask: jax.Array | None = None
  end: jax.Array | None = None
  branch_scale: jax.Array | None = None
  aside: jax.Array | None = None


@flax.struct.dataclass
class Features:
  """What `pool` gives.

  Attributes:
    pooled: float32 [B, E] whatever the weights are kept in, not normalised; shares a space with text if the encoder is `joint`.
    tokens: float [B, L, D], last-layer tokens as they leave the last block (no final norm), special tokens first.
    num_special: how many leading tokens are not patches (1 class token for a ViT, 2 for AST).
  """

  pooled: jax.Array
  tokens: jax.Array
  num_special: int = flax.struct.field(pytree_node=False, default=1)


class PrefixLike(Protocol):
  """Extra keys and values for one attention layer; the class lives in phpjax/methods/prompts.py."""

  key: jax.Array
  value: jax.Array
  at: str
  gate: jax.Array | None
  num_gated: int


def unit(x: jax.Array) -> jax.Array:
  """Unit length along the last axis."""
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True).clip(1e-6)


def activation(name: str, x: jax.Array) -> jax.Array:
  """`gelu` (exact) or `quick_gelu` (x * sigmoid(1.702 x), OpenAI CLIP)."""
  if name == "gelu":
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))  # one operation where jax.nn.gelu's erfc compiles to hundreds
  if name == "quick_gelu":
    return x * nn.sigmoid(1.702 * x)
  raise ValueError(f"unknown activation {name!r}; known: gelu, quick_gelu")


@jax.custom_vjp
def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
  """softmax(query key' / sqrt(d)) value: [B, L, H, d], [B, S, H, d] twice -> [B, L, H, d]; the softmax is float32.

  `mask` bool [B | 1, 1, L | 1, S] is False where a key must not be read.

  Its own gradient: the sum of the softmax's gradient over keys is read off the outputs (FlashAttention, arXiv 2205.14135,
  appendix B), S / d times fewer numbers than autodiff reads, and the scores are not kept beside the weights.
  """
  return _attend(query, key, value, mask)[0]


def _attend(
  query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  scores = jnp.einsum("blhd,bshd->bhls", query * query.shape[-1] ** -0.5, key, preferred_element_type=jnp.float32)
  if mask is not None:
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
  weights = nn.softmax(scores, axis=-1).astype(value.dtype)
  out = jnp.einsum("bhls,bshd->blhd", weights, value)
  return out, (query, key, value, weights, out)


def _attend_gradient(kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
  query, key, value, weights, out = kept
  total = (gradient.astype(jnp.float32) * out).sum(axis=-1).swapaxes(1, 2)[..., None]  # [B, H, L, 1]
  towards = jnp.einsum("blhd,bshd->bhls", gradient, value, preferred_element_type=jnp.float32) - total
  towards = (weights * towards * query.shape[-1] ** -0.5).astype(value.dtype)
  to_query, to_key = jnp.einsum("bhls,bshd->blhd", towards, key), jnp.einsum("bhls,blhd->bshd", towards, query)
  return to_query, to_key, jnp.einsum("bhls,blhd->bshd", weights, gradient), None


attend.defvjp(_attend, _attend_gradient)


class Attention(nn.Module):
  """Multi-head self-attention whose keys and values may be extended by a prefix.

  The three kinds of prefix differ in what they pass through:
    "input"      layer norm, then the block's key/value projections (VPT, CoPL, PTAT);
    "normed"     the projections only (PHP);
    "projected"  neither (DualPrompt's prefix tuning, CODA-Prompt).
  """

  width: int
  num_heads: int
  dtype: Any = jnp.float32
  key_bias: bool = True  # Whisper has none

  def setup(self) -> None:
    self.query = nn.Dense(self.width, dtype=self.dtype)
    self.key = nn.Dense(self.width, use_bias=self.key_bias, dtype=self.dtype)
    self.value = nn.Dense(self.width, dtype=self.dtype)
    self.out = nn.Dense(self.width, dtype=self.dtype)

  def __call__(
    self, normed: jax.Array, norm: Callable, prefix: PrefixLike | None = None, mask: jax.Array | None = None
  ) -> jax.Array:
    """normed [B, L, D], prefix keys and values [B, P, D], mask bool [B | 1, 1, L | 1, L] -> [B, L, D]."""
    query, key, value = self.query(normed), self.key(normed), self.value(normed)
    split = lambda x: x.reshape(*x.shape[:2], self.num_heads, -1)
    if prefix is not None:
      extra_key, extra_value = (x.astype(query.dtype) for x in self.project(prefix, norm))
      joined = extra_key.shape[1] - prefix.num_gated
      key = jnp.concatenate([extra_key[:, :joined], key], axis=1)
      value = jnp.concatenate([extra_value[:, :joined], value], axis=1)
      if mask is not None:  # every query sees the whole prefix
        mask = jnp.pad(mask, [(0, 0)] * 3 + [(joined, 0)], constant_values=True)
    mixed = attend(split(query), split(key), split(value), mask)
    if prefix is not None and prefix.num_gated:
      gated = attend(split(query), split(extra_key[:, joined:]), split(extra_value[:, joined:]), None)
      mixed = mixed + prefix.gate.astype(mixed.dtype) * gated
    return self.out(mixed.reshape(normed.shape))

  def project(self, prefix: PrefixLike, norm: Callable) -> tuple[jax.Array, jax.Array]:
    """Prefix [B, P, D] each -> keys and values ready to be concatenated, [B, P, D] each."""
    if prefix.at == "projected":
      return prefix.key, prefix.value
    if prefix.at == "normed":
      return self.key(prefix.key), self.value(prefix.value)
    if prefix.at == "input":
      return self.key(norm(prefix.key)), self.value(norm(prefix.value))
    raise ValueError(f"unknown prefix kind {prefix.at!r}; known: input, normed, projected")


class Block(nn.Module):
  """A transformer block in two halves, so that a method can act between them.

  Attributes:
    width, num_heads, mlp_width, activation, eps, dtype: sizes and arithmetic.
    post_norm: the norms come behind the residual sums (BERT) instead of in front of the halves; a prefix of kind "input" then
      goes through the projection only, because what attention reads has been normalised by the block before.
    layer_scale: each half is multiplied by a learned vector before it is added (DINOv2).
    key_bias: whether the key projection has a bias.
  """

  width: int
  num_heads: int
  mlp_width: int
  activation: str = "gelu"
  eps: float = 1e-5
  dtype: Any = jnp.float32
  post_norm: bool = False
  layer_scale: bool = False
  key_bias: bool = True

  def setup(self) -> None:
    self.ln_1 = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype)
    self.attn = Attention(self.width, self.num_heads, self.dtype, self.key_bias)
    self.ln_2 = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype)
    self.fc_1 = nn.Dense(self.mlp_width, dtype=self.dtype)
    self.fc_2 = nn.Dense(self.width, dtype=self.dtype)
    if self.layer_scale:
      self.scale_1, self.scale_2 = (self.param(f"layer_scale_{i}", nn.initializers.ones, (self.width,)) for i in (1, 2))

  def attention(self, tokens: jax.Array, prefix: PrefixLike | None = None, mask: jax.Array | None = None) -> jax.Array:
    """tokens [B, L, D] -> tokens + Attn(LN(tokens)), or LN(tokens + Attn(tokens)) with post_norm; [B, L, D]."""
    if self.post_norm:
      return self.ln_1(tokens + self.attn(tokens, lambda x: x, prefix, mask))
    mixed = self.attn(self.ln_1(tokens), self.ln_1, prefix, mask)
    return tokens + (mixed * self.scale_1.astype(mixed.dtype) if self.layer_scale else mixed)

  def mlp(self, tokens: jax.Array) -> jax.Array:
    """tokens [B, L, D] -> tokens + MLP(LN(tokens)), or LN(tokens + MLP(tokens)) with post_norm; [B, L, D]."""
    if self.post_norm:
      return self.ln_2(tokens + self._mlp(tokens))
    mixed = self._mlp(self.ln_2(tokens))
    return tokens + (mixed * self.scale_2.astype(mixed.dtype) if self.layer_scale else mixed)

  def _mlp(self, tokens: jax.Array) -> jax.Array:
    return self.fc_2(activation(self.activation, self.fc_1(tokens)))


class Encoder(nn.Module):
  """Base class: a stack of `Block`s. Subclasses add `stem` and `pool`, and `enter` where something happens between layers."""

  width: int
  depth: int
  num_heads: int
  embed_dim: int
  mlp_ratio: float = 4.0
  activation: str = "gelu"
  eps: float = 1e-5
  dtype: Any = jnp.float32

  @property
  def joint(self) -> bool:
    """Whether `pool` leads into a space shared with another modality, at a stored temperature (`logit_scale`)."""
    return True

  def resize_positions(self, table: np.ndarray) -> np.ndarray:
    """Position embeddings [rows, D] learned for another input size -> as many rows as this encoder has.

    Raises ValueError where the encoder knows no rule for so many rows.
    """
    raise ValueError(f"{type(self).__name__} has {self.num_tokens} positions and cannot use a table of {len(table)}")

  def layer_width(self, layer: int) -> int:
    """Channels of the tokens that layer `layer` reads; the same in all layers but in HTS-AT."""
    del layer
    return self.width

  def layer_tokens(self, layer: int) -> int:
    """Tokens that layer `layer` reads."""
    del layer
    return self.num_tokens

  def make_block(self, **options: Any) -> Block:
    """One layer of these sizes."""
    mlp_width = int(self.width * self.mlp_ratio)
    return Block(self.width, self.num_heads, mlp_width, self.activation, self.eps, self.dtype, **options)

  def make_blocks(self, **options: Any) -> list[Block]:
    """All layers."""
    return [self.make_block(**options) for _ in range(self.depth)]

  def enter(self, layer: int, stream: Stream) -> Stream:
    """Called before layer `layer`; here the identity."""
    del layer
    return stream

  def attention_mask(self, stream: Stream) -> jax.Array | None:
    """bool [B, 1, 1, L] from the stream's key mask."""
    return None if stream.mask is None else stream.mask[:, None, None, :]

  def attention(self, layer: int, stream: Stream, prefix: PrefixLike | None = None) -> Stream:
    """First half of layer `layer`."""
    return stream.replace(tokens=self.blocks[layer].attention(stream.tokens, prefix, self.attention_mask(stream)))

  def mlp(self, layer: int, stream: Stream) -> Stream:
    """Second half of layer `layer`."""
    return stream.replace(tokens=self.blocks[layer].mlp(stream.tokens))

  def layers(self, stream: Stream) -> Stream:
    """All layers with no method between them."""
    for layer in range(self.depth):
      stream = self.mlp(layer, self.attention(layer, self.enter(layer, stream)))
    return stream

  def __call__(self, inputs: jax.Array) -> Features:
    """What `stem` takes -> Features, with no method between the layers."""
    return self.pool(self.layers(self.stem(inputs)))
