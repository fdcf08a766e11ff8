r"""Class texts against frozen features, nothing learned.

  python -m phpjax.main --config=configs/zero_shot.py:toybox --workdir=runs/zero_shot_toybox

CLIP (arXiv 2103.00020) with the class text of its paper, "a photo of a {}.", and LAION's CLAP (arXiv 2211.06687) with "This is
a sound of {}.", each at its own temperature. The nano encoders know other words and were trained with other texts.

Event tasks: AVE and AVVP, where "background" is one of the texts (phpjax/methods/zero_shot.py says how it counts), and AVE's
classes in groups (`ave_classes`). Variants as in configs/linear_probe.py; encoders that share no space with text are refused:
`ast`, and those of `tux21`.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "full") -> ConfigDict:
  """See above."""
  c = base.experiment(variant, tasks=("ave", "avvp"))
  texts = {"visual_text": "a photo of a {}.", "audio_text": "This is a sound of {}."}
  if c.data.toybox:
    texts = {"visual_text": "x x x x {}.", "audio_text": "The sounds of {}"}
  else:
    base.add_audio_text(c)
  c.method = ConfigDict({"name": "zero_shot", "compat": "paper", **texts})
  return c
