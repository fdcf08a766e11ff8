"""The published forms of every encoder, and the conversion from one: strict both ways.

Every parameter of the encoder must be fed by a rule, and every tensor of the source must be used or be listed as left out with
its reason.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from phpjax.encoders import names
from phpjax.encoders.base import Encoder
from phpjax.encoders.bert import BERT
from phpjax.encoders.htsat import HTSAT
from phpjax.encoders.text import CLIPText
from phpjax.encoders.vit import AST, CLIPVision, DINOv2
from phpjax.encoders.whisper import Whisper


@dataclasses.dataclass(frozen=True)
class Format:
  """One way in which an encoder is published.

  Attributes:
    name: for messages.
    marker: a tensor that this format has and no other.
    rules: encoder module -> its rules.
    strip: prefixes taken off source names, tried in order.
    unused: {regular expression of source names: why they are left out}.
    computed: encoder module -> {our name: array} of what the source does not store.
  """

  name: str
  marker: str
  rules: Callable[[Any], Iterator[names.Rule]]
  strip: tuple[str, ...] = ()
  unused: Mapping[str, str] = dataclasses.field(default_factory=dict)
  computed: Callable[[Any], dict[str, np.ndarray]] = lambda module: {}


OPENAI_BUFFERS = {r"input_resolution|context_length|vocab_size": "sizes"}
POSITION_IDS = {r"(.*\.)?position_ids": "0, 1, 2, ..."}
CLAP_BUFFERS = {
  r".*relative_position_index": "a table of offsets",
  r".*attn_mask": "the mask of shifted windows",
  r".*num_batches_tracked": "counts training batches",
}
FUSION = {r".*(mel_conv2d|fusion_model|fusion_).*": "the fusion branch for clips over ten seconds"}
LAION_TEXT = r"(text_branch|text_projection|logit_scale_t).*"
LAION_AUDIO = r"(audio_branch|audio_projection|logit_scale_a).*"
LAION_HEADS = {r"(text|audio)_transform\..*": "used by CLAP's training loss only"}

FORMATS: dict[type[Encoder], tuple[Format, ...]] = {
  CLIPVision: (
    Format(
      "OpenAI CLIP",
      "visual.conv1.weight",
      names.clip_vision_openai,
      unused={
        **OPENAI_BUFFERS,
        r"(transformer\.|token_embedding|positional_embedding|ln_final|text_projection).*": "text tower",
      },
    ),
    Format(
      "Hugging Face CLIP",
      "vision_model.embeddings.class_embedding",
      names.clip_vision_hf,
      unused={**POSITION_IDS, r"text_(model|projection)\..*": "text tower"},
    ),
  ),
  CLIPText: (
    Format(
      "OpenAI CLIP",
      "token_embedding.weight",
      names.clip_text_openai,
      unused={**OPENAI_BUFFERS, r"visual\..*": "picture tower", r"logit_scale": "kept with the picture tower"},
    ),
    Format(
      "Hugging Face CLIP",
      "text_model.embeddings.token_embedding.weight",
      names.clip_text_hf,
      unused={
        **POSITION_IDS,
        r"(vision_model|visual_projection)\..*": "picture tower",
        r"logit_scale": "kept with the picture tower",
      },
    ),
  ),
  AST: (
    Format(
      "AST by its authors",
      "v.dist_token",
      names.ast_original,
      strip=("module.",),
      unused={r"(mlp_head|v\.head|v\.head_dist)\..*": "classifier"},
    ),
    Format(
      "Hugging Face AST",
      "embeddings.distillation_token",
      names.ast_hf,
      strip=("audio_spectrogram_transformer.",),
      unused={r"classifier\..*": "classifier"},
    ),
  ),
  DINOv2: (
    Format(
      "Hugging Face DINOv2",
      "encoder.layer.0.layer_scale1.lambda1",
      names.dinov2_hf,
      strip=("dinov2.",),
      unused={r"embeddings\.mask_token": "masked training only", r"classifier\..*": "classifier"},
    ),
  ),
  Whisper: (
    Format(
      "Hugging Face Whisper",
      "encoder.conv1.weight",
      names.whisper_hf,
      strip=("model.",),
      unused={r"decoder\..*": "decoder", r"proj_out\..*": "decoder"},
    ),
  ),
  BERT: (
    Format(
      "LAION CLAP",
      "text_branch.embeddings.word_embeddings.weight",
      names.clap_text_laion,
      strip=("module.",),
      unused={LAION_AUDIO: "audio tower", **LAION_HEADS, **POSITION_IDS},
    ),
    Format(
      "Hugging Face CLAP",
      "text_model.embeddings.word_embeddings.weight",
      names.clap_text_hf,
      unused={
        r"(audio_model|audio_projection)\..*|logit_scale_a": "audio tower",
        **POSITION_IDS,
        r".*embeddings\.token_type_ids": "zeros",
      },
    ),
    Format(
      "Hugging Face BERT",
      "embeddings.word_embeddings.weight",
      names.bert_hf,
      strip=("bert.",),
      unused={r"pooler\..*": "not used by mean pooling", r"cls\..*": "masked-word head", **POSITION_IDS},
    ),
  ),
  HTSAT: (
    Format(
      "LAION CLAP",
      "audio_branch.patch_embed.proj.weight",
      names.htsat_laion,
      strip=("module.",),
      unused={
        LAION_TEXT: "text tower",
        **LAION_HEADS,
        **CLAP_BUFFERS,
        **FUSION,
        r"audio_branch\.spectrogram_extractor\..*": "the Fourier transform as a convolution",
        r"audio_branch\.(tscam_conv|head)\..*": "classifier",
      },
    ),
    Format(
      "Hugging Face CLAP",
      "audio_model.audio_encoder.patch_embed.proj.weight",
      names.htsat_hf,
      unused={r"(text_model|text_projection)\..*|logit_scale_t": "text tower", **CLAP_BUFFERS, **FUSION},
      computed=names.mel_of,
    ),
  ),
}


def detect(module: Encoder, found: set[str]) -> Format:
  """The format whose marker the source has; raises ValueError when there is none."""
  formats = FORMATS[type(module)]
  for candidate in formats:
    if candidate.marker in {strip(name, candidate) for name in found}:
      return candidate
  known = " or ".join(f"{f.name} ({f.marker})" for f in formats)
  some = ", ".join(sorted(found)[:3]) or "nothing"
  raise ValueError(f"holds no {known}; its tensors are {some}, ...")


def strip(name: str, source: Format) -> str:
  """A source name without the prefix that a wrapper put in front."""
  for prefix in source.strip:
    name = name.removeprefix(prefix)
  return name


def convert(
  module: Encoder, wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Callable[[], np.ndarray]]
) -> tuple[dict[str, np.ndarray], Format, dict[str, list[str]]]:
  """Source tensors -> ({our name: array}, format, {reason: source names left out}).

  Args:
    module: the encoder.
    wanted: {our name: shape}. The rows of position_embedding may be more or fewer.
    tensors: {source name: reads it}.

  Raises:
    ValueError: unknown format, or a tensor that is missing, unknown or of another shape.
  """
  source = detect(module, set(tensors))
  read = {strip(name, source): get for name, get in tensors.items()}
  out, used = source.computed(module), set()
  rules = list(source.rules(module))
  if missing := sorted({theirs for _, theirs, _ in rules} - read.keys()):
    raise ValueError(f"lacks {len(missing)} tensors of {source.name}: {', '.join(missing[:3])}")
  for ours, theirs, op in rules:
    used.add(theirs)
    out[ours] = op(read[theirs]())
  left: dict[str, list[str]] = {}
  for name in sorted(read.keys() - used):
    reason = next((why for pattern, why in source.unused.items() if re.fullmatch(pattern, name)), None)
    if reason is None:
      raise ValueError(f"holds {name}, which {source.name} has no place for: is it another architecture?")
    left.setdefault(reason, []).append(name)
  _check(out, wanted)
  return out, source, left


def _check(out: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]]) -> None:
  if out.keys() != wanted.keys():
    raise AssertionError(f"rules and encoder disagree: {sorted(out.keys() ^ wanted.keys())[:5]}")
  for name, array in out.items():
    expected = wanted[name]
    fits = array.shape[1:] == expected[1:] if name == "position_embedding" else array.shape == tuple(expected)
    if not fits:
      raise ValueError(f"has {name} of shape {array.shape}, the encoder takes {tuple(expected)}: is it another size?")
    if not np.isfinite(array).all():
      raise ValueError(f"has {name} with values that are not finite: download it again")
