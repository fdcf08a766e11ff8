r"""DualPrompt: prompts of all tasks and prompts of one, after https://arxiv.org/abs/2204.04799.

  python -m phpjax.main --config=configs/dualprompt.py:toybox --workdir=runs/dualprompt_toybox

The paper: G-Prompts of length 5 in the first two layers, E-Prompts of length 20 in the next three, match weight 1; ViT-B/16,
Adam at 0.005 (constant), batch 128, 5 epochs of CIFAR-100 or 50 of ImageNet-R. Here: the same for each of vision and audio, a
key per modality, heads on the usual features (phpjax/methods/dualprompt.py); the three layers of `tiny` and the four steps of
`tux21` have one and two.
Rates, epochs and batch are those that all methods here share (configs/base.py); at toybox size heads take the linear
probe's rate. G-Prompts keep their full rate on later tasks, as in the paper.

Variants: `full`, `toybox`, `tiny` or `tux21`, and behind it a `+` with what is changed, as in configs/php_avqa.py.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "full") -> ConfigDict:
  """See above."""
  c = base.experiment(variant)
  size, _ = base.split(variant, base.SIZES)
  sizes = {"general": (0, 1), "expert": (2, 3, 4), "general_length": 5, "expert_length": 20}
  if size == "tux21":
    sizes |= {"general": (0,), "expert": (1, 2)}
  if size == "tiny":
    sizes = {"general": (0,), "expert": (1, 2), "general_length": 2, "expert_length": 3}
  c.method = ConfigDict({"name": "dualprompt", "compat": "paper", **sizes, "match_weight": 1.0, "warm_start": True})
  c.opt.later_shared_scale = 1.0
  if c.data.toybox:
    c.opt.head.lr = 5e-3
  return c
