"""What a benchmark is: a dataset, a task and a metric, and what they need of one another.

The three know nothing of each other, and the code that trains, evaluates and predicts knows none of them by name: it asks
the benchmark. To add one: a file with a subclass of `Benchmark`, and a line in `BENCHMARKS`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from data_pipelines import Dataset, Record, Source, transforms
from data_pipelines.loader import Augment, RandomAccess
from phpjax.metrics import rows
from phpjax.predictions import Prediction
from phpjax.tasks import Task, Widths

Tree = dict[str, Any]
Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class TaskInfo:
  """What a task needs of its dataset; small enough to be stored beside a checkpoint, so that none is needed to load it."""

  name: str
  seconds: int
  classes: tuple[str, ...]
  words: tuple[str, ...] = ()


class Benchmark:
  """Joins a dataset, a task and its metric; it holds no state.

  Attributes:
    dataset: reads its files.
    task: head, prediction and loss.
    metric: the module of phpjax.metrics that scores it.
    prediction: what an answer about one clip looks like.
    label_keys: the label arrays that the trivial predictor counts.
    labels_are_media: whether these are decoded with a clip (masks); else they stand in the annotations.
    asks: whether a clip comes with a question.
    protocols: ways to learn and score the task, as its config's `protocol` chooses; () where there is but one.
    mirrored: the arrays that change when a clip is mirrored left to right; () where a label would become wrong.
    scoring: how the main score comes about, in a few words.
    also_shown: scores that every evaluation prints beside the main one.
    official: seconds, classes (or answers) and words of the published benchmark.
    figure: file name, without its ending, of the figure of examples; figure_rows: how many it shows.
  """

  dataset: ClassVar[type[Dataset]]
  task: ClassVar[type[Task]]
  metric: ClassVar[ModuleType]
  prediction: ClassVar[type[Prediction]]
  label_keys: ClassVar[tuple[str, ...]] = ("label",)
  labels_are_media: ClassVar[bool] = False
  asks: ClassVar[bool] = False
  protocols: ClassVar[tuple[str, ...]] = ()
  mirrored: ClassVar[tuple[str, ...]] = ("visual",)
  scoring: ClassVar[str]
  also_shown: ClassVar[tuple[str, ...]] = ()
  official: ClassVar[tuple[int, int, int]]
  figure: ClassVar[str]
  figure_rows: ClassVar[int] = 3

  # -- dataset and task

  def open(self, root: pathlib.Path, data: Any) -> Dataset:
    """The dataset below a data root, as its config's `data` asks for; raises DataError."""
    del data
    return self.dataset(root)

  def describe(self, name: str, dataset: Dataset) -> TaskInfo:
    """The dataset's part of the task called `name`."""
    return TaskInfo(name, dataset.seconds, tuple(dataset.classes))

  def unusable(self, split: str, records: Sequence[Record]) -> str:
    """Why the rows of a split cannot be scored, "" if they can."""
    del split, records
    return ""

  def view(self, source: Source, split: str, data: Any) -> RandomAccess:
    """The cut of a split that a run reads, as its config's `data` asks for; by default all of it."""
    del split, data
    return source

  def train_seconds(self, seconds: int, data: Any) -> int:
    """How many of the `seconds` of a clip a training step of the published benchmark sees through `view`."""
    del data
    return seconds

  def augmentation(self) -> Augment:
    """Mirrors a training example at random (`data.mirrored`)."""
    return functools.partial(transforms.flip, keys=self.mirrored)

  def make_task(self, info: TaskInfo, modules: Tree, protocol: str = "official") -> Task:
    """The task, sized by its dataset and the encoders {modality: module}; raises ValueError for an unknown protocol."""
    if protocol not in (known := self.protocols or ("official",)):
      raise ValueError(f"protocol.{info.name}={protocol!r} is not one of {', '.join(map(repr, known))}")
    visual, audio = modules["visual"], modules["audio"]
    patches = visual.num_tokens - visual.num_special
    special = (visual.num_special, audio.num_special)
    widths = Widths(visual.width, audio.width, visual.embed_dim, patches, *special, audio.embed_dim)
    options = self.task_options(info, modules) | ({"protocol": protocol} if self.protocols else {})
    return self.task(widths, info.seconds, len(info.classes), name=info.name, classes=info.classes, **options)

  def task_options(self, info: TaskInfo, modules: Tree) -> Tree:
    """Sizes that this task has beyond those of every task."""
    del info, modules
    return {}

  def question(self, question: str | None, info: TaskInfo) -> Tree:
    """A question about one clip -> the arrays of a batch that hold it; raises UserError for one that cannot be asked."""
    del question, info
    return {}

  # -- task and metric

  @property
  def main(self) -> str:
    """The score that enters the accuracy matrix."""
    return self.metric.MAIN

  def shown(self, protocol: str | None) -> tuple[str, ...]:
    """The scores that every evaluation of a run with this protocol prints."""
    del protocol
    return (self.main, *self.also_shown)

  def protocol_of(self, protocol: str | None) -> str:
    """How a run learned and scored the task, for people."""
    return f"{protocol or self.protocols[0]}, {self.scoring}" if self.protocols else self.scoring

  def statistics(self, outputs: Arrays, batch: Arrays) -> dict[str, np.ndarray]:
    """One batch of a task's scores and labels -> what the metric needs of every real clip, [n, ...] each."""
    raise NotImplementedError

  def summarise(self, parts: Sequence[Arrays]) -> dict[str, float]:
    """Statistics of all batches -> every score of the benchmark, in [0, 1]."""
    return self.metric.summarise(rows.join(parts))

  # -- dataset and metric: the best predictor that never looks at a clip

  def train_labels(self, labels: Iterable[Tree]) -> Arrays:
    """What `trivial` reads of the training split, from the label arrays of its rows one by one."""
    return stack(labels, self.label_keys)

  def test_labels(self, labels: Iterable[Tree]) -> Arrays:
    """The same of the split that is scored; of a growing label set (`task.growing`) the rows of all its tasks come, and say as
    `place` which one's they are, and as `own` whether this one's."""
    return stack(labels, self.label_keys)

  def trivial(self, train: Arrays, test: Arrays, info: TaskInfo) -> tuple[str, dict[str, float]]:
    """-> (its name, its scores)."""
    raise NotImplementedError

  # -- what people look at

  def draw(self, examples: Sequence[Tree], info: TaskInfo, path: pathlib.Path) -> None:
    """A figure of examples, truth beside prediction; each is an example of the dataset, the task's scores under "outputs"."""
    raise NotImplementedError


def stack(labels: Iterable[Tree], keys: Sequence[str]) -> dict[str, np.ndarray]:
  """Label arrays of rows -> one array for each key, [N, ...]."""
  labels = list(labels)
  return {key: np.stack([row[key] for row in labels]) for key in keys}
