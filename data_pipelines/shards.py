"""Writes the clips of a dataset in shards of a fixed number of clips, each whole or not there.

TFDS's own `download_and_prepare` can neither go on after it was killed nor use several processes. Which clips belong to
which shard follows from the label files alone, so neither a clip that turns out broken nor the number of processes
changes any other shard.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import records
from data_pipelines.base import Dataset
from data_pipelines.encode import Encoding, Fingerprint, Stamp, encode_clip, source_files
from data_pipelines.prepare_suspects import in_flight
from data_pipelines.schema import DataError, MediaError, Record, printable

Rows = dict[str, dict[str, list[Record]]]  # split -> clip -> its annotation rows


@dataclasses.dataclass(frozen=True)
class Shard:
  """One file: consecutive clips of a split."""

  file: str
  split: str
  clips: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ClipEntry:
  """One clip of a finished shard: the files it was made from, and why it was left out ("" if it was not)."""

  clip: str
  files: tuple[Fingerprint, ...]
  reason: str


@dataclasses.dataclass(frozen=True)
class ShardEntry:
  """A finished shard: the size and sha256 of its file, and all its clips in order."""

  file: str
  split: str
  size: int
  sha256: str
  clips: tuple[ClipEntry, ...]

  @property
  def written(self) -> list[str]:
    """The clips of its records, in their order."""
    return [entry.clip for entry in self.clips if not entry.reason]

  @property
  def left_out(self) -> list[ClipEntry]:
    return [entry for entry in self.clips if entry.reason]

  @classmethod
  def from_json(cls, value: Any, path: Path) -> "ShardEntry":
    """The value of the journal file `path`; raises DataError if it is no journal."""
    text, number = lambda x: records.typed(x, str), lambda x: records.typed(x, int, 0)
    with records.expecting(path):
      clips = []
      for x in records.typed(value["clips"], list):
        files = (Fingerprint(text(f["path"]), number(f["size"]), text(f["sha256"])) for f in records.typed(x["files"], list))
        clips.append(ClipEntry(text(x["clip"]), tuple(files), text(x["reason"])))
      return cls(text(value["file"]), text(value["split"]), number(value["size"]), text(value["sha256"]), tuple(clips))


@dataclasses.dataclass(frozen=True)
class MadeClip:
  """A clip's line in the journal, its serialised example (None if it cannot be used), and the stamps of its files."""

  entry: ClipEntry
  example: bytes | None
  stamps: dict[str, Stamp]


class SourceChanged(DataError):
  """A file is not what a finished shard was made from; the argument is its path."""


def rows_by_clip(dataset: Dataset) -> Rows:
  """Split -> clip -> its rows, in the order of the label files; raises DataError."""
  found: Rows = {}
  for split in dataset.splits():
    clips = found.setdefault(split, {})
    for record in dataset.records(split):
      clips.setdefault(records.clip_text(dataset.clip_key(record)), []).append(record)
  return found


def plan_shards(name: str, rows: Rows, clips_per_shard: int) -> list[Shard]:
  """All shards of all splits; a split without rows has none."""
  shards = []
  for split, clips in rows.items():
    names = list(clips)
    parts = [tuple(names[i : i + clips_per_shard]) for i in range(0, len(names), clips_per_shard)]
    shards += [Shard(records.shard_name(name, split, i, len(parts)), split, part) for i, part in enumerate(parts)]
  return shards


