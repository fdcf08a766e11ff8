"""AVE, audio-visual event localisation (Tian et al., ECCV 2018): one event category, or background, per
second.

Files: `Annotations.txt`, rows `Category&VideoID&Quality&StartTime&EndTime` (seconds, half-open), with or without
a header line; the splits as `{train,val,test}Set.txt`, the same rows, or as `{train,val,test}_order.h5`, row numbers
(git repository, DG-SCT, PHP); `<VideoID>.mp4`, or frames and waves. The per-second label arrays of the original
(labels.h5) follow from the rows, so they are not needed.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import limits
from data_pipelines.base import ClipLayout, Dataset
from data_pipelines.schema import FETCH, DataError, Example, Record, brief, index_of, order_splits
from data_pipelines.tables import is_second, named_splits, read_lines

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
_SET_FILE, _ORDER_FILE = re.compile(r"(\w+)Set\.txt"), re.compile(r"(\w+)_order\.h5")
ANNOTATIONS = ("Annotations.txt", "Annotations_with_domain.txt")  # PHP's copy has a sixth field


@dataclasses.dataclass(frozen=True)
class Event(Record):
  """Event `category` (class index) in the seconds start <= t < end."""

  category: int
  start: int
  end: int


class AVE(Dataset):
  """Examples add label int32 [T]: the class index in event seconds, len(classes) = background elsewhere.

  A split that has both a Set file and an order file is read from the former; in the published files they agree.
  """

  name = "ave"
  folders = ("AVE", "AVE_Dataset")
  label_files = tuple(f"{folder}{name}" for name in ("*Set.txt", "*_order.h5") for folder in ("", "labels/", "data/"))
  layout = ClipLayout(video=("", "video", "AVE"), frames=("frames",), wave=("wave",))

  def __init__(self, root: Path | str) -> None:
    super().__init__(root)
    self.classes = self._read_categories(CATEGORIES)
    self._index = index_of(self.classes)
    beside = sorted(self.label_root.iterdir())
    self._files = named_splits(beside, _ORDER_FILE) | named_splits(beside, _SET_FILE)

  def splits(self) -> tuple[str, ...]:
    return order_splits(self._files)

  def annotations(self) -> list[Event]:
    """All rows of Annotations.txt, which the Set files repeat; raises DataError if it is not there."""
    return self._rows(self._annotations())

  def _annotations(self) -> Path:
    if not (path := self.find_file(*ANNOTATIONS)):
      raise DataError(f"AVE: no {' or '.join(ANNOTATIONS)} in {self.label_root}; it comes with AVE_Dataset.zip")
    return path

  def _read(self, split: str) -> list[Event]:
    path = self._files[split]
    if path.suffix != ".h5":
      return self._rows(path)
    rows = self.annotations()
    return [rows[i] for i in self._order(path, len(rows))]

  def _order(self, path: Path, count: int) -> list[int]:
    """The row numbers of an order file, which must fit `count` annotations."""
    order = read_order(path)
    if wrong := [i for i in order if not 0 <= i < count]:
      reason = f"{len(wrong)} of its {len(order)} row numbers, the first {wrong[0]}, do not exist"
    elif len(order) > count:
      reason = f"it lists {len(order)} rows"
    else:
      return order
    raise DataError(f"{path}: {reason}: {self._annotations()} has {count} rows (the published one 4143); fetch both again")

  def _rows(self, path: Path) -> list[Event]:
    rows = []
    for number, line in enumerate(read_lines(path), 1):
      fields = line.strip().split("&")
      # A header is known by its words; taking the first row for one would shift every label after it.
      if line.strip() and not (number == 1 and fields[:2] == ["Category", "VideoID"]):
        rows.append(self._row(fields, f"{path}:{number}"))
    return rows

  def _row(self, fields: list[str], where: str) -> Event:
    if len(fields) < 5 or not (is_second(fields[3]) and is_second(fields[4])):
      raise DataError(f"{where}: expected Category&VideoID&Quality&StartTime&EndTime, got {'&'.join(fields)!r:.200}; {FETCH}")
    category, video, _, start, end = fields[:5]
    if category not in self._index:
      raise DataError(f"{where}: unknown category {category!r:.200}; list all in categories.txt beside this file")
    return Event(video, video, self._index[category], int(start), int(end))

  def class_of(self, record: Event) -> str:
    return self.classes[record.category]

  def labels(self, record: Event) -> Example:
    second = np.arange(self.seconds)
    inside = (record.start <= second) & (second < record.end)
    return {"label": np.where(inside, record.category, len(self.classes)).astype(np.int32)}


def read_order(path: Path) -> list[int]:
  """The dataset `order` of an order file: rows of Annotations.txt, from 0, not counting its header; raises DataError."""
  import h5py  # only here: it takes a while to load, and most copies of AVE have Set files

  try:
    limits.check_file(path, "label_bytes")
    with h5py.File(path, "r") as file:
      return _row_numbers(file, path)
  except DataError:
    raise
  except Exception as error:  # damaged bytes fail in every way that HDF5 does
    raise DataError(f"{path}: has no readable dataset 'order' ({type(error).__name__}: {brief(error)}); {FETCH}") from error


def _row_numbers(file: Any, path: Path) -> list[int]:
  """The dataset `order` of an open HDF5 file, which must lie in that very file; raises DataError, and as HDF5 does."""
  import h5py

  if not isinstance(file.get("order", getlink=True), h5py.HardLink):  # a link could name any other file
    raise DataError(f"{path}: has no readable dataset 'order' of its own; {FETCH}")
  stored = file["order"]
  if stored.ndim != 1 or stored.dtype.kind not in "iu":
    raise DataError(f"{path}: its dataset 'order' is {stored.dtype} {list(stored.shape)}, not row numbers; {FETCH}")
  if stored.is_virtual or stored.external:
    raise DataError(f"{path}: its dataset 'order' lies in other files, which are not opened; {FETCH}")
  for count in (stored.size, math.prod(stored.chunks or ())):  # a few bytes can announce any size
    if found := limits.excess("label_rows", count, "announces"):
      raise DataError(f"{path}: its dataset 'order' {found[0]}; {found[1]}")
  return np.asarray(stored).tolist()
