"""NCM: the nearest class mean on frozen features (Mensink et al. 2013, TPAMI; the classifier of iCaRL, arXiv 1611.07725)."""

from __future__ import annotations

import dataclasses

import jax

from phpjax.methods.base import Tree
from phpjax.methods.class_statistics import ClassStatistics, cosine_scores


@dataclasses.dataclass(frozen=True)
class NCM(ClassStatistics):
  """Nearest class mean: no gradient; cosine of a sample to the mean of each class.

  iCaRL, equation 2: features of unit length, their mean per class, scaled to unit length again. There the features are
  learned and the mean is that of exemplars; here they are frozen and it is that of all samples, so nothing is forgotten but
  what a label set that grows confuses. 0 trainable parameters.
  """

  unit: bool = True

  def scores(self, rows: jax.Array, classes: Tree, shared: Tree) -> jax.Array:
    """Cosines."""
    del shared
    return cosine_scores(rows, classes["means"], classes["counts"])
