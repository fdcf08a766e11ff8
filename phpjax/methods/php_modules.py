"""PHP's trainable modules (Yin et al. 2025, arXiv 2507.21588; numbered after the module tables of the released code).

Layout here is [N, tokens, channels] with N = clips x seconds. Sections "3.x" are those of the reference description of the
released code. Where the same numbers cost less in another order of sums, that order is taken; parameters never change for it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from phpjax.methods.prompts import Prefix, l2_normalise, similarity


def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU; one operation where jax.nn.gelu's erfc compiles to hundreds."""
  return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


class Linear(nn.Module):
  """The numbers of a linear map, for callers who do not simply apply it; drawn and named as nn.Dense does."""

  features: int
  use_bias: bool = True

  @nn.compact
  def __call__(self, width: int) -> tuple[jax.Array, jax.Array | None]:
    """-> kernel [width, features], bias [features] or None."""
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (width, self.features))
    return kernel, self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None


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


# -- shallow phase: task-shared adapters (3.6) -------------------------------------------------------------------------


def map_tokens_and_channels(
  x: jax.Array, token_map: tuple[jax.Array, jax.Array], channel_map: tuple[jax.Array, jax.Array]
) -> jax.Array:
  """A map over tokens, then one over channels: [N, K, C'] -> [N, L, C].

  `token_map` is (kernel [K, L], bias [L]), `channel_map` (kernel [C', C], bias [C]). Both are linear, so the cheaper one may
  come first: 50 tokens of 768 channels become 4096 of 96 for a twentieth of the products with the channels first.
  """
  (tokens, token_bias), (channels, channel_bias) = token_map, channel_map
  (num_in, num_out), (width_in, width_out) = tokens.shape, channels.shape
  tokens_first = num_out * num_in * width_in + num_out * width_in * width_out  # products
  if tokens_first <= num_in * width_in * width_out + num_out * num_in * width_out:
    return (jnp.einsum("nkc,kl->nlc", x, tokens) + token_bias[:, None]) @ channels + channel_bias
  bias = token_bias[:, None] * channels.sum(axis=0) + channel_bias  # what the channel map makes of the token map's bias
  return jnp.einsum("nkc,kl->nlc", x @ channels, tokens) + bias


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
    token_map = Linear(x.shape[1], name="token_map")(other.shape[1])
    channel_map = Linear(width, name="channel_map")(other.shape[2])
    other = map_tokens_and_channels(other, token_map, channel_map)  # [N, L, C]
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


# -- middle phase: generated prompts (3.3) -----------------------------------------------------------------------------


