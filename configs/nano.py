r"""Pretrains the nano encoders that `:toybox` configs use, on composed scenes of known toybox objects.

  python -m phpjax.pretrain --config=configs/nano.py --out=runs/nano

Never draws an `unseen` picture or sound, nor a scene of the toybox benchmarks (those have seeds of their own).
"""

from ml_collections import ConfigDict


def get_config(variant: str = "full") -> ConfigDict:
  """`full` (what is shipped) or `tiny` (a few steps, for tests)."""
  c = ConfigDict()
  c.seed = 20_260_101
  c.encoders = ConfigDict({"visual": "nano_vit", "audio": "nano_ast", "text": "nano_text"})
  c.num_steps = 3000
  c.batch_size = 64
  c.num_captions = 16  # scenes of a batch whose caption is encoded
  c.warmup_steps = 100
  c.lr = 1.5e-3
  c.weight_decay = 0.05
  c.region_weight = 1.0  # patch tokens against class texts, where the compositor knows what a patch shows
  c.background_weight = 0.3  # of a background patch in that loss
  c.caption_weight = 0.5  # scene against caption, within the batch
  c.num_workers = 1
  c.num_test_scenes = 500
  c.log_every_steps = 50
  c.save_every_steps = 500
  if variant == "tiny":
    c.encoders = ConfigDict({"visual": "tiny_vit", "audio": "tiny_ast", "text": "tiny_text"})
    c.num_steps, c.batch_size, c.num_captions, c.warmup_steps, c.num_test_scenes, c.num_workers, c.log_every_steps = (
      3,
      8,
      4,
      1,
      16,
      0,
      1,
    )
  elif variant != "full":
    raise ValueError(f"unknown variant {variant!r}; known: full, tiny")
  return c
