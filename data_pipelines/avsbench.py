"""AVSBench-object, audio-visual segmentation (Zhou et al., ECCV 2022): a mask of what sounds, in each of five seconds.

S4 (one source a clip, `Single-source/`) and MS3 (several, `Multi-sources/`), each a table and a folder `s4_data` or `ms3_data`
beside it, or around it (PHP), with `visual_frames`, `audio_wav` and `gt_masks`. DG-SCT's packs have `wave/.../AVS.npy` where
`audio_wav` is missing. The pickled spectrograms of the original packs are never opened.
"""

import dataclasses
import re
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_pipelines import media as media_lib
from data_pipelines import pictures, waves
from data_pipelines.base import ClipLayout, Dataset
from data_pipelines.schema import FETCH, DataError, Example, Media, Record, index_of, order_splits
from data_pipelines.tables import read_lines

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


@dataclasses.dataclass(frozen=True)
class Segmentation(Record):
  """A clip of `category` ("" in MS3); `masks` of its frames, from the first, are labelled."""

  category: str
  split: str
  masks: int


def _pictures(paths: Iterable[Path]) -> list[Path]:
  """The paths of files, each as it is there if only its ending is in capitals."""
  return [media_lib.present(path) or path for path in paths]


class Masks(Dataset):
  """What S4 and MS3 share: a table of clips, and masks beside frames and sound.

  Attributes:
    meta: name of the table; a header line is known by its column `split`.
    columns: those of the table that are read, and where they stand when it has no header line or calls them otherwise.
    data_folder: holds frames, sound and masks; beside the table, or the table lies in it.
    masks_train, masks_test: how many frames of a clip have a mask, in the split train and in the others.
  """

  folders = ("AVSBench", "AVSBench_data", "AVSBench-object", "AVS")
  layout = ClipLayout(video=(), frames=(), wave=())  # frames and sound lie in folders by split, and S4's by category
  seconds = 5
  meta: ClassVar[str]
  columns: ClassVar[dict[str, int]]
  data_folder: ClassVar[str]
  masks_train: ClassVar[int] = 5
  masks_test: ClassVar[int] = 5

  def __init__(self, root: Path | str) -> None:
    super().__init__(root)
    base = self.label_root
    self.data_root = base if base.name == self.data_folder else base / self.data_folder
    self._rows = self._read_meta(base / self.meta)

  def _read_meta(self, path: Path) -> list[tuple[dict[str, str], str]]:
    """The rows of the table, each with the place to name in an error."""
    lines = [[field.strip() for field in line.split(",")] for line in read_lines(path)]  # no field is quoted
    table = [(row, f"{path}:{number}") for number, row in enumerate(lines, 1) if any(row)]
    names = [name.lower() for name in table[0][0]] if table else []
    places, width = dict(self.columns), len(names)
    if "split" in names:
      table.pop(0)
      places |= {name: names.index(name) for name in self.columns if name in names}
    if table and max(places.values()) >= width:
      raise DataError(f"{path}: expected the columns {', '.join(self.columns)}, got {','.join(names)!r:.200}; {FETCH}")
    for row, where in table:
      if len(row) != width:
        raise DataError(f"{where}: expected {width} fields, got {','.join(row)!r:.200}; {FETCH}")
      if not re.fullmatch(r"\w+", row[places["split"]]):  # it becomes the name of folders and of prepared records
        raise DataError(f"{where}: {row[places['split']]!r:.80} is no name of a split: letters, digits and _ only; {FETCH}")
    ids = [row[places["name"]] for row, _ in table]
    if ids and any(ids == [str(first + i) for i in range(len(ids))] for first in (0, 1)):
      raise DataError(f"{path}: a column that counts the rows stands where the names of clips should; {FETCH}")
    return [({name: row[place] for name, place in places.items()}, where) for row, where in table]

  def splits(self) -> tuple[str, ...]:
    return order_splits(row["split"] for row, _ in self._rows)

  def _read(self, split: str) -> list[Segmentation]:
    masks = self.masks_train if split == "train" else self.masks_test
    rows = [row for row, _ in self._rows if row["split"] == split]
    return [Segmentation(row["name"], row["name"], row.get("category", ""), split, masks) for row in rows]

  def _folder(self, kind: str, record: Segmentation) -> Path:
    """The folder of a split, and in S4 of a category."""
    return self.data_root / kind / record.split / record.category  # "" adds nothing

  def frames(self, record: Segmentation) -> list[Path]:
    """The pictures of a clip, one a second."""
    folder = self._folder("visual_frames", record) / record.clip
    return _pictures(folder / f"{record.clip}_{k}.png" for k in range(1, self.seconds + 1))

  def masks(self, record: Segmentation) -> list[Path]:
    """The masks of a clip, of its leading seconds."""
    folder = self._folder("gt_masks", record) / record.clip
    return _pictures(folder / f"{record.clip}_{k}.png" for k in range(1, record.masks + 1))

  def sound(self, record: Segmentation) -> Path:
    """The wav of a clip; without one the AVS.npy that should hold it, if that exists."""
    wav = self._folder("audio_wav", record) / f"{record.clip}.wav"
    packed = self._folder("wave", record) / waves.FILE_NAME
    return media_lib.present(wav) or (packed if packed.is_file() else wav)

  def pictures(self, record: Segmentation) -> tuple[list[Path], list[Path]]:
    return self.frames(record), self.masks(record)

  def clip_files(self, record: Segmentation) -> tuple[Path, ...]:
    """(folder of frames, sound, folder of masks), () if any is missing."""
    files = self.frames(record)[0].parent, self.sound(record), self.masks(record)[0].parent
    return files if all(path.exists() for path in files) else ()

  def path_names(self, record: Segmentation) -> tuple[str, ...]:
    return (record.clip, record.split, *filter(None, (record.category,)))

  def clip_key(self, record: Segmentation) -> Hashable:
    return record.split, record.category, record.clip  # the masks belong to the clip

  def decode_clip(self, record: Segmentation, media: Media) -> Example:
    """visual uint8 [T, H, W, 3], audio int16 [T, S] and label uint8 [T, H, W]; raises MediaError."""
    visual = np.stack([pictures.read_image(path, media) for path in self.frames(record)])
    label = np.zeros(visual.shape[:3], np.uint8)
    for k, path in enumerate(self.masks(record)):
      label[k] = pictures.read_mask(path, media)
    sound = self.sound(record)
    if sound.name == waves.FILE_NAME:
      audio = self._seconds_of(waves.read_wave(sound, record.clip, media.sample_rate_hz), media)
    else:
      audio = self._read_wave(sound, media)
    return {"visual": visual, "audio": audio, "label": label}

  def _zero_clip(self, media: Media) -> Example:
    clip = super()._zero_clip(media)
    return {**clip, "label": np.zeros(clip["visual"].shape[:3], np.uint8)}

  def labels(self, record: Segmentation) -> Example:
    return {"label_mask": (np.arange(self.seconds) < record.masks).astype(np.float32)}


