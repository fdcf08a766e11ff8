"""PHP's published names and layouts -> our parameter trees, for tests.

Every mapping takes `weights`, {published name: array}, and the `prefix` that the names of its module share; names of dead
parameters are left unread. All of them are linear, so that `published_gradients` can turn gradients back into published names
and layouts by differentiating the mapping itself.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Tree = dict[str, Any]
Weights = Mapping[str, Any]

ADAPTER_PARTS = {
  "audio_1": "fc_affine_audio_1",
  "audio_2": "fc_affine_audio_2",
  "visual_1": "fc_affine_video_1",
  "visual_2": "fc_affine_video_2",
  "bottleneck": "fc_affine_bottleneck",
  "channel_gate": "fc_affine_v_c_att",
  "spatial_gate": "fc_affine_v_s_att",
  "temporal_gate": "temporal_gated.0",
}


def linear(weights: Weights, name: str) -> Tree:
  """torch's [out, in] -> kernel [in, out]; a bias where there is one."""
  bias = {"bias": jnp.asarray(weights[f"{name}.bias"])} if f"{name}.bias" in weights else {}
  return {"kernel": jnp.asarray(weights[f"{name}.weight"]).T, **bias}


def norm(weights: Weights, name: str) -> Tree:
  """A layer norm, or the scale and bias of a batch norm."""
  return {"scale": jnp.asarray(weights[f"{name}.weight"]), "bias": jnp.asarray(weights[f"{name}.bias"])}


def convolution(weights: Weights, name: str, bias: bool = True) -> Tree:
  """torch's [out, in, height, width] -> kernel [height, width, in, out]."""
  kernel = {"kernel": jnp.asarray(weights[f"{name}.weight"]).transpose(2, 3, 1, 0)}
  return {**kernel, "bias": jnp.asarray(weights[f"{name}.bias"])} if bias else kernel


def grouped(weights: Weights, name: str, width: int) -> Tree:
  """A grouped 1x1 convolution [out, in / groups, 1, 1] -> kernel [groups, in / groups, out / groups]."""
  weight = jnp.asarray(weights[f"{name}.weight"])[..., 0, 0]
  groups = width // weight.shape[1]
  return {"kernel": weight.reshape(groups, -1, weight.shape[1]).swapaxes(1, 2)}


def adapter(weights: Weights, prefix: str = "") -> Tree:
  """VisualAdapter -> ShallowAdapter; `gate` where the adapter has one."""
  tokens, width = jnp.asarray(weights[f"{prefix}conv_adapter.weight"]), weights[f"{prefix}fc.bias"].shape[0]
  gate = {"gate": jnp.asarray(weights[f"{prefix}gate"])} if f"{prefix}gate" in weights else {}
  return {
    "token_map": {"kernel": tokens[..., 0, 0].T, "bias": jnp.asarray(weights[f"{prefix}conv_adapter.bias"])},
    "channel_map": linear(weights, f"{prefix}fc"),
    "latents": jnp.asarray(weights[f"{prefix}my_tokens"]),
    "gate_av": jnp.asarray(weights[f"{prefix}gate_av"]),
    **{ours: linear(weights, prefix + theirs) for ours, theirs in ADAPTER_PARTS.items()},
    **{name: norm(weights, prefix + name) for name in ("ln_before", "ln_post")},
    "down": grouped(weights, f"{prefix}down_sampler", width),
    "up": grouped(weights, f"{prefix}up_sampler", weights[f"{prefix}down_sampler.weight"].shape[0]),
    **gate,
  }


def generator_block(weights: Weights, prefix: str) -> Tree:
  """One layer [attention, MLP] of PromptGenerator's transformer -> GeneratorBlock."""
  parts = jnp.split(jnp.asarray(weights[f"{prefix}0.fn.to_qkv.weight"]), 3)
  return {
    "ln_1": norm(weights, f"{prefix}0.norm"),
    **{name: {"kernel": part.T} for name, part in zip(("query", "key", "value"), parts, strict=True)},
    "out": linear(weights, f"{prefix}0.fn.to_out.0"),
    "ln_2": norm(weights, f"{prefix}1.norm"),
    "fc_1": linear(weights, f"{prefix}1.fn.net.0"),
    "fc_2": linear(weights, f"{prefix}1.fn.net.3"),
  }


