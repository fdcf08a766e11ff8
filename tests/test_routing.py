"""Centroids of frozen features, and the nearest of them, against plain numpy."""

import types

import numpy as np
import pytest

from phpjax import routing


def features(*shape, seed=0):
  return types.SimpleNamespace(pooled=np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def test_a_clip_is_the_direction_of_its_mean_feature_of_every_modality():
  found = {"visual": features(6, 4), "audio": features(6, 3, seed=1)}
  rows = routing.vectors(found, 2)
  assert rows.shape == (2, 7) and rows.dtype == np.float32
  for clip in range(2):
    for m, part in (("visual", slice(0, 4)), ("audio", slice(4, 7))):
      seconds = found[m].pooled[3 * clip : 3 * clip + 3]
      expected = np.mean([x / np.sqrt((x**2).sum()) for x in seconds], axis=0)
      np.testing.assert_allclose(rows[clip, part], expected / np.sqrt((expected**2).sum()), rtol=1e-5)


def test_clusters_are_found_in_any_order_of_the_rows():
  rng = np.random.default_rng(0)
  middles = 10 * rng.normal(size=(routing.NUM_CENTROIDS, 6))
  rows = (middles[:, None] + 0.01 * rng.normal(size=(len(middles), 20, 6))).reshape(-1, 6)
  found = routing.centroids(rows)
  assert found.shape == (routing.NUM_CENTROIDS, 6) and found.dtype == np.float32
  gaps = np.linalg.norm(found[:, None] - middles[None], axis=-1)
  assert gaps.min(1).max() < 0.02 and sorted(gaps.argmin(1)) == list(range(len(middles)))
  assert np.array_equal(found, routing.centroids(rng.permutation(rows)))


def test_fewer_clips_than_centroids_are_centroids_themselves():
  rows = np.array([[2.0, 0], [1, 0], [2, 0]])
  assert np.array_equal(routing.centroids(rows), [[1, 0], [2, 0], [2, 0], [2, 0], [2, 0]])


@pytest.mark.parametrize("seed", range(3))
def test_the_nearest_is_found(seed):
  rng = np.random.default_rng(seed)
  rows, stored = rng.normal(size=(9, 4)), rng.normal(size=(3, routing.NUM_CENTROIDS, 4))
  expected = [min(range(3), key=lambda t: min(np.linalg.norm(row - c) for c in stored[t])) for row in rows]
  assert routing.Router([{"centroids": x} for x in stored]).nearest(rows).tolist() == expected
  same = [{"centroids": stored[0]}] * 2
  assert routing.Router(same).nearest(rows).tolist() == [0] * 9, "ties go to the first"


def test_mahalanobis_distances_are_those_of_the_pooled_covariance_about_the_centroids():
  rng = np.random.default_rng(0)
  clips = [rng.normal(size=(30, 4)) * (9, 1, 0.1, 1) + (0, 0, task, 0) for task in range(3)]  # apart where they vary least
  left = [routing.looks(rows, routing.MAHALANOBIS) for rows in clips]
  rests = []
  for rows, looks in zip(clips, left, strict=True):
    gaps = [[np.linalg.norm(row - c) for c in looks["centroids"]] for row in rows]
    rests += [row - looks["centroids"][int(np.argmin(gap))] for row, gap in zip(rows, gaps, strict=True)]
  covariance = sum(np.outer(x, x) for x in rests) / len(rests)
  inverse = np.linalg.inv((1 - routing.SHRINKAGE) * covariance + routing.SHRINKAGE * np.trace(covariance) / 4 * np.eye(4))
  distance = lambda row, looks: min((row - c) @ inverse @ (row - c) for c in looks["centroids"])
  asked = rng.normal(size=(40, 4)) * (9, 1, 0.1, 1) + (0, 0, 1, 0)
  expected = [int(np.argmin([distance(row, looks) for looks in left])) for row in asked]
  found = routing.Router(left).nearest(asked)
  assert found.tolist() == expected
  plain = routing.Router([routing.looks(rows, routing.EUCLIDEAN) for rows in clips]).nearest(asked)
  assert (found == 1).mean() > (plain == 1).mean(), "which is why there is a choice"


@pytest.mark.parametrize("metric", routing.METRICS)
def test_a_task_that_is_not_learned_has_room_for_what_it_will_leave(metric):
  rows = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
  shapes = lambda tree: {key: (np.shape(x), np.asarray(x).dtype) for key, x in tree.items()}
  assert shapes(routing.nothing_seen(5, metric)) == shapes(routing.looks(rows, metric))
