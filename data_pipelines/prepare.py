"""python -m data_pipelines.prepare --dataset=ave --root=DIR --out=DIR: decodes a benchmark once, into ArrayRecord.

OUT/<dataset folder> holds copies of the label files and the records (`data_pipelines.records`), so that
--config.data.root=OUT works as the raw root did. A run that was stopped goes on where it stopped; a clip that ends the
process that decodes it is found out and left out, by this run or, where there is but one process, by the next.

Every split has its own records, as TFDS wants it: a clip that splits share (2296 of the 9288 of MUSIC-AVQA, whose splits
share out questions) is decoded and stored once for each of them, and the space that is asked for counts it so.
"""

import argparse
import contextlib
import dataclasses
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_pipelines import DATASETS, records
from data_pipelines.base import Dataset
from data_pipelines.check import check
from data_pipelines.encode import Encoding
from data_pipelines.known import FACTS
from data_pipelines.prepare_folder import copy_labels, describe, keep_settings, label_files, locked, sweep
from data_pipelines.prepare_suspects import forget
from data_pipelines.prepare_workers import Setup, make_shards, sizes, with_killers
from data_pipelines.progress import Progress
from data_pipelines.schema import DataError, refuse
from data_pipelines.shards import ClipEntry, Shard, ShardEntry, ShardMaker, SourceChanged, plan_shards

SAMPLES = 8  # clips encoded to estimate the space
STOPPED = 42


@dataclasses.dataclass(frozen=True)
class Options:
  """What to do, beside what the records depend on.

  Attributes:
    num_workers: processes.
    strict: stop at the first clip that cannot be used.
    max_broken_percent: stop when more of all clips cannot be used.
    overwrite: begin anew where finished shards do not fit the settings or the media.
    force: begin although the disk seems too small.
  """

  num_workers: int = 1
  strict: bool = False
  max_broken_percent: float = 5.0
  overwrite: bool = False
  force: bool = False


def prepare(name: str, root: Path, out: Path, encoding: Encoding, clips_per_shard: int, options: Options) -> Path:
  """Writes the records of one benchmark.

  Args:
    name: key of DATASETS.
    root: data root, or the dataset folder, with the raw media.
    out: data root to make.
    encoding: how clips are stored.
    clips_per_shard: clips in one file, the unit that is finished or made again.
    options: see there.

  Returns:
    The TFDS directory.

  Raises:
    DataError: wrong arguments or data, too many broken clips, no space, finished shards that do not fit.
    OSError: what the disk says.
  """
  dataset = _open(name, root, out)
  place = out / dataset.folders[0]
  folder = records.records_folder(place, name)
  (folder / records.JOURNAL).mkdir(parents=True, exist_ok=True)
  _tell_labels(name, root)
  with locked(folder):
    labels = label_files(dataset)
    settings = describe(dataset, name, encoding, clips_per_shard, labels)
    maker = ShardMaker(dataset, folder, encoding)
    setup = with_killers(Setup(name, str(root), str(folder), encoding), maker)  # before overwriting forgets the suspects
    keep_settings(folder, settings, options.overwrite)
    sweep(folder, [place / path.relative_to(dataset.root) for path in labels])
    copy_labels(dataset, place, labels)
    shards = plan_shards(name, maker.rows, clips_per_shard)
    entries = _make(maker, shards, setup, options)
    _finish(maker, name, settings, [entries[shard.file] for shard in shards])
    forget(folder)
  return folder


def _open(name: str, root: Path, out: Path) -> Dataset:
  if name not in DATASETS:
    raise DataError(f"unknown dataset {name!r}; known: {', '.join(DATASETS)}")
  if words := FACTS[name].unprepared:
    raise DataError(f"{name} needs no preparation: {words}")
  dataset = DATASETS[name](root)
  if (out / dataset.folders[0]).resolve().is_relative_to(dataset.root.resolve()):
    raise DataError(f"{out}: lies in the raw data; --out must name another folder")
  if dataset.prepared is not None:
    raise DataError(f"{dataset.root}: is prepared already; --root must name the raw media")
  for split in dataset.splits():
    dataset.records(split)  # what is wrong with them is said of these files, not of their copies
  return dataset