def count(weights: Weights, pattern: str) -> int:
  """How many of the names `pattern` with {} = 0, 1, ... exist."""
  number = 0
  while pattern.format(number) in weights:
    number += 1
  return number


def generator(weights: Weights, prefix: str = "") -> Tree:
  """PromptGenerator."""
  layers = f"{prefix}transformer.layers."
  depth = count(weights, layers + "{}.0.norm.weight")
  blocks = {f"block_{i}": generator_block(weights, f"{layers}{i}.") for i in range(depth)}
  return {**blocks, "mixture": linear(weights, f"{prefix}pre_out")}


def weight_network(weights: Weights, prefix: str = "") -> Tree:
  """WeightGenerator -> its two entries of MiddlePrompts."""
  return {"weight_key": linear(weights, f"{prefix}key_w"), "weight_query": linear(weights, f"{prefix}query_w")}


def middle(weights: Weights, prefix: str = "mid_e_prompt.") -> Tree:
  """M2Prompt -> MiddlePrompts."""
  names = [f"{prefix}pgn_module"]
  while f"{prefix}pgn_module_{len(names)}.pre_out.weight" in weights:
    names.append(f"{prefix}pgn_module_{len(names)}")
  return {
    "codebook": jnp.asarray(weights[f"{prefix}maben"]),
    **{f"generator_{i}": generator(weights, f"{name}.") for i, name in enumerate(names)},
    **weight_network(weights, f"{prefix}wgn_module."),
  }


def deep(weights: Weights, prefix: str = "deep_visual_e_prompt.") -> Tree:
  """VisualEPrompt -> {"prompt": [layers, 2, pool, P, D], "keys": [pool, D]}."""
  return {"prompt": jnp.asarray(weights[f"{prefix}prompt"]), "keys": jnp.asarray(weights[f"{prefix}prompt_key"])}


def clip_adapter(weights: Weights, prefix: str = "clip_adapter.") -> Tree:
  """ClipAdapter, "clip_adapter." or "clip_adapter_text."."""
  return {"down": linear(weights, f"{prefix}fc.0"), "up": linear(weights, f"{prefix}fc.2")}


def context(weights: Weights, prefix: str = "prompt_learner.") -> jax.Array:
  """The learnable words of PromptLearner, [words, width]."""
  return jnp.asarray(weights[f"{prefix}ctx"])


def contrastive(weights: Weights, prefix: str = "audio_visual_contrastive_learner.") -> Tree:
  """The audio map of AudioVisualContrast."""
  return linear(weights, f"{prefix}fc_a1")


def attention(weights: Weights, name: str, num_heads: int) -> Tree:
  """torch's packed MultiheadAttention -> query, key (its bias is dead), value as [D, H, d], out."""
  split = lambda x: x.reshape(*x.shape[:-1], num_heads, -1)
  kernels = [split(part.T) for part in jnp.split(jnp.asarray(weights[f"{name}.in_proj_weight"]), 3)]
  biases = [split(part) for part in jnp.split(jnp.asarray(weights[f"{name}.in_proj_bias"]), 3)]
  tree = {part: {"kernel": k, "bias": b} for part, k, b in zip(("query", "key", "value"), kernels, biases, strict=True)}
  return {**tree, "key": {"kernel": kernels[1]}, "out": linear(weights, f"{name}.out_proj")}


def lstm(weights: Weights, name: str) -> Tree:
  """torch's gates i, f, g, o packed along rows -> OptimizedLSTMCell; its two biases are one sum."""
  kernels = {side: jnp.split(jnp.asarray(weights[f"{name}.weight_{side}h_l0"]), 4) for side in "ih"}
  biases = jnp.split(jnp.asarray(weights[f"{name}.bias_ih_l0"]) + jnp.asarray(weights[f"{name}.bias_hh_l0"]), 4)
  tree = {f"i{gate}": {"kernel": k.T} for gate, k in zip("ifgo", kernels["i"], strict=True)}
  return {**tree, **{f"h{gate}": {"kernel": k.T, "bias": b} for gate, k, b in zip("ifgo", kernels["h"], biases, strict=True)}}


