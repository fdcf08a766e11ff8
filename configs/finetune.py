r"""Sequential fine-tuning: PHP's modules as one set that every task trains on, nothing kept.

  python -m phpjax.main --config=configs/finetune.py:toybox --workdir=runs/finetune_toybox

The controlled counterpart of configs/php_avqa.py: same modules, sizes, schedule and variants, no task-specific part. Its
shared parameters keep their full rate on every task; that they are not held back is the point of the baseline.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "full") -> ConfigDict:
  """As in configs/php_avqa.py."""
  c = base.php(variant, "finetune")
  c.opt.later_shared_scale = 1.0
  return c
