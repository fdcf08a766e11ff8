"""LLP, audio-visual video parsing (Tian et al., ECCV 2020): which events are heard and which are seen, per
second.

Files, tab-separated, with or without a header line: `AVVP_<split>.csv` or `AVVP_<split>_pd.csv` with weak labels of
the whole clip, and `AVVP_eval_{audio,visual}.csv` with one event (onset <= t < offset) a row for the evaluated
splits. The defects of the published files (empty or reversed spans, repeated rows and labels, rows of clips in no split)
are tolerated: they add nothing, as in the official evaluation.
"""

import dataclasses
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from data_pipelines.base import ClipLayout, Dataset
from data_pipelines.schema import FETCH, DataError, Example, Record, index_of
from data_pipelines.tables import is_second, named_splits, read_lines

CATEGORIES = (
  "Speech",
  "Car",
  "Cheering",
  "Dog",
  "Cat",
  "Frying_(food)",
  "Basketball_bounce",
  "Fire_alarm",
  "Chainsaw",
  "Cello",
  "Banjo",
  "Singing",
  "Chicken_rooster",
  "Violin_fiddle",
  "Vacuum_cleaner",
  "Baby_laughter",
  "Accordion",
  "Lawn_mower",
  "Motorcycle",
  "Helicopter",
  "Acoustic_guitar",
  "Telephone_bell_ringing",
  "Baby_cry_infant_cry",
  "Blender",
  "Clapping",
)
_SPLIT_FILE = re.compile(r"AVVP_(?!eval_|dataset_full)(\w+?)(?:_pd)?\.csv")
_DENSE_FILES = {"audio": "AVVP_eval_audio.csv", "visual": "AVVP_eval_visual.csv"}

Span = tuple[int, int, int]  # onset, offset, class index


@dataclasses.dataclass(frozen=True)
class Parsing(Record):
  """Weak labels (class indices) of a clip, and its dense spans where `dense` says that its split has them."""

  weak: tuple[int, ...]
  audio: tuple[Span, ...]
  visual: tuple[Span, ...]
  dense: bool


class LLP(Dataset):
  """Examples add label [C], dense_audio [T, C], dense_visual [T, C] and dense (), all float32 in {0, 1}.

  A clip of a split with dense labels has dense = 1 even when it has no row of its own: nothing is heard or
  seen then.
  """

  name = "llp"
  folders = ("LLP", "AVVP")
  label_files = ("AVVP_*.csv", "data/AVVP_*.csv", "labels/AVVP_*.csv", "LLP_dataset/labels/AVVP_*.csv")
  layout = ClipLayout(
    video=("video", "", "LLP_dataset/video", "data/LLP_dataset/video"),  # data/: the layout of AVVP-ECCV20
    frames=("frames", "frame", "LLP_dataset/frames", "LLP_dataset/frame", "data/LLP_dataset/frame"),
    wave=("wave", "audio", "LLP_dataset/wave", "LLP_dataset/audio", "data/LLP_dataset/audio"),
  )

  def __init__(self, root: Path | str) -> None:
    super().__init__(root)
    self.classes = self._read_categories(CATEGORIES)
    self._index = index_of(self.classes)
    self._files = named_splits(self._labels(self.root), _SPLIT_FILE)
    if not self._files:
      raise DataError(
        f"LLP: no AVVP_train.csv or AVVP_<split>_pd.csv in {self.label_root}; they lie in data/ of the AVVP-ECCV20 repository"
      )
    self._dense: dict[str, dict[str, tuple[Span, ...]]] = {}

  def splits(self) -> tuple[str, ...]:
    return tuple(self._files)

  def _read(self, split: str) -> list[Parsing]:
    weak = [(row[0], self._names(row[1], where)) for row, where in self._rows(self._files[split], 2)]
    audio, visual = self._spans("audio"), self._spans("visual")
    dense = any(name in audio or name in visual for name, _ in weak)
    return [Parsing(name, name, labels, audio.get(name, ()), visual.get(name, ()), dense) for name, labels in weak]

  def _rows(self, path: Path, columns: int) -> list[tuple[list[str], str]]:
    """Rows of a tab-separated file without its header, each with the place to name in an error."""
    table = [(line.split("\t"), f"{path}:{number}") for number, line in enumerate(read_lines(path), 1) if line]
    rows = [(row, where) for row, where in table if row[0] != "filename"]
    for row, where in rows:
      if len(row) != columns:
        raise DataError(f"{where}: expected {columns} tab-separated fields, got {len(row)}; {FETCH}")
    return rows

  def _names(self, names: str, where: str) -> tuple[int, ...]:
    """Comma-separated event names -> class indices."""
    for name in (words := [word.strip() for word in names.split(",")]):
      if name not in self._index:
        raise DataError(f"{where}: unknown category {name!r:.200}; list all in categories.txt beside this file")
    return tuple(self._index[name] for name in words)

  def _spans(self, kind: str) -> dict[str, tuple[Span, ...]]:
    """Full filename -> its dense spans; {} if the root has no such file."""
    if kind not in self._dense:
      path, spans = self.find_file(_DENSE_FILES[kind]), defaultdict(list)
      for (name, onset, offset, event), where in self._rows(path, 4) if path else ():
        if not (is_second(onset) and is_second(offset)):
          raise DataError(f"{where}: onset and offset must be whole seconds, got {onset!r:.50} and {offset!r:.50}; {FETCH}")
        spans[name] += [(int(onset), int(offset), label) for label in self._names(event, where)]
      self._dense[kind] = {name: tuple(found) for name, found in spans.items()}
    return self._dense[kind]

  def clip_names(self, record: Parsing) -> tuple[str, ...]:
    # <YouTube id>_<start>_<end>: media carry only the id, which is always 11 characters long.
    return (record.clip[:11], record.clip)

  def labels(self, record: Parsing) -> Example:
    weak = np.zeros(len(self.classes), np.float32)
    weak[list(record.weak)] = 1
    return {
      "label": weak,
      "dense_audio": self._grid(record.audio),
      "dense_visual": self._grid(record.visual),
      "dense": np.float32(record.dense),
    }

  def _grid(self, spans: tuple[Span, ...]) -> np.ndarray:
    grid = np.zeros((self.seconds, len(self.classes)), np.float32)
    for onset, offset, label in spans:
      grid[onset:offset, label] = 1
    return grid
