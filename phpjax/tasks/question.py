"""Audio-visual question answering (MUSIC-AVQA, Li et al., CVPR 2022)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from phpjax.tasks.base import Task, Tree, masked_mean


def unit(x: jax.Array) -> jax.Array:
  """Unit length along the last axis; zero stays zero (`l2_normalise` of the methods, which a task may not import)."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))


class Projection(nn.Module):
  """The numbers of one projection of an attention: kernel [D, H, d] and bias [H, d] or None."""

  num_heads: int
  use_bias: bool = True

  @nn.compact
  def __call__(self, width: int) -> tuple[jax.Array, jax.Array | None]:
    """The width D = H d of the tokens -> kernel, bias."""
    shape = (width, self.num_heads, width // self.num_heads)
    kernel = self.param("kernel", nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2)), shape)
    return kernel, self.param("bias", nn.initializers.zeros, shape[1:]) if self.use_bias else None


class Attention(nn.Module):
  """Multi-head attention of a few questions to many tokens.

  The projections of keys and values are moved to the questions' side, (a W) (b W')' = (a W W'') b': a token then costs H
  products per question and channel where its own key and value would cost 2 D (same numbers; Q H is far below D). Keys have
  no bias: it would shift all scores of a question alike.
  """

  num_heads: int
  dropout: float

  @nn.compact
  def __call__(self, question: jax.Array, tokens: jax.Array, train: bool) -> jax.Array:
    """question [B, Q, D], tokens [B, L, D] -> [B, Q, D]."""
    width = question.shape[-1]
    query, query_bias = Projection(self.num_heads, name="query")(width)
    key, _ = Projection(self.num_heads, use_bias=False, name="key")(width)
    value, value_bias = Projection(self.num_heads, name="value")(width)
    asked = (jnp.einsum("bqk,khd->bqhd", question, query) + query_bias) * query.shape[-1] ** -0.5
    weights = nn.softmax(jnp.einsum("bqhk,blk->bqhl", jnp.einsum("bqhd,khd->bqhk", asked, key), tokens))
    weights = nn.Dropout(self.dropout, deterministic=not train)(weights)
    heard = jnp.einsum("bqhk,khd->bqhd", jnp.einsum("bqhl,blk->bqhk", weights, tokens), value)
    heard = heard + weights.sum(axis=-1, keepdims=True) * value_bias  # dropped weights do not sum to one
    return nn.Dense(width, name="out")(heard.reshape(*question.shape[:2], -1))


class Listener(nn.Module):
  """The question attends to a sequence, then a feed-forward block (as in PHP's release)."""

  num_heads: int
  dropout: float

  @nn.compact
  def __call__(self, question: jax.Array, tokens: jax.Array, train: bool) -> jax.Array:
    """question [B, Q, D], tokens [B, L, D] -> [B, Q, D]."""
    drop = nn.Dropout(self.dropout, deterministic=not train)
    u = Attention(self.num_heads, self.dropout, name="attn")(question, tokens, train)
    h = nn.Dense(u.shape[-1], name="fc_2")(drop(nn.relu(nn.Dense(u.shape[-1], name="fc_1")(u))))
    return nn.LayerNorm(epsilon=1e-5, name="norm")(u + drop(h))


