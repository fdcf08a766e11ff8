"""Composes the toybox data root: the benchmarks in their own on-disk layouts.

The same seed and sizes give the same bytes for any number of workers. The result appears in one rename and is
kept: asking again with the same settings returns at once.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType

from data_pipelines import progress as progress_lib
from data_pipelines.schema import SPLITS, DataError
from data_pipelines.toybox import write_ave, write_avqa, write_avs, write_llp, write_ms3
from data_pipelines.toybox.clips import Clip, manifest_splits
from data_pipelines.toybox.library import MEDIA_DIR, Library, load_library

LAYOUTS: dict[str, ModuleType] = {module.FOLDER: module for module in (write_ave, write_llp, write_avs, write_avqa, write_ms3)}
Sizes = Mapping[str, Mapping[str, int]]
Progress = Callable[[int, int], None]

# AVSBench's S4 has more training clips than the others: only the first of five frames carries a mask there. MS3 has few: a run
# that does not learn it composes it all the same.
DEFAULT_SIZES: Sizes = {
  "AVE": {"train": 240, "val": 40, "test": 100, "unseen": 60},
  "LLP": {"train": 240, "val": 40, "test": 100, "unseen": 60},
  "AVSBench": {"train": 600, "val": 40, "test": 80, "unseen": 50},
  "MUSIC-AVQA": {"train": 200, "val": 30, "test": 60, "unseen": 40},
  "AVSBench-MS3": {"train": 120, "val": 40, "test": 40, "unseen": 40},
}
TINY_SIZES: Sizes = {folder: {"train": 4, "val": 2, "test": 3, "unseen": 3} for folder in DEFAULT_SIZES}
SIZES = {"default": DEFAULT_SIZES, "tiny": TINY_SIZES}
RECEIPT = "toybox.json"

_libraries: dict[tuple[str, ...], Library] = {}


def compose(
  out_dir: Path | str,
  *,
  seed: int = 0,
  sizes: Sizes = DEFAULT_SIZES,
  workers: int | None = None,
  progress: Progress | None = None,
) -> Path:
  """Writes out_dir/{AVE,LLP,AVSBench,MUSIC-AVQA} (S4 and MS3 in AVSBench), or returns at once if the same is already there.

  Args:
    out_dir: the data root; made if need be. A former toybox there is replaced, anything else is left alone.
    seed: all chance comes from it.
    sizes: clips per benchmark folder and split.
    workers: processes; None: one per core, at most eight.
    progress: called with (clips done, clips in all); None: lines on stderr with the time left.

  Returns:
    out_dir.

  Raises:
    DataError: unknown sizes, or out_dir holds something that is not a toybox.
  """
  out = Path(out_dir).expanduser().absolute()
  _check_sizes(sizes)
  receipt = _receipt(seed, sizes)
  if _is_done(out, receipt):
    return out
  if out.exists() and not (out / RECEIPT).is_file() and (not out.is_dir() or any(out.iterdir())):
    raise DataError(f"toybox: {out} is not empty and not a toybox; name another folder or empty this one")
  partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    _write(partial, seed, sizes, workers, progress or progress_lib.Progress("toybox", every_s=3.0))
    (partial / RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
    _publish(partial, out, receipt)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return out


def plan_all(seed: int, sizes: Sizes) -> dict[str, dict[str, list[Clip]]]:
  """Every clip of a data root, without rendering it: benchmark folder -> split -> clips."""
  return {
    folder: {
      split: [layout.plan(seed, _library(split), split, index) for index in range(sizes[folder][split])]
      for split in SPLITS
      if sizes[folder].get(split)
    }
    for folder, layout in LAYOUTS.items()
    if folder in sizes
  }


def _check_sizes(sizes: Sizes) -> None:
  for folder, counts in sizes.items():
    if folder not in LAYOUTS:
      raise DataError(f"toybox: unknown benchmark {folder!r} in sizes; known: {', '.join(LAYOUTS)}")
    for split, count in counts.items():
      if split not in SPLITS or not isinstance(count, int) or count < 0:
        raise DataError(
          f"toybox: sizes[{folder!r}][{split!r}] = {count!r}; splits are {', '.join(SPLITS)}, counts whole numbers from 0"
        )


def version() -> str:
  """sha256 of the media and of the code that composes."""
  digest = hashlib.sha256((MEDIA_DIR / "manifest.json").read_bytes())
  for path in sorted(Path(__file__).parent.glob("*.py")):
    digest.update(path.read_bytes())
  return digest.hexdigest()


def _receipt(seed: int, sizes: Sizes) -> dict:
  """Everything the bytes depend on."""
  counts = {folder: dict(splits) for folder, splits in sizes.items()}
  return {"name": "toybox", "seed": seed, "sizes": counts, "version": version()}


def _is_done(out: Path, receipt: dict) -> bool:
  try:
    return json.loads((out / RECEIPT).read_text(encoding="utf-8")) == receipt
  except (OSError, ValueError, RecursionError):
    return False  # nothing there, or nothing of ours: compose decides what that means


def _publish(partial: Path, out: Path, receipt: dict) -> None:
  """One rename; a former toybox steps aside first, and whoever finished the same before us wins."""
  old = out.with_name(f".{out.name}.old-{os.getpid()}")
  if _is_done(out, receipt):
    return
  if out.exists():
    out.rename(old)
  try:
    partial.rename(out)
  except OSError:
    if not _is_done(out, receipt):
      raise
  finally:
    shutil.rmtree(old, ignore_errors=True)


def _write(root: Path, seed: int, sizes: Sizes, workers: int | None, progress: Progress) -> None:
  plans = plan_all(seed, sizes)
  for folder, clips in plans.items():
    LAYOUTS[folder].write_annotations(root, clips, _library("train"), seed)
  jobs = [(str(root), folder, clip) for folder, clips in plans.items() for members in clips.values() for clip in members]
  count = workers or min(8, os.cpu_count() or 1)
  if count == 1 or len(jobs) < 2:
    for done, job in enumerate(jobs, 1):
      _write_clip(job)
      progress(done, len(jobs))
    return
  # Spawned, not forked: the caller may hold threads (jax), which a fork would copy in mid-flight.
  with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
    for done, _ in enumerate(pool.map(_write_clip, jobs, chunksize=min(8, -(-len(jobs) // count))), 1):
      progress(done, len(jobs))


def _write_clip(job: tuple[str, str, Clip]) -> None:
  root, folder, clip = job
  LAYOUTS[folder].write_media(Path(root), clip, _library(clip.split))


def _library(split: str) -> Library:
  """The library of a benchmark split, loaded once per process (it only caches what never changes)."""
  key = manifest_splits(split)
  if key not in _libraries:
    _libraries[key] = load_library(key)
  return _libraries[key]
