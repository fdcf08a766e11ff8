"""What all datasets share: finding files, rows, decoding, and a cached random-access source of examples."""

import dataclasses
import functools
import random
import threading
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from data_pipelines import arrays, pictures, transforms
from data_pipelines import media as media_lib
from data_pipelines.prepared import PreparedStore, open_store
from data_pipelines.schema import DataError, Example, Media, MediaError, Record
from data_pipelines.tables import check_name, read_lines

DEFAULT_CACHE_BYTES = 1_500_000_000
TOYBOX_HINT = "put the benchmark there, or make the toybox with: python -m data_pipelines.toybox --out={root}"


class ClipCache:
  """Decoded clips in memory, bounded in bytes, safe to use from many threads.

  Full, it drops entries at random: epochs read every clip once in a new order, where dropping the oldest
  would always drop the one that is needed next, and keeping the first would keep those of a finished task for
  ever.
  """

  def __init__(self, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
    self.max_bytes, self.num_bytes = max_bytes, 0
    self._entries: dict[Hashable, tuple[Example, int, int]] = {}  # value, its bytes, its place in _keys
    self._keys: list[Hashable] = []
    self._lock = threading.Lock()
    self._making = [threading.Lock() for _ in range(64)]
    self._random = random.Random(0)

  def __reduce__(self) -> tuple[Any, ...]:
    """Pickled for a decoding process it is an empty one of the same size: nothing is shared."""
    return ClipCache, (self.max_bytes,)

  def fetch(self, key: Hashable, make: Callable[[], Example]) -> Example:
    """The entry of a key, made once even if many threads ask for it at the same time (questions on one clip)."""
    with self._making[hash(key) % len(self._making)]:
      value = self.get(key)
      if value is None:
        value = make()
        self.put(key, value)
      return value

  def get(self, key: Hashable) -> Example | None:
    entry = self._entries.get(key)
    return entry[0] if entry else None

  def put(self, key: Hashable, value: Example) -> None:
    size = sum(x.nbytes for x in value.values())
    if size > self.max_bytes:
      return
    with self._lock:
      if key in self._entries:  # another thread was faster
        return
      while self.num_bytes + size > self.max_bytes:
        self._drop(self._random.choice(self._keys))
      self._entries[key] = (value, size, len(self._keys))
      self._keys.append(key)
      self.num_bytes += size

  def _drop(self, key: Hashable) -> None:
    _, size, place = self._entries.pop(key)
    last = self._keys.pop()
    if last != key:
      self._keys[place] = last
      self._entries[last] = (*self._entries[last][:2], place)
    self.num_bytes -= size


# One budget for all datasets of a process: tasks come one after the other.
SHARED_CACHE = ClipCache()


@dataclasses.dataclass(frozen=True)
class ClipLayout:
  """Where the media of a clip may lie below a dataset's root.

  Attributes:
    video: folders of `<clip>.mp4`.
    frames: folders of `<clip>/00000001.jpg`.
    wave: folders of `<clip>.npy` or `<clip>.wav`.

  Endings may be in capitals.
  """

  video: tuple[str, ...]
  frames: tuple[str, ...]
  wave: tuple[str, ...]

  def find(self, root: Path, names: Sequence[str]) -> tuple[Path, ...]:
    """(video,) or (frames folder, wave file) of the first name that has one; () if the clip is missing."""
    for name in names:
      for folder in self.video:
        if path := media_lib.present(root / folder / f"{name}{media_lib.VIDEO}"):
          return (path,)
    for name in names:
      frames = next((p for f in self.frames if (p := root / f / name).is_dir()), None)
      if frames and (wave := self.find_wave(root, name)):
        return frames, wave
    return ()

  def find_wave(self, root: Path, name: str) -> Path | None:
    """The wave file of a clip, whether or not its frames are there."""
    waves = (root / folder / f"{name}{ending}" for folder in self.wave for ending in media_lib.WAVES)
    return next(filter(None, map(media_lib.present, waves)), None)


class Dataset:
  """Reads one benchmark as it lies on disk; see the class attributes for what a dataset must say.

  Attributes:
    name: its key in DATASETS.
    folders: names of its folder below a data root.
    label_files: glob patterns, relative to the dataset folder, of the files that hold its splits.
    layout: where media lie.
    seconds: T.
    hint: how to get it, said where it is not found; {root} is the data root.
    spread: whether T seconds stand for a longer clip (labels of the whole clip) or are the first T (labels
      per second).
    classes: class names, index = label.
  """

  name: ClassVar[str]
  folders: ClassVar[tuple[str, ...]]
  label_files: ClassVar[tuple[str, ...]]
  layout: ClassVar[ClipLayout]
  seconds: ClassVar[int] = 10
  spread: ClassVar[bool] = False
  hint: ClassVar[str] = TOYBOX_HINT
  classes: tuple[str, ...]

  def __init__(self, root: Path | str) -> None:
    """Finds the dataset below a data root, or at it; raises DataError if it is not there."""
    self.root = self._located(Path(root))
    self.label_root = self._labels(self.root)[0].parent
    self._records: dict[str, list[Record]] = {}

  @classmethod
  def _labels(cls, folder: Path) -> list[Path]:
    """The label files of the first pattern that matches anything."""
    return next((found for pattern in cls.label_files if (found := sorted(folder.glob(pattern)))), [])

  @classmethod
  def _places(cls, root: Path) -> list[Path]:
    """Where the dataset may lie, below a data root or at it."""
    return [root / name for name in cls.folders] + [root]

  @classmethod
  def locate(cls, root: Path) -> Path | None:
    """The folder of the dataset below a data root, or at it: the first with label files; None if there is none."""
    return next(filter(cls._labels, cls._places(root)), None)

  @classmethod
  def _located(cls, root: Path) -> Path:
    if place := cls.locate(root):
      return place
    names = dict.fromkeys(Path(pattern).name for pattern in cls.label_files)
    raise DataError(
      f"{cls.__name__}: no {' or '.join(names)} in {' or '.join(map(str, cls._places(root)))}; " + cls.hint.format(root=root)
    )

  def find_file(self, *names: str) -> Path | None:
    """The first file of these names, such as categories.txt, beside the labels or at the dataset's root."""
    return next((p for name in names for f in (self.label_root, self.root) if (p := f / name).is_file()), None)

  def _read_categories(self, official: tuple[str, ...]) -> tuple[str, ...]:
    """Class names of the root's categories.txt, one a line, or the official ones."""
    if not (path := self.find_file("categories.txt")):
      return official
    names = tuple(line.strip() for line in read_lines(path) if line.strip())
    if not names or len(set(names)) != len(names):
      raise DataError(f"{path}: needs one category a line, each once")
    return names

  def splits(self) -> tuple[str, ...]:
    """The splits present, of train val test unseen, then any others."""
    raise NotImplementedError

  def records(self, split: str) -> list[Record]:
    """The annotation rows of a split, in file order; touches no media. Raises DataError on a wrong row."""
    if split not in self._records:
      if split not in self.splits():
        raise DataError(f"{type(self).__name__}: no split {split!r} in {self.label_root}, only {', '.join(self.splits())}")
      rows = self._read(split)
      for number, row in enumerate(rows, 1):
        for name in self.path_names(row):
          check_name(name, f"{type(self).__name__} {split} in {self.label_root}: row {number}")
      self._records[split] = rows
    return self._records[split]

  def _read(self, split: str) -> list[Record]:
    """Reads the rows of a split that exists."""
    raise NotImplementedError

  def labels(self, record: Record) -> Example:
    """The label arrays of one row."""
    raise NotImplementedError

  def class_of(self, record: Record) -> str:
    """The one class of a row, of datasets that can be learned class by class (see parts.py)."""
    raise NotImplementedError

  def clip_names(self, record: Record) -> tuple[str, ...]:
    """Names under which the media of a row may be stored, the usual one first."""
    return (record.clip,)

  def path_names(self, record: Record) -> tuple[str, ...]:
    """What of a row becomes the name of a file or folder; each must be one name, so that no row leads out of the root."""
    return self.clip_names(record)

  def clip_key(self, record: Record) -> Hashable:
    """What `decode_clip` depends on: rows of equal keys share one decoded clip."""
    return record.clip

  def clip_files(self, record: Record) -> tuple[Path, ...]:
    """The media files of a row, () if any is missing."""
    return self.layout.find(self.root, self.clip_names(record))

  def companions(self) -> Sequence[Path]:
    """Media files that lie beside those of the rows and are known not to be read."""
    return ()

  def pictures(self, record: Record) -> tuple[list[Path], list[Path]]:
    """Of a clip that is stored as pictures: the files of its T frames, and of the masks of the first of them."""
    return pictures.frame_files(self.clip_files(record)[0], self.seconds), []

  @functools.cached_property
  def prepared(self) -> PreparedStore | None:
    """What `data_pipelines.prepare` wrote below this root to stand in for the media; None for a raw root."""
    return open_store(self.root, self.name, spread=self.spread)

  def has_clip(self, record: Record) -> bool:
    """Whether the media of a row exist."""
    return bool(self.clip_files(record)) if self.prepared is None else self.clip_key(record) in self.prepared

  def read_clip(self, record: Record, media: Media) -> Example:
    """`decode_clip`, or the same from prepared records where the root has them."""
    if self.prepared is None:
      return self.decode_clip(record, media)
    return self.prepared.decode_clip(self.clip_key(record), media, self._zero_clip(media))

  def decode_clip(self, record: Record, media: Media) -> Example:
    """The media of a row: visual uint8 [T, H, W, 3], audio int16 [T, S]; raises MediaError."""
    files = self.clip_files(record)
    if not files:
      usual = self.root / self.layout.video[0] / f"{self.clip_names(record)[0]}{media_lib.VIDEO}"
      raise MediaError(usual, f"no such file, nor frames and wave of clip {record.clip!r}", media_lib.AGAIN)
    if len(files) == 1:
      clip = media_lib.decode_clip(files[0], media, self.seconds, spread=self.spread)
      return {"visual": clip.visual, "audio": clip.audio}
    return {
      "visual": pictures.read_frames(files[0], media, self.seconds),
      "audio": self._read_wave(files[1], media),
    }

  def _read_wave(self, path: Path, media: Media) -> np.ndarray:
    """Sound beside frames -> int16 [T, S]."""
    read = arrays.read_npy_wave if path.suffix.lower() == ".npy" else media_lib.decode_audio
    return self._seconds_of(read(path, media.sample_rate_hz), media)

  def _seconds_of(self, wave: np.ndarray, media: Media) -> np.ndarray:
    """float32 [n] -> int16 [T, S], the seconds that an example shows."""
    starts = transforms.pick_seconds(len(wave) / media.sample_rate_hz, self.seconds, spread=self.spread)
    return transforms.cut_seconds(wave, media.sample_rate_hz, starts)

  def decode(self, record: Record, media: Media) -> Example:
    """One example: media, labels, id (str) and mask (float32 (), 1); raises MediaError naming the file."""
    return self._example(record, self.read_clip(record, media))

  def _example(self, record: Record, clip: Example) -> Example:
    return {**clip, **self.labels(record), "id": record.id, "mask": np.float32(1)}

  def _zero_clip(self, media: Media) -> Example:
    t, size = self.seconds, media.image_size
    return {"visual": np.zeros((t, size, size, 3), np.uint8), "audio": np.zeros((t, media.sample_rate_hz), np.int16)}

  def zeros(self, record: Record, media: Media) -> Example:
    """An example of the right shapes that counts for nothing (mask 0) and keeps the row's id."""
    example = self._example(record, self._zero_clip(media))
    return {k: v if k == "id" else np.zeros_like(v) for k, v in example.items()}

  def examples(
    self, split: str, media: Media, *, on_bad_clip: Literal["error", "skip"] = "error", cache: ClipCache | None = None
  ) -> "Source":
    """Random access to the examples of a split; `cache` defaults to the one that all datasets share."""
    return Source(self, split, media, on_bad_clip=on_bad_clip, cache=SHARED_CACHE if cache is None else cache)

  def coverage(self, split: str) -> dict[str, Any]:
    """{"clips": number of distinct clips, "missing": those whose media files do not exist}."""
    clips = {record.clip: record for record in self.records(split)}
    missing = [clip for clip, record in clips.items() if not self.has_clip(record)]
    return {"clips": len(clips), "missing": missing}


class Source:
  """The examples of one split: len(source), source[i]; thread-safe.

  A clip is found bad when a row of it is asked for; from then on all its rows are left out.

  Attributes:
    ids: the id of every row.
    bad: (id, reason) of every row that was asked for and left out, when on_bad_clip is "skip".
    rows: itself; a view names the source that it is made of so.
  """

  def __init__(self, dataset: Dataset, split: str, media: Media, *, on_bad_clip: str, cache: ClipCache) -> None:
    if on_bad_clip not in ("error", "skip"):
      raise DataError(f"on_bad_clip must be 'error' or 'skip', got {on_bad_clip!r}")
    self.dataset, self.split, self.media, self.on_bad_clip = dataset, split, media, on_bad_clip
    self.records = dataset.records(split)
    self.ids = [record.id for record in self.records]
    self._cache, self._lock = cache, threading.Lock()
    self._reasons: dict[Hashable, str] = {}  # of every clip asked for: why it cannot be read, "" if it can
    self._left_out: set[int] = set()

  def __getstate__(self) -> dict[str, Any]:
    """Pickled for a decoding process: all but the lock."""
    with self._lock:
      return {**vars(self), "_lock": None, "_reasons": dict(self._reasons), "_left_out": set(self._left_out)}

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state, _lock=threading.Lock())

  def __len__(self) -> int:
    return len(self.records)

  @property
  def rows(self) -> "Source":
    return self

  @property
  def bad(self) -> list[tuple[str, str]]:
    with self._lock:
      return [(self.ids[i], self.reason(self.records[i])) for i in sorted(self._left_out)]

  def reason(self, record: Record) -> str:
    """Why the clip of a row cannot be read, "" if it can or was not asked for yet."""
    return self._reasons.get(self.dataset.clip_key(record), "")

  def found(self, index: int) -> str:
    """Why row `index`, which was asked for, was left out, "" if it was not."""
    return self.reason(self.records[index])

  def learn(self, index: int, reason: str) -> None:
    """Takes over what `found` says in another process."""
    key = self.dataset.clip_key(self.records[index])
    with self._lock:
      self._reasons[key] = reason or self._reasons.get(key, "")
      if reason:
        self._left_out.add(index)

  def unopened(self) -> list[int]:
    """The first row of every clip that was not asked for yet, so that nobody knows whether it can be read."""
    first: dict[Hashable, int] = {}
    for index, record in enumerate(self.records):
      first.setdefault(self.dataset.clip_key(record), index)
    return [index for key, index in first.items() if key not in self._reasons]

  def __getitem__(self, index: int) -> Example:
    """Example of row `index`; raises MediaError, or gives zeros with mask 0 if on_bad_clip is "skip"."""
    record = self.records[index]
    key = self.dataset.clip_key(record)
    if not self._reasons.get(key):
      try:
        example = self.dataset._example(record, self._clip(record))
        with self._lock:
          self._reasons.setdefault(key, "")
        return example
      except MediaError as error:
        if self.on_bad_clip == "error":
          raise
        with self._lock:
          self._reasons[key] = str(error)
    with self._lock:
      self._left_out.add(index)
    return self.dataset.zeros(record, self.media)

  def _clip(self, record: Record) -> Example:
    key = (type(self.dataset).__name__, self.dataset.root, self.dataset.clip_key(record), self.media)
    return self._cache.fetch(key, lambda: self._decode(record))

  def _decode(self, record: Record) -> Example:
    clip = self.dataset.read_clip(record, self.media)
    for array in clip.values():
      array.setflags(write=False)  # it will be handed out again
    return clip
