"""PHP's trainable modules (Yin et al. 2025, arXiv 2507.21588; numbered after the module tables of the released code).

Layout here is [N, tokens, channels] with N = clips x seconds.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from phpjax.methods.prompts import Prefix, l2_normalise


def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU; one operation where jax.nn.gelu's erfc compiles to hundreds."""
  return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


class GroupedDense(nn.Module):
  """A 1x1 convolution in groups, without bias: [..., C] -> [..., features]."""

  features: int
  groups: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = x.shape[-1] // self.groups
    kernel = self.param(
      "kernel",
      nn.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0),
      (self.groups, width, self.features // self.groups),
    )
    y = jnp.einsum("...gc,gcd->...gd", x.reshape(*x.shape[:-1], self.groups, width), kernel)
    return y.reshape(*x.shape[:-1], self.features)


class TokenMix(nn.Module):
  """A 1x1 convolution over the token axis: [N, K, C] -> [N, L, C]."""

  num_tokens: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[1], self.num_tokens))
    bias = self.param("bias", nn.initializers.zeros, (self.num_tokens,))
    return jnp.einsum("nkc,kl->nlc", x, kernel) + bias[:, None]


class ShallowAdapter(nn.Module):
  """Task-shared, modality-aggregating adapter (PHP's shallow phase; DG-SCT's adapter).

  Reads the other modality through latent tokens and through channel, spatial and temporal gates, then a grouped
  bottleneck. The result is a residual to be added to `x`.

  Attributes:
    num_latents: latent tokens (`my_tokens`).
    reduction: width / bottleneck width.
    groups: groups of the bottleneck.
    alpha, beta, gamma: weights of the channel, spatial and temporal gate.
    gated: multiply the residual by a scalar that starts at zero, so that the adapter starts as the identity.
  """

  num_latents: int = 32
  reduction: int = 8
  groups: int = 2
  alpha: float = 0.2
  beta: float = 0.05
  gamma: float = 0.01
  gated: bool = True

  @nn.compact
  def __call__(self, x: jax.Array, other: jax.Array) -> jax.Array:
    """x [N, L, C], other [N, K, C'] -> residual [N, L, C]."""
    width = x.shape[-1]
    other = nn.Dense(width, name="channel_map")(TokenMix(x.shape[1], name="token_map")(other))  # [N, L, C]
    x = x + self.read_latents(x, other)
    x = x * self.gates(x, other.mean(axis=1, keepdims=True))
    h = GroupedDense(width // self.reduction, self.groups, name="down")(nn.LayerNorm(epsilon=1e-5, name="ln_before")(x))
    h = GroupedDense(width, self.groups, name="up")(nn.relu(h))
    h = nn.LayerNorm(epsilon=1e-5, name="ln_post")(h)
    return h * self.param("gate", nn.initializers.zeros, (1,)) if self.gated else h

  def read_latents(self, x: jax.Array, other: jax.Array) -> jax.Array:
    """Latents attend to the other modality, tokens attend to the latents (unscaled, as published); gate starts at zero."""
    latents = self.param("latents", nn.initializers.uniform(1.0), (self.num_latents, x.shape[-1]))
    latents = latents + nn.softmax(jnp.einsum("kc,nlc->nkl", latents, other)) @ other  # [N, K, C]
    gate = self.param("gate_av", nn.initializers.zeros, (1,))
    return gate * (nn.softmax(x @ latents.swapaxes(1, 2)) @ latents)

  def gates(self, x: jax.Array, summary: jax.Array) -> jax.Array:
    """x [N, L, C], summary [N, 1, C] of the other modality -> factors [N, L, C]."""
    width = x.shape[-1]
    mixed = nn.relu(nn.Dense(width, name="audio_1")(summary)) * nn.relu(nn.Dense(width, name="visual_1")(x))
    squeezed = nn.relu(nn.Dense(width // 2, name="bottleneck")(mixed.mean(axis=1, keepdims=True)))
    channel = nn.sigmoid(nn.Dense(width, name="channel_gate")(squeezed))  # [N, 1, C]
    spatial = nn.relu(nn.Dense(width // 2, name="visual_2")(x * (channel + 1))) * nn.relu(
      nn.Dense(width // 2, name="audio_2")(summary)
    )
    spatial = nn.sigmoid(nn.Dense(1, name="spatial_gate")(spatial))  # [N, L, 1]
    temporal = nn.sigmoid(nn.Dense(1, name="temporal_gate")(summary))  # [N, 1, 1]
    return self.alpha * channel + self.beta * spatial + self.gamma * temporal + 1 - self.alpha


class GeneratorBlock(nn.Module):
  """Pre-norm block whose queries may be fewer than its keys, so that the last block costs one token only."""

  num_heads: int

  @nn.compact
  def __call__(self, x: jax.Array, num_queries: int) -> jax.Array:
    """x [N, L, D] -> the first `num_queries` tokens after the block, [N, num_queries, D]."""
    width = x.shape[-1]
    normed = nn.LayerNorm(epsilon=1e-5, name="ln_1")(x)
    split = lambda y: y.reshape(*y.shape[:2], self.num_heads, -1)
    project = lambda name, y: split(nn.Dense(width, use_bias=False, name=name)(y))
    mixed = jax.nn.dot_product_attention(
      project("query", normed[:, :num_queries]), project("key", normed), project("value", normed)
    )
    x = x[:, :num_queries]
    x = x + nn.Dense(width, name="out")(mixed.reshape(x.shape))
    h = nn.Dense(width, name="fc_1")(nn.LayerNorm(epsilon=1e-5, name="ln_2")(x))
    return x + nn.Dense(width, name="fc_2")(gelu(h))


class PromptGenerator(nn.Module):
  """Task-specific, modality-shared generator of one middle layer's prompts (PHP's middle phase).

  The stem's tokens and the codebook go through a small transformer; its first token picks, for each prompt, a
  mixture of codebook vectors. Only that token is read, so the last block computes that token alone (same numbers).
  """

  num_prompts: int
  depth: int
  num_heads: int

  @nn.compact
  def __call__(self, tokens: jax.Array, codebook: jax.Array) -> jax.Array:
    """tokens [N, L, D], codebook [M, D] -> prompts [N, num_prompts, D]."""
    x = jnp.concatenate([tokens, jnp.broadcast_to(codebook, (tokens.shape[0], *codebook.shape))], axis=1)
    for layer in range(self.depth):
      last = layer == self.depth - 1
      x = GeneratorBlock(self.num_heads, name=f"block_{layer}")(x, 1 if last else x.shape[1])
    mixture = nn.Dense(self.num_prompts * codebook.shape[0], name="mixture")(x[:, 0])
    mixture = nn.softmax(mixture.reshape(-1, self.num_prompts, codebook.shape[0]))
    return mixture @ codebook


class MiddlePrompts(nn.Module):
  """All middle prompts of one task: a codebook, a generator per middle layer and a weight network they share."""

  num_layers: int
  num_prompts: int
  codebook_size: int
  depth: int
  num_heads: int

  @nn.compact
  def __call__(self, tokens: jax.Array, class_token: jax.Array) -> list[Prefix]:
    """tokens [N, L, D] of one modality, class_token [D] -> a Prefix of num_prompts / 2 keys and values per middle layer."""
    width = tokens.shape[-1]
    codebook = self.param("codebook", nn.initializers.normal(0.02), (self.codebook_size, width))
    key = nn.Dense(width, name="weight_key")(class_token)
    query = nn.Dense(width, name="weight_query")
    prefixes = []
    for layer in range(self.num_layers):
      prompts = PromptGenerator(self.num_prompts, self.depth, self.num_heads, name=f"generator_{layer}")(tokens, codebook)
      weight = nn.sigmoid(query(prompts) @ key / width**0.5)  # the input-independent key of the release (quirk 9)
      prompts = prompts * weight[..., None]
      half = self.num_prompts // 2
      prefixes.append(Prefix(prompts[:, :half], prompts[:, half:], at="normed"))
    return prefixes


class ClipAdapter(nn.Module):
  """CLIP-Adapter: 0.2 relu(W2 relu(W1 x)) + 0.8 x, then unit length (arXiv 2110.04544)."""

  reduction: int = 4
  ratio: float = 0.2

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., E] -> [..., E]."""
    h = nn.relu(nn.Dense(x.shape[-1] // self.reduction, use_bias=False, name="down")(x))
    h = nn.relu(nn.Dense(x.shape[-1], use_bias=False, name="up")(h))
    return l2_normalise(self.ratio * h + (1 - self.ratio) * x)
