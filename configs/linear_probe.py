r"""No prompts: a head per task on the frozen features.

  python -m phpjax.main --config=configs/linear_probe.py:toybox --workdir=runs/linear_probe_toybox

Variants: `full`, `toybox` or `tiny`, and behind it a `+` with another order of tasks or other encoders (configs/php_avqa.py).
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "full") -> ConfigDict:
  """See above."""
  c = base.experiment(variant)
  if c.data.toybox:
    c.opt.head.lr = 5e-3  # chosen on val of seed 0 among 2e-3, 5e-3 and 1e-2: mean 45.2, 59.4, 53.8
  return c