def _tell_labels(name: str, root: Path) -> None:
  """Says what `data_pipelines.check` says of the label files; gaps in them keep nobody from preparing what is there."""
  for finding in check(name, root, labels_only=True).findings:
    if finding.severity == "gap":
      print(f"prepare: {finding.line()}", file=sys.stderr)


def _make(maker: ShardMaker, shards: Sequence[Shard], setup: Setup, options: Options) -> dict[str, ShardEntry]:
  """Checks the finished shards, makes the others -> file name -> entry."""
  entries = _finished(maker, shards)
  missing = [shard for shard in shards if shard.file not in entries]
  clips = _Clips(sum(len(shard.clips) for shard in shards), sum(len(shard.clips) for shard in missing), options)
  for entry in entries.values():
    for clip in entry.left_out:
      clips.leave_out(entry.split, clip.clip, clip.reason)
  clips.check()
  if entries:
    print(f"prepare: {len(entries)} of {len(shards)} shards are finished", file=sys.stderr)
  if not missing:
    return entries
  # What was there is not the whole any more, until the end says so again.
  (maker.folder / records.MANIFEST).unlink(missing_ok=True)
  _check_space(maker, missing, setup, options)
  setup = with_killers(setup, maker)
  with contextlib.closing(make_shards(maker, missing, setup, options.num_workers, clips)) as results:
    for entry in results:
      entries[entry.file] = entry
      if clips.too_many:
        break
  clips.check()  # behind the shards that were begun: what is broken in them is listed too
  clips.finish()
  return entries


def _finished(maker: ShardMaker, shards: Sequence[Shard]) -> dict[str, ShardEntry]:
  """The shards that are whole and up to date; raises DataError if media of one changed."""
  with ThreadPoolExecutor(os.cpu_count()) as pool:
    try:
      found = list(pool.map(maker.finished, shards))
    except SourceChanged as error:
      raise DataError(
        f"{error} is not what its finished shard in {maker.folder} was made from; make all anew with --overwrite"
      ) from error
  return {entry.file: entry for entry in found if entry}


class _Clips:
  """Counts the clips as they are done, lists those that cannot be used, and says when they are too many."""

  def __init__(self, total: int, to_make: int, options: Options) -> None:
    self._total, self._to_make, self._options = total, to_make, options
    self._done: set[tuple[str, str]] = set()  # clips of a worker that died are told of again
    self._left_out: set[tuple[str, str]] = set()
    self._progress = Progress("prepare", every_s=10.0)

  def __call__(self, split: str, clip: str, reason: str) -> bool:
    """A clip is done -> whether to go on."""
    self._done.add((split, clip))
    if reason:
      self._progress.clear()
      self.leave_out(split, clip, reason)
    self._progress(len(self._done), self._to_make)
    return not self.too_many

  def leave_out(self, split: str, clip: str, reason: str) -> None:
    if (split, clip) in self._left_out:
      return
    self._left_out.add((split, clip))
    print(f"prepare: left out: {split} clip {clip}: {reason}", file=sys.stderr)

  def finish(self) -> None:
    self._progress.finish(self._to_make)

  @property
  def too_many(self) -> bool:
    allowed = 0 if self._options.strict else self._options.max_broken_percent
    return 100 * len(self._left_out) > allowed * self._total

  def check(self) -> None:
    """Raises DataError if too many clips are left out."""
    if not self.too_many:
      return
    broken = f"{len(self._left_out)} of {self._total} clips cannot be used, they are listed above; mend them and run again"
    if self._options.strict:
      raise DataError(f"{broken}, or leave out --strict to go on without them")
    limit = f"more than {self._options.max_broken_percent:g} percent"
    raise DataError(f"{broken}, or allow more with --max_broken_percent ({limit}); what is finished is kept")


