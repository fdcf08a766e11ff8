r"""LwF: fine-tuning that keeps what the heads of earlier tasks say of the new task's clips.

  python -m phpjax.main --config=configs/lwf.py:toybox --workdir=runs/lwf_toybox

Everything but the distillation is that of configs/finetune.py. Weight 1 and temperature 2 are the paper's (arXiv 1606.09282),
and ours. Question answering is not distilled (phpjax/methods/lwf.py says why). `phpjax.bench` measures a first task, which has
no teacher; behind it a step costs a second forward pass and the earlier heads twice.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "full") -> ConfigDict:
  """As in configs/finetune.py."""
  c = base.php(variant, "lwf")
  c.opt.later_shared_scale = 1.0
  if variant == "tiny":  # a step runs the network twice: deep prompts alone compile in time
    c.method.shallow, c.method.mid = (), ()
  c.method.lwf_weight, c.method.lwf_temperature = 1.0, 2.0
  return c
