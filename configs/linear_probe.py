r"""No prompts: a head per task on the frozen features.

python -m phpjax.main --config=configs/linear_probe.py:toybox --workdir=runs/linear_probe_toybox
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "full") -> ConfigDict:
  """`full`, `toybox` or `tiny`."""
  c = base.choose(base.base(), variant)
  if variant != "full":
    c.opt.head.lr = 5e-3  # chosen on val of seed 0 among 2e-3, 5e-3 and 1e-2: mean 45.2, 59.4, 53.8
  return c
