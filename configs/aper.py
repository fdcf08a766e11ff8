r"""APER: prompts that learn on the first task alone, and classes as statistics, after https://arxiv.org/abs/2303.07338.

  python -m phpjax.main --config=configs/aper.py:toybox+ave_classes --workdir=runs/aper_classes

The authors' config for VPT-Deep: 5 prompts in each layer of a ViT-B/16, SGD at 0.01, weight decay 5e-4, batch 48, 20 epochs of
the first task; then the nearest class mean. Here: 10 prompts in every step of both towers, and the discriminants, shrinkage and
standardisation of configs/slda.py (phpjax/methods/aper.py says what is whose).
Rates, epochs and batch are those that all methods here share (configs/base.py); at toybox size the head takes the linear
probe's rate. `--config.method.merge=False` leaves the frozen features out.

Tasks in which every second or clip has exactly one class: AVE here, and class-incremental ones, of which the first is learned
by gradient. Variants as in configs/linear_probe.py.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "full") -> ConfigDict:
  """See above."""
  c = base.experiment(variant, tasks=("ave",))
  size, _ = base.split(variant, base.SIZES)
  options = {"modalities": ("visual", "audio"), "patch_mean": True, "unit": False, "shrinkage": 0.3}
  c.method = ConfigDict({"name": "aper", "compat": "paper", "length": 2 if size == "tiny" else 10, "merge": True, **options})
  if c.data.toybox:
    c.opt.head.lr = 5e-3
  return c
