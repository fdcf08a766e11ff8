"""The folder that `prepare` writes to: its lock, its settings, and the copies of the label files."""

import contextlib
import dataclasses
import fcntl
import glob
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipelines import limits, records
from data_pipelines.base import Dataset
from data_pipelines.encode import JPEG_QUALITY, Encoding
from data_pipelines.schema import DataError

LABEL_ENDINGS = (".txt", ".csv", ".tsv", ".json", "_order.h5")
LIBRARIES = ("array_record", "av", "pillow", "soxr", "tensorflow-datasets")  # what the bytes come from


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
  """Keeps a second run out; the system gives the lock back however this one ends."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    _lock(handle, folder)
    yield
  finally:
    os.close(handle)


def _lock(handle: int, folder: Path) -> None:
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise DataError(f"{folder}: another prepare is writing there; wait for it") from error
  except OSError as error:  # some network disks have no locks
    print(f"prepare: {folder} cannot be locked ({error.strerror}): start no second run there", file=sys.stderr)


def label_files(dataset: Dataset) -> list[Path]:
  """The small text files in the two folders where a reader looks for labels, splits and vocabularies."""
  beside = {path for folder in (dataset.root, dataset.label_root) for path in folder.iterdir()}
  found = [path for path in beside if path.name.endswith(LABEL_ENDINGS) and path.is_file()]
  return sorted(path for path in found if path.stat().st_size <= limits.current().label_bytes)


def describe(dataset: Dataset, name: str, encoding: Encoding, clips_per_shard: int, labels: Sequence[Path]) -> dict[str, Any]:
  """All that the bytes of the records depend on, beside the media."""
  return {
    "dataset": name,
    "seconds": dataset.seconds,
    "spread": dataset.spread,
    **dataclasses.asdict(encoding),
    "jpeg_quality": JPEG_QUALITY,
    "clips_per_shard": clips_per_shard,
    "labels": {os.path.relpath(path, dataset.root): records.file_sha256(path) for path in labels},
    "versions": {library: importlib.metadata.version(library) for library in LIBRARIES},
  }


def keep_settings(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
  """Refuses to mix two settings in one folder; overwriting empties it first."""
  path = folder / records.JOURNAL / "settings.json"
  if overwrite:
    _empty(folder)
  elif (known := records.read_json(path)) is not None and known != settings:
    with records.expecting(path):
      records.typed(known, dict)
    changes = ", ".join(f"{key} was {was!r}, is {now!r}" for key, was, now in _differences(known, settings))
    raise DataError(
      f"{folder}: holds records of other settings ({changes}); make them anew with --overwrite, or name another --out"
    )
  records.write_atomic(path, records.dump_json(settings).encode())


def _differences(known: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
  for key in sorted({*known, *now}):
    was, new = known.get(key), now.get(key)
    if isinstance(was, dict) and isinstance(new, dict):
      yield from _differences(was, new, f"{prefix}{key}/")
    elif was != new:
      yield prefix + key, was, new


def _empty(folder: Path) -> None:
  # The journal last: killed before, the next run still knows the settings of what is left.
  for path in sorted(folder.iterdir(), key=lambda path: path.name == records.JOURNAL):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  (folder / records.JOURNAL).mkdir()


def sweep(folder: Path, copies: Sequence[Path] = ()) -> None:
  """Removes what a killed run left half written in the records folder and beside the copies of the label files."""
  found = [*folder.glob(".*.partial"), *(folder / records.JOURNAL).glob(".*.partial")]
  for path in (*found, *(partial for copy in copies for partial in copy.parent.glob(f".{glob.escape(copy.name)}.*.partial"))):
    path.unlink()


def copy_labels(dataset: Dataset, place: Path, labels: Sequence[Path]) -> None:
  """Copies the label files and makes sure that the reader reads the same from the copies."""
  for path in labels:
    copy = place / path.relative_to(dataset.root)
    copy.parent.mkdir(parents=True, exist_ok=True)
    records.write_atomic(copy, path.read_bytes())
  again = type(dataset)(place)
  same = again.splits() == dataset.splits() and again.classes == dataset.classes
  if not same or any(again.records(split) != dataset.records(split) for split in dataset.splits()):
    raise DataError(f"{place}: its label files do not read as those of {dataset.root}; empty that folder and run again")
