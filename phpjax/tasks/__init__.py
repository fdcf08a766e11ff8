"""Kinds of tasks: heads and losses. `phpjax.benchmarks` joins each with the dataset it reads and the metric that scores it."""

from __future__ import annotations

from phpjax.tasks.base import Task, Widths
from phpjax.tasks.classes import Classes
from phpjax.tasks.event import AVE, AVVP
from phpjax.tasks.question import AVQA
from phpjax.tasks.segmentation import AVS
from phpjax.tasks.together import Together

__all__ = ["AVE", "AVQA", "AVS", "AVVP", "Classes", "Task", "Together", "Widths"]
