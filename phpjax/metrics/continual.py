"""Scores of a sequence of tasks, from its accuracy matrix.

R[i, j] = score on task j after learning task i. What lies above the diagonal (tasks not yet learned) is None,
NaN or a zero-shot score; only `fwt` reads it. A matrix may be unfinished: K rows after K tasks. Chaudhry et
al., ECCV 2018 (https://arxiv.org/abs/1801.10112) for forgetting, Lopez-Paz and Ranzato, NeurIPS 2017
(https://arxiv.org/abs/1706.08840) for BWT and FWT, LPI's post-processing for its two variants.
"""

from collections.abc import Sequence

import numpy as np

Matrix = Sequence[Sequence[float | None]] | np.ndarray


def as_array(matrix: Matrix) -> np.ndarray:
  """Rows of scores, None where there is none -> float64 [K, T], NaN where there is none.

  Raises:
    ValueError: no row, fewer columns than rows, or a score missing on or below the diagonal.
  """
  array = np.array([[np.nan if score is None else score for score in row] for row in matrix], np.float64)
  if array.ndim != 2 or not len(array) or array.shape[1] < len(array):
    raise ValueError(f"an accuracy matrix has a row per learned task, a column per task; not {array.shape}")
  if np.isnan(array[np.tril_indices(len(array), 0, array.shape[1])]).any():
    raise ValueError("the accuracy matrix lacks a score of a task that was learned")
  return array


def average_accuracy(matrix: Matrix) -> np.ndarray:
  """A_k = mean over j <= k of R[k, j] -> [K]."""
  scores = as_array(matrix)
  return np.array([scores[k, : k + 1].mean() for k in range(len(scores))])


def forgetting(matrix: Matrix) -> np.ndarray:
  """F_k = mean over j < k of (max over i < k of R[i, j]) - R[k, j], F_0 = 0 -> [K]; negative if they gain."""
  scores = as_array(matrix)
  lost = [[scores[j:k, j].max() - scores[k, j] for j in range(k)] for k in range(len(scores))]
  return np.array([_mean(row) for row in lost])


def forgetting_since_learned(matrix: Matrix) -> np.ndarray:
  """The variant against the score just after learning: mean over j < k of R[j, j] - R[k, j] -> [K]."""
  scores = as_array(matrix)
  lost = [[scores[j, j] - scores[k, j] for j in range(k)] for k in range(len(scores))]
  return np.array([_mean(row) for row in lost])


def bwt(matrix: Matrix) -> np.ndarray:
  """Backward transfer, BWT_k = mean over j < k of R[k, j] - R[j, j], BWT_0 = 0 -> [K]."""
  return 0.0 - forgetting_since_learned(matrix)  # not a bare minus: that would give -0.0


def pooled_accuracy(matrix: Matrix, counts: Sequence[int]) -> np.ndarray:
  """P_k = accuracy over the clips of all tasks j <= k after task k = sum of n_j R[k, j] over sum of n_j -> [K].

  For tasks that grow one label set, each R the share of a task's clips whose class was found among all. Protocols such as
  Tux-21's call P after the last task "last" and its mean over k "average". Their forgetting may have the last score among the
  best: a task that gains in the last step then counts as 0, where `forgetting` has less.

  Args:
    matrix: K rows.
    counts: n, the scored clips of each task, [T].

  Raises:
    ValueError: not a positive number for each task.
  """
  scores, counts = as_array(matrix), np.asarray(counts, np.float64)
  if counts.shape != scores.shape[1:] or not (counts > 0).all():
    raise ValueError(f"pooling {scores.shape[1]} tasks needs the number of clips of each, not {counts.tolist()}")
  return np.array([np.average(scores[k, : k + 1], weights=counts[: k + 1]) for k in range(len(scores))])


def fwt(matrix: Matrix, baseline: Sequence[float]) -> float:
  """Forward transfer = mean over j >= 1 of R[j - 1, j] - baseline[j]; needs scores above the diagonal.

  Args:
    matrix: [T, T], with zero-shot scores just above the diagonal.
    baseline: scores of an untrained model, [T].

  Raises:
    ValueError: such a score is missing.
  """
  scores = as_array(matrix)
  ahead = [scores[j - 1, j] - baseline[j] for j in range(1, min(len(scores) + 1, scores.shape[1]))]
  if np.isnan(ahead).any():
    raise ValueError("forward transfer needs the score of each task just before it is learned")
  return _mean(ahead)


def lpi_average(matrix: Matrix) -> float:
  """LPI's average: mean over tasks of the mean over all evaluations since the task was learned."""
  scores = as_array(matrix)
  return _mean([scores[j:, j].mean() for j in range(len(scores))])


def lpi_forgetting(matrix: Matrix) -> float:
  """LPI's forgetting: last score minus the best before it, mean over the earlier tasks; negative: forgot."""
  return 0.0 - float(forgetting(matrix)[-1])


def _mean(values: Sequence[float]) -> float:
  """Mean; 0 for nothing (the first task has nothing to forget)."""
  return float(np.mean(values)) if len(values) else 0.0


def summarise(matrix: Matrix) -> dict[str, float]:
  """The numbers of a run, of its last row if not said otherwise.

  Returns:
    `mean_accuracy` (A of the last row), `mean_of_average_accuracy` (mean over k of A_k), `forgetting`,
    `forgetting_since_learned`, `bwt`, `lpi_average`, `lpi_forgetting`; in the unit of the matrix.
  """
  average = average_accuracy(matrix)
  return {
    "mean_accuracy": float(average[-1]),
    "mean_of_average_accuracy": float(average.mean()),
    "forgetting": float(forgetting(matrix)[-1]),
    "forgetting_since_learned": float(forgetting_since_learned(matrix)[-1]),
    "bwt": float(bwt(matrix)[-1]),
    "lpi_average": lpi_average(matrix),
    "lpi_forgetting": lpi_forgetting(matrix),
  }
