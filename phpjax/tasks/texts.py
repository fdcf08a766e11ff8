"""Class texts as encoders read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

VISUAL_TEXT = "x x x x {}."  # the leading words are place holders for a method's learnable context
AUDIO_TEXT = "The sounds of {}"  # CLAP tells capitals apart


def class_texts(encoders: dict[str, Any], names: Sequence[str], **templates: str) -> dict[str, tuple[Any, np.ndarray]]:
  """{"visual", "audio": (opened text tower, token ids int32 [C, L])} of classes, from opened encoders with "text" among them.

  The audio side reads the encoder "audio_text" where there is one (CLAP's own tower), else "text" too. Its texts hold the
  classes' names as the data write them, underscores included: so does PHP's release. `templates` {modality: text with {}} may
  replace both texts.
  """
  seen, heard = encoders["text"], encoders.get("audio_text", encoders["text"])
  encode = lambda tower, texts: (tower, tower.tokenizer(texts, tower.module.context_length))
  visual_text, audio_text = templates.get("visual", VISUAL_TEXT), templates.get("audio", AUDIO_TEXT)
  return {
    "visual": encode(seen, [visual_text.format(name.replace("_", " ")) for name in names]),
    "audio": encode(heard, [audio_text.format(name) for name in names]),
  }


def text_features(tower: Any, ids: np.ndarray) -> jax.Array:
  """Token ids [C, L] through an opened text tower -> float32 [C, E], not normalised."""
  return jax.jit(tower.module.apply)({"params": tower.params}, ids).pooled
