"""AVE, audio-visual event localisation (Tian et al., ECCV 2018): one event category, or background, per
second.

Files: `Annotations.txt` and `{train,val,test}Set.txt`, rows `Category&VideoID&Quality&StartTime&EndTime`
(seconds, half-open), with or without a header line; `<VideoID>.mp4`. The per-second label arrays of the
original (labels.h5) follow from the rows, so they are not needed.
"""

import dataclasses
import re
from pathlib import Path

import numpy as np

from data_pipelines.base import ClipLayout, Dataset, named_splits, read_lines
from data_pipelines.schema import FETCH, DataError, Example, Record, index_of

# Order of first appearance in Annotations.txt, which is the channel order of the original label arrays.
CATEGORIES = (
  "Church bell",
  "Male speech, man speaking",
  "Bark",
  "Fixed-wing aircraft, airplane",
  "Race car, auto racing",
  "Female speech, woman speaking",
  "Helicopter",
  "Violin, fiddle",
  "Flute",
  "Ukulele",
  "Frying (food)",
  "Truck",
  "Shofar",
  "Motorcycle",
  "Acoustic guitar",
  "Train horn",
  "Clock",
  "Banjo",
  "Goat",
  "Baby cry, infant cry",
  "Bus",
  "Chainsaw",
  "Cat",
  "Horse",
  "Toilet flush",
  "Rodents, rats, mice",
  "Accordion",
  "Mandolin",
)
_SET_FILE = re.compile(r"(\w+)Set\.txt")


@dataclasses.dataclass(frozen=True)
class Event(Record):
  """Event `category` (class index) in the seconds start <= t < end."""

  category: int
  start: int
  end: int


class AVE(Dataset):
  """Examples add label int32 [T]: the class index in event seconds, len(classes) = background elsewhere."""

  folders = ("AVE", "AVE_Dataset")
  label_files = ("*Set.txt", "labels/*Set.txt")
  layout = ClipLayout(video=("", "video", "AVE"), frames=("frames",), wave=("wave",))

  def __init__(self, root: Path | str) -> None:
    super().__init__(root)
    self.classes = self._read_categories(CATEGORIES)
    self._index = index_of(self.classes)
    self._files = named_splits(self._labels(self.root), _SET_FILE)

  def splits(self) -> tuple[str, ...]:
    return tuple(self._files)

  def annotations(self) -> list[Event]:
    """All rows of Annotations.txt, which the split files repeat; raises DataError if it is not there."""
    if not (path := self._find("Annotations.txt")):
      raise DataError(f"AVE: no Annotations.txt in {self.label_root}; it comes with AVE_Dataset.zip")
    return self._rows(path)

  def _read(self, split: str) -> list[Event]:
    return self._rows(self._files[split])

  def _rows(self, path: Path) -> list[Event]:
    rows = []
    for number, line in enumerate(read_lines(path), 1):
      fields = line.strip().split("&")
      # A header is known by its words; taking the first row for one would shift every label after it.
      if line.strip() and not (number == 1 and fields[:2] == ["Category", "VideoID"]):
        rows.append(self._row(fields, f"{path}:{number}"))
    return rows

  def _row(self, fields: list[str], where: str) -> Event:
    if len(fields) < 5 or not (fields[3].isdigit() and fields[4].isdigit()):
      raise DataError(f"{where}: expected Category&VideoID&Quality&StartTime&EndTime, got {'&'.join(fields)!r}; {FETCH}")
    category, video, _, start, end = fields[:5]
    if category not in self._index:
      raise DataError(f"{where}: unknown category {category!r}; list all in categories.txt beside this file")
    return Event(video, video, self._index[category], int(start), int(end))

  def labels(self, record: Event) -> Example:
    second = np.arange(self.seconds)
    inside = (record.start <= second) & (second < record.end)
    return {"label": np.where(inside, record.category, len(self.classes)).astype(np.int32)}
