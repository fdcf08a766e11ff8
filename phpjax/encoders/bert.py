"""Bidirectional text towers: BERT and RoBERTa, alone or as the text half of CLAP."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from phpjax.encoders.base import LOGIT_SCALE, Encoder, Features, Stream


class BERT(Encoder):
  """BERT (Devlin et al. 2019, arXiv 1810.04805) and RoBERTa: norms behind the residual sums, padding masked.

  Attributes:
    vocabulary_size, context_length: words and the longest text.
    pad_id: fills up shorter texts; no token attends to it.
    position_offset: the first token's row of the position table (RoBERTa: pad_id + 1).
    pooling: "mean" over the real tokens (sentence-transformers), or "clap": the first token through the pooler (tanh) and
      CLAP's two-layer projection into the space shared with audio.
  """

  modality: ClassVar[str] = "text"
  vocabulary_size: int = 30_522
  context_length: int = 512
  num_types: int = 2
  pad_id: int = 0
  position_offset: int = 0
  pooling: str = "mean"
  eps: float = 1e-12

  @property
  def num_tokens(self) -> int:
    """The longest text."""
    return self.context_length

  @property
  def joint(self) -> bool:
    """CLAP's text tower shares a space with audio, BERT alone with nothing."""
    return self.pooling == "clap"

  def setup(self) -> None:
    if self.pooling not in ("mean", "clap"):
      raise ValueError(f"unknown pooling {self.pooling!r}; known: mean, clap")
    rows = self.context_length + self.position_offset
    self.token_embedding = nn.Embed(self.vocabulary_size, self.width, dtype=self.dtype)
    self.position_embedding = self.param("position_embedding", nn.initializers.normal(0.02), (rows, self.width))
    self.type_embedding = self.param("type_embedding", nn.initializers.normal(0.02), (self.num_types, self.width))
    self.ln_embedding = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype)
    self.blocks = self.make_blocks(post_norm=True)
    if self.pooling == "clap":
      self.pooler = nn.Dense(self.width, dtype=self.dtype)
      self.projection = ProjectionMLP(self.embed_dim, self.dtype)
      self.logit_scale = self.param("logit_scale", nn.initializers.constant(LOGIT_SCALE), ())

  def embed(self, ids: jax.Array) -> Stream:
    """int32 [B, L], padded with `pad_id` -> word embeddings [B, L, D] without positions, and their mask."""
    mask = ids != self.pad_id
    return Stream(self.token_embedding(ids), mask=mask, end=mask.sum(axis=1) - 1)

  def positions(self, stream: Stream) -> Stream:
    """Adds positions and the first segment's embedding, then the norm."""
    length = stream.tokens.shape[1]
    if length > self.context_length:
      raise ValueError(f"a text of {length} tokens does not fit the encoder's {self.context_length}")
    added = self.position_embedding[self.position_offset :][:length] + self.type_embedding[0]
    return stream.replace(tokens=self.ln_embedding(stream.tokens + added.astype(stream.tokens.dtype)))

  def stem(self, ids: jax.Array) -> Stream:
    """int32 [B, L] -> tokens [B, L, D]."""
    return self.positions(self.embed(ids))

  def pool(self, stream: Stream) -> Features:
    """See `pooling`; and the last-layer tokens."""
    if self.pooling == "mean":
      weight = stream.mask.astype(jnp.float32)[..., None]
      pooled = (stream.tokens.astype(jnp.float32) * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1)
    else:
      pooled = self.projection(jnp.tanh(self.pooler(stream.tokens[:, 0])))
    return Features(pooled.astype(jnp.float32), stream.tokens, num_special=0)


class ProjectionMLP(nn.Module):
  """CLAP's projection of either tower: linear, ReLU, linear."""

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., D] -> [..., features]."""
    hidden = nn.relu(nn.Dense(self.features, dtype=self.dtype, name="fc_1")(x))
    return nn.Dense(self.features, dtype=self.dtype, name="fc_2")(hidden)
