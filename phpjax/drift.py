"""How far the shared parameters have moved since a task was learned, and what that cost the task.

A task keeps its own prompts and head, and reads the shared parameters of now (PHP's release does the same and does not
look: reference table of quirks, 33).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

Tree = dict[str, Any]


def anchor(shared: Tree, uses: Iterable[str]) -> Tree:
  """The shared leaves that a task reads, as they are at its end, on the host."""
  return jax.device_get({key: shared[key] for key in uses})


def distances(then: Tree, shared: Tree) -> dict[str, float]:
  """{top-level key: length of the change over the length of what stood there before}, float64."""
  now = jax.device_get({key: shared[key] for key in then})
  return {key: _length(jax.tree.map(np.subtract, now[key], then[key])) / max(_length(then[key]), 1e-30) for key in then}


def _length(tree: Any) -> float:
  return float(np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in jax.tree.leaves(tree))))


def record(
  anchors: Mapping[str, Tree], shared: Tree, matrix: Sequence[Sequence[float]], names: Sequence[str], learned: int
) -> list[Tree]:
  """A row for every task older than the one just learned.

  Args:
    anchors: {task: what `anchor` gave at its end}.
    shared: the shared parameters of now.
    matrix: accuracy matrix, `matrix[i][j]` the score of task j after task i.
    names: tasks in learning order.
    learned: index of the task just learned.

  Returns:
    [{"task", "after", "moved": {key: relative distance}, "score_change": score now minus score at the task's own end}].
  """
  return [
    {
      "task": name,
      "after": names[learned],
      "moved": distances(anchors[name], shared),
      "score_change": matrix[learned][j] - matrix[j][j],
    }
    for j, name in enumerate(names[:learned])
  ]
