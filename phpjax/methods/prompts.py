"""Parts that several prompt methods share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from phpjax.methods.base import Backbone, Method, Tree

TOWERS = ("visual", "audio")  # what the pool methods prompt; a text in the batch stays as it is


@flax.struct.dataclass
class Prefix:
  """Extra keys and values for one attention layer.

  Attributes:
    key, value: float [B, P, D].
    at: "input" (through layer norm and projection: VPT, CoPL, PTAT), "normed" (projection only: PHP) or
      "projected" (neither: DualPrompt, CODA-Prompt).
    gate: float [], on the last `num_gated` of the P; None without any. Those have a softmax of their own; what they give is
      multiplied by the gate and added (zero-initialised attention, LLaMA-Adapter, arXiv 2303.16199): at 0 they change nothing.
    num_gated: how many.
  """

  key: jax.Array
  value: jax.Array
  at: str = flax.struct.field(pytree_node=False, default="input")
  gate: jax.Array | None = None
  num_gated: int = flax.struct.field(pytree_node=False, default=0)


def broadcast_prefix(prompt: jax.Array | tuple[jax.Array, jax.Array], batch_size: int, at: str) -> Prefix:
  """prompt [2, P, D] (keys, values) -> the same Prefix for every row of the batch."""
  key, value = (jnp.broadcast_to(p, (batch_size, *p.shape)) for p in prompt)
  return Prefix(key, value, at)


def similarity(x: jax.Array, y: jax.Array) -> jax.Array:
  """x [N, E], y [M, E] -> x @ y.T [N, M] in full float32: by default GPU and TPU round the factors, and these are logits."""
  return jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)


def l2_normalise(x: jax.Array, eps: float = 1e-12) -> jax.Array:
  """Unit length along the last axis; zero stays zero, with a finite gradient."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), eps))


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
  """x [N, E], y [M, E] of any float type -> cosines float32 [N, M]; 0 for a row of zeros."""
  return similarity(*(l2_normalise(rows.astype(jnp.float32)) for rows in (x, y)))


def mean_of_real(values: jax.Array, mask: jax.Array | None) -> jax.Array:
  """values float [B * T], one per second; mask [B] -> their mean over the seconds of clips that are real, float32 []."""
  if mask is None:
    return values.mean()
  seconds = jnp.repeat(mask, len(values) // len(mask))
  return jnp.sum(values * seconds) / jnp.maximum(seconds.sum(), 1)


# -- which layer a step is -----------------------------------------------------------------------------------------


def towers(backbone: Backbone) -> tuple[str, ...]:
  """The configured encoders of pictures and sound."""
  return tuple(m for m in TOWERS if m in backbone.present())


def read_by(task: Any, backbone: Backbone) -> tuple[str, ...]:
  """The towers that run on a task's batches."""
  return tuple(m for m in towers(backbone) if m in task.device_keys)


def num_steps(backbone: Backbone, text: bool = False) -> int:
  """Steps of `model.forward`: layers of the shallowest tower, of the text encoder too where the batch holds texts."""
  return min(getattr(backbone, m).depth for m in (*towers(backbone), *(("text",) if text else ())))


def width_at(backbone: Backbone, modality: str, step: int) -> int:
  """Channels of the layer that takes the prompt of a step: the last one of it, see `model.layer_map`."""
  sizes = getattr(backbone, modality)
  return sizes.layer_widths[sizes.depth // num_steps(backbone) * (step + 1) - 1]


def option_problems(method: Method, sizes: tuple[str, ...], steps: tuple[str, ...] = ()) -> Iterator[str]:
  """What is wrong with fields that are sizes, and with those that are tuples of steps: a step takes one prompt."""
  if not towers(method.backbone):
    yield "needs an encoder of pictures or of sound"
    return
  yield from (f"{name}={getattr(method, name)} must be 1 or more" for name in sizes if getattr(method, name) < 1)
  wanted, depth = [step for name in steps for step in getattr(method, name)], num_steps(method.backbone)
  if outside := [step for step in wanted if not 0 <= step < depth]:
    yield f"has a prompt in step {max(outside, key=abs)}, the encoders have {depth} layers: set {' and '.join(steps)}"
  if twice := sorted({step for step in wanted if wanted.count(step) > 1}):
    yield f"has more than one prompt in step {twice[0]}"


def check_text(backbone: Backbone, streams: Tree) -> None:
  """Raises ValueError where a batch's text encoder is shallower than the towers, so that steps would be other layers."""
  if "text" in streams and num_steps(backbone, text=True) < num_steps(backbone):
    raise ValueError(f"a text encoder of {backbone.text.depth} layers is shallower than the towers, whose steps prompts count")


# -- prompts as tokens ---------------------------------------------------------------------------------------------


def append_tokens(stream: Any, prompt: jax.Array) -> Any:
  """A stream of tokens [B, L, D] and a prompt [B, P, D] -> one of [B, L + P, D], class token still first."""
  tokens = jnp.concatenate([stream.tokens, prompt.astype(stream.tokens.dtype)], axis=1)
  mask = stream.mask if stream.mask is None else jnp.pad(stream.mask, [(0, 0), (0, prompt.shape[1])], constant_values=True)
  return stream.replace(tokens=tokens, mask=mask)


def drop_tokens(stream: Any, count: int) -> Any:
  """The inverse of `append_tokens`: without the last `count` tokens."""
  mask = stream.mask if stream.mask is None else stream.mask[:, :-count]
  return stream.replace(tokens=stream.tokens[:, :-count], mask=mask)


@dataclasses.dataclass(frozen=True)
class InputPrompts(Method):
  """What methods with extra input tokens share; they choose the tokens in `start`, context {"inputs": {m: [B, P, D]}, "last"}.

  An encoder whose layers are alike takes them behind its own tokens when the stem is done (before CLIP's `ln_pre`, without
  positions, as LPI and S-Prompts have it) and loses them behind the last layer, so that features keep their shapes. In a
  staged one (HTS-AT), whose windows and merges leave no place for more tokens, they are extra keys and values of the first
  step alone, through layer norm and projections.
  """

  def context_of(self, inputs: Tree, streams: Tree) -> Tree:
    """{modality: [B, P, D]} -> the part of the context that the hooks below read."""
    return {"inputs": inputs, "last": num_steps(self.backbone, "text" in streams) - 1}

  def prefix(self, context: Tree, step: int) -> Tree:
    """The first step of staged encoders."""
    if step:
      return {}
    return {m: Prefix(p, p, "input") for m, p in context["inputs"].items() if not getattr(self.backbone, m).uniform}

  def adapt(self, context: Tree, site: str, step: int, streams: Tree) -> Tree:
    """Appends the tokens behind the stems, takes them off behind the last layer."""
    if site == "stem":
      change = append_tokens
    elif site == "mlp" and step == context["last"]:
      change = lambda stream, prompt: drop_tokens(stream, prompt.shape[1])
    else:
      return streams
    changed = {m: change(streams[m], p) for m, p in context["inputs"].items() if getattr(self.backbone, m).uniform}
    return {**streams, **changed}
