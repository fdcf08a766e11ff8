"""Rules from the names and layouts of published checkpoints to ours, one generator per encoder and publisher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from phpjax.encoders.audio_frontend import slaney_mel_bank
from phpjax.encoders.base import Encoder

Op = Callable[[np.ndarray], np.ndarray]
Rule = tuple[str, str, Op]  # (our name, source name, what is done to the array)


# -- what is done to an array ------------------------------------------------------------------------------------------


def same(x: np.ndarray) -> np.ndarray:
  """As it is."""
  return x


def linear(x: np.ndarray) -> np.ndarray:
  """torch's [out, in] -> [in, out]."""
  return x.T


def conv(x: np.ndarray) -> np.ndarray:
  """torch's [out, in, ...] -> [..., in, out]."""
  return np.moveaxis(x, (0, 1), (-1, -2))


def flat(x: np.ndarray) -> np.ndarray:
  """[1, 1, D] -> [D]."""
  return x.reshape(-1)


def rows(x: np.ndarray) -> np.ndarray:
  """[1, L, D] -> [L, D]."""
  return x.reshape(x.shape[-2:])


def third(part: int, op: Op) -> Op:
  """One of three matrices packed along the first axis: query 0, key 1, value 2."""
  return lambda x: op(np.split(x, 3)[part])


# -- parts of a network ------------------------------------------------------------------------------------------------


def dense(ours: str, source: str, bias: bool = True) -> Iterator[Rule]:
  """A linear layer."""
  yield f"{ours}/kernel", f"{source}.weight", linear
  if bias:
    yield f"{ours}/bias", f"{source}.bias", same


def norm(ours: str, source: str) -> Iterator[Rule]:
  """A layer norm."""
  yield f"{ours}/scale", f"{source}.weight", same
  yield f"{ours}/bias", f"{source}.bias", same


def convolution(ours: str, source: str, bias: bool = True) -> Iterator[Rule]:
  """A convolution."""
  yield f"{ours}/kernel", f"{source}.weight", conv
  if bias:
    yield f"{ours}/bias", f"{source}.bias", same


def packed(ours: str, weight: str, bias: str) -> Iterator[Rule]:
  """Query, key and value in one matrix."""
  for part, name in enumerate(("query", "key", "value")):
    yield f"{ours}/{name}/kernel", weight, third(part, linear)
    yield f"{ours}/{name}/bias", bias, third(part, same)


def layers(module: Encoder, source: str, parts: Mapping[str, str], key_bias: bool = True) -> Iterator[Rule]:
  """All blocks; `source` with {i} for the layer's number, `parts` our name -> source name. "qkv" is a packed linear layer,
  "in_proj" torch's own packed attention."""
  for i in range(module.depth):
    yield from block(f"blocks_{i}", source.format(i=i), parts, key_bias)


def block(ours: str, source: str, parts: Mapping[str, str], key_bias: bool = True) -> Iterator[Rule]:
  """One block, see `layers`."""
  for name, theirs in parts.items():
    there = f"{source}.{theirs}"
    if name == "in_proj":
      yield from packed(f"{ours}/attn", f"{there}_weight", f"{there}_bias")
    elif name == "qkv":
      yield from packed(f"{ours}/attn", f"{there}.weight", f"{there}.bias")
    elif name.startswith("ln"):
      yield from norm(f"{ours}/{name}", there)
    elif name.startswith("layer_scale"):
      yield f"{ours}/{name}", there, same
    elif name.startswith("fc"):
      yield from dense(f"{ours}/{name}", there)
    else:
      yield from dense(f"{ours}/attn/{name}", there, bias=key_bias or name != "key")


