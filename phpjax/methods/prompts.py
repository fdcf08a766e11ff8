"""Parts that several prompt methods share."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp


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


def broadcast_prefix(prompt: jax.Array, batch_size: int, at: str) -> Prefix:
  """prompt [2, P, D] (keys, values) -> the same Prefix for every row of the batch."""
  key, value = (jnp.broadcast_to(p, (batch_size, *p.shape)) for p in prompt)
  return Prefix(key, value, at)


def similarity(x: jax.Array, y: jax.Array) -> jax.Array:
  """x [N, E], y [M, E] -> x @ y.T [N, M] in full float32: by default GPU and TPU round the factors, and these are logits."""
  return jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)


def l2_normalise(x: jax.Array, eps: float = 1e-12) -> jax.Array:
  """Unit length along the last axis; zero stays zero, with a finite gradient."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), eps))
