r"""CoPL on AVE, AVVP, AVS and AVQA, after its abstract (ACM MM 2024; the code is not public, the text was not at hand).

  python -m phpjax.main --config=configs/copl.py:toybox --workdir=runs/copl_toybox
  python -m phpjax.main --config=configs/copl.py:toybox --config.tasks="('ave',)" --workdir=runs/copl_ave

The second is the paper's own setting: one task at a time. Published are the three kinds of prompts, the coupled bank, and about
1 percent of additional parameters; encoders, tasks, sizes, losses and optimizer are not known to us. Ours are therefore the
design in phpjax/methods/copl.py and every number: 8 modal-specific, 4 interaction and 4 instance prompts in all blocks, rank
32, 16 slots; AdamW with DG-SCT's rate for AVE, 5e-4 for a batch of 8, times sqrt(32 / 8) (`opt.lr_scaling`); no decay of
prompts; batch, epochs and schedule as all experiments have them. No text encoder is read.

A variant is a size and what is changed, joined by "+", as `toybox+no_coupling`: `full`, `toybox` or `tiny`, and behind it
  only_msp, only_mip                  modal-specific or interaction prompts alone
  no_bank                             both of them, no instance prompts
  no_coupling                         a bank whose modalities do not know of each other
  slots_4, slots_32, ...              of the bank
  length_2, length_16, ...            modal-specific prompts in a block
  first_4, last_4, last_8, ...        the blocks that carry prompts
  rank_8, rank_64, ...                in which the modalities meet
  shuffled_audio                      trained the same; at test the interaction is handed another clip's partner. The epoch
                                      that counts is chosen with it too: compare with `--config.data.selection_split=`
  shared, shared_bank                 in sequence, all parts or the bank are one that every task trains on
  reversed, ast, clip_b16, ...        tasks, orders and encoders as in configs/php_avqa.py
"""

import re

from ml_collections import ConfigDict

from configs import base

SWITCHES = {
  "only_msp": {"mip": False, "bank": False},
  "only_mip": {"msp": False, "bank": False},
  "no_bank": {"bank": False},
  "no_coupling": {"coupling": False},
  "shuffled_audio": {"shuffle_audio": True},
  "shared": {"shared": ("msp", "projections", "mip", "bank")},
  "shared_bank": {"shared": ("bank",)},
}
NUMBERS = {"slots": "num_slots", "length": "msp_length", "rank": "rank"}
CHANGES = (*SWITCHES, "slots_N", "length_N", "first_N", "last_N", "rank_N")
OF_SIZE = {
  "full": {"blocks": tuple(range(12)), "msp_length": 8, "rank": 32, "num_slots": 16},
  "toybox": {"blocks": tuple(range(12)), "msp_length": 4, "rank": 8, "num_slots": 8},
  "tux21": {"blocks": (0, 1, 2, 3), "msp_length": 4, "rank": 16, "num_slots": 8},
  "tiny": {"blocks": (0, 1, 2), "msp_length": 2, "rank": 4, "num_slots": 4},
}


def get_config(variant: str = "full") -> ConfigDict:
  """See above."""
  size, changes = base.split(variant, base.SIZES)
  c = base.sized(size)
  c.method = ConfigDict(
    {
      "name": "copl",
      "compat": "paper",
      **{"msp": True, "mip": True, "bank": True, "coupling": True},
      **{"num_latents": 4, "instance_length": 4, "temperature": 0.1},
      **{"coupling_weight": 0.1, "orthogonality_weight": 0.01, "entropy_weight": 0.0},
      **{"shared": (), "shuffle_audio": False},
      **OF_SIZE[size],
    }
  )
  if size == "full":
    c.opt.reference_batch_size = 8
    for label in ("shared", "prompts", "head"):
      c.opt[label].lr = 5e-4
  elif c.data.toybox:
    c.opt.head.lr = 5e-3  # what configs/linear_probe.py found for the same heads
  base.changed(c, changes, base.SIZES, change, CHANGES)
  del c.encoders["text"]
  return c


def change(c: ConfigDict, word: str) -> bool:
  """Makes the change that `word` names, False where it names none of these."""
  if word in SWITCHES:
    c.method.update(SWITCHES[word])
  elif match := re.fullmatch(f"({'|'.join(NUMBERS)})_([1-9][0-9]*)", word):
    c.method[NUMBERS[match[1]]] = int(match[2])
  elif match := re.fullmatch("(first|last)_([1-9][0-9]*)", word):
    c.method.blocks = c.method.blocks[: int(match[2])] if match[1] == "first" else c.method.blocks[-int(match[2]) :]
  else:
    return False
  return True