OPENAI_BLOCK = {"in_proj": "attn.in_proj", "out": "attn.out_proj", "ln_1": "ln_1", "ln_2": "ln_2"}
OPENAI_BLOCK |= {"fc_1": "mlp.c_fc", "fc_2": "mlp.c_proj"}
TIMM_BLOCK = {"qkv": "attn.qkv", "out": "attn.proj", "ln_1": "norm1", "ln_2": "norm2", "fc_1": "mlp.fc1", "fc_2": "mlp.fc2"}
HF_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
HF_CLIP_BLOCK = {k: f"self_attn.{v}" for k, v in HF_PROJECTIONS.items()}
HF_CLIP_BLOCK |= {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "fc_1": "mlp.fc1", "fc_2": "mlp.fc2"}
HF_WHISPER_BLOCK = {k: f"self_attn.{v}" for k, v in HF_PROJECTIONS.items()}
HF_WHISPER_BLOCK |= {"ln_1": "self_attn_layer_norm", "ln_2": "final_layer_norm", "fc_1": "fc1", "fc_2": "fc2"}
HF_VIT_ATTENTION = {k: f"attention.attention.{k}" for k in ("query", "key", "value")} | {"out": "attention.output.dense"}
HF_AST_BLOCK = {**HF_VIT_ATTENTION, "ln_1": "layernorm_before", "ln_2": "layernorm_after"}
HF_AST_BLOCK |= {"fc_1": "intermediate.dense", "fc_2": "output.dense"}
HF_DINO_BLOCK = {**HF_VIT_ATTENTION, "ln_1": "norm1", "ln_2": "norm2", "fc_1": "mlp.fc1", "fc_2": "mlp.fc2"}
HF_DINO_BLOCK |= {f"layer_scale_{i}": f"layer_scale{i}.lambda1" for i in (1, 2)}
HF_SELF_ATTENTION = {k: f"attention.self.{k}" for k in ("query", "key", "value")} | {"out": "attention.output.dense"}
HF_BERT_BLOCK = {**HF_SELF_ATTENTION, "ln_1": "attention.output.LayerNorm", "ln_2": "output.LayerNorm"}
HF_BERT_BLOCK |= {"fc_1": "intermediate.dense", "fc_2": "output.dense"}
HF_SWIN_BLOCK = {**HF_SELF_ATTENTION, "ln_1": "layernorm_before", "ln_2": "layernorm_after"}
HF_SWIN_BLOCK |= {"fc_1": "intermediate.dense", "fc_2": "output.dense"}


# -- whole encoders ----------------------------------------------------------------------------------------------------


def clip_vision_openai(module: Encoder) -> Iterator[Rule]:
  """OpenAI's CLIP, picture tower."""
  yield from convolution("patch_embedding", "visual.conv1", bias=False)
  yield "class_embedding", "visual.class_embedding", same
  yield "position_embedding", "visual.positional_embedding", same
  yield from norm("ln_pre", "visual.ln_pre")
  yield from layers(module, "visual.transformer.resblocks.{i}", OPENAI_BLOCK)
  yield from norm("ln_post", "visual.ln_post")
  yield "projection/kernel", "visual.proj", same
  yield "logit_scale", "logit_scale", same


def clip_vision_hf(module: Encoder) -> Iterator[Rule]:
  """transformers' CLIP, picture tower."""
  yield from convolution("patch_embedding", "vision_model.embeddings.patch_embedding", bias=False)
  yield "class_embedding", "vision_model.embeddings.class_embedding", same
  yield "position_embedding", "vision_model.embeddings.position_embedding.weight", same
  yield from norm("ln_pre", "vision_model.pre_layrnorm")
  yield from layers(module, "vision_model.encoder.layers.{i}", HF_CLIP_BLOCK)
  yield from norm("ln_post", "vision_model.post_layernorm")
  yield "projection/kernel", "visual_projection.weight", linear
  yield "logit_scale", "logit_scale", same


def clip_text_openai(module: Encoder) -> Iterator[Rule]:
  """OpenAI's CLIP, text tower."""
  yield "token_embedding/embedding", "token_embedding.weight", same
  yield "position_embedding", "positional_embedding", same
  yield from layers(module, "transformer.resblocks.{i}", OPENAI_BLOCK)
  yield from norm("ln_final", "ln_final")
  yield "projection/kernel", "text_projection", same


def clip_text_hf(module: Encoder) -> Iterator[Rule]:
  """transformers' CLIP, text tower."""
  yield "token_embedding/embedding", "text_model.embeddings.token_embedding.weight", same
  yield "position_embedding", "text_model.embeddings.position_embedding.weight", same
  yield from layers(module, "text_model.encoder.layers.{i}", HF_CLIP_BLOCK)
  yield from norm("ln_final", "text_model.final_layer_norm")
  yield "projection/kernel", "text_projection.weight", linear


def ast_original(module: Encoder) -> Iterator[Rule]:
  """The authors' AST (timm's DeiT inside)."""
  yield from convolution("patch_embedding", "v.patch_embed.proj")
  yield "class_embedding", "v.cls_token", flat
  yield "distillation_embedding", "v.dist_token", flat
  yield "position_embedding", "v.pos_embed", rows
  yield from layers(module, "v.blocks.{i}", TIMM_BLOCK)
  yield from norm("ln_post", "v.norm")


def ast_hf(module: Encoder) -> Iterator[Rule]:
  """transformers' AST."""
  yield from convolution("patch_embedding", "embeddings.patch_embeddings.projection")
  yield "class_embedding", "embeddings.cls_token", flat
  yield "distillation_embedding", "embeddings.distillation_token", flat
  yield "position_embedding", "embeddings.position_embeddings", rows
  yield from layers(module, "encoder.layer.{i}", HF_AST_BLOCK)
  yield from norm("ln_post", "layernorm")


