r"""PHP on AVE -> AVVP -> AVS -> AVQA, after https://arxiv.org/abs/2507.21588.

  python -m phpjax.main --config=configs/php_avqa.py:toybox --workdir=runs/php_avqa_toybox

A variant is a size and what is changed, joined by "+", as `toybox+no_shallow` or `released+ave_avvp_avqa`:
  full             CLIP ViT-B/32, HTS-AT, CLIP and CLAP text, batch 32; what stands in front if no size is named
  toybox           the embedded data and encoders: minutes on two CPU cores
  toybox+short     a fifth to a half of its epochs, the last one counts, one rate for all heads: for tables of many methods
  tiny             seconds, for tests
  tux21            Tux Paint's stamps, 7 tasks of 3 classes, on DINOv2, Whisper, MiniLM: minutes; data.root holds them
  released         full size, as the release does it and trains it: batch 2, Adam with L2 decay, all quirks
  released_toybox  the same quirks and optimizer with the toybox's data, rates and epochs
and behind it
  ave_classes                                 the event classes of AVE in groups, class-incremental
  ave_avvp_avqa, ave_avqa_avvp, reversed      other tasks or orders: the release's, its README's, the paper's four from the end
  no_PHASE, only_PHASE                        PHASE: shallow, middle, deep
  shallow_0_3, middle_2_4, deep_5_8, ...      the layers of a phase, first and last; a layer takes a middle or a deep prompt
  deep_length_5, deep_length_20, ...          deep prompts per layer
  ast, clip_b16                               another audio encoder, another CLIP (full size only)

`compat` decides, "paper" or "released", what phpjax/compat.py tells in a table; each of its options may be set alone:

  python -m phpjax.main --config=configs/php_avqa.py:toybox --config.method.write_back=False --workdir=runs/no_write_back

Rates at full size are PHP's 3e-4 times sqrt(32 / 2), Adam's rule for a batch 16 times as large (`opt.lr_scaling`).
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "full") -> ConfigDict:
  """See above."""
  return base.php(variant)
