"""What the metrics share: padding rows are dropped before counting, and nothing is scored from nothing."""

from collections.abc import Mapping, Sequence

import numpy as np


def keep(mask: np.ndarray | None, *arrays: np.ndarray) -> list[np.ndarray]:
  """Drops the padding rows of arrays that share their first axis.

  Args:
    mask: [N], 0 marks a padding row; None keeps every row.
    *arrays: [N, ...] each.

  Returns:
    The arrays as numpy arrays, rows with mask 0 left out.

  Raises:
    ValueError: the first axes differ.
  """
  arrays = [np.asarray(array) for array in arrays]
  lengths = {len(array) for array in arrays} | (set() if mask is None else {len(mask)})
  if len(lengths) != 1:
    raise ValueError(f"metric inputs disagree on the number of examples: {sorted(lengths)}")
  if mask is None:
    return arrays
  kept = np.asarray(mask) > 0
  return [array[kept] for array in arrays]


def join(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Joins the statistics of several batches, in order: a list of {name: [n, ...]} -> {name: [N, ...]}."""
  if not parts:
    raise ValueError("no batch was scored")
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def mean(values: np.ndarray) -> float:
  """Plain float64 mean of all values; raises ValueError where there is none."""
  if np.size(values) == 0:
    raise ValueError("no example to score")
  return float(np.mean(values, dtype=np.float64))


def check_finite(name: str, values: np.ndarray) -> None:
  """Raises ValueError where scores hold NaN (argmax and comparisons would silently answer something)."""
  if np.isnan(values).any():
    raise ValueError(f"{name} hold NaN in {int(np.isnan(values).sum())} of {values.size} places")
