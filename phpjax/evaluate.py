"""Runs a predictor over a split and keeps the accuracy matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

Tree = dict[str, Any]
Matrix = list[list[float | None]]


def evaluate(
  predict: Callable[[Tree], Tree],
  batches: Iterable[Tree],
  statistics: Callable[[Tree, Tree], Tree],
  summarise: Callable[[Sequence[Tree]], dict[str, float]],
  *,
  on_batch: Callable[[int], None],
) -> dict[str, float]:
  """Scores one split.

  Args:
    predict: batch -> arrays with a leading B.
    batches: numpy batches with "mask" (0: padding).
    statistics: (arrays, batch) -> numbers of the real rows.
    summarise: the numbers of all batches -> scores. Sums are divided once, there, never per batch.
    on_batch: told how many batches are done.
  """
  parts: list[Tree] = []

  def fetch(outputs: Tree, batch: Tree) -> None:
    parts.append(statistics(jax.device_get(outputs), batch))
    on_batch(len(parts))

  waiting = None
  for batch in batches:
    dispatched = predict(batch), batch  # before the numbers of the last one are fetched: the device need not wait for the host
    if waiting:
      fetch(*waiting)
    waiting = dispatched
  if waiting:
    fetch(*waiting)
  return summarise(parts)


def add_row(matrix: Matrix, scores: dict[str, float], tasks: Sequence[str], learned: int) -> Matrix:
  """The matrix with row `learned` (scores of the tasks 0..learned), null for tasks not learned yet."""
  row = [scores[name] if j <= learned else None for j, name in enumerate(tasks)]
  return [*matrix[:learned], row]
