"""Every layer of every encoder equals Hugging Face transformers' (torch, CPU) on the same random weights, read from disk.

Needs the extra `parity` and runs only when asked for (marker `parity`): tiny models of every architecture, then the
published sizes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phpjax import convert
from phpjax.encoders import pretrained, vit
from phpjax.encoders.bert import BERT
from phpjax.encoders.htsat import HTSAT

pytestmark = pytest.mark.parity
LAYER, POOLED = 1e-4, 1e-4  # largest difference over the largest number
TOKENIZER = pretrained.SHIPPED / "nano_text" / "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Case:
  """One encoder against its counterpart.

  Attributes:
    encoder, modality: ours.
    kind: of the config and the model in transformers, e.g. "CLIP".
    tiny: (their config's arguments, our sizes) of a small model; {} of both is the published size.
    tower: model -> the part whose blocks are compared.
    inputs: (module, rng) -> (what `enter` takes of ours, keyword arguments of theirs).
    enter: our method from those inputs to a stream.
    theirs: (model, keyword arguments) -> pooled output.
    model: class in transformers.
  """

  encoder: str
  modality: str
  kind: str
  tiny: tuple[dict[str, Any], dict[str, Any]]
  tower: Callable[[Any], Any]
  inputs: Callable[[Any, np.random.Generator], tuple[Any, dict[str, Any]]]
  enter: str
  theirs: Callable[[Any, dict[str, Any]], Any]
  full: dict[str, Any] = dataclasses.field(default_factory=dict)  # their config's arguments for our published size


def pixels(module, rng):
  raw = rng.integers(0, 256, (2, module.image_size, module.image_size, 3), dtype=np.uint8)
  standard = np.asarray(vit.normalise(raw, module.statistics)).transpose(0, 3, 1, 2)
  return raw, {"pixel_values": standard.copy()}


def fbank(module, rng):
  frames = module.patch_size + (module.grid[1] - 1) * module.stride
  frames = max(frames, 98)  # one second
  x = rng.normal(0, 0.5, (2, frames, module.num_mels)).astype(np.float32)
  return x, {"input_values": x}


def mel(module, rng):
  frames = module.image_size**2 // module.num_mels - 23
  x = rng.normal(-30, 15, (2, frames, module.num_mels)).astype(np.float32)
  return x, {"input_features": x[:, None], "is_longer": np.zeros((2, 1), bool)}


def speech(module, rng):
  x = rng.normal(0, 0.5, (2, 2 * module.num_tokens, module.num_mels)).astype(np.float32)
  return x, {"input_features": x.transpose(0, 2, 1).copy()}


def words(module, rng):
  """Two texts, the second shorter; ends where each kind of tower wants it."""
  length, pad = min(12, module.context_length), getattr(module, "pad_id", None)
  ids = rng.integers(3, module.vocabulary_size - 2, (2, length), dtype=np.int64)
  mask = np.ones_like(ids)
  mask[1, length - 4 :] = 0
  if pad is None:  # CLIP: the end of text is the largest id
    ids[0, -1] = ids[1, length - 5] = module.vocabulary_size - 1
  ids = np.where(mask, ids, pad or 0)
  return ids.astype(np.int32), {"input_ids": ids, "attention_mask": mask}


def clip(vision: dict[str, Any], text: dict[str, Any], dim: int) -> dict[str, Any]:
  return {"vision_config": vision, "text_config": text, "projection_dim": dim}


_NARROW = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_CLIP_TINY = clip(
  {
    **_NARROW,
    "image_size": 32,
    "patch_size": 8,
  },
  {
    **_NARROW,
    "vocab_size": 64,
    "max_position_embeddings": 16,
    "eos_token_id": 63,
    "bos_token_id": 62,
    "pad_token_id": 0,
  },
  16,
)
_SMALL = {"width": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0}
_CLAP_AUDIO = {
  "image_size": 64,
  "num_mel_bins": 16,
  "window_size": 4,
  "spec_size": 64,
  "patch_size": 4,
  "patch_stride": [4, 4],
  "hidden_size": 64,
  "patch_embeds_hidden_size": 16,
  "depths": [2, 2, 2],
  "num_hidden_layers": 3,
  "num_attention_heads": [2, 4, 4],
  "projection_dim": 16,
  "enable_fusion": False,
  "mlp_ratio": 2.0,
}
_CLAP_TEXT = {
  **_NARROW,
  "vocab_size": 64,
  "max_position_embeddings": 18,
  "projection_dim": 16,
  "layer_norm_eps": 1e-5,
}
_CLAP_TINY = {"audio_config": _CLAP_AUDIO, "text_config": _CLAP_TEXT, "projection_dim": 16}
_CLAP_FULL = {
  "audio_config": {"enable_fusion": False},
  "text_config": {"layer_norm_eps": 1e-5, "vocab_size": 50_265, "type_vocab_size": 1},
}

_TEXT_ENDS = {"eos_token_id": 49_407, "bos_token_id": 49_406}

CASES = [
  Case(
    "clip_vit_b32",
    "visual",
    "CLIP",
    (_CLIP_TINY, {**_SMALL, "embed_dim": 16, "image_size": 32, "patch_size": 8}),
    lambda m: m.vision_model,
    pixels,
    "stem",
    lambda m, x: m.visual_projection(m.vision_model(**x).pooler_output),
  ),
  Case(
    "clip_text_b32",
    "text",
    "CLIP",
    (_CLIP_TINY, {**_SMALL, "embed_dim": 16, "vocabulary_size": 64, "context_length": 16}),
    lambda m: m.text_model,
    words,
    "stem",
    lambda m, x: m.text_projection(m.text_model(**x).pooler_output),
    # OpenAI's own end-of-text id, so that the text tower pools where it does
    clip({}, _TEXT_ENDS, 512),
  ),
  Case(
    "ast_base",
    "audio",
    "AST",
    (
      {
        **_NARROW,
        "num_mel_bins": 48,
        "max_length": 98,
        "layer_norm_eps": 1e-6,
      },
      {**_SMALL, "embed_dim": 32, "num_mels": 48},
    ),
    lambda m: m,
    fbank,
    "embed_normalised",
    lambda m, x: m(**x).pooler_output,
    {"max_length": 98, "layer_norm_eps": 1e-6},
  ),
  Case(
    "dinov2_s14",
    "visual",
    "Dinov2",
    (
      {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "mlp_ratio": 2, "image_size": 42, "patch_size": 14},
      {**_SMALL, "embed_dim": 32, "image_size": 42},
    ),
    lambda m: m,
    pixels,
    "stem",
    lambda m, x: m(**x).pooler_output,
    {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518},
  ),
  Case(
    "whisper_tiny",
    "audio",
    "Whisper",
    (
      {
        "d_model": 32,
        "encoder_layers": 3,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_layers": 1,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 64,
        "vocab_size": 64,
        "max_source_positions": 50,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
      },
      {**_SMALL, "embed_dim": 32, "seconds": 1.0},
    ),
    lambda m: m.encoder,
    speech,
    "embed_mel",
    lambda m, x: m.encoder(**x).last_hidden_state.mean(1),
  ),
  Case(
    "minilm_l6",
    "text",
    "Bert",
    (
      {
        **_NARROW,
        "vocab_size": 64,
        "max_position_embeddings": 16,
      },
      {**_SMALL, "embed_dim": 32, "vocabulary_size": 64, "context_length": 16},
    ),
    lambda m: m,
    words,
    "stem",
    lambda m, x: mean_of_real(m(**x).last_hidden_state, x["attention_mask"]),
    {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6},
  ),
  Case(
    "htsat_tiny",
    "audio",
    "Clap",
    (
      _CLAP_TINY,
      {
        "width": 64,
        "depth": 6,
        "num_heads": 4,
        "embed_dim": 16,
        "mlp_ratio": 2.0,
        "depths": (2, 2, 2),
        "heads": (2, 4, 4),
        "window": 4,
        "image_size": 64,
        "num_mels": 16,
        "seconds": 1.0,
        "repeats": 2,
      },
    ),
    lambda m: m.audio_model.audio_encoder,
    mel,
    "embed_mel",
    lambda m, x: m.audio_projection(m.audio_model(**x).pooler_output),
    _CLAP_FULL,
  ),
  Case(
    "roberta_base",
    "text",
    "Clap",
    (_CLAP_TINY, {**_SMALL, "embed_dim": 16, "vocabulary_size": 64, "context_length": 16, "num_types": 1}),
    lambda m: m.text_model,
    words,
    "stem",
    lambda m, x: m.text_projection(m.text_model(**x).pooler_output),
    _CLAP_FULL,
  ),
]
ONLY_FULL = [
  ("clip_vit_b16", "clip_vit_b32", clip({"patch_size": 16}, {}, 512)),
  (
    "clip_vit_l14",
    "clip_vit_b32",
    clip(
      {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14},
      {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
      768,
    ),
  ),
  ("clip_text_b16", "clip_text_b32", clip(_NARROW, _TEXT_ENDS, 512)),
  (
    "clip_text_l14",
    "clip_text_b32",
    clip(_NARROW, {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, **_TEXT_ENDS}, 768),
  ),
  ("dinov2_b14", "dinov2_s14", {"image_size": 518}),
  (
    "whisper_base",
    "whisper_tiny",
    {
      "d_model": 512,
      "encoder_layers": 6,
      "encoder_attention_heads": 8,
      "encoder_ffn_dim": 2048,
      "decoder_layers": 1,
      "decoder_attention_heads": 8,
      "decoder_ffn_dim": 64,
    },
  ),
  ("bert_base", "minilm_l6", {}),
]


def mean_of_real(tokens, mask):
  return (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)


def build(kind, arguments, folder):
  """A model with weights of every size that matters, saved as a Hugging Face folder."""
  import torch
  import transformers

  torch.manual_seed(0)
  config = getattr(transformers, f"{kind}Config")(**arguments)
  model = getattr(transformers, f"{kind}Model")(config).eval()
  with torch.no_grad():
    for name, p in model.named_parameters():
      if p.ndim >= 2:
        p.normal_(0, float(np.prod(p.shape[1:])) ** -0.5)
      elif name.endswith("weight") or "lambda" in name:
        p.normal_(1, 0.1)
      elif p.ndim:
        p.normal_(0, 0.05)
    for name, buffer in model.named_buffers():
      if name.endswith("running_var"):
        buffer.uniform_(100, 300)
      elif name.endswith("running_mean"):
        buffer.normal_(-30, 5)
  model.save_pretrained(folder)
  return model


def blocks_of(tower, depth):
  """The tower's blocks, stages joined."""
  import torch

  lists = [m for m in tower.modules() if isinstance(m, torch.nn.ModuleList)]
  for found in lists:
    if len(found) == depth and not hasattr(found[0], "blocks"):
      return list(found)
  return [block for found in lists for stage in found if hasattr(stage, "blocks") for block in stage.blocks]


def run_theirs(case, model, inputs, depth):
  """-> (output of every block, pooled)."""
  import torch

  states = []
  keep = lambda module, arguments, output: states.append((output[0] if isinstance(output, tuple) else output).numpy())
  blocks = blocks_of(case.tower(model), depth)
  assert len(blocks) == depth
  handles = [block.register_forward_hook(keep) for block in blocks]
  with torch.inference_mode():
    pooled = case.theirs(model, {k: torch.from_numpy(v) for k, v in inputs.items()}).numpy()
  for handle in handles:
    handle.remove()
  return states, pooled


def run_ours(encoder, enter, inputs):
  """-> (tokens after every layer, pooled), jitted at once."""

  def forward(params, x):
    module = encoder.module.bind({"params": params})
    stream, states = getattr(module, enter)(x), []
    for layer in range(module.depth):
      stream = module.mlp(layer, module.attention(layer, module.enter(layer, stream)))
      states.append(stream.tokens)
    return states, module.pool(stream).pooled

  with jax.default_matmul_precision("highest"):
    return jax.device_get(jax.jit(forward)(encoder.params, inputs))


def relative(ours, theirs):
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


def compare(case, encoder_name, arguments, sizes, tmp_path, dtype=jnp.float32):
  model = build(case.kind, arguments, tmp_path / "source")
  convert.convert(encoder_name, tmp_path / "source", tmp_path / "out", tokenizer_source=TOKENIZER, **sizes)
  options = {"seconds": 30.0} if case.kind == "Whisper" and not sizes else {}
  encoder = pretrained.load(encoder_name, str(tmp_path / "out"), modality=case.modality, dtype=dtype, **options)
  ours, theirs = case.inputs(encoder.module, np.random.default_rng(1))
  mine, other = run_ours(encoder, case.enter, ours), run_theirs(case, model, theirs, encoder.module.depth)
  # What padding computes is nobody's business: no real token reads it.
  real = theirs.get("attention_mask", np.ones((len(mine[1]), 1)))[..., None]
  shaped = lambda states: [state.reshape(mine[0][i].shape) * real for i, state in enumerate(states)]
  return (shaped(mine[0]), mine[1]), (shaped(other[0]), other[1])


def check(ours, theirs):
  for layer, (a, b) in enumerate(zip(ours[0], theirs[0], strict=True)):
    assert relative(a, b) <= LAYER, f"layer {layer}"
  assert relative(ours[1], theirs[1]) <= POOLED


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.encoder)
def test_tiny(case, tmp_path):
  check(*compare(case, case.encoder, *case.tiny, tmp_path))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.encoder)
