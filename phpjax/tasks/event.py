"""Audio-visual events: AVE (one event per clip, a class per second) and AVVP (weak labels, several events per clip)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from phpjax.tasks.base import Task, Tree, masked_mean, softened_binary_divergence, softened_divergence
from phpjax.tasks.texts import class_texts, text_features

EVENT_MODALITIES = ("visual", "audio")


@dataclasses.dataclass(frozen=True)
class EventTask(Task):
  """Logits per second, modality and class: {"visual": [B, T, C], "audio": [B, T, C]}."""

  kind: ClassVar[str] = "event"
  constant_encoders: ClassVar[tuple[str, ...]] = ("audio_text",)
  distils: ClassVar[bool] = True

  def constants(self, encoders: Tree, **templates: str) -> Tree:
    """Class texts: "class_ids" int32 [C, L] for the visual side, "audio_text" float32 [C, E] for the audio side.

    The visual texts stay words, for a method may put learnable ones among them.
    """
    if "text" not in encoders:
      return {}
    texts = class_texts(encoders, self.text_classes(), **templates)
    return {"class_ids": jnp.asarray(texts["visual"][1]), "audio_text": text_features(*texts["audio"])}

  def text_classes(self) -> tuple[str, ...]:
    """The words behind the columns of a text classifier."""
    return self.classes

  def init_head(self, rng: jax.Array) -> Tree:
    """A linear map per modality on the pooled features, starting at zero."""
    del rng
    make = lambda: {"kernel": jnp.zeros((self.widths.embed, self.num_classes)), "bias": jnp.zeros(self.num_classes)}
    return {m: make() for m in EVENT_MODALITIES}

  def init_calibration(self) -> Tree:
    """What a text classifier still needs of the task: nothing here."""
    return {}

  def calibrate(self, calibration: Tree, logits: Tree) -> Tree:
    """Similarities {modality: [B, T, C]} -> logits of the same shapes."""
    del calibration
    return logits

  def predict(
    self, head: Tree, state: Tree, features: Tree, batch: Tree, *, rng: jax.Array | None, train: bool
  ) -> tuple[Tree, Tree]:
    """Linear on unit-scaled pooled features, per second and modality."""
    logits = {}
    for m in EVENT_MODALITIES:
      pooled = features[m].pooled
      pooled = pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True).clip(1e-6) * self.widths.embed**0.5
      logits[m] = (pooled @ head[m]["kernel"] + head[m]["bias"]).reshape(-1, self.seconds, self.num_classes)
    return logits, state

  def distillation(self, student: Tree, teacher: Tree, temperature: float, batch: Tree) -> jax.Array:
    """Of the softmax over classes: mean over seconds, sum over modalities."""
    second = sum(softened_divergence(student[m], teacher[m], temperature) for m in EVENT_MODALITIES)
    return masked_mean(second.mean(axis=1), batch["mask"])


@dataclasses.dataclass(frozen=True)
class AVE(EventTask):
  """Audio-visual event localisation (Tian et al., ECCV 2018): a class per second, the last one is background."""

  samples: ClassVar[str] = "seconds"

  def outputs_of(self, scores: jax.Array) -> Tree:
    """All of it stands with the frames: both modalities are summed anyway."""
    scores = scores.reshape(-1, self.seconds, self.num_classes)
    return {"visual": scores, "audio": jnp.zeros_like(scores)}

  def label_shapes(self, seconds: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """The class of every second."""
    return {"label": ((seconds,), jnp.int32)}

  def loss(self, outputs: Tree, batch: Tree) -> jax.Array:
    """Cross-entropy per second of the summed logits."""
    logits = outputs["visual"] + outputs["audio"]
    return masked_mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(axis=1), batch["mask"])

  def scores(self, outputs: Tree) -> Tree:
    """Summed logits [B, T, C]."""
    return {"scores": outputs["visual"] + outputs["audio"]}


@dataclasses.dataclass(frozen=True)
class AVVP(EventTask):
  """Audio-visual video parsing (Tian et al., ECCV 2020): learns from clip labels, is scored per second and modality.

  "official": the clip's probability pools all seconds of both modalities by the linear softmax sum(p^2) / sum(p) (Wang et
  al. 2019, arXiv 1810.09050), so that a class may be only heard or only seen.

  "released" is PHP's rule: one softmax over the classes for the whole clip, of the logits of both modalities together,
  averaged over its seconds, against the labels as they are (two classes present count twice; quirk 31). There is no
  background text and nothing to calibrate. The official scores then read a softmax per second and modality: a rule of
  ours, under which at most one class can be on at a time.

  Attributes:
    protocol: "official" or "released".
  """

  protocol: str = "official"

  def label_shapes(self, seconds: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Which classes the clip holds."""
    del seconds
    return {"label": ((self.num_classes,), jnp.float32)}

  def init_head(self, rng: jax.Array) -> Tree:
    """As the base class; official: with biases that start rare, for a class is absent from most seconds."""
    head = super().init_head(rng)
    return head if self.released else jax.tree.map(lambda x: x - 2.0 if x.ndim == 1 else x, head)

  @property
  def released(self) -> bool:
    """Whether the protocol is that of PHP's release."""
    return self.protocol == "released"

  def text_classes(self) -> tuple[str, ...]:
    """The classes and, official, "background", against which a silent or empty second is measured."""
    return self.classes if self.released else (*self.classes, "background")

  def init_calibration(self) -> Tree:
    """Official: a scale per modality and a bias per modality and class turn log-shares into log-odds."""
    if self.released:
      return super().init_calibration()
    return {
      m: {"log_scale": jnp.full((), -1.0, jnp.float32), "bias": jnp.full((self.num_classes,), 0.5, jnp.float32)}
      for m in EVENT_MODALITIES
    }

  def calibrate(self, calibration: Tree, logits: Tree) -> Tree:
    """Similarities [B, T, C + 1], background last -> log-odds [B, T, C]: the scaled log-share of a class plus a bias.

    Released: [B, T, C], as they are.
    """
    if self.released:
      return super().calibrate(calibration, logits)
    share = {m: nn.log_softmax(x)[..., :-1] for m, x in logits.items()}
    return {m: jnp.exp(calibration[m]["log_scale"]) * share[m] + calibration[m]["bias"] for m in EVENT_MODALITIES}

  def loss(self, outputs: Tree, batch: Tree) -> jax.Array:
    """Mean over clips of: official, the binary cross-entropy of the pooled probability, summed over classes; released, the
    cross-entropy of the fused logits with labels that do not sum to one."""
    if self.released:
      return masked_mean(optax.softmax_cross_entropy(self.fused(outputs), batch["label"]), batch["mask"])
    pooled = self.clip_probability(outputs).clip(1e-6, 1 - 1e-6)
    entropy = -(batch["label"] * jnp.log(pooled) + (1 - batch["label"]) * jnp.log1p(-pooled))
    return masked_mean(entropy.sum(axis=-1), batch["mask"])

  def distillation(self, student: Tree, teacher: Tree, temperature: float, batch: Tree) -> jax.Array:
    """Official: of each class on its own, summed over classes and modalities, mean over seconds; released: as AVE."""
    if self.released:
      return super().distillation(student, teacher, temperature, batch)
    second = sum(softened_binary_divergence(student[m], teacher[m], temperature).sum(axis=-1) for m in EVENT_MODALITIES)
    return masked_mean(second.mean(axis=1), batch["mask"])

  def fused(self, outputs: Tree) -> jax.Array:
    """Logits of both modalities together, mean over the seconds: [B, C]."""
    return sum(outputs[m] for m in EVENT_MODALITIES).mean(axis=1)

  def segment_probability(self, outputs: Tree) -> Tree:
    """{modality: [B, T, C]}: official, of each class on its own; released, of one class among all."""
    return {m: nn.softmax(outputs[m]) if self.released else nn.sigmoid(outputs[m]) for m in EVENT_MODALITIES}

  def clip_probability(self, outputs: Tree) -> jax.Array:
    """Probability of the class in the clip, [B, C]: the seconds' linear softmax; released: their largest, which rules out
    nothing that a second has."""
    p = jnp.concatenate(list(self.segment_probability(outputs).values()), axis=1)  # [B, 2 T, C]
    return p.max(axis=1) if self.released else jnp.sum(p * p, axis=1) / jnp.sum(p, axis=1).clip(1e-6)

  def scores(self, outputs: Tree) -> Tree:
    """Probabilities {"visual", "audio": [B, T, C], "clip": [B, C]}, and the logits "fused" [B, C]."""
    return {
      **self.segment_probability(outputs),
      "clip": self.clip_probability(outputs),
      "fused": self.fused(outputs),
    }