def attend_few(asking: jax.Array, x: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """Attention of few tokens without anybody's keys or values: the projections move to the side of the queries.

  asking [N, Q, D] and x [N, L, D] are normed tokens, query, key, value [D, H, d] kernels -> [N, Q, H, d]. (a W) (b W')' is
  (a W W'') b', which costs H instead of H d products per channel and token of x for each query.
  """
  asked = jnp.einsum("nqhd,khd->nqhk", jnp.einsum("nqk,khd->nqhd", asking, query * query.shape[-1] ** -0.5), key)
  weights = nn.softmax(jnp.einsum("nqhk,nlk->nqhl", asked, x))
  return jnp.einsum("nqhk,khd->nqhd", jnp.einsum("nqhl,nlk->nqhk", weights, x), value)


def attend_shared(query: jax.Array, key: jax.Array, value: jax.Array, own_key: jax.Array, own_value: jax.Array) -> jax.Array:
  """Attention whose queries and most keys are the same for every frame.

  query, key, value [M, H, d] of all frames, own_key, own_value [N, L, H, d] -> [N, M, H, d]. The shared part of the softmax
  is made once and joined with each frame's own as in FlashAttention (arXiv 2205.14135).
  """
  query = query * query.shape[-1] ** -0.5
  shared, own = jnp.einsum("qhd,mhd->hqm", query, key), jnp.einsum("qhd,nlhd->nhql", query, own_key)
  peak = jax.lax.stop_gradient(shared.max(axis=-1, keepdims=True))  # [H, M, 1]
  top = jax.lax.stop_gradient(jnp.maximum(peak, own.max(axis=-1, keepdims=True)))  # [N, H, M, 1]
  shared, own, scale = jnp.exp(shared - peak), jnp.exp(own - top), jnp.exp(peak - top)
  mixed = jnp.einsum("nhql,nlhd->nhqd", own, own_value) + scale * jnp.einsum("hqm,mhd->hqd", shared, value)
  mixed = mixed / (own.sum(axis=-1, keepdims=True) + scale * shared.sum(axis=-1, keepdims=True))
  return mixed.swapaxes(1, 2)


class GeneratorBlock(nn.Module):
  """Pre-norm block whose queries may be fewer than its keys, so that the last block costs one token only.

  Attributes:
    num_heads: of the attention.
    head_width, mlp_width: width / num_heads and width unless given.
  """

  num_heads: int
  head_width: int | None = None
  mlp_width: int | None = None

  @nn.compact
  def __call__(self, x: jax.Array, num_queries: int, shared: jax.Array | None = None) -> jax.Array:
    """x [N, L, D] -> the first `num_queries` tokens after the block, [N, num_queries, D].

    `shared` [M, D] stands for M more tokens behind x that are the same for every frame.
    """
    width = x.shape[-1]
    norm = nn.LayerNorm(epsilon=1e-5, name="ln_1")
    mixed = self.attend(norm(x), num_queries, None if shared is None else norm(shared))
    x = (x if shared is None else behind(x, shared))[:, :num_queries]
    x = x + nn.Dense(width, name="out")(mixed.reshape(*x.shape[:2], -1))
    h = nn.Dense(self.mlp_width or width, name="fc_1")(nn.LayerNorm(epsilon=1e-5, name="ln_2")(x))
    return x + nn.Dense(width, name="fc_2")(gelu(h))

  def attend(self, x: jax.Array, num_queries: int, shared: jax.Array | None) -> jax.Array:
    """Normed tokens as in `__call__` -> [N, num_queries, H, d], by the cheapest of three equal ways."""
    (length, width), heads = x.shape[1:], self.num_heads
    inner = heads * (self.head_width or width // heads)
    kernels = [
      Linear(inner, use_bias=False, name=name)(width)[0].reshape(width, heads, -1) for name in ("query", "key", "value")
    ]
    if num_queries <= length and num_queries * heads < inner:
      return attend_few(x[:, :num_queries], x if shared is None else behind(x, shared), *kernels)
    query, key, value = (jnp.einsum("nlk,khd->nlhd", x, kernel) for kernel in kernels)
    if shared is None:
      return jax.nn.dot_product_attention(query[:, :num_queries], key, value)
    all_query, all_key, all_value = (jnp.einsum("mk,khd->mhd", shared, kernel) for kernel in kernels)
    mixed = jax.nn.dot_product_attention(query[:, :num_queries], behind(key, all_key), behind(value, all_value))
    asking = all_query[: max(num_queries - length, 0)]
    return jnp.concatenate([mixed, attend_shared(asking, all_key, all_value, key, value)], axis=1)


def behind(x: jax.Array, shared: jax.Array) -> jax.Array:
  """x [N, L, ...], shared [M, ...] -> [N, L + M, ...]."""
  return jnp.concatenate([x, jnp.broadcast_to(shared, (x.shape[0], *shared.shape))], axis=1)


class PromptGenerator(nn.Module):
  """Task-specific, modality-shared generator of one middle layer's prompts (PHP's middle phase).

  The stem's tokens and the codebook go through a small transformer; its first token picks, for each prompt, a
  mixture of codebook vectors. Only that token is read, so the last block computes that token alone, and the codebook
  enters the first block once, not once per frame (same numbers).
  """

  num_prompts: int
  depth: int
  num_heads: int
  head_width: int | None = None
  mlp_width: int | None = None

  @nn.compact
  def __call__(self, tokens: jax.Array, codebook: jax.Array) -> jax.Array:
    """tokens [N, L, D], codebook [M, D] -> prompts [N, num_prompts, D]."""
    size, x = codebook.shape[0], tokens
    for layer in range(self.depth):
      block = GeneratorBlock(self.num_heads, self.head_width, self.mlp_width, name=f"block_{layer}")
      num_queries = 1 if layer == self.depth - 1 else tokens.shape[1] + size
      x = block(x, num_queries, codebook if layer == 0 else None)
    mixture = nn.Dense(self.num_prompts * size, name="mixture")(x[:, 0])
    return nn.softmax(mixture.reshape(-1, self.num_prompts, size)) @ codebook


def weigh(prompts: jax.Array, class_key: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
  """Multiplies each prompt by sigmoid(<prompt W + b, key> / sqrt(D)): [N, P, D] -> [N, P, D].

  `class_key` is [D], or [N, D] for a key per frame. The key goes through W' once, where the prompts would P times.
  """
  score = prompts @ (class_key @ kernel.T)[..., None] + (class_key @ bias)[..., None, None]  # [N, P, 1]
  return prompts * nn.sigmoid(score / prompts.shape[-1] ** 0.5)


class MiddlePrompts(nn.Module):
  """All middle prompts of one task: a codebook, a generator per middle layer and a weight network they share.

  `remat`: the inside of a generator is computed again for the gradient, one generator after the other.
  """

  num_layers: int
  num_prompts: int
  codebook_size: int
  depth: int
  num_heads: int
  head_width: int | None = None
  mlp_width: int | None = None
  remat: bool = False

  @nn.compact
  def __call__(self, tokens: jax.Array, class_token: jax.Array) -> list[Prefix]:
    """tokens [N, L, D] of one modality, class_token [D] -> a Prefix of num_prompts / 2 keys and values per middle layer.

    The class token is the same for all frames and modalities, as released (quirk 9); [N, D] is one per frame.
    """
    width = tokens.shape[-1]
    codebook = self.param("codebook", nn.initializers.normal(0.02), (self.codebook_size, width))
    class_key = nn.Dense(width, name="weight_key")(class_token)
    kernel, bias = Linear(width, name="weight_query")(width)
    sizes = (self.num_prompts, self.depth, self.num_heads, self.head_width, self.mlp_width)
    half, prefixes = self.num_prompts // 2, []
    generator = nn.remat(PromptGenerator) if self.remat else PromptGenerator
    for layer in range(self.num_layers):
      prompts = generator(*sizes, name=f"generator_{layer}")(tokens, codebook)
      prompts = weigh(prompts, class_key, kernel, bias)
      prefixes.append(Prefix(prompts[:, :half], prompts[:, half:], at="normed"))
    return prefixes


def pool_cells(tokens: jax.Array, width: int) -> jax.Array:
  """A square of narrow tokens -> fewer wide ones for the generators: [N, side * side, C] -> [N, cells * C / width, width].

  Two 2x2 max-pools over the square, then neighbouring cells of a row side by side (3.3; HTS-AT 4096 x 96 -> 32 x 768).
  Raises ValueError where the sizes do not divide.
  """
  count, length, channels = tokens.shape
  side = round(length**0.5)
  if side * side != length or side % 4:
    raise ValueError(f"{length} tokens are not a square whose side is a multiple of 4")
  cells = tokens.reshape(count, side // 4, 4, side // 4, 4, channels).max(axis=(2, 4))  # two pools of 2x2 are one of 4x4
  if cells[0].size % width:
    raise ValueError(f"{side // 4} x {side // 4} cells of {channels} channels do not make whole tokens of width {width}")
  return cells.reshape(count, -1, width)


def add_to_first_channels(tokens: jax.Array, prompt: jax.Array) -> jax.Array:
  """The audio side of the middle phase (3.5a): a prompt's numbers, row by row, added to the first channels of all tokens.

  tokens [N, L, C], prompt [N, 2, P, D] seen as [N, L, 2 P D / L] -> [N, L, C]. Raises ValueError where it does not fit.
  """
  (count, length, channels), numbers = tokens.shape, prompt[0].size
  if numbers % length or numbers // length > channels:
    shape = " x ".join(map(str, prompt.shape[1:]))
    raise ValueError(f"a prompt of {shape} does not spread over {length} tokens of {channels} channels")
  added = prompt.reshape(count, length, -1)
  return tokens + jnp.pad(added, [(0, 0), (0, 0), (0, channels - added.shape[-1])])


# -- deep phase as released: a pool of prompts (3.4) -------------------------------------------------------------------


def select_by_key(query: jax.Array, keys: jax.Array, clips: int, mask: jax.Array | None = None) -> jax.Array:
  """Which prompt of the pool each group of frames takes: the most similar key of most of its frames.

  query [N, D], keys [pool, D], `clips` groups of equally many consecutive frames, mask [N] with 0 for frames that do not
  vote -> int32 [clips]. Ties go to the smallest index, of similarities and of votes, as in the released DualPrompt.
  """
  if query.shape[0] % clips:
    raise ValueError(f"{query.shape[0]} frames do not make {clips} groups of equal size")
  nearest = similarity(l2_normalise(query), l2_normalise(keys)).argmax(axis=-1)
  votes = jax.nn.one_hot(nearest, keys.shape[0])
  if mask is not None:
    votes = votes * (mask > 0)[:, None]
  return votes.reshape(clips, -1, keys.shape[0]).sum(axis=1).argmax(axis=-1).astype(jnp.int32)


def lay_out_reshaped(prompt: jax.Array, frames: jax.Array | int, count: int) -> tuple[jax.Array, jax.Array]:
  """The released layout of one prompt (quirk 5): [2, n, P, D] reshaped, not transposed, to [n, 2, P, D].

  prompt [2, P, D] (keys, values), `frames` the number n of real frames (it may be traced), `count` all frames of the batch,
  the real ones first -> keys and values [count, P, D]: frame f takes rows (2 f) // n and (2 f + 1) // n of the prompt.
  """
  slots = 2 * jnp.arange(count)[:, None] + jnp.arange(2)
  rows = jnp.minimum(slots // jnp.maximum(frames, 1), 1)  # frames behind the real ones take the values, unread
  return prompt[rows[:, 0]], prompt[rows[:, 1]]


# -- class texts and contrast (3.7) ------------------------------------------------------------------------------------


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


def contrast(visual: jax.Array, audio: jax.Array, kernel: jax.Array, bias: jax.Array, scale: jax.Array | float) -> jax.Array:
  """Logits of every clip's sound against every clip's picture: visual, audio [B, T, E] -> [B, B], sounds down.

  kernel [E, E] and bias [E] map the audio side, after the mean over time where it costs 1 / T of the released order.
  """
  heard = l2_normalise(audio.mean(axis=1) @ kernel + bias)
  return similarity(scale * heard, l2_normalise(visual.mean(axis=1)))
