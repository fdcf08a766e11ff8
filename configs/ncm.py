r"""Nearest class mean on frozen features, no gradient.

  python -m phpjax.main --config=configs/ncm.py:toybox --workdir=runs/ncm_toybox

Mensink et al. (2013) and the classifier of iCaRL (arXiv 1611.07725): features of unit length, the mean of each class, scaled
to unit length again, cosine. What is ours: features are standardised first, by what the first task shows, and beside the pooled
ones there is the mean of the last layer's tokens (`patch_mean`; AVE of the toybox's `val`, one run each: 96.2 percent with it,
97.5 without; it is on because `slda` has it).

Tasks in which every second or clip has exactly one class: AVE here. Variants as in configs/linear_probe.py.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "full") -> ConfigDict:
  """See above."""
  c = base.experiment(variant, tasks=("ave",))
  c.method = ConfigDict({"name": "ncm", "compat": "paper", "modalities": ("visual", "audio"), "patch_mean": True, "unit": True})
  return c