def test_full_size(case, tmp_path):
  check(*compare(case, case.encoder, case.full, {}, tmp_path))


@pytest.mark.parametrize("size", ["tiny", "full"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.encoder)
def test_bfloat16(case, size, tmp_path):
  arguments, sizes = case.tiny if size == "tiny" else (case.full, {})
  (_, ours), (_, theirs) = compare(case, case.encoder, arguments, sizes, tmp_path, dtype=jnp.bfloat16)
  cosine = (ours * theirs).sum(-1) / (np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1))
  assert cosine.min() >= 0.999


@pytest.mark.parametrize(("encoder", "like", "arguments"), ONLY_FULL, ids=[name for name, *_ in ONLY_FULL])
def test_other_full_sizes(encoder, like, arguments, tmp_path):
  case = next(c for c in CASES if c.encoder == like)
  check(*compare(case, encoder, arguments, {}, tmp_path))


def test_every_published_encoder_is_compared():
  from phpjax.encoders import ENCODERS

  compared = {c.encoder for c in CASES} | {name for name, *_ in ONLY_FULL}
  assert {n for n in ENCODERS if not n.startswith(("nano", "tiny"))} == compared
  assert BERT in {ENCODERS[c][0] for c in compared} and HTSAT in {ENCODERS[c][0] for c in compared}
