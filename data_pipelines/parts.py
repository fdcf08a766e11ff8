"""Class-incremental tasks: the classes of one dataset in groups, each group a task of its own.

Which class comes when is decided by a hash, the same on every machine: classes sorted by the sha256 of `SEED:CLASS`.
"""

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.base import Dataset
from data_pipelines.schema import DataError, Example, Media, Record, shuffled


def class_groups(classes: Sequence[str], count: int, seed: int) -> tuple[tuple[str, ...], ...]:
  """The classes in `count` groups of equal size, in the order of learning; raises DataError if they do not fit."""
  if count < 1 or len(classes) % count:
    fitting = [n for n in range(2, len(classes) + 1) if len(classes) % n == 0]
    raise DataError(f"{len(classes)} classes do not make {count} tasks of equal size; they make {', '.join(map(str, fitting))}")
  order, size = shuffled(seed, classes), len(classes) // count
  return tuple(tuple(order[start : start + size]) for start in range(0, len(order), size))


class ClassPart(Dataset):
  """The rows of a dataset whose class is one of a group.

  Examples add label int32 (): the place of the class in the group. Media, their files and splits are those of the whole; a
  split without a row of the group is left out.
  """

  def __init__(self, whole: Dataset, group: Sequence[str]) -> None:
    self.whole, self.classes = whole, tuple(group)
    self.root, self.label_root, self.seconds, self.spread = whole.root, whole.label_root, whole.seconds, whole.spread
    self._place = {name: place for place, name in enumerate(self.classes)}
    self._records: dict[str, list[Record]] = {}

  @property
  def name(self) -> str:
    """As the whole is called."""
    return self.whole.name

  def splits(self) -> tuple[str, ...]:
    return tuple(split for split in self.whole.splits() if self._read(split))

  def _read(self, split: str) -> list[Record]:
    return [record for record in self.whole.records(split) if self.whole.class_of(record) in self._place]

  def labels(self, record: Record) -> Example:
    return {"label": np.int32(self._place[self.whole.class_of(record)])}

  def class_of(self, record: Record) -> str:
    return self.whole.class_of(record)

  def clip_names(self, record: Record) -> tuple[str, ...]:
    return self.whole.clip_names(record)

  def path_names(self, record: Record) -> tuple[str, ...]:
    return self.whole.path_names(record)

  def clip_key(self, record: Record) -> Hashable:
    return self.whole.clip_key(record)

  def clip_files(self, record: Record) -> tuple[Path, ...]:
    return self.whole.clip_files(record)

  def has_clip(self, record: Record) -> bool:
    return self.whole.has_clip(record)

  def read_clip(self, record: Record, media: Media) -> Example:
    return self.whole.read_clip(record, media)

  def decode_clip(self, record: Record, media: Media) -> Example:
    return self.whole.decode_clip(record, media)

  def _zero_clip(self, media: Media) -> Example:
    return self.whole._zero_clip(media)