class ShardMaker:
  """Makes and checks the shards of one dataset.

  Attributes:
    folder: where they lie.
    rows: what `rows_by_clip` found.
    features: the TFDS features of their examples.
    killers: clips that must not be decoded, and why.
  """

  def __init__(self, dataset: Dataset, folder: Path, encoding: Encoding, killers: Mapping[str, str] | None = None) -> None:
    self.killers = dict(killers or {})
    self.dataset, self.folder, self.encoding = dataset, folder, encoding
    self.rows = rows_by_clip(dataset)
    first = next((row for clips in self.rows.values() for found in clips.values() for row in found), None)
    if first is None:
      raise DataError(f"{dataset.label_root}: the label files have no rows; fetch them again")
    self.features = records.build_features(dataset.labels(first))
    self._serialize = records.Serializer(self.features)

  def journal(self, shard: Shard) -> Path:
    return self.folder / records.JOURNAL / f"{shard.file}.json"

  def stamps(self, shard: Shard) -> Path:
    """Beside the journal, because it differs from run to run: what saves hashing the media again, no more."""
    return self.folder / records.JOURNAL / f"{shard.file}{records.STAMPS}"

  def finished(self, shard: Shard) -> ShardEntry | None:
    """The entry of a shard that is whole and up to date, None if it has to be made.

    A shard is out of date when a clip that was left out has other files now. Raises SourceChanged where the files of a
    clip that was written changed.
    """
    journal, path = self.journal(shard), self.folder / shard.file
    if (value := records.read_json(journal)) is None or not path.is_file():
      return None
    entry, known = ShardEntry.from_json(value, journal), _read_stamps(self.stamps(shard))
    if (entry.file, entry.split, tuple(clip.clip for clip in entry.clips)) != (shard.file, shard.split, shard.clips):
      return None  # it tells of other clips than the label files
    if path.stat().st_size != entry.size or records.file_sha256(path) != entry.sha256:
      return None
    for clip in entry.clips:
      if changed := self._changed(shard.split, clip, known):
        if clip.reason:
          return None
        raise SourceChanged(str(changed))
    return entry

  def _changed(self, split: str, entry: ClipEntry, known: dict[str, Stamp]) -> Path | None:
    """The first file of a clip that is not as it was."""
    root = self.dataset.root
    paths = source_files(self.dataset, self.rows[split][entry.clip][0])
    for path, file in zip(paths, entry.files, strict=False):
      if not file.holds(path, root, known.get(file.path)):
        return path
    if len(paths) == len(entry.files):
      return None
    return paths[len(entry.files)] if len(paths) > len(entry.files) else root / entry.files[len(paths)].path

  def make(self, shard: Shard, report: Callable[[str, str, str], bool]) -> ShardEntry:
    """Writes a shard and then its journal, each in one rename; calls `report` with split, clip and reason of every clip."""
    partial = records.partial_path(self.folder / shard.file)
    entries: list[ClipEntry] = []
    stamps: dict[str, Stamp] = {}
    with _writer(partial) as write:
      for clip in shard.clips:
        made = self.make_clip(shard.split, clip)
        if made.example is not None:
          write(made.example)
        entries.append(made.entry)
        stamps |= made.stamps
        report(shard.split, clip, made.entry.reason)
    _check_whole(partial, sum(not entry.reason for entry in entries))
    entry = ShardEntry(shard.file, shard.split, partial.stat().st_size, records.file_sha256(partial), tuple(entries))
    self.publish(shard, partial, entry, stamps)
    return entry

  def publish(self, shard: Shard, partial: Path, entry: ShardEntry, stamps: dict[str, Stamp]) -> None:
    """The shard first: without its journal it counts for nothing."""
    partial.rename(self.folder / shard.file)
    known = {path: dataclasses.asdict(stamp) for path, stamp in stamps.items()}
    records.write_atomic(self.stamps(shard), records.dump_json(known).encode())
    records.write_atomic(self.journal(shard), records.dump_json(dataclasses.asdict(entry)).encode())

  def make_clip(self, split: str, clip: str) -> MadeClip:
    """Reads and encodes a clip."""
    with in_flight(self.folder, split, clip) if clip not in self.killers else contextlib.nullcontext():
      return self._make_clip(clip, self.rows[split][clip])

  def _make_clip(self, clip: str, rows: list[Record]) -> MadeClip:
    root, files, stamps = self.dataset.root, (), {}
    try:
      paths = source_files(self.dataset, rows[0])
      before = [Stamp.of(path) for path in paths]  # first: what changes from here on differs from it
      files = tuple(Fingerprint.of(path, root) for path in paths)
      stamps = {file.path: stamp for file, stamp in zip(files, before, strict=True) if stamp.settled}
      if clip in self.killers:
        return MadeClip(ClipEntry(clip, files, self.killers[clip]), None, stamps)
      example = self._example(clip, rows)
      for path, file, stamp in zip(paths, files, before, strict=True):
        if not file.holds(path, root, stamp):
          raise MediaError(path, "changed while it was read", "run again")
    except (MediaError, OSError) as error:
      return MadeClip(ClipEntry(clip, files, self._reason(error)), None, stamps)
    return MadeClip(ClipEntry(clip, files, ""), example, stamps)

  def _example(self, clip: str, rows: list[Record]) -> bytes:
    encoded = encode_clip(self.dataset, rows[0], self.encoding)
    labels = [self.dataset.labels(row) for row in rows]
    return self._serialize(
      {
        "clip": records.to_bytes(clip),
        "ids": [records.to_bytes(row.id) for row in rows],
        **dataclasses.asdict(encoded),
        "labels": {key: np.stack([x[key] for x in labels]) for key in labels[0]},
      }
    )

  def _reason(self, error: MediaError | OSError) -> str:
    """What is wrong with a clip, with paths relative to the dataset folder."""
    text = f"{error.path}: {error.reason}" if isinstance(error, MediaError) else str(error)
    return printable(text.replace(f"{self.dataset.root}{os.sep}", ""))


def _read_stamps(path: Path) -> dict[str, Stamp]:
  """The stamps beside a journal; {} without them."""
  with records.expecting(path):
    return {name: Stamp(**stamp) for name, stamp in records.typed(records.read_json(path) or {}, dict).items()}


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[Callable[[bytes], None]]:
  """Gives the function that appends a record to a new ArrayRecord file, which then is on the disk."""
  from array_record.python.array_record_module import ArrayRecordWriter

  writer = ArrayRecordWriter(os.fspath(path), records.WRITER_OPTIONS)
  try:
    yield writer.write
    writer.close()
  except RuntimeError as error:
    raise OSError(f"{path}: cannot be written ({error}); is the disk full?".replace("\n", " ")) from error
  with path.open("rb") as file:
    os.fsync(file.fileno())


def _check_whole(path: Path, count: int) -> None:
  """The writer keeps silent about a disk that is full."""
  from array_record.python.array_record_module import ArrayRecordReader

  try:
    reader = ArrayRecordReader(os.fspath(path))
    found = reader.num_records()
    reader.close()
  except RuntimeError as error:
    raise OSError(f"{path}: is not whole ({error}); is the disk full?".replace("\n", " ")) from error
  if found != count:
    raise OSError(f"{path}: holds {found} records of {count}; is the disk full?")
