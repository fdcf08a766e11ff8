r"""Streaming linear discriminant analysis on frozen features, no gradient.

  python -m phpjax.main --config=configs/slda.py:toybox --workdir=runs/slda_toybox

Hayes and Kanan (2020, arXiv 1909.01520): class means and one covariance within classes. The paper's shrinkage is
(1 - 1e-4) S + 1e-4 I on features as they are. Here it is 0.3 towards the identity of the covariance's own trace, on features
that the first task standardises, and the covariance is that about the final means of the classes (phpjax/methods/slda.py).

`patch_mean` lays the mean of the last layer's tokens beside the pooled features: AVE of the toybox's `val`, one run each, 96.8
percent with it, 96.0 without.

Tasks in which every second or clip has exactly one class: AVE here. Variants as in configs/linear_probe.py.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "full") -> ConfigDict:
  """See above."""
  c = base.experiment(variant, tasks=("ave",))
  options = {"modalities": ("visual", "audio"), "patch_mean": True, "unit": False, "shrinkage": 0.3}
  c.method = ConfigDict({"name": "slda", "compat": "paper", **options})
  return c
