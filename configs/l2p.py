r"""L2P: prompts that each second of a clip chooses from one pool, after https://arxiv.org/abs/2112.08654.

  python -m phpjax.main --config=configs/l2p.py:toybox --workdir=runs/l2p_toybox

The paper: 10 prompts of 5 tokens, the 5 nearest by cosine, pull weight 0.5; ViT-B/16, Adam at 0.03 (constant), batch 128, 5
epochs. The authors' config for CIFAR-100: 10 tokens, the 4 nearest, pull weight 1, one choice per batch. Here: the paper's
sizes, a pool for each of vision and audio, a choice for each second, heads on the usual features (phpjax/methods/l2p.py).
Rates, epochs and batch are those that all methods here share (configs/base.py); at toybox size heads take the linear
probe's rate. The pool keeps its full rate on later tasks: it is retrained, as in the paper.

Variants: `full`, `toybox`, `tiny` or `tux21`, and behind it a `+` with what is changed, as in configs/php_avqa.py.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "full") -> ConfigDict:
  """See above."""
  c = base.experiment(variant)
  size, _ = base.split(variant, base.SIZES)
  sizes = {"pool_size": 4, "length": 2, "top_k": 2} if size == "tiny" else {"pool_size": 10, "length": 5, "top_k": 5}
  c.method = ConfigDict({"name": "l2p", "compat": "paper", **sizes, "pull_weight": 0.5})
  c.opt.later_shared_scale = 1.0
  if c.data.toybox:
    c.opt.head.lr = 5e-3
  return c
