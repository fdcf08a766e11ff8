"""Text towers: CLIP's causal transformer, read at the end-of-text token."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from phpjax.encoders.base import Encoder, Features, Stream


class CLIPText(Encoder):
  """CLIP's text tower (Radford et al. 2021): causal, pooled at the end-of-text token (the largest id), projected.

  Text runs `embed`, then a method may replace embeddings, then `positions` (so that context words enter before positions).
  Because attention is causal, sequences may be cut right after the longest text without changing any result.
  """

  modality: ClassVar[str] = "text"
  vocabulary_size: int = 49_408
  context_length: int = 77
  unroll: bool = False  # write the loop over layers out, for who counts the operations of a compiled program

  @property
  def num_tokens(self) -> int:
    """The longest text."""
    return self.context_length

  def setup(self) -> None:
    self.token_embedding = nn.Embed(self.vocabulary_size, self.width, dtype=self.dtype)
    self.position_embedding = self.param("position_embedding", nn.initializers.normal(0.01), (self.context_length, self.width))
    self.blocks = self.make_blocks()
    self.ln_final = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype)
    self.projection = nn.Dense(self.embed_dim, use_bias=False, dtype=self.dtype)

  def embed(self, ids: jax.Array) -> Stream:
    """int32 [B, L], padded behind the end-of-text token -> word embeddings [B, L, D] without positions."""
    return Stream(self.token_embedding(ids), end=ids.argmax(axis=-1))

  def positions(self, stream: Stream) -> Stream:
    """Adds the learned positions."""
    length = stream.tokens.shape[1]
    if length > self.context_length:
      raise ValueError(f"a text of {length} tokens does not fit the encoder's {self.context_length}")
    return stream.replace(tokens=stream.tokens + self.position_embedding[:length].astype(stream.tokens.dtype))

  def stem(self, ids: jax.Array) -> Stream:
    """int32 [B, L] -> tokens [B, L, D] with positions."""
    return self.positions(self.embed(ids))

  def attention_mask(self, stream: Stream) -> jax.Array:
    """bool [1, 1, L, L], causal."""
    length = stream.tokens.shape[1]
    return jnp.asarray(np.tril(np.ones((length, length), bool)))[None, None]

  def layers(self, stream: Stream) -> Stream:
    """All layers with no method between them, as a loop over stacked weights: class texts need nothing else, and one
    layer compiles twelve times faster than twelve."""
    if self.is_initializing():
      return super().layers(stream)
    weights = [self.variables["params"][f"blocks_{i}"] for i in range(self.depth)]
    block, mask = self.make_block(parent=None), self.attention_mask(stream)

    def layer(tokens: jax.Array, params: Any) -> tuple[jax.Array, None]:
      tokens = block.apply({"params": params}, tokens, None, mask, method="attention")
      return block.apply({"params": params}, tokens, method="mlp"), None

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *weights)
    tokens, _ = jax.lax.scan(layer, stream.tokens, stacked, unroll=self.depth if self.unroll else 1)
    return stream.replace(tokens=tokens)

  def pool(self, stream: Stream) -> Features:
    """The projected, normalised end-of-text token, and the raw last-layer tokens."""
    last = jnp.take_along_axis(stream.tokens, stream.end[:, None, None], axis=1)[:, 0]
    return Features(self.projection(self.ln_final(last)).astype(jnp.float32), stream.tokens, num_special=0)
