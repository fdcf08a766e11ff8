"""How far shared parameters moved, against plain numpy."""

import numpy as np
import pytest

from phpjax import drift


def test_distances_are_relative_and_per_key():
  then = {
    "adapters": {"a": np.array([3.0, 4.0], np.float32), "b": np.zeros((2, 2), np.float32)},
    "context": np.ones(4, np.float32),
  }
  now = {
    "adapters": {"a": then["adapters"]["a"], "b": np.full((2, 2), 0.5, np.float32)},
    "context": then["context"],
    "new": np.ones(1),
  }
  assert drift.anchor(then, ("context",)).keys() == {"context"}
  assert drift.distances(then, now) == {"adapters": pytest.approx(1.0 / 5.0), "context": 0.0}


def test_a_row_for_every_older_task_says_what_the_change_cost():
  shared, anchors = {"x": np.array([2.0])}, {"ave": {"x": np.array([1.0])}, "avs": {}}
  rows = drift.record(anchors, shared, [[0.5, None], [0.4, 0.3], [0.45, 0.1, 0.9]], ["ave", "avs", "avqa"], 2)
  assert rows == [
    {"task": "ave", "after": "avqa", "moved": {"x": 1.0}, "score_change": pytest.approx(-0.05)},
    {"task": "avs", "after": "avqa", "moved": {}, "score_change": pytest.approx(-0.2)},
  ]
