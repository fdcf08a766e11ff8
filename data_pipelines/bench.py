"""python -m data_pipelines.bench [--root=DIR --dataset=ave]: clips decoded per second, in all and per core.

A data root is measured as it is: mp4, pictures or prepared records. Without one, some clips of the toybox are composed,
unpacked to JPEG frames and waves, and prepared, so that the three can be compared.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from data_pipelines import DATASETS, loader
from data_pipelines.base import Dataset
from data_pipelines.encode import Encoding, encode_clip
from data_pipelines.prepare import Options, prepare
from data_pipelines.prepare_folder import copy_labels, label_files
from data_pipelines.schema import DataError, Example, Media, Record, refuse
from data_pipelines.toybox.compose import compose


def clips_per_second(dataset: Dataset, rows: list[Record], media: Media, num_threads: int) -> float:
  """Decodes every row once, after one that is not counted, which opens files and loads libraries; two rows at least."""
  source = _Clips(dataset, rows, media)
  source[0]
  found = loader.throughput(source, batch_size=1, num_threads=num_threads)
  # All of them, the first too: the threads decode others while that is waited for.
  return len(rows) / (found["first_batch_s"] + (len(rows) - 1) / found["examples_per_s"])


@dataclasses.dataclass(frozen=True)
class _Clips:
  """The decoded clips of rows, of which the loader makes batches."""

  dataset: Dataset
  rows: list[Record]
  media: Media

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> Example:
    return {"id": self.rows[index].id, **self.dataset.read_clip(self.rows[index], self.media)}


def kind_of(dataset: Dataset, row: Record) -> str:
  """How the clip of a row is stored."""
  if dataset.prepared is not None:
    return "ArrayRecord"
  return "mp4" if len(dataset.clip_files(row)) == 1 else "pictures"


def rows_of(dataset: Dataset, count: int) -> list[Record]:
  """`count` rows of the first split whose clips exist, evenly spread over it, repeated if there are fewer."""
  rows = [row for row in dataset.records(dataset.splits()[0]) if dataset.has_clip(row)]
  if not rows:
    raise DataError(f"{dataset.root}: has no clips of split {dataset.splits()[0]}")
  return [rows[i * len(rows) // count % len(rows)] for i in range(count)]


def toybox_roots(folder: Path, count: int) -> list[Path]:
  """The same AVE clips as mp4, as JPEG frames with waves, and as records."""
  raw = compose(folder / "mp4", sizes={"AVE": {"train": count}})
  dataset, unpacked = DATASETS["ave"](raw), folder / "pictures"
  copy_labels(dataset, unpacked / "AVE", label_files(dataset))
  (unpacked / "AVE" / "wave").mkdir()
  for row in dataset.records("train"):
    encoded = encode_clip(dataset, row, Encoding())
    (frames := unpacked / "AVE" / "frames" / row.clip).mkdir(parents=True)
    for k, frame in enumerate(encoded.frames, 1):
      (frames / f"{k:08d}.jpg").write_bytes(frame)
    np.save(unpacked / "AVE" / "wave" / f"{row.clip}.npy", encoded.audio)
  prepare("ave", raw, folder / "records", Encoding(), 128, Options())
  return [raw, unpacked, folder / "records"]


def report(roots: list[Path], name: str, media: Media, count: int) -> None:
  """Prints one line a root and number of threads."""
  cores = os.cpu_count() or 1
  for root in roots:
    dataset = DATASETS[name](root)
    rows = rows_of(dataset, count)
    for threads in sorted({1, cores}):
      rate = clips_per_second(dataset, rows, media, threads)
      print(f"{kind_of(dataset, rows[0]):<12} {threads:>3} threads {rate:8.1f} clips/s {rate / threads:8.1f} clips/s per core")


def main(arguments: list[str] | None = None) -> int:
  """Parses the command line, measures -> exit code (2: the user can mend it)."""
  parser = argparse.ArgumentParser(prog="python -m data_pipelines.bench", description="Clips decoded per second.")
  parser.add_argument("--root", type=Path, help="data root, raw or prepared (default: clips of the toybox)")
  parser.add_argument("--dataset", default="ave", help=", ".join(DATASETS))
  parser.add_argument("--clips", type=int, default=64, help="clips decoded for each number")
  parser.add_argument("--image_size", type=int, default=224)
  parser.add_argument("--sample_rate_hz", type=int, default=32000)
  given = parser.parse_args(arguments)
  try:
    if given.dataset not in DATASETS or given.clips < 2:
      raise DataError(f"--dataset must be one of {', '.join(DATASETS)}, --clips 2 or more")
    media = Media(given.image_size, given.sample_rate_hz)
    if given.root:
      report([given.root], given.dataset, media, given.clips)
      return 0
    with tempfile.TemporaryDirectory() as folder:
      report(toybox_roots(Path(folder), given.clips), "ave", media, given.clips)
  except (DataError, OSError) as error:
    return refuse(error)
  return 0


if __name__ == "__main__":
  sys.exit(main())
