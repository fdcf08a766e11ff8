"""What every frozen encoder offers, so that `model.forward` can run several of them in lock step.

An encoder is a linen module with `stem enter attention mlp pool` and the plain numbers `depth width num_tokens embed_dim`.
Between any two of these calls a method may change the stream (see phpjax/model.py). Encoders never change: their
parameters arrive as an argument and are never differentiated.
"""

from __future__ import annotations

from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn


@flax.struct.dataclass
class Stream:
  """The tokens of one modality on their way through an encoder.

  Attributes:
    tokens: float [B, L, D].
    mask: bool [B, L], False where a key must not be attended to; None when all tokens are real.
    end: int32 [B], position of the end-of-text token; None for vision and audio.
  """

  tokens: jax.Array
  mask: jax.Array | None = None
  end: jax.Array | None = None


@flax.struct.dataclass
class Features:
  """What `pool` gives.

  Attributes:
    pooled: float32 [B, E] whatever the weights are kept in, in the joint embedding space, not normalised.
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

  def setup(self) -> None:
    self.query = nn.Dense(self.width, dtype=self.dtype)
    self.key = nn.Dense(self.width, dtype=self.dtype)
    self.value = nn.Dense(self.width, dtype=self.dtype)
    self.out = nn.Dense(self.width, dtype=self.dtype)

  def __call__(
    self, normed: jax.Array, norm: nn.Module, prefix: PrefixLike | None = None, mask: jax.Array | None = None
  ) -> jax.Array:
    """normed [B, L, D], prefix keys and values [B, P, D], mask bool [B | 1, 1, L, L] -> [B, L, D]."""
    query, key, value = self.query(normed), self.key(normed), self.value(normed)
    if prefix is not None:
      extra_key, extra_value = self.project(prefix, norm)
      key = jnp.concatenate([extra_key.astype(key.dtype), key], axis=1)
      value = jnp.concatenate([extra_value.astype(value.dtype), value], axis=1)
      if mask is not None:  # every query sees the whole prefix
        mask = jnp.pad(mask, [(0, 0)] * 3 + [(extra_key.shape[1], 0)], constant_values=True)
    split = lambda x: x.reshape(*x.shape[:2], self.num_heads, -1)
    mixed = jax.nn.dot_product_attention(split(query), split(key), split(value), mask=mask)
    return self.out(mixed.reshape(normed.shape))

  def project(self, prefix: PrefixLike, norm: nn.Module) -> tuple[jax.Array, jax.Array]:
    """Prefix [B, P, D] each -> keys and values ready to be concatenated, [B, P, D] each."""
    if prefix.at == "projected":
      return prefix.key, prefix.value
    if prefix.at == "normed":
      return self.key(prefix.key), self.value(prefix.value)
    if prefix.at == "input":
      return self.key(norm(prefix.key)), self.value(norm(prefix.value))
    raise ValueError(f"unknown prefix kind {prefix.at!r}; known: input, normed, projected")


class Block(nn.Module):
  """A pre-norm transformer block in two halves, so that a method can act between them."""

  width: int
  num_heads: int
  mlp_width: int
  activation: str = "gelu"
  eps: float = 1e-5
  dtype: Any = jnp.float32

  def setup(self) -> None:
    self.ln_1 = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype)
    self.attn = Attention(self.width, self.num_heads, self.dtype)
    self.ln_2 = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype)
    self.fc_1 = nn.Dense(self.mlp_width, dtype=self.dtype)
    self.fc_2 = nn.Dense(self.width, dtype=self.dtype)

  def attention(self, tokens: jax.Array, prefix: PrefixLike | None = None, mask: jax.Array | None = None) -> jax.Array:
    """tokens [B, L, D] -> tokens + Attn(LN(tokens)), [B, L, D]."""
    return tokens + self.attn(self.ln_1(tokens), self.ln_1, prefix, mask)

  def mlp(self, tokens: jax.Array) -> jax.Array:
    """tokens [B, L, D] -> tokens + MLP(LN(tokens)), [B, L, D]."""
    return tokens + self.fc_2(activation(self.activation, self.fc_1(self.ln_2(tokens))))


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

  def make_block(self, **options: Any) -> Block:
    """One layer of these sizes."""
    mlp_width = int(self.width * self.mlp_ratio)
    return Block(self.width, self.num_heads, mlp_width, self.activation, self.eps, self.dtype, **options)

  def make_blocks(self) -> list[Block]:
    """All layers."""
    return [self.make_block() for _ in range(self.depth)]

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