def _check_space(maker: ShardMaker, missing: Sequence[Shard], setup: Setup, options: Options) -> None:
  """Encodes a few clips to say how much space all will need; raises DataError if the disk has less."""
  clips = [(shard.split, clip) for shard in missing for clip in shard.clips]
  chosen = [clips[i * len(clips) // SAMPLES] for i in range(SAMPLES)] if len(clips) > SAMPLES else clips
  found = sizes(maker, setup, chosen, options.num_workers)
  if not found:
    print(f"prepare: none of {len(chosen)} sampled clips can be used, so the space needed is not known", file=sys.stderr)
    return
  need = 1.05 * len(clips) * sum(found) / len(found)
  free = shutil.disk_usage(maker.folder).free
  line = f"{len(clips)} clips need about {_gigabytes(need)}, {maker.folder} has {_gigabytes(free)} free"
  print(f"prepare: {line}", file=sys.stderr)
  if need > free and not options.force:
    raise DataError(f"{line}; make room, name another --out, take a smaller --image_size, or go on with --force")


def _gigabytes(size: float) -> str:
  return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _finish(maker: ShardMaker, name: str, settings: dict[str, Any], entries: Sequence[ShardEntry]) -> None:
  """Writes the metadata of TFDS and then the manifest, which makes the records count."""
  splits = {}
  for split in maker.rows:
    found = [entry for entry in entries if entry.split == split]
    lengths = [len(entry.written) for entry in found]
    # TFDS cannot open a split of no examples.
    if sum(lengths):
      splits[split] = lengths, sum(entry.size for entry in found)
  records.write_metadata(maker.folder, name, maker.features, splits)
  manifest = {
    "settings": settings,
    "splits": {split: _counts(maker, split, entries) for split in maker.rows},
    "left_out": [_left_out(entry.split, clip) for entry in entries for clip in entry.left_out],
    "shards": [{"file": e.file, "split": e.split, "size": e.size, "sha256": e.sha256, "clips": e.written} for e in entries],
  }
  records.write_atomic(maker.folder / records.MANIFEST, records.dump_json(manifest).encode())


def _left_out(split: str, entry: ClipEntry) -> dict[str, str]:
  return {"split": split, "clip": entry.clip, "reason": entry.reason}


def _counts(maker: ShardMaker, split: str, entries: Sequence[ShardEntry]) -> dict[str, int]:
  clips, found = maker.rows[split], [entry for entry in entries if entry.split == split]
  return {
    "rows": sum(map(len, clips.values())),
    "clips": len(clips),
    "written": sum(len(entry.written) for entry in found),
    "shards": len(found),
    "size": sum(entry.size for entry in found),
  }


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m data_pipelines.prepare",
    description="Decodes a benchmark once, into ArrayRecord files that TFDS reads; stopped, it goes on when run again. "
    "A clip that several splits share is decoded and stored once for each.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add, encoding, options = parser.add_argument, Encoding(), Options()
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  add("--dataset", required=True, help=", ".join(DATASETS))
  add("--root", required=True, type=Path, help="data root with the raw media")
  add("--out", required=True, type=Path, help="data root to make")
  add("--image_size", type=int, default=encoding.image_size, help="short side of stored video frames, at most; 0: as they are")
  add("--sample_rate_hz", type=int, default=encoding.sample_rate_hz, help="of the stored sound")
  add("--clips_per_shard", type=int, default=128, help="clips in one file")
  add("--num_workers", type=int, default=cores, help="processes")
  add("--max_broken_percent", type=float, default=options.max_broken_percent, help="stop when more clips cannot be used")
  add("--strict", action="store_true", help="stop when any clip cannot be used")
  add("--overwrite", action="store_true", help="make all anew")
  add("--force", action="store_true", help="go on although the disk seems too small")
  return parser


def main(arguments: list[str] | None = None) -> int:
  """Parses the command line, prepares, prints the folder -> exit code (2: the user can mend it, 42: stopped)."""
  parser = _parser()
  given = parser.parse_args(arguments)
  if given.clips_per_shard < 1 or given.num_workers < 1:
    parser.error("--clips_per_shard and --num_workers must be 1 or more")
  if not 0 <= given.max_broken_percent <= 100:  # nan too
    parser.error("--max_broken_percent must be between 0 and 100")
  root, out = given.root.expanduser().absolute(), given.out.expanduser().absolute()
  fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(Options)}
  try:
    encoding = Encoding(given.image_size, given.sample_rate_hz)
    print(prepare(given.dataset, root, out, encoding, given.clips_per_shard, Options(**fields)))
  except (DataError, OSError) as error:
    return refuse(error)
  except KeyboardInterrupt:
    print("stopped; what is finished is kept, run the same command to go on", file=sys.stderr)
    return STOPPED
  return 0


if __name__ == "__main__":
  signal.signal(signal.SIGTERM, signal.default_int_handler)  # preemption is a stop like Ctrl-C
  sys.exit(main())
