"""Continual learning of audio-visual-text tasks by prompting one frozen backbone.

predictor = phpjax.load("runs/php_avqa_toybox")
predictor.predict("avqa", video="clip.mp4", question="How many instruments are sounding in the video?")
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from phpjax.predict import Predictor

__all__ = ["__version__", "load"]
__version__ = "0.1.0"  # that of pyproject.toml


def load(workdir: str | os.PathLike[str], step: int | None = None) -> Predictor:
  """Opens a run of phpjax.main for predictions: no flags, no training data, any number of devices.

  Args:
    workdir: the folder of the run.
    step: a checkpoint's number; by default the newest one that is whole.

  Raises:
    phpjax.errors.UserError: no such run, no checkpoint that can be read, or other encoder weights than it was trained with.
  """
  from phpjax import predict  # imports jax: `import phpjax` stays light

  return predict.load(workdir, step)
