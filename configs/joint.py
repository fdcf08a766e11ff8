r"""Joint training on all tasks at once: what the same modules reach when there is nothing to forget.

  python -m phpjax.main --config=configs/joint.py:toybox --workdir=runs/joint_toybox

Not continual: the upper bound beside configs/finetune.py, whose modules, sizes and rates these are. A step takes a batch of
every task; there are as many epochs as the task with most of them has (`epoch_factor`), each as long as the longest task's, and
shorter tasks start over. Where all tasks have a validation split, the mean of their scores chooses the epoch. All rows of the
accuracy matrix are those of the one model (`"joint": true` in results.json), so its forgetting is 0. `phpjax.bench` measures
the tasks one by one; a step costs their sum.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "full") -> ConfigDict:
  """As in configs/finetune.py."""
  c = base.php(variant, "joint")
  c.opt.later_shared_scale = 1.0
  return c
