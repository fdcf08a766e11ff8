"""Class texts, for methods that compare features with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

from phpjax.methods.base import Backbone, Sizes

PAIR = ("visual", "audio")


def text_of(backbone: Backbone, modality: str) -> Sizes:
  """The text tower that a modality's features are compared with."""
  return backbone.audio_text or backbone.text if modality == "audio" else backbone.text


def space_problems(backbone: Backbone) -> Iterator[str]:
  """Spaces in which features and class texts cannot be compared, of encoders that say that they share one with text."""
  for m in PAIR:
    sizes, text = getattr(backbone, m), text_of(backbone, m)
    if sizes.joint and sizes.embed_dim != text.embed_dim:
      yield f"compares {m} features of size {sizes.embed_dim} with class texts of size {text.embed_dim}"


def encode(text: Any, ids: jax.Array, context: jax.Array | None = None) -> jax.Array:
  """Class texts int32 [C, L] through a bound text tower -> float32 [C, E], not normalised.

  `context` [n, D] takes the place of the n words behind the start token, which are place holders then.
  """
  stream = text.embed(ids)
  if context is not None:
    words = context.astype(stream.tokens.dtype)
    stream = stream.replace(tokens=stream.tokens.at[:, 1 : 1 + len(words)].set(words))
  return text.pool(text.layers(text.positions(stream))).pooled
