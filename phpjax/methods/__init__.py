"""Continual methods. One file each; a new one needs a line in `METHODS`."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from phpjax.methods.aper import APER
from phpjax.methods.base import Backbone, Method, Sizes, TrainingClips
from phpjax.methods.coda_prompt import CODAPrompt
from phpjax.methods.copl import CoPL
from phpjax.methods.dualprompt import DualPrompt
from phpjax.methods.ewc import EWC
from phpjax.methods.finetune import FineTune
from phpjax.methods.joint import Joint
from phpjax.methods.l2p import L2P
from phpjax.methods.lwf import LwF
from phpjax.methods.ncm import NCM
from phpjax.methods.php import PHP
from phpjax.methods.s_prompts import SPrompts
from phpjax.methods.slda import SLDA
from phpjax.methods.zero_shot import ZeroShot

METHODS: dict[str, type[Method]] = {
  "linear_probe": Method,
  "finetune": FineTune,
  "ewc": EWC,
  "lwf": LwF,
  "joint": Joint,
  "php": PHP,
  "copl": CoPL,
  "zero_shot": ZeroShot,
  "ncm": NCM,
  "slda": SLDA,
  "aper": APER,
  "l2p": L2P,
  "dualprompt": DualPrompt,
  "coda_prompt": CODAPrompt,
  "s_prompts": SPrompts,
}


def make_method(name: str, backbone: Backbone, **options: Any) -> Method:
  """The method called `name`; lists become tuples. Raises ValueError for an unknown name or option."""
  if name not in METHODS:
    raise ValueError(f"unknown method {name!r}; known: {', '.join(sorted(METHODS))}")
  known = {f.name for f in dataclasses.fields(METHODS[name])} - {"backbone"}
  for option in options:
    if option not in known:
      close = difflib.get_close_matches(option, known, n=1)
      raise ValueError(f"method {name} has no option {option!r}" + (f": did you mean {close[0]!r}?" if close else ""))
  return METHODS[name](backbone, **{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


__all__ = ["METHODS", "Backbone", "Method", "Sizes", "TrainingClips", "make_method"]
