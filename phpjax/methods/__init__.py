"""Continual methods. One file each; a new one needs a line in `METHODS`."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from phpjax.methods.base import Backbone, Method, Sizes
from phpjax.methods.coda_prompt import CODAPrompt
from phpjax.methods.copl import CoPL
from phpjax.methods.dualprompt import DualPrompt
from phpjax.methods.finetune import FineTune
from phpjax.methods.l2p import L2P
from phpjax.methods.php import PHP
from phpjax.methods.s_prompts import SPrompts

METHODS: dict[str, type[Method]] = {
  "linear_probe": Method,
  "finetune": FineTune,
  "php": PHP,
  "copl": CoPL,
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


__all__ = ["METHODS", "Backbone", "Method", "Sizes", "make_method"]
