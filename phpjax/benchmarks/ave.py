"""AVE: a class per second, background among them."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np

import data_pipelines
from phpjax import figures, metrics, predictions, tasks
from phpjax.benchmarks.base import Arrays, Benchmark, TaskInfo, Tree
from phpjax.metrics import rows


class AVE(Benchmark):
  """Audio-visual event localisation; the last class is background, which the files do not list."""

  dataset = data_pipelines.AVE
  task = tasks.AVE
  metric = metrics.ave
  prediction = predictions.EventPrediction
  scoring = "accuracy over all seconds, background is a class"
  official = (10, 29, 0)
  figure = "ave_timelines"

  def describe(self, name: str, dataset: data_pipelines.Dataset) -> TaskInfo:
    """The event classes and background."""
    return TaskInfo(name, dataset.seconds, (*dataset.classes, "background"))

  def statistics(self, outputs: Arrays, batch: Arrays) -> dict[str, np.ndarray]:
    """The most probable class of each second against the true one."""
    scores, label = rows.keep(batch["mask"], outputs["scores"], batch["label"])
    return self.metric.statistics(self.metric.decide(scores), label, background=scores.shape[-1] - 1)

  def trivial(self, train: Arrays, test: Arrays, info: TaskInfo) -> tuple[str, dict[str, float]]:
    """One class everywhere."""
    del train
    return self.metric.trivial(test["label"], background=len(info.classes) - 1)

  def draw(self, examples: Sequence[Tree], info: TaskInfo, path: pathlib.Path) -> None:
    """Time lines of the classes."""
    figures.ave_timelines([self.example(row) for row in examples], info.classes[:-1], path)

  def example(self, row: Tree) -> Tree:
    """For `figures.ave_timelines`."""
    prediction = row["outputs"]["scores"].argmax(-1)
    return {"id": row["id"], "visual": row["visual"], "label": row["label"], "prediction": prediction}
