"""Which task a clip belongs to, where nobody says: the task that left the nearest centroid of frozen features behind.

As in S-Prompts (Wang et al., NeurIPS 2022, arXiv 2207.12819): after a task, k-means on the features of its training clips, as
the encoders give them without any prompt; at test the nearest centroid of all tasks.

`routing="mahalanobis"` is ours: distances under the covariance of clips about their centroids, pooled over all tasks so far and
shrunk as `slda` shrinks its own. Features of frozen encoders vary far more along some directions than along others, none of
which need tell tasks apart: on Tux-21, seeds 0 to 4, it finds the task of 53 percent of the test pictures, "euclidean" of 38.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from phpjax.methods.class_statistics import precision

Tree = dict[str, Any]
NUM_CENTROIDS = 5  # of each task, S-Prompts' number
MODALITIES = ("visual", "audio")
METRICS = EUCLIDEAN, MAHALANOBIS = ("euclidean", "mahalanobis")
SHRINKAGE = 0.3


def metric_of(config: Any) -> str:
  """One of METRICS; that of runs from before there was a choice is the first."""
  return config.get("routing", EUCLIDEAN)


def vectors(features: Tree, clips: int) -> np.ndarray:
  """{modality: Features of every second} -> float32 [B, D]: of each modality the direction of its mean feature, side by side.

  Unit length, so that neither the number of seconds that are run nor how much a clip changes counts.
  """
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True).clip(1e-6)
  found = [np.asarray(features[m].pooled, np.float32) for m in MODALITIES if m in features]
  return np.concatenate([unit(unit(x).reshape(clips, -1, x.shape[-1]).mean(axis=1)) for x in found], axis=1)


def width(encoders: Tree) -> int:
  """D of `vectors`, of encoders {modality: Pretrained}."""
  return sum(encoders[m].module.embed_dim for m in MODALITIES if m in encoders)


def nothing_seen(width: int, metric: str) -> Tree:
  """Of a task that is not learned: `looks` of no clip; "scatter" and "count" only where distances need them."""
  scatter = {"scatter": np.zeros((width, width), np.float32), "count": np.zeros((), np.float32)}
  return {"centroids": np.zeros((NUM_CENTROIDS, width), np.float32), **(scatter if metric == MAHALANOBIS else {})}


def looks(rows: np.ndarray, metric: str) -> Tree:
  """What a task leaves behind, of its clips [n, D]: float32 {"centroids" [NUM_CENTROIDS, D]}, and for Mahalanobis distances
  {"scatter" [D, D], of the clips about their nearest centroids, "count" []}."""
  found = centroids(rows)
  if metric != MAHALANOBIS:
    return {"centroids": found}
  rest = rows.astype(np.float64) - found[_squared(rows, found[None])[:, 0].argmin(-1)]
  return {"centroids": found, "scatter": (rest.T @ rest).astype(np.float32), "count": np.float32(len(rows))}


def centroids(rows: np.ndarray) -> np.ndarray:
  """Features of a task's clips, [n, D] -> float32 [NUM_CENTROIDS, D] by k-means; the same for the same rows in any order.

  Where there are fewer different clips than centroids, each is one, the last of them repeated.
  """
  from sklearn.cluster import KMeans  # only here: it takes a second to load

  distinct = np.unique(rows.astype(np.float64), axis=0)  # sorted, so that the order of the clips does not matter
  if len(distinct) <= NUM_CENTROIDS:
    found = distinct
  else:
    found = KMeans(NUM_CENTROIDS, n_init=10, random_state=0).fit(distinct).cluster_centers_
  return np.pad(found, ((0, NUM_CENTROIDS - len(found)), (0, 0)), mode="edge").astype(np.float32)


class Router:
  """Finds the tasks of clips by what tasks left behind, `looks` of each in their order."""

  def __init__(self, tasks: Sequence[Tree]) -> None:
    self._stored = np.stack([np.asarray(task["centroids"], np.float64) for task in tasks])  # [tasks, centroids, D]
    self._whiten = None
    if "scatter" in tasks[0]:
      scatter = sum(np.asarray(task["scatter"], np.float64) for task in tasks)
      self._whiten = np.linalg.cholesky(precision(scatter, sum(float(task["count"]) for task in tasks), SHRINKAGE))
      self._stored = self._stored @ self._whiten

  def nearest(self, rows: np.ndarray) -> np.ndarray:
    """rows [B, D] -> the task with the nearest centroid, int [B]; ties: the first."""
    rows = rows.astype(np.float64)
    return _squared(rows if self._whiten is None else rows @ self._whiten, self._stored).min(-1).argmin(-1)


def _squared(rows: np.ndarray, stored: np.ndarray) -> np.ndarray:
  """Squared Euclidean distances, rows [B, D], stored [tasks, centroids, D] -> [B, tasks, centroids]."""
  return ((rows[:, None, None].astype(np.float64) - stored[None]) ** 2).sum(-1)