def _places(folder: str, data_folder: str, meta: str) -> tuple[str, ...]:
  """Where a table may lie: beside the data folder, or in it as PHP keeps it."""
  inside = f"{data_folder}/{meta}"
  return (f"{folder}/{meta}", f"{folder}/{inside}", meta, inside)


class AVSBench(Masks):
  """S4: examples add label uint8 [T, H, W] in {0, 1}, label_mask float32 [T] (has a mask) and class int32 ().

  `s4_meta_data.csv` (name, start_time, category, split); in `s4_data`, below `<split>/<category>/` of each kind:
  `visual_frames/.../<name>/<name>_{1..5}.png`, `audio_wav/.../<name>.wav`, and `gt_masks/.../<name>/<name>_{1..5}.png`, of
  which train has only the first.
  """

  name = "avsbench"
  meta = "s4_meta_data.csv"
  columns: ClassVar[dict[str, int]] = {"name": 0, "category": 2, "split": 3}
  data_folder = "s4_data"
  label_files = _places("Single-source", data_folder, meta)
  masks_train = 1

  def __init__(self, root: Path | str) -> None:
    super().__init__(root)
    self.classes = self._read_categories(CATEGORIES)
    self._index = index_of(self.classes)
    for row, where in self._rows:
      if row["category"] not in self._index:
        raise DataError(f"{where}: unknown category {row['category']!r:.200}; list all in categories.txt beside this file")

  def labels(self, record: Segmentation) -> Example:
    return {**super().labels(record), "class": np.int32(self._index[record.category])}


class AVSBenchMS3(Masks):
  """MS3: examples add label uint8 [T, H, W] in {0, 1} and label_mask float32 [T], all 1; what sounds has no class here.

  `ms3_meta_data.csv` (video id, split); in `ms3_data`: `visual_frames/<id>/<id>.mp4_{1..5}.png` (no split),
  `audio_wav/<split>/<id>.wav`, `gt_masks/<split>/<id>/<id>_{1..5}.png`, empty where nothing that is seen sounds.
  """

  name = "avsbench_ms3"
  meta = "ms3_meta_data.csv"
  columns: ClassVar[dict[str, int]] = {"name": 0, "split": 1}
  data_folder = "ms3_data"
  label_files = _places("Multi-sources", data_folder, meta)
  classes = ()

  def frames(self, record: Segmentation) -> list[Path]:
    """The pictures of a clip, one a second, in one folder for all splits."""
    folder = self.data_root / "visual_frames" / record.clip
    return _pictures(folder / f"{record.clip}.mp4_{k}.png" for k in range(1, self.seconds + 1))
