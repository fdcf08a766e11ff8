"""Classes as statistics of features that stay as they are: what `ncm`, `slda` and `aper` share. No gradient, one pass over a
task's training clips.

A sample is whatever has exactly one class, as `Task.samples` says: a second of a clip, or a clip. The functions below take
plain arrays, rows [N, D] with labels int [N] and weights [N] (0: padding), and know no task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from phpjax.methods.base import Method, TrainingClips, Tree
from phpjax.methods.prompts import l2_normalise

PAIR = ("visual", "audio")
UNSEEN = -1e9  # score of a class without a sample
EPS = 1e-6  # beside a standard deviation

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]  # [N, D], labels [N], weights [N]


# -- arrays ------------------------------------------------------------------------------------------------------


def standardisation(parts: Iterable[Rows]) -> Tree:
  """Weighted {"mean", "std"} [D] of all rows, float64; `parts` are gone through twice."""
  parts = [(rows[weights > 0], weights[weights > 0]) for rows, _, weights in parts]
  total = sum(weights.sum() for _, weights in parts)
  mean = sum(weights @ rows.astype(np.float64) for rows, weights in parts) / total
  variance = sum(weights @ np.square(rows - mean) for rows, weights in parts) / total
  return {"mean": mean, "std": np.sqrt(variance) + EPS}


def standardise(rows: Any, mean: Any, std: Any) -> Any:
  """Rows [N, D] of numpy or JAX -> zero mean and a length of about 1, where mean and std are theirs."""
  return (rows - mean) / std / rows.shape[-1] ** 0.5


@dataclasses.dataclass
class Moments:
  """Sums over samples, float64 on the host: the same whatever the batches and their order.

  Attributes:
    sums: per class, [C, D].
    counts: per class, [C].
    products: of all rows with themselves, [D, D]; None if nobody asks for them.
  """

  sums: np.ndarray
  counts: np.ndarray
  products: np.ndarray | None

  @classmethod
  def none(cls, num_classes: int, width: int, *, products: bool) -> Moments:
    """Before the first sample."""
    return cls(np.zeros((num_classes, width)), np.zeros(num_classes), np.zeros((width, width)) if products else None)

  def add(self, rows: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> None:
    """Takes up a batch; raises IndexError for a label outside of the classes."""
    real = weights > 0
    rows, labels, weights = rows[real].astype(np.float64), labels[real], weights[real].astype(np.float64)
    share = np.zeros((len(rows), len(self.counts)))
    share[np.arange(len(rows)), labels] = weights
    self.sums += share.T @ rows
    self.counts += share.sum(0)
    if self.products is not None:
      self.products += (rows * weights[:, None]).T @ rows

  @property
  def means(self) -> np.ndarray:
    """Of the classes, [C, D]; zero where there is no sample."""
    return self.sums / np.maximum(self.counts, 1e-30)[:, None]

  @property
  def scatter(self) -> np.ndarray:
    """Sum over samples of (x - class mean)(x - class mean)', [D, D]."""
    return self.products - self.sums.T @ self.means


def precision(scatter: np.ndarray, count: float, shrinkage: float) -> np.ndarray:
  """Inverse of the within-class covariance shrunk towards a multiple of the identity of the same trace, float64 [D, D].

  (1 - s) S / n + s tr(S) / (n D) I, with s the shrinkage: the form of Ledoit and Wolf (2004); the identity's share is held
  above zero, for a class of one sample has no scatter.
  """
  width = len(scatter)
  scale = max(np.trace(scatter) / (count * width), 1e-12)
  return np.linalg.inv((1 - shrinkage) * scatter.astype(np.float64) / count + shrinkage * scale * np.eye(width))


def mask_unseen(scores: jax.Array, counts: jax.Array) -> jax.Array:
  """Scores [N, C] with those of classes that had no sample so low that none is chosen."""
  return jnp.where(counts > 0, scores, UNSEEN)


def product(x: jax.Array, y: jax.Array) -> jax.Array:
  """x @ y in full float32 on every device."""
  return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def cosine_scores(rows: jax.Array, means: jax.Array, counts: jax.Array) -> jax.Array:
  """Cosines of rows [N, D] to class means [C, D] -> [N, C]."""
  return mask_unseen(product(l2_normalise(rows), l2_normalise(means).T), counts)


def discriminant_scores(rows: jax.Array, means: jax.Array, counts: jax.Array, inverse: jax.Array) -> jax.Array:
  """Linear discriminants x' P m - m' P m / 2 of equal priors, rows [N, D], means [C, D], inverse P [D, D] -> [N, C]."""
  weights = product(means, inverse)  # [C, D]
  return mask_unseen(product(rows, weights.T) - (weights * means).sum(axis=1) / 2, counts)


