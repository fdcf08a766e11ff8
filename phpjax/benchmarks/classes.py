"""Class-incremental benchmarks: the classes of a dataset arrive in groups, one task each, and the task is not given at test."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np

import data_pipelines
from data_pipelines.parts import ClassPart, class_groups
from phpjax import figures, metrics, predictions, tasks
from phpjax.benchmarks.base import Arrays, Benchmark, TaskInfo, Tree, stack


@dataclasses.dataclass(frozen=True)
class ClassIncremental(Benchmark):
  """One group of classes of a dataset, of `data.num_class_tasks` groups; `data.class_seed` says who is in which.

  Attributes:
    number: of the task, from 1.
    whole: the dataset.
  """

  number: int
  whole: ClassVar[type[data_pipelines.Dataset]]

  dataset = ClassPart
  task = tasks.Classes
  metric = metrics.classes
  prediction = predictions.ClassPrediction
  scoring = "accuracy over the classes of all tasks learned so far"
  also_shown = ("task_accuracy", "accuracy_within_task")
  official = (10, 7, 0)

  @property
  def figure(self) -> str:
    """A file of its own for each task."""
    return f"{self.whole.name}_classes_{self.number}"

  def open(self, root: pathlib.Path, data: Any) -> ClassPart:
    """The rows of the group's classes; raises DataError."""
    whole = self.open_whole(root, data)
    groups = class_groups(whole.classes, data.num_class_tasks, data.class_seed)
    if self.number > len(groups):
      raise data_pipelines.DataError(f"task {self.number} of data.num_class_tasks={len(groups)} does not exist")
    return ClassPart(whole, groups[self.number - 1])

  def open_whole(self, root: pathlib.Path, data: Any) -> data_pipelines.Dataset:
    """The dataset with all of its classes; raises DataError."""
    del data
    return self.whole(root)

  def statistics(self, outputs: Arrays, batch: Arrays) -> dict[str, np.ndarray]:
    """The best class of all tasks against the true one."""
    return self.metric.statistics(outputs["scores"], batch["label"], outputs["place"], mask=batch["mask"])

  def test_labels(self, labels: Iterable[Tree]) -> Arrays:
    """Those of all tasks of the growing label set."""
    return stack(labels, (*self.label_keys, "place", "own"))

  def trivial(self, train: Arrays, test: Arrays, info: TaskInfo) -> tuple[str, dict[str, float]]:
    """One class for all clips of all tasks."""
    del train, info
    return self.metric.trivial(test["label"], test["place"], test["own"])

  def draw(self, examples: Sequence[Tree], info: TaskInfo, path: pathlib.Path) -> None:
    """First frames with the true class, and whether it was found."""
    figures.class_examples([self.example(row, info) for row in examples], path)

  def example(self, row: Tree, info: TaskInfo) -> Tree:
    """For `figures.class_examples`."""
    scores, place = row["outputs"]["scores"], int(row["outputs"]["place"])
    task, best = np.unravel_index(scores.argmax(), scores.shape)
    said = info.classes[best] if task == place else f"a class of task {task + 1}"
    return {"id": row["id"], "visual": row["visual"], "truth": info.classes[int(row["label"])], "prediction": said}


class AVEClasses(ClassIncremental):
  """The event of a whole clip of AVE: 28 classes as 4 tasks of 7."""

  whole = data_pipelines.AVE


class Tux21(ClassIncremental):
  """What a stamp of Tux Paint shows, from its picture and its spoken caption: 21 classes as 7 tasks of 3."""

  whole = data_pipelines.TuxPaint
  official = (1, 3, 0)

  def open_whole(self, root: pathlib.Path, data: Any) -> data_pipelines.TuxPaint:
    """The seed decides the test captions too."""
    return data_pipelines.TuxPaint(root, data.class_seed)
