r"""EWC: fine-tuning that is pulled back to earlier tasks' parameters, weighed by their Fisher information.

  python -m phpjax.main --config=configs/ewc.py:toybox --workdir=runs/ewc_toybox

Everything but the penalty is that of configs/finetune.py. The paper (arXiv 1612.00796) takes lambda = 400 for its Atari games
and searched it for MNIST; ours is 400 too and was not tuned here. It depends on the scale of a loss (an event task's own counts
`class_weight` times, 5, beside it), and so wants a search on `val` of its own: --config.method.ewc_weight=...,
--config.data.evaluation_split=val.
--config.method.ewc_online=True is the online form (arXiv 1805.06370; its gamma is ewc_decay), without the normalised Fisher
information of that paper.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "full") -> ConfigDict:
  """As in configs/finetune.py."""
  c = base.php(variant, "ewc")
  c.opt.later_shared_scale = 1.0
  if variant == "tiny":  # the Fisher information is a program of its own for each task: deep prompts alone compile in time
    c.method.shallow, c.method.mid = (), ()
  c.method.ewc_weight, c.method.ewc_online, c.method.ewc_decay = 400.0, False, 0.95
  return c
