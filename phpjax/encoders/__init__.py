"""Frozen encoders. `ENCODERS` names them; `pretrained.load` opens one with its weights."""

from __future__ import annotations

from typing import Any

from phpjax.encoders.base import Encoder, Features, Stream, unit
from phpjax.encoders.text import CLIPText
from phpjax.encoders.vit import AST, CLIPVision

_NANO = {"width": 64, "depth": 12, "num_heads": 4, "embed_dim": 64, "activation": "quick_gelu"}
_TINY = {"width": 32, "depth": 3, "num_heads": 2, "embed_dim": 16, "mlp_ratio": 2.0, "activation": "quick_gelu"}
_NANO_AST = {"num_mels": 64, "patch_size": 16, "stride": 16}

# name -> (module, sizes). nano_*: trained by phpjax.pretrain and shipped with the package, for `:toybox`.
# tiny_*: random weights, for tests. The rest: weights brought by the user through phpjax.convert.
ENCODERS: dict[str, tuple[type[Encoder], dict[str, Any]]] = {
  "nano_vit": (CLIPVision, {**_NANO, "image_size": 64, "patch_size": 8}),
  "nano_ast": (AST, {**_NANO, **_NANO_AST}),
  "nano_text": (CLIPText, {**_NANO, "vocabulary_size": 256, "context_length": 40}),
  "tiny_vit": (CLIPVision, {**_TINY, "image_size": 32, "patch_size": 8}),
  "tiny_ast": (AST, {**_TINY, **_NANO_AST, "stride": 32}),
  "tiny_text": (CLIPText, {**_TINY, "vocabulary_size": 256, "context_length": 40}),
  "clip_vit_b32": (
    CLIPVision,
    {
      "width": 768,
      "depth": 12,
      "num_heads": 12,
      "embed_dim": 512,
      "activation": "quick_gelu",
      "image_size": 224,
      "patch_size": 32,
    },
  ),
  "clip_text_b32": (CLIPText, {"width": 512, "depth": 12, "num_heads": 8, "embed_dim": 512, "activation": "quick_gelu"}),
  "ast_base": (AST, {"width": 768, "depth": 12, "num_heads": 12, "embed_dim": 512}),
}


def make_encoder(name: str, **sizes: Any) -> Encoder:
  """The module called `name`, with `sizes` replacing entries of its table row; raises ValueError for an unknown name."""
  if name not in ENCODERS:
    raise ValueError(f"unknown encoder {name!r}; known: {', '.join(sorted(ENCODERS))}")
  module, defaults = ENCODERS[name]
  return module(**{**defaults, **sizes})


__all__ = ["AST", "ENCODERS", "CLIPText", "CLIPVision", "Encoder", "Features", "Stream", "make_encoder", "unit"]