def dinov2_hf(module: Encoder) -> Iterator[Rule]:
  """transformers' DINOv2."""
  yield from convolution("patch_embedding", "embeddings.patch_embeddings.projection")
  yield "class_embedding", "embeddings.cls_token", flat
  yield "position_embedding", "embeddings.position_embeddings", rows
  yield from layers(module, "encoder.layer.{i}", HF_DINO_BLOCK)
  yield from norm("ln_post", "layernorm")


def whisper_hf(module: Encoder) -> Iterator[Rule]:
  """transformers' Whisper, encoder."""
  for i in (1, 2):
    yield from convolution(f"conv_{i}", f"encoder.conv{i}")
  yield "position_embedding", "encoder.embed_positions.weight", same
  yield from layers(module, "encoder.layers.{i}", HF_WHISPER_BLOCK, key_bias=False)
  yield from norm("ln_post", "encoder.layer_norm")


def _bert(module: Any, source: str) -> Iterator[Rule]:
  yield "token_embedding/embedding", f"{source}embeddings.word_embeddings.weight", same
  # RoBERTa's first rows belong to padding; they are kept, so that the file is the published table
  yield "position_embedding", f"{source}embeddings.position_embeddings.weight", same
  yield "type_embedding", f"{source}embeddings.token_type_embeddings.weight", same
  yield from norm("ln_embedding", f"{source}embeddings.LayerNorm")
  yield from layers(module, source + "encoder.layer.{i}", HF_BERT_BLOCK)
  if module.pooling == "clap":
    yield from dense("pooler", f"{source}pooler.dense")


def bert_hf(module: Encoder) -> Iterator[Rule]:
  """transformers' BERT, sentence-transformers' MiniLM."""
  yield from _bert(module, "")


def clap_text_hf(module: Encoder) -> Iterator[Rule]:
  """transformers' CLAP, text tower."""
  yield from _bert(module, "text_model.")
  for i in (1, 2):
    yield from dense(f"projection/fc_{i}", f"text_projection.linear{i}")
  yield "logit_scale", "logit_scale_t", same


def clap_text_laion(module: Encoder) -> Iterator[Rule]:
  """LAION's CLAP, text tower."""
  yield from _bert(module, "text_branch.")
  for i, place in ((1, 0), (2, 2)):
    yield from dense(f"projection/fc_{i}", f"text_projection.{place}")
  yield "logit_scale", "logit_scale_t", same


def swin(module: Any, source: str, parts: Mapping[str, str], position_bias: str) -> Iterator[Rule]:
  """All of HTS-AT between spectrogram and projection."""
  for layer in range(module.depth):
    stage, index = module.stage(layer)
    there = f"{source}layers.{stage}.blocks.{index}"
    yield from block(f"blocks_{layer}", there, parts)
    yield f"blocks_{layer}/attn/position_bias", f"{there}.{position_bias}", same
  for stage in range(len(module.depths) - 1):
    yield f"merges_{stage}/reduction/kernel", f"{source}layers.{stage}.downsample.reduction.weight", linear
    yield from norm(f"merges_{stage}/norm", f"{source}layers.{stage}.downsample.norm")
  yield from convolution("patch_embedding", f"{source}patch_embed.proj")
  yield from norm("ln_patch", f"{source}patch_embed.norm")
  yield from norm("ln_post", f"{source}norm")


def batch_norm(source: str) -> Iterator[Rule]:
  """HTS-AT's batch norm over mel bins."""
  yield from norm("frontend", source)
  yield "frontend/mean", f"{source}.running_mean", same
  yield "frontend/var", f"{source}.running_var", same


def htsat_laion(module: Encoder) -> Iterator[Rule]:
  """LAION's CLAP, audio tower; of the fusion model the plain branch."""
  yield "frontend/mel", "audio_branch.logmel_extractor.melW", same
  yield from batch_norm("audio_branch.bn0")
  yield from swin(module, "audio_branch.", TIMM_BLOCK, "attn.relative_position_bias_table")
  for i, place in ((1, 0), (2, 2)):
    yield from dense(f"projection/fc_{i}", f"audio_projection.{place}")
  yield "logit_scale", "logit_scale_a", same


def htsat_hf(module: Encoder) -> Iterator[Rule]:
  """transformers' CLAP, audio tower."""
  source = "audio_model.audio_encoder."
  yield from batch_norm(f"{source}batch_norm")
  yield from swin(module, source, HF_SWIN_BLOCK, "attention.self.relative_position_bias_table")
  for i in (1, 2):
    yield from dense(f"projection/fc_{i}", f"audio_projection.linear{i}")
  yield "logit_scale", "logit_scale_a", same


def mel_of(module: Any) -> dict[str, np.ndarray]:
  """The mel matrix of a source that leaves it to its feature extractor."""
  return {"frontend/mel": slaney_mel_bank(module.num_mels, module.num_fft, module.mel_rate_hz, module.low_hz, module.high_hz)}
