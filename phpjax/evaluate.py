"""Runs a predictor over a split and keeps the accuracy matrix."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

Tree = dict[str, Any]
Matrix = list[list[float | None]]


def evaluate(predict: Callable[[Tree], Tree], batches: Iterable[Tree], statistics: Callable[[Tree, Tree], Tree],
             summarise: Callable[[Sequence[Tree]], dict[str, float]], *, on_batch: Callable[[int], None] | None = None,
             keep: int = 0) -> tuple[dict[str, float], list[Tree]]:
  """Scores one split.

  Args:
    predict: batch -> arrays with a leading B.
    batches: numpy batches with "mask" (0: padding).
    statistics: (arrays, batch) -> numbers of the real rows.
    summarise: all numbers -> scores. Sums are divided once, here, never per batch.
    on_batch: told how many batches are done.
    keep: how many examples to return, with their outputs and ids, for figures.

  Returns:
    (scores, the first `keep` examples: batch and output arrays of one row each).
  """
  parts, kept = [], []
  for done, batch in enumerate(batches, start=1):
    outputs = jax.device_get(predict(batch))
    parts.append(statistics(outputs, batch))
    for row in np.flatnonzero(batch["mask"])[:max(keep - len(kept), 0)]:
      kept.append({**{k: v[row] for k, v in batch.items()}, "outputs": {k: v[row] for k, v in outputs.items()}})
    if on_batch:
      on_batch(done)
  return summarise(parts), kept


def add_row(matrix: Matrix, scores: dict[str, float], tasks: Sequence[str], learned: int) -> Matrix:
  """The matrix with row `learned` (scores of the tasks 0..learned), null for tasks not learned yet."""
  row = [scores[name] if j <= learned else None for j, name in enumerate(tasks)]
  return [*matrix[:learned], row]
