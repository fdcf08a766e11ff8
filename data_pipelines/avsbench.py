"""AVSBench-object S4, single-source audio-visual segmentation (Zhou et al., ECCV 2022): a mask of the
sounding object.

Files below `Single-source/`: `s4_meta_data.csv` (name, start_time, category, split; PHP keeps it in
s4_data/), and in `s4_data/`: `visual_frames/<split>/<category>/<name>/<name>_{1..5}.png`,
`audio_wav/<split>/<category>/<name>.wav`, `gt_masks/<split>/<category>/<name>/<name>_{1..5}.png`, of which
train has only the first. The pickled spectrograms of the original pack are never opened.
"""

import csv
import dataclasses
from collections.abc import Hashable
from pathlib import Path

import numpy as np

from data_pipelines import media as media_lib
from data_pipelines.base import ClipLayout, Dataset, read_lines
from data_pipelines.schema import FETCH, DataError, Example, Media, Record, index_of, order_splits

CATEGORIES = (
  "baby_laughter",
  "female_singing",
  "male_speech",
  "dog_barking",
  "cat_meowing",
  "lions_roaring",
  "horse_clip-clop",
  "coyote_howling",
  "mynah_bird_singing",
  "playing_acoustic_guitar",
  "playing_tabla",
  "playing_violin",
  "playing_piano",
  "playing_ukulele",
  "playing_glockenspiel",
  "helicopter",
  "race_car",
  "driving_buses",
  "ambulance_siren",
  "typing_on_computer_keyboard",
  "chainsawing_trees",
  "cap_gun_shooting",
  "lawn_mowing",
)
_COLUMNS = ("name", "start_time", "category", "split")
_META = "s4_meta_data.csv"


@dataclasses.dataclass(frozen=True)
class Segmentation(Record):
  """A clip of `category`; `masks` of its frames, from the first, are labelled."""

  category: str
  split: str
  masks: int


class AVSBench(Dataset):
  """Examples add label uint8 [T, H, W] in {0, 1}, label_mask float32 [T] (has a mask) and class int32 ()."""

  folders = ("AVSBench", "AVSBench_data", "AVS")
  label_files = (f"Single-source/{_META}", f"Single-source/s4_data/{_META}", _META, f"s4_data/{_META}")
  layout = ClipLayout(video=(), frames=(), wave=())  # frames and sound lie in one folder a split and category
  seconds = 5

  def __init__(self, root: Path | str) -> None:
    super().__init__(root)
    base = self.label_root
    self.data_root = base if base.name == "s4_data" else base / "s4_data"
    self.classes = self._read_categories(CATEGORIES)
    self._index = index_of(self.classes)
    self._rows = self._read_meta(base / _META)

  def _read_meta(self, path: Path) -> list[dict[str, str]]:
    table = [row for row in csv.reader(read_lines(path)) if row]
    columns = tuple(name.strip() for name in table.pop(0)) if table and "split" in table[0] else _COLUMNS
    if missing := {"name", "category", "split"} - set(columns):
      raise DataError(f"{path}: no column {' or '.join(sorted(missing))}; its header is {','.join(_COLUMNS)}")
    rows = []
    for row in table:
      if len(row) != len(columns):
        raise DataError(f"{path}: expected {len(columns)} fields, got {','.join(row)!r}; {FETCH}")
      rows.append(dict(zip(columns, (field.strip() for field in row), strict=True)))
      if (category := rows[-1]["category"]) not in self._index:
        raise DataError(f"{path}: unknown category {category!r}; list all in categories.txt beside this file")
    return rows

  def splits(self) -> tuple[str, ...]:
    return order_splits(row["split"] for row in self._rows)

  def _read(self, split: str) -> list[Segmentation]:
    masks = 1 if split == "train" else self.seconds
    return [
      Segmentation(row["name"], row["name"], row["category"], split, masks) for row in self._rows if row["split"] == split
    ]

  def _path(self, kind: str, record: Segmentation) -> Path:
    return self.data_root / kind / record.split / record.category / record.clip

  def clip_files(self, record: Segmentation) -> tuple[Path, ...]:
    files = self._path("visual_frames", record), self._wave(record), self._path("gt_masks", record)
    return files if all(path.exists() for path in files) else ()

  def clip_key(self, record: Segmentation) -> Hashable:
    return record.split, record.category, record.clip  # the masks belong to the clip

  def _wave(self, record: Segmentation) -> Path:
    folder = self._path("audio_wav", record)
    return folder.with_name(folder.name + ".wav")

  def pictures(self, record: Segmentation) -> tuple[list[Path], list[Path]]:
    names = [f"{record.clip}_{k}.png" for k in range(1, self.seconds + 1)]
    frames, masks = self._path("visual_frames", record), self._path("gt_masks", record)
    return [frames / name for name in names], [masks / name for name in names[: record.masks]]

  def decode_clip(self, record: Segmentation, media: Media) -> Example:
    """visual uint8 [T, H, W, 3], audio int16 [T, S] and label uint8 [T, H, W]; raises MediaError."""
    frames, masks = self.pictures(record)
    visual = np.stack([media_lib.read_image(path, media) for path in frames])
    label = np.zeros(visual.shape[:3], np.uint8)
    for k, path in enumerate(masks):
      label[k] = media_lib.read_mask(path, media)
    return {"visual": visual, "audio": self._read_wave(self._wave(record), media), "label": label}

  def _zero_clip(self, media: Media) -> Example:
    clip = super()._zero_clip(media)
    return {**clip, "label": np.zeros(clip["visual"].shape[:3], np.uint8)}

  def labels(self, record: Segmentation) -> Example:
    return {
      "label_mask": (np.arange(self.seconds) < record.masks).astype(np.float32),
      "class": np.int32(self._index[record.category]),
    }
