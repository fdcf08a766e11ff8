r"""CODA-Prompt: prompts as sums of components that attention weighs, after https://arxiv.org/abs/2211.13218.

  python -m phpjax.main --config=configs/coda_prompt.py:toybox --workdir=runs/coda_prompt_toybox

The paper: 100 components over all tasks, of length 8 (half keys, half values), in the first five layers, orthogonality weight
0.1; ViT-B/16, Adam at 0.001 with a cosine, batch 128, 20 epochs of CIFAR-100 or 50 of ImageNet-R. The authors' later code
multiplies the penalty by 0, for it begins orthogonal. Here: the same for each of vision and audio, 100 divided by the number of
tasks each, heads on the usual features (phpjax/methods/coda_prompt.py). The nano encoders' features of 64 numbers have no room
for 100 orthogonal keys: `toybox` has 16 components per task, as many as fit four times.
Rates, epochs and batch are those that all methods here share (configs/base.py); at toybox size heads take the linear
probe's rate. Other tasks, set by --config.tasks, do not change the share: set --config.method.components_per_task.

Variants: `full`, `toybox`, `tiny` or `tux21`, and behind it a `+` with what is changed, as in configs/php_avqa.py.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "full") -> ConfigDict:
  """See above."""
  c = base.experiment(variant)
  size, _ = base.split(variant, base.SIZES)
  share = {"toybox": 64, "tiny": 8}.get(size, 100) // len(c.tasks)
  steps = {"tiny": (0, 2), "tux21": (0, 1)}.get(size, (0, 1, 2, 3, 4))  # tux21: five of twelve layers are under two of its four
  sizes = {"components_per_task": share, "length": 4 if size == "tiny" else 8, "steps": steps}
  c.method = ConfigDict({"name": "coda_prompt", "compat": "paper", **sizes, "orthogonality_weight": 0.1})
  if c.data.toybox:
    c.opt.head.lr = 5e-3
  return c
