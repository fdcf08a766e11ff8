"""AVS and MS3: the pixels of what sounds (AVSBench: S4 with one source a clip, MS3 with several)."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

import data_pipelines
from data_pipelines.loader import RandomAccess
from data_pipelines.views import LabelledSeconds
from phpjax import figures, metrics, predictions, tasks
from phpjax.benchmarks.base import Arrays, Benchmark, TaskInfo, Tree


class AVS(Benchmark):
  """Audio-visual segmentation; training clips have the mask of their first second only."""

  dataset = data_pipelines.AVSBench
  task = tasks.AVS
  metric = metrics.avs
  prediction = predictions.MaskPrediction
  label_keys = ("label", "label_mask")
  labels_are_media = True
  mirrored = ("visual", "label")
  scoring = "mIoU and F of each clip by itself; batch4: of four together, as the official script"
  also_shown = ("f", "miou_batch4", "f_batch4")
  official = (5, 23, 0)
  figure = "avs_overlays"
  figure_rows = 2  # three rows of frames each

  def view(self, source: data_pipelines.Source, split: str, data: Any) -> RandomAccess:
    """Training may leave out the seconds without a mask (`data.labelled_seconds_only`)."""
    return LabelledSeconds(source) if split == "train" and data.labelled_seconds_only else source

  def train_seconds(self, seconds: int, data: Any) -> int:
    """The first only, where those without a mask are left out."""
    return 1 if data.labelled_seconds_only else seconds

  def task_options(self, info: TaskInfo, modules: Tree) -> Tree:
    """Masks are as large as the pictures that the encoder reads."""
    del info
    return {"image_size": modules["visual"].image_size}

  def statistics(self, outputs: Arrays, batch: Arrays) -> dict[str, np.ndarray]:
    """Logits of pixels against masks."""
    return self.metric.statistics(outputs["mask"], batch["label"], mask=batch["mask"], label_mask=batch["label_mask"])

  def train_labels(self, labels: Iterable[Tree]) -> Arrays:
    """The mean mask; a running sum, so that the masks of a training split need not be held in memory."""
    total, count = 0, 0
    for row in labels:
      total = total + (row["label"] * row["label_mask"][:, None, None]).sum(0)
      count = count + row["label_mask"].sum()
    return {"mean_mask": total / max(count, 1)}

  def trivial(self, train: Arrays, test: Arrays, info: TaskInfo) -> tuple[str, dict[str, float]]:
    """One mask everywhere."""
    del info
    return self.metric.trivial(test["label"], train["mean_mask"], label_mask=test["label_mask"])

  def draw(self, examples: Sequence[Tree], info: TaskInfo, path: pathlib.Path) -> None:
    """Masks over frames."""
    del info
    figures.avs_overlays([self.example(row) for row in examples], path)

  def example(self, row: Tree) -> Tree:
    """For `figures.avs_overlays`."""
    said = row["outputs"]["mask"] > 0
    iou = self.metric.frame_iou(said, row["label"] > 0)
    return {"id": row["id"], "visual": row["visual"], "label": row["label"], "prediction": said.astype(np.uint8), "iou": iou}


class MS3(AVS):
  """Segmentation of several sources; all seconds of all clips have a mask, and what sounds has no class."""

  dataset = data_pipelines.AVSBenchMS3
  official = (5, 0, 0)
  figure = "ms3_overlays"

  def train_seconds(self, seconds: int, data: Any) -> int:
    """All of them, each is labelled."""
    del data
    return seconds
