"""Writes the clips of a dataset in shards of a fixed number of clips, each whole or not there.

TFDS's own `download_and_prepare` can neither go on after it was killed nor use several processes. Which clips belong to
which shard follows from the label files alone, so neither a clip that turns out broken nor the number of processes
changes any other shard.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import records
from data_pipelines.base import Dataset
from data_pipelines.encode import Encoding, Fingerprint, encode_clip, source_files
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
  def from_json(cls, value: dict[str, Any]) -> "ShardEntry":
    clips = [ClipEntry(x["clip"], tuple(Fingerprint(**file) for file in x["files"]), x["reason"]) for x in value["clips"]]
    return cls(value["file"], value["split"], value["size"], value["sha256"], tuple(clips))


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
  """

  def __init__(self, dataset: Dataset, folder: Path, encoding: Encoding) -> None:
    self.dataset, self.folder, self.encoding = dataset, folder, encoding
    self.rows = rows_by_clip(dataset)
    first = next((row for clips in self.rows.values() for found in clips.values() for row in found), None)
    if first is None:
      raise DataError(f"{dataset.label_root}: the label files have no rows; fetch them again")
    self.features = records.build_features(dataset.labels(first))
    self._serialize = records.Serializer(self.features)

  def journal(self, shard: Shard) -> Path:
    return self.folder / records.JOURNAL / f"{shard.file}.json"

  def finished(self, shard: Shard) -> ShardEntry | None:
    """The entry of a shard that is whole and up to date, None if it has to be made.

    A shard is out of date when a clip that was left out has other files now. Raises SourceChanged where the files of a
    clip that was written changed.
    """
    journal, path = self.journal(shard), self.folder / shard.file
    if (value := records.read_json(journal)) is None or not path.is_file():
      return None
    entry, since_ns = ShardEntry.from_json(value), journal.stat().st_mtime_ns
    if path.stat().st_size != entry.size or records.file_sha256(path) != entry.sha256:
      return None
    for clip in entry.clips:
      if changed := self._changed(shard.split, clip, since_ns):
        if clip.reason:
          return None
        raise SourceChanged(str(changed))
    return entry

  def _changed(self, split: str, entry: ClipEntry, since_ns: int) -> Path | None:
    """The first file of a clip that is not as it was."""
    root = self.dataset.root
    paths = source_files(self.dataset, self.rows[split][entry.clip][0])
    for path, file in zip(paths, entry.files, strict=False):
      if not file.holds(path, root, since_ns):
        return path
    if len(paths) == len(entry.files):
      return None
    return paths[len(entry.files)] if len(paths) > len(entry.files) else root / entry.files[len(paths)].path

  def make(self, shard: Shard, report: Callable[[str, str, str], None]) -> ShardEntry:
    """Writes a shard and then its journal, each in one rename; calls `report` with split, clip and reason of every clip."""
    path, entries = self.folder / shard.file, []
    partial = records.partial_path(path)
    with _writer(partial) as write:
      for clip in shard.clips:
        entry, example = self.entry(shard.split, clip)
        if example is not None:
          write(example)
        entries.append(entry)
        report(shard.split, clip, entry.reason)
    _check_whole(partial, sum(not entry.reason for entry in entries))
    entry = ShardEntry(shard.file, shard.split, partial.stat().st_size, records.file_sha256(partial), tuple(entries))
    self.publish(shard, partial, entry)
    return entry

  def publish(self, shard: Shard, partial: Path, entry: ShardEntry) -> None:
    """The shard first: without its journal it counts for nothing."""
    partial.rename(self.folder / shard.file)
    records.write_atomic(self.journal(shard), records.dump_json(dataclasses.asdict(entry)).encode())

  def entry(self, split: str, clip: str) -> tuple[ClipEntry, bytes | None]:
    """A clip's line in the journal and its serialised example; None if it cannot be used."""
    rows, files = self.rows[split][clip], ()
    try:
      files = tuple(Fingerprint.of(path, self.dataset.root) for path in source_files(self.dataset, rows[0]))
      example = self._example(clip, rows)
    except (MediaError, OSError) as error:
      return ClipEntry(clip, files, self._reason(error)), None
    return ClipEntry(clip, files, ""), example

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