def avqa_head(weights: Weights, prefix: str = "handler.", num_heads: int = 4) -> Tree:
  """AvqaDownTaskHandler -> QuestionHead; fc1..fc4 and norm3 are dead."""
  listener = lambda letter, number: {
    "attn": attention(weights, f"{prefix}attn_{letter}", num_heads),
    "fc_1": linear(weights, f"{prefix}linear{number}1"),
    "fc_2": linear(weights, f"{prefix}linear{number}2"),
    "norm": norm(weights, f"{prefix}norm{number}"),
  }
  encoder = f"{prefix}question_encoder."
  return {
    "words": {"embedding": jnp.asarray(weights[f"{encoder}word2vec.weight"])},
    "lstm": lstm(weights, f"{encoder}lstm"),
    "question": linear(weights, f"{encoder}fc"),
    "audio_1": linear(weights, f"{prefix}fc_a1"),
    "audio_2": linear(weights, f"{prefix}fc_a2"),
    "visual_1": linear(weights, f"{prefix}fc_v1"),
    "visual_2": linear(weights, f"{prefix}fc_v2"),
    "ground": linear(weights, f"{prefix}fc_gl"),
    "audio_listener": listener("a", 2),
    "visual_listener": listener("v", 1),
    "fusion": linear(weights, f"{prefix}fc_fusion"),
    "answer": linear(weights, f"{prefix}fc_ans"),
  }


def avs_head(weights: Weights, prefix: str = "handler.") -> tuple[Tree, Tree]:
  """AVSDownTaskHandler -> (parameters, running statistics) of SegmentationHead.

  The bias in front of the last batch norm shifts the mean it subtracts, so it goes into the running mean.
  """
  decoder, cross = f"{prefix}visual_decoder.", f"{prefix}cross_attn."
  blocks = {f"up_{i}": f"{decoder}up_blocks.{i}.conv." for i in range(count(weights, decoder + "up_blocks.{}.conv.0.weight"))}
  blocks["pixels"] = f"{decoder}feat_adapter."
  params: Tree = {"reduce": convolution(weights, f"{decoder}spatial_projection")}
  state: Tree = {}
  for ours, theirs in blocks.items():
    params[f"{ours}_conv"] = convolution(weights, f"{theirs}0", bias=False)
    params[f"{ours}_norm"] = norm(weights, f"{theirs}1")
    mean = jnp.asarray(weights[f"{theirs}1.running_mean"]) - jnp.asarray(weights.get(f"{theirs}0.bias", 0.0))
    state[f"{ours}_norm"] = {"mean": mean, "var": jnp.asarray(weights[f"{theirs}1.running_var"])}
  key, value = (
    {"kernel": k.T, "bias": b}
    for k, b in zip(*(jnp.split(jnp.asarray(weights[f"{cross}W_kv.{part}"]), 2) for part in ("weight", "bias")), strict=True)
  )
  params |= {"context": linear(weights, f"{prefix}audio_proj"), "query": linear(weights, f"{cross}W_q"), "value": value}
  params |= {"key": {"kernel": key["kernel"]}, "out": linear(weights, f"{cross}proj")}
  mask = convolution(weights, f"{prefix}fusion_conv")
  return {**params, "mask": {"kernel": mask["kernel"][0, 0], "bias": mask["bias"]}}, state


def published_gradients(mapping: Callable[[Weights, str], Any], weights: Weights, gradients: Any, prefix: str = "") -> Tree:
  """Gradients for the tree `mapping(weights, prefix)` -> {published name: gradient in the published layout}.

  Names that the mapping does not read come back as zeros.
  """
  own = {k: jnp.asarray(v) for k, v in weights.items() if k.startswith(prefix) and jnp.issubdtype(v.dtype, jnp.floating)}
  _, back = jax.vjp(lambda w: mapping(w, prefix), own)
  return back(gradients)[0]
