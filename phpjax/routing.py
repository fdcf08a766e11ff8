"""Which task a clip belongs to, where nobody says: the task that left the nearest centroid of frozen features behind.

As in S-Prompts (Wang et al., NeurIPS 2022, arXiv 2207.12819): after a task, k-means on the features of its training clips, as
the encoders give them without any prompt; at test the nearest centroid of all tasks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Tree = dict[str, Any]
NUM_CENTROIDS = 5  # of each task, S-Prompts' number
MODALITIES = ("visual", "audio")


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


def nearest(rows: np.ndarray, stored: np.ndarray) -> np.ndarray:
  """rows [B, D], stored [tasks, centroids, D] -> the task with the nearest centroid (Euclidean), int [B]; ties: the first."""
  squared = ((rows[:, None, None].astype(np.float64) - stored[None]) ** 2).sum(-1)  # [B, tasks, centroids]
  return squared.min(-1).argmin(-1)
