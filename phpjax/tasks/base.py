"""What a task is: its head, prediction, loss and scores. A task never knows which method trains it."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Widths:
  """Sizes of the features a head reads, from the encoders; `audio_embed` 0: as large as `embed`."""

  visual: int
  audio: int
  embed: int
  patches: int
  visual_special: int = 1
  audio_special: int = 2
  audio_embed: int = 0


@dataclasses.dataclass(frozen=True)
class Task:
  """One element of the sequence.

  Hashable, and equal for tasks of equal shapes (the name and the classes' words do not count), so that such tasks
  share one compiled step.

  Attributes:
    widths: sizes of the features.
    seconds: T, seconds per clip.
    num_classes: size of the label set.
    name: "ave", "avvp", "avs", "avqa", "ms3", or a part of a class-incremental benchmark.
    classes: the label words.
  """

  widths: Widths
  seconds: int
  num_classes: int
  name: str = dataclasses.field(compare=False)
  classes: tuple[str, ...] = dataclasses.field(compare=False, repr=False)
  kind: ClassVar[str] = ""
  growing: ClassVar[bool] = False  # whether the label set is that of all such tasks together
  samples: ClassVar[str] = ""  # what has exactly one class, which `label` says: "seconds" or "clips"; "": nothing has
  constant_encoders: ClassVar[tuple[str, ...]] = ()  # that only `constants` reads
  device_keys: ClassVar[tuple[str, ...]] = ("visual", "audio", "label", "mask")
  distils: ClassVar[bool] = (
    False  # the head reads the features of a clip and nothing else, so it can answer on other tasks' clips
  )

  def label_shapes(self, seconds: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """{key: (shape of one example, dtype)} of what a batch holds beside media and mask; `seconds` of the clip are run."""
    raise NotImplementedError

  def uncounted_flops(self, frames: int) -> float:
    """Operations of a training step on so many seconds that a compiler, which counts a loop's body once, leaves out."""
    del frames
    return 0.0

  def constants(self, encoders: Tree, **templates: str) -> Tree:
    """Arrays computed once per task, outside jit, from the opened encoders {modality: Pretrained}.

    `templates` {modality: text with {}} are a method's own class texts (`Method.templates`).
    """
    del encoders, templates
    return {}

  def init_head(self, rng: jax.Array) -> Tree:
    """Parameters of the head."""
    raise NotImplementedError

  def init_state(self) -> Tree:
    """What changes without a gradient (running statistics)."""
    return {}

  def predict(
    self, head: Tree, state: Tree, features: Tree, batch: Tree, *, rng: jax.Array | None, train: bool
  ) -> tuple[Tree, Tree]:
    """Features of all modalities -> (outputs, state)."""
    raise NotImplementedError

  def outputs_of(self, scores: jax.Array) -> Tree:
    """Scores [N, C] of the task's `samples`, whoever gives them -> outputs as of `predict`."""
    raise NotImplementedError

  def loss(self, outputs: Tree, batch: Tree) -> jax.Array:
    """Scalar, mean over the real clips of the batch."""
    raise NotImplementedError

  def distillation(self, student: Tree, teacher: Tree, temperature: float, batch: Tree) -> jax.Array:
    """How far outputs are from a teacher's on the same clips, both softened: scalar, mean over the real clips, 0 for equals.

    Kullback-Leibler divergence: the cross-entropy of Hinton et al. 2015 (arXiv 1503.02531) less the teacher's own entropy,
    which moves no gradient; without that paper's factor temperature^2. Only of tasks that have `distils`.
    """
    raise NotImplementedError

  def scores(self, outputs: Tree) -> Tree:
    """What the metric needs of each clip, as small arrays with a leading B."""
    raise NotImplementedError


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
  """values [B], mask [B] -> mean over the clips that are real; 0 for none."""
  return jnp.sum(values * mask) / jnp.maximum(mask.sum(), 1)


def softened_divergence(student: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
  """Logits [..., C] -> Kullback-Leibler divergence of the student's softmax from the teacher's, [...]."""
  ours, theirs = (jax.nn.log_softmax(x / temperature) for x in (student, teacher))
  return jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)


def softened_binary_divergence(student: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
  """Log-odds -> the same of yes and no, elementwise."""
  ours, theirs = student / temperature, teacher / temperature
  log, yes = jax.nn.log_sigmoid, jax.nn.sigmoid(theirs)
  return yes * (log(theirs) - log(ours)) + (1 - yes) * (log(-theirs) - log(-ours))
