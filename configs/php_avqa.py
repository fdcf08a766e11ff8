r"""PHP on AVE -> AVVP -> AVS -> AVQA, after https://arxiv.org/abs/2507.21588.

  python -m phpjax.main --config=configs/php_avqa.py:toybox --workdir=runs/php_avqa_toybox

The full variant has the paper's sizes and protocol; `:toybox` runs in minutes on two CPU cores, `:tiny` is for tests.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "full") -> ConfigDict:
  """`full`, `toybox` or `tiny`."""
  c = base.choose(base.base(), variant)
  c.method = ConfigDict({"name": "php", "compat": "paper", **base.PHP[variant]})
  return c
