"""Resampling along one axis as torch's `interpolate` does it without antialiasing; numpy or JAX arrays."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

CUBIC_A = -0.75  # torch's and OpenCV's; jax.image.resize and Pillow use -0.5


@functools.cache
def taps(size: int, wanted: int, kind: str, align_corners: bool = False) -> tuple[np.ndarray, np.ndarray]:
  """Which inputs make each output: (index int32 [wanted, k], weight float32 [wanted, k]), k = 4 ("cubic") or 2 ("linear")."""
  if kind not in ("cubic", "linear"):
    raise ValueError(f"unknown interpolation {kind!r}; known: cubic, linear")
  if align_corners:
    at = np.arange(wanted) * ((size - 1) / max(wanted - 1, 1))
  else:
    at = (np.arange(wanted) + 0.5) * (size / wanted) - 0.5
  if kind == "linear":
    at = np.maximum(at, 0)
  base = np.floor(at)
  offsets = np.arange(-1, 3) if kind == "cubic" else np.arange(2)
  distance = np.abs((at - base)[:, None] - offsets)
  weight = _cubic(distance) if kind == "cubic" else 1 - distance
  index = np.clip(base[:, None] + offsets, 0, size - 1)
  return index.astype(np.int32), weight.astype(np.float32)


def _cubic(x: np.ndarray) -> np.ndarray:
  """Keys' cubic convolution kernel of a distance in [0, 2]."""
  a = CUBIC_A
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
  return np.where(x <= 1, near, far)


def resize(x: Any, axis: int, wanted: int, kind: str = "cubic", align_corners: bool = False) -> Any:
  """`x` with `wanted` samples along `axis`; the same kind of array as it came."""
  size = x.shape[axis]
  if size == wanted:
    return x
  index, weight = taps(size, wanted, kind, align_corners)
  shape = [1] * x.ndim
  shape[axis] = wanted
  return sum(x.take(index[:, k], axis=axis) * weight[:, k].reshape(shape) for k in range(index.shape[1]))


def resize_grid(table: np.ndarray, grid: tuple[int, int], wanted: tuple[int, int], kind: str = "cubic") -> np.ndarray:
  """Position embeddings [h * w, D] of a grid -> [h' * w', D] of another one."""
  x = table.reshape(*grid, table.shape[-1])
  return resize(resize(x, 0, wanted[0], kind), 1, wanted[1], kind).reshape(-1, table.shape[-1])