class QuestionHead(nn.Module):
  """Question LSTM, visual grounding by audio, two attentions, answer (as in PHP's release)."""

  num_words: int
  num_answers: int
  width: int
  dropout: float = 0.1
  num_heads: int = 4

  @nn.compact
  def __call__(self, visual: jax.Array, audio: jax.Array, question: jax.Array, train: bool) -> jax.Array:
    """visual [B, T, L, D], audio [B, T, K, D'], question int32 [B, Q, W] -> logits [B, Q, num_answers]."""
    asked = self.encode_question(question.reshape(-1, question.shape[-1])).reshape(*question.shape[:2], self.width)
    heard = unit(self.mlp("audio", audio))
    seen = unit(self.mlp("visual", visual))
    grounded = nn.softmax(seen @ heard.swapaxes(-1, -2)) @ heard  # [B, T, L, D], vision asks audio
    looked = nn.Dense(self.width, name="ground")(jnp.tanh(jnp.concatenate([visual, grounded], axis=-1)))
    flat = lambda x: x.reshape(x.shape[0], -1, self.width)
    looked, heard = flat(looked), flat(heard)
    answers = [
      Listener(self.num_heads, self.dropout, name=name)(asked, x, train) + x.mean(axis=1, keepdims=True)
      for name, x in (("audio_listener", heard), ("visual_listener", looked))
    ]
    fused = nn.Dense(self.width, name="fusion")(jnp.tanh(jnp.concatenate(answers, axis=-1)))
    return nn.Dense(self.num_answers, name="answer")(jnp.tanh(fused * asked))

  def mlp(self, name: str, x: jax.Array) -> jax.Array:
    """Two layers to the head's width."""
    return nn.Dense(self.width, name=f"{name}_2")(nn.relu(nn.Dense(self.width, name=f"{name}_1")(x)))

  def encode_question(self, question: jax.Array) -> jax.Array:
    """int32 [B, W] -> [B, D]; pads are read too, as published."""
    words = jnp.tanh(nn.Embed(self.num_words, self.width, name="words")(question))
    (cell, hidden), _ = nn.RNN(nn.OptimizedLSTMCell(self.width, name="lstm"), return_carry=True)(words)
    return nn.Dense(self.width, name="question")(jnp.tanh(jnp.concatenate([hidden, cell], axis=-1)))


@dataclasses.dataclass(frozen=True)
class AVQA(Task):
  """One answer out of a closed list, for up to Q questions about the same clip."""

  num_words: int = 93
  kind: ClassVar[str] = "question"
  device_keys: ClassVar[tuple[str, ...]] = ("visual", "audio", "question", "question_mask", "label", "mask")

  def label_shapes(self, seconds: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """One question of 14 words and its answer."""
    del seconds
    return {"question": ((1, 14), jnp.int32), "question_mask": ((1,), jnp.float32), "label": ((1,), jnp.int32)}

  def head(self) -> QuestionHead:
    """The head, as wide as the visual encoder."""
    return QuestionHead(self.num_words, self.num_classes, self.widths.visual)

  def init_head(self, rng: jax.Array) -> Tree:
    """Parameters of the head."""
    tokens = {m: jnp.zeros((1, self.seconds, 2, getattr(self.widths, m))) for m in ("visual", "audio")}
    return self.head().init(rng, tokens["visual"], tokens["audio"], jnp.zeros((1, 1, 14), jnp.int32), False)["params"]

  def predict(
    self, head: Tree, state: Tree, features: Tree, batch: Tree, *, rng: jax.Array | None, train: bool
  ) -> tuple[Tree, Tree]:
    """-> {"answer": logits [B, Q, answers]}; the last-layer tokens enter raw, as published."""
    tokens = {m: features[m].tokens.reshape(-1, self.seconds, *features[m].tokens.shape[1:]) for m in ("visual", "audio")}
    rngs = {"dropout": rng} if train else {}
    return {
      "answer": self.head().apply({"params": head}, tokens["visual"], tokens["audio"], batch["question"], train, rngs=rngs)
    }, state

  def loss(self, outputs: Tree, batch: Tree) -> jax.Array:
    """Cross-entropy, mean over the real questions."""
    entropy = optax.softmax_cross_entropy_with_integer_labels(outputs["answer"], batch["label"])
    return masked_mean(entropy.reshape(-1), (batch["mask"][:, None] * batch["question_mask"]).reshape(-1))

  def scores(self, outputs: Tree) -> Tree:
    """Logits [B, Q, answers]."""
    return {"scores": outputs["answer"]}
