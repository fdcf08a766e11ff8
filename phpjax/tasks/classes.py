"""Class-incremental classification: one class per clip, out of a label set that grows from task to task."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from phpjax.tasks.base import Task, Tree, masked_mean, softened_divergence
from phpjax.tasks.texts import class_texts, text_features


@dataclasses.dataclass(frozen=True)
class Classes(Task):
  """Some new classes, told apart by a linear map per modality; the classes of all tasks together are told apart at test.

  Each task has a head of its own for its own classes and learns it against these alone, so that nothing old is trained again
  by having a head. At test the heads of all learned tasks stand side by side (see phpjax/answers.py).
  """

  kind: ClassVar[str] = "classes"
  growing: ClassVar[bool] = True
  samples: ClassVar[str] = "clips"
  constant_encoders: ClassVar[tuple[str, ...]] = ("audio_text",)
  distils: ClassVar[bool] = True

  def label_shapes(self, seconds: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """The class of the clip."""
    del seconds
    return {"label": ((), jnp.int32)}

  def constants(self, encoders: Tree, **templates: str) -> Tree:
    """For a method that brings class texts of its own, their features: {"visual_text", "audio_text": float32 [C, E]}."""
    if not templates or "text" not in encoders:
      return {}
    return {f"{m}_text": text_features(*of) for m, of in class_texts(encoders, self.classes, **templates).items()}

  def init_head(self, rng: jax.Array) -> Tree:
    """A linear map per modality on the pooled features, starting at zero."""
    del rng
    sizes = {"visual": self.widths.embed, "audio": self.widths.audio_embed or self.widths.embed}
    make = lambda size: {"kernel": jnp.zeros((size, self.num_classes)), "bias": jnp.zeros(self.num_classes)}
    return {m: make(size) for m, size in sizes.items()}

  def predict(
    self, head: Tree, state: Tree, features: Tree, batch: Tree, *, rng: jax.Array | None, train: bool
  ) -> tuple[Tree, Tree]:
    """Linear on `clip_features`, summed over the modalities that are there: {"logits": [B, C]}."""
    del batch, rng, train
    clip = clip_features(features, self.seconds)
    return {"logits": sum(x @ head[m]["kernel"] + head[m]["bias"] for m, x in clip.items())}, state

  def outputs_of(self, scores: jax.Array) -> Tree:
    """Scores [B, C] are the logits."""
    return {"logits": scores}

  def loss(self, outputs: Tree, batch: Tree) -> jax.Array:
    """Cross-entropy over the classes of this task."""
    return masked_mean(optax.softmax_cross_entropy_with_integer_labels(outputs["logits"], batch["label"]), batch["mask"])

  def loss_among(self, scores: jax.Array, place: int, batch: Tree) -> jax.Array:
    """Cross-entropy over the classes of K tasks that are learned at once: scores [B, K, C], `place` that of this one."""
    label = place * self.num_classes + batch["label"]
    flat = scores.reshape(len(scores), -1)
    return masked_mean(optax.softmax_cross_entropy_with_integer_labels(flat, label), batch["mask"])

  def distillation(self, student: Tree, teacher: Tree, temperature: float, batch: Tree) -> jax.Array:
    """Of the softmax over the classes of a task."""
    return masked_mean(softened_divergence(student["logits"], teacher["logits"], temperature), batch["mask"])

  def scores(self, outputs: Tree) -> Tree:
    """Logits [B, C]."""
    return {"scores": outputs["logits"]}


def clip_features(features: Tree, seconds: int) -> Tree:
  """{modality: Features of seconds} -> {modality: float32 [B, E]}: pooled features at length sqrt(E), mean over seconds."""

  def mean(pooled: jax.Array) -> jax.Array:
    scaled = pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True).clip(1e-6) * pooled.shape[-1] ** 0.5
    return scaled.reshape(-1, seconds, pooled.shape[-1]).mean(axis=1)

  return {m: mean(found.pooled) for m, found in features.items() if m in ("visual", "audio")}
