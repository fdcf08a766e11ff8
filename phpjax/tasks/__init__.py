"""Tasks of a sequence. `TASKS` names them with the dataset each one reads."""

from __future__ import annotations

from phpjax.tasks.base import Task, Widths
from phpjax.tasks.event import AVE, AVVP
from phpjax.tasks.question import AVQA
from phpjax.tasks.segmentation import AVS

# name -> (task, dataset of data_pipelines.DATASETS)
TASKS: dict[str, tuple[type[Task], str]] = {
  "ave": (AVE, "ave"),
  "avvp": (AVVP, "llp"),
  "avs": (AVS, "avsbench"),
  "avqa": (AVQA, "music_avqa"),
}

__all__ = ["AVE", "AVQA", "AVS", "AVVP", "TASKS", "Task", "Widths"]
