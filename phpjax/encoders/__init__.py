"""Frozen encoders. `ENCODERS` names them; `pretrained.load` opens one with its weights."""

from __future__ import annotations

from typing import Any

from phpjax.encoders.base import Encoder, Features, Stream, unit
from phpjax.encoders.bert import BERT
from phpjax.encoders.htsat import HTSAT
from phpjax.encoders.text import CLIPText
from phpjax.encoders.vit import AST, CLIPVision, DINOv2
from phpjax.encoders.whisper import Whisper

_NANO = {"width": 64, "depth": 12, "num_heads": 4, "embed_dim": 64, "activation": "quick_gelu"}
_TINY = {"width": 32, "depth": 3, "num_heads": 2, "embed_dim": 16, "mlp_ratio": 2.0, "activation": "quick_gelu"}
_BASE = {"width": 768, "depth": 12, "num_heads": 12, "embed_dim": 768}
_CLIP = {"activation": "quick_gelu"}
_CLIP_B = {**_CLIP, **_BASE, "embed_dim": 512}
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
  "clip_vit_b32": (CLIPVision, {**_CLIP_B, "patch_size": 32}),
  "clip_vit_b16": (CLIPVision, {**_CLIP_B, "patch_size": 16}),
  "clip_vit_l14": (CLIPVision, {**_CLIP, "width": 1024, "depth": 24, "num_heads": 16, "embed_dim": 768, "patch_size": 14}),
  "clip_text_b32": (CLIPText, {**_CLIP, "width": 512, "depth": 12, "num_heads": 8, "embed_dim": 512}),
  "clip_text_b16": (CLIPText, {**_CLIP, "width": 512, "depth": 12, "num_heads": 8, "embed_dim": 512}),
  "clip_text_l14": (CLIPText, {**_CLIP, "width": 768, "depth": 12, "num_heads": 12, "embed_dim": 768}),
  "ast_base": (AST, {**_BASE, "eps": 1e-6, "with_text": False}),
  "htsat_tiny": (HTSAT, {"width": 768, "depth": 12, "num_heads": 32, "embed_dim": 512}),
  "roberta_base": (
    BERT,
    {
      **_BASE,
      "embed_dim": 512,
      "vocabulary_size": 50_265,
      "num_types": 1,
      "pad_id": 1,
      "position_offset": 2,
      "pooling": "clap",
      "eps": 1e-5,
    },
  ),
  "bert_base": (BERT, _BASE),
  "minilm_l6": (BERT, {"width": 384, "depth": 6, "num_heads": 12, "embed_dim": 384}),
  "dinov2_s14": (DINOv2, {"width": 384, "depth": 12, "num_heads": 6, "embed_dim": 384, "eps": 1e-6}),
  "dinov2_b14": (DINOv2, {**_BASE, "eps": 1e-6}),
  "whisper_tiny": (Whisper, {"width": 384, "depth": 4, "num_heads": 6, "embed_dim": 384}),
  "whisper_base": (Whisper, {"width": 512, "depth": 6, "num_heads": 8, "embed_dim": 512}),
}


def make_encoder(name: str, **sizes: Any) -> Encoder:
  """The module called `name`, with `sizes` replacing entries of its table row; raises ValueError for an unknown name."""
  if name not in ENCODERS:
    raise ValueError(f"unknown encoder {name!r}; known: {', '.join(sorted(ENCODERS))}")
  module, defaults = ENCODERS[name]
  return module(**{**defaults, **sizes})


__all__ = [
  "AST",
  "BERT",
  "ENCODERS",
  "HTSAT",
  "CLIPText",
  "CLIPVision",
  "DINOv2",
  "Encoder",
  "Features",
  "Stream",
  "Whisper",
  "make_encoder",
  "unit",
]
