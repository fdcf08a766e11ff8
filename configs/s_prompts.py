r"""S-Prompts: prompts of each task's own, nothing shared, after https://arxiv.org/abs/2207.12819.

  python -m phpjax.main --config=configs/s_prompts.py:toybox --workdir=runs/s_prompts_toybox

The paper: 10 tokens per task behind the class token, the task of a test sample by the nearest of 5 k-means centres; the
authors' config for CORe50: SGD at 0.01, batch 128, 10 epochs. Here: 10 tokens for each of vision and audio behind all others
(their place is the same to the encoders, for they carry no position), the task's head where S-liPrompts has language prompts
(phpjax/methods/s_prompts.py).
Rates, epochs and batch are those that all methods here share (configs/base.py); at toybox size heads take the linear
probe's rate.

Variants: `full`, `toybox`, `tiny` or `tux21`, and behind it a `+` with what is changed, as in configs/php_avqa.py.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "full") -> ConfigDict:
  """See above."""
  c = base.experiment(variant)
  size, _ = base.split(variant, base.SIZES)
  c.method = ConfigDict({"name": "s_prompts", "compat": "paper", "length": 3 if size == "tiny" else 10})
  if c.data.toybox:
    c.opt.head.lr = 5e-3
  return c
