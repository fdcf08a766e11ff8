r"""No prompts: a head per task on the frozen features.

python -m phpjax.main --config=configs/linear_probe.py:toybox --workdir=runs/linear_probe_toybox
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "full") -> ConfigDict:
  """`full`, `toybox` or `tiny`."""
  return base.choose(base.base(), variant)