# -- the method ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ClassStatistics(Method):
  """What `ncm`, `slda` and `aper` share; raises ValueError for options that do not fit.

  Nothing is trained: 0 trainable parameters. Kept are, for D numbers of a sample, 2 D + 1 of all tasks (what standardises,
  found on the first one, and how many samples there were) and C (D + 1) of a task of C classes.

  Attributes:
    modalities: whose features are laid side by side, of those that have an encoder.
    patch_mean: beside the pooled features of an encoder with special tokens (a ViT, AST), the mean of the last layer's other
      tokens; where there are none (HTS-AT, Whisper), the pooled features are made of that mean already.
    unit: scale every standardised sample to unit length.
  """

  modalities: tuple[str, ...] = PAIR
  patch_mean: bool = True
  unit: bool = False
  learns: ClassVar[bool] = False
  start_reads: ClassVar[bool] = False
  second_moments: ClassVar[bool] = False

  def __post_init__(self) -> None:
    if not self.modalities or set(self.modalities) - set(PAIR) or len(set(self.modalities)) < len(self.modalities):
      raise ValueError(f"method option modalities names some of {', '.join(PAIR)}, each once, not {self.modalities!r}")
    if missing := [m for m in self.modalities if getattr(self.backbone, m) is None]:
      raise ValueError(f"method option modalities={self.modalities!r}: there is no encoder for {', '.join(missing)}")

  @classmethod
  def refuses(cls, task: Any) -> str | None:
    """Tasks in which nothing has exactly one class."""
    return None if task.samples else "it keeps statistics of classes, so every second or clip must have exactly one class"

  @property
  def width(self) -> int:
    """D, numbers of a sample."""
    sizes = {m: getattr(self.backbone, m) for m in self.modalities}
    return sum(s.embed_dim + self._has_patch_mean(m) * s.layer_widths[-1] for m, s in sizes.items())

  def _has_patch_mean(self, modality: str) -> bool:
    return self.patch_mean and getattr(self.backbone, modality).num_special > 0

  def init_state(self, shared: Tree) -> Tree:
    """What standardises, and the samples so far: none."""
    del shared
    return {"mean": jnp.zeros(self.width), "std": jnp.ones(self.width), "count": jnp.zeros(())}

  def init_head(self, rng: jax.Array, task: Any) -> Tree:
    """Nothing learns: the classifier is the head's state."""
    del rng, task
    return {}

  def init_head_state(self, task: Any) -> Tree:
    """The classes of a task: no sample."""
    return {"means": jnp.zeros((task.num_classes, self.width)), "counts": jnp.zeros(task.num_classes)}

  # -- scores

  def start(self, task: Any, trainable: Tree, frozen: Tree, state: Tree, past: Tree | None, streams: Tree, **how: Any) -> Tree:
    """Hands what all tasks share to `predict`."""
    del task, trainable, frozen, past, streams, how
    return {"all_tasks": state["shared"]}

  def predict(
    self,
    task: Any,
    trainable: Tree,
    frozen: Tree,
    state: Tree,
    features: Tree,
    context: Tree,
    classes: Tree,
    batch: Tree,
    *,
    rng: jax.Array | None,
    train: bool,
  ) -> tuple[Tree, Tree]:
    """The samples against the classes of a task, which are its head's `state`."""
    rows = self.prepare(self.samples(task, features, batch), context["all_tasks"])
    return task.outputs_of(self.scores(rows, state, context["all_tasks"])), state

  def samples(self, task: Any, features: Tree, batch: Tree) -> jax.Array:
    """Raw features of a batch's samples, float32 [N, D]: of its seconds in their order, or means over a clip's seconds."""
    rows = jnp.concatenate([x.astype(jnp.float32) for x in self.parts(features)], axis=-1)
    return rows if task.samples == "seconds" else rows.reshape(len(batch["mask"]), -1, rows.shape[-1]).mean(axis=1)

  def parts(self, features: Tree) -> Iterator[jax.Array]:
    """What is laid side by side of every second."""
    for m in self.modalities:
      yield features[m].pooled
      if self._has_patch_mean(m):
        yield features[m].tokens[:, features[m].num_special :].astype(jnp.float32).mean(axis=1)

  def prepare(self, rows: Any, shared: Tree) -> Any:
    """Raw samples [N, D] of numpy or JAX -> what statistics and scores are made of."""
    rows = standardise(rows, shared["mean"], shared["std"])
    return rows / ((rows * rows).sum(axis=-1, keepdims=True) ** 0.5).clip(EPS) if self.unit else rows

  def scores(self, rows: jax.Array, classes: Tree, shared: Tree) -> jax.Array:
    """Prepared samples [N, D] against {"means" [C, D], "counts" [C]} -> [N, C]; comparable over the classes of all tasks."""
    raise NotImplementedError

  # -- statistics

  def end_task(self, params: Tree, state: Tree, task: Any, clips: TrainingClips) -> tuple[Tree, Tree]:
    """One pass over the task's clips. The first task's samples are held until it ends: they say how to standardise."""
    shared, parts = jax.device_get(state["shared"]), self.passes(task, clips)
    if shared["count"] == 0:
      parts = list(parts)
      found = standardisation(parts)
      shared = {**shared, **{name: x.astype(np.float32) for name, x in found.items()}}  # as later tasks and `predict` read them
    moments = Moments.none(task.num_classes, self.width, products=self.second_moments)
    for rows, labels, weights in parts:
      moments.add(self.prepare(rows.astype(np.float64), shared), labels, weights)
    shared = self.consolidate({**shared, "count": shared["count"] + moments.counts.sum()}, moments)
    own = {"means": moments.means, "counts": moments.counts}
    shared, own = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (shared, own))
    tasks = {**state["tasks"], task.name: {**state["tasks"][task.name], "head": own}}
    return params, {**state, "shared": shared, "tasks": tasks}

  def passes(self, task: Any, clips: TrainingClips) -> Iterator[Rows]:
    """Raw samples, labels and weights of the training clips, batch by batch."""
    raw = jax.jit(lambda found, mask: self.samples(task, found, {"mask": mask}))
    for found, batch in self.features_of(clips):
      rows, labels = np.asarray(raw(found, batch["mask"])), np.asarray(batch["label"]).reshape(-1)
      yield rows, labels, np.repeat(np.asarray(batch["mask"]), len(rows) // len(batch["mask"]))

  def features_of(self, clips: TrainingClips) -> Iterator[tuple[Tree, Tree]]:
    """What `samples` reads of the training clips, with their batches."""
    return clips.features(False)

  def consolidate(self, shared: Tree, moments: Moments) -> Tree:
    """What one more task does to the statistics of all tasks."""
    del moments
    return shared
