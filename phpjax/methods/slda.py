"""SLDA: streaming linear discriminant analysis on frozen features (Hayes and Kanan 2020, arXiv 1909.01520)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from phpjax.methods.base import Tree
from phpjax.methods.class_statistics import ClassStatistics, Moments, discriminant_scores, precision


@dataclasses.dataclass(frozen=True)
class SLDA(ClassStatistics):
  """Streaming linear discriminant analysis: no gradient; class means and one covariance within classes, of all tasks so far.

  Section 3 of the paper: the score of class k is m_k' P x - m_k' P m_k / 2 with P the inverse of the shrunk covariance, equal
  priors. Two things are ours: the covariance is the pooled scatter about the final class means (the paper updates it about the
  running ones; the pooled one does not depend on the order of the samples), and it is shrunk towards a multiple of the identity
  of the same trace, by 0.3 (the paper takes (1 - 1e-4) S + 1e-4 I, which depends on the scale of the features). Old tasks'
  scores change as the covariance grows; their class means do not. 0 trainable parameters; 2 D D + 2 D + 1 numbers of all tasks.

  Attributes:
    shrinkage: share of the identity, in (0, 1]; with 1 the nearest mean in Euclidean distance is left.
  """

  shrinkage: float = 0.3
  second_moments: ClassVar[bool] = True

  def __post_init__(self) -> None:
    super().__post_init__()
    if not 0 < self.shrinkage <= 1:
      raise ValueError(f"method option shrinkage={self.shrinkage} must be above 0 and at most 1")

  def init_state(self, shared: Tree) -> Tree:
    """Beside what standardises: no scatter, and as inverse covariance the identity."""
    return {**super().init_state(shared), "scatter": jnp.zeros((self.width, self.width)), "precision": jnp.eye(self.width)}

  def consolidate(self, shared: Tree, moments: Moments) -> Tree:
    """Adds a task's scatter; the inverse is computed here, in float64, once per task instead of once per batch."""
    scatter = shared["scatter"] + moments.scatter
    return {**shared, "scatter": scatter, "precision": precision(scatter, float(shared["count"]), self.shrinkage)}

  def scores(self, rows: jax.Array, classes: Tree, shared: Tree) -> jax.Array:
    """Linear discriminants."""
    return discriminant_scores(rows, classes["means"], classes["counts"], shared["precision"])
