"""What is on disk of each clip: missing, empty, cut, unreadable or odd files, or records; by threads over all cores."""

import hashlib
import os
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np

from data_pipelines import arrays, pictures, waves
from data_pipelines.base import Dataset
from data_pipelines.checks import records
from data_pipelines.checks.findings import ClipState, Context
from data_pipelines.known import Facts
from data_pipelines.media import ENDINGS, PICTURES, VIDEO, WAVES, opened
from data_pipelines.schema import DataError, Example, Media, MediaError, Record, printable

# As small as decoding goes: only whether it works is asked, and how loud it is.
MEDIA = Media(image_size=32, sample_rate_hz=16000)
SILENT_BELOW = 32768 * 10 ** (-60 / 20)
TOLERANCE_S = 1.0
SAMPLE = 50  # clips of each split
BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"uuid", b"styp", b"sidx", b"moof", b"mfra")
Progress = Callable[[int, int], None]


def inspect_all(dataset: Dataset, context: Context, workers: int, progress: Progress) -> dict[Hashable, ClipState]:
  """The state of every distinct clip, in the order of `context.clips`; `progress` gets (done, all)."""
  chosen = chosen_clips(context)
  if context.prepared is not None:
    records.inspect_shards(context, workers)
  pool = ThreadPoolExecutor(workers)
  try:
    jobs = [pool.submit(_inspected, dataset, record, context, key in chosen) for key, record in context.clips.items()]
    states = {}
    for done, (key, job) in enumerate(zip(context.clips, jobs, strict=True), 1):
      states[key] = job.result()
      progress(done, len(jobs))
    return states
  finally:  # Ctrl-C or an error: what has not begun is dropped
    pool.shutdown(cancel_futures=True)


def chosen_clips(context: Context) -> set[Hashable]:
  """The clips to decode: all, none, or SAMPLE of each split, the same ones each time."""
  if context.decode != "sample":
    return set(context.clips) if context.decode == "all" else set()
  by_id = {record.clip: key for key, record in context.clips.items()}
  chosen = set()
  for rows in context.splits.values():
    ids = sorted({r.clip for r in rows}, key=lambda name: hashlib.sha256(name.encode()).digest())
    chosen |= {by_id[name] for name in ids[:SAMPLE]}
  return chosen


def _inspected(dataset: Dataset, record: Record, context: Context, decode: bool) -> ClipState:
  """`inspect`; files that cannot be opened, also those that no row shows, make the clip unreadable."""
  try:
    return inspect(dataset, record, context, decode)
  except DataError as error:
    return ClipState(problem="unreadable", detail=_words(error))
  except OSError as error:
    return ClipState(problem="unreadable", detail=printable(str(error)))


def inspect(dataset: Dataset, record: Record, context: Context, decode: bool) -> ClipState:
  """Looks at the files or the records of one clip, and decodes it if asked to."""
  state = _look_up(dataset, record) if context.prepared is None else records.look_up(dataset, record, context)
  cut = next((words for path in state.files if path.suffix.lower() == VIDEO and (words := _cut_mp4(path))), "")
  if cut and not decode and not state.problem:
    state.problem, state.detail = "truncated", cut
  if not decode or state.problem:
    return state
  state.decoded = True
  clip, state.problem, state.detail = _decode(dataset, record)
  if clip is None and cut:
    state.problem, state.detail = "truncated", cut
  elif clip is not None:
    _remark(clip["audio"], record, context, state)
    if cut:
      state.remarks["cut at the end"] = cut
  return state


def _look_up(dataset: Dataset, record: Record) -> ClipState:
  """The state of a clip as far as its files tell that are not decoded."""
  files = dataset.clip_files(record)
  if not files:
    return ClipState(problem="missing", detail=_missing(dataset, record))
  state = ClipState(files)
  if empty := next((empty for path in files if (empty := _empty_file(path))), None):
    state.problem, state.detail = "zero-byte", f"{printable(empty)}: is empty (0 bytes)"
    return state
  _look_into_table(files, record, state)
  _count_pictures(dataset, record, state)
  return state


def _look_into_table(files: Sequence[Path], record: Record, state: ClipState) -> None:
  """Whether an AVS.npy, which holds the sounds of many clips, holds that of this one."""
  for path in files:
    if path.name == waves.FILE_NAME:
      try:
        if waves.num_samples(path, record.clip) is None:
          state.problem, state.detail = "missing", f"{printable(record.clip)}: not in {printable(path)}"
      except DataError as error:
        state.problem, state.detail = "unreadable", _words(error)


def _words(error: DataError) -> str:
  """What is wrong, with the file and without the mend."""
  return f"{printable(error.path)}: {error.reason}" if isinstance(error, MediaError) else str(error)


def _missing(dataset: Dataset, record: Record) -> str:
  """The clip that is missing, and which half of it is there; of AVSBench the first file that is not."""
  layout, names = dataset.layout, dataset.clip_names(record)
  if not layout.video:
    return _decode(dataset, record)[2] or printable(record.clip)
  frames = any((dataset.root / folder / name).is_dir() for folder in layout.frames for name in names)
  wave = any(layout.find_wave(dataset.root, name) for name in names)
  half = " (frames without a wave)" if frames else " (a wave without frames)" if wave else ""
  return printable(record.clip) + half


def _decode(dataset: Dataset, record: Record) -> tuple[Example | None, str, str]:
  """The decoded clip, or None with the kind of problem and its words."""
  try:
    return dataset.read_clip(record, MEDIA), "", ""
  except DataError as error:
    cut = isinstance(error, MediaError) and error.reason.startswith("is cut off")
    return None, "truncated" if cut else "unreadable", _words(error)


def _empty_file(path: Path) -> Path | None:
  """The file, or the first picture of the folder, that has no bytes."""
  if not path.is_dir():
    return None if path.stat().st_size else path
  with os.scandir(path) as entries:
    empty = sorted(e.name for e in entries if e.name.lower().endswith(PICTURES) and not e.stat().st_size)
  return path / empty[0] if empty else None


def _cut_mp4(path: Path) -> str:
  """Says that an mp4 is shorter than its boxes claim, found in their headers alone; "" if it is whole."""
  size = path.stat().st_size
  place = 0
  with path.open("rb") as file:
    while place + 8 <= size:
      file.seek(place)
      head = file.read(16)
      length = int.from_bytes(head[:4], "big")
      if length == 1:  # the length follows in eight bytes
        length = int.from_bytes(head[8:16], "big")
      if length < 8 or head[4:8] not in BOXES:  # up to the end of the file, or no mp4: decoding will tell
        return ""
      place += length
  return f"{printable(path)}: is cut off: {size} bytes of at least {place}" if place > size else ""


def _pictures(folder: Path) -> list[str]:
  """Names of the pictures in a folder."""
  with os.scandir(folder) as entries:
    return [e.name for e in entries if e.name.lower().endswith(PICTURES) and not e.name.startswith(".")]


def _is_masks(path: Path) -> bool:
  return "gt_masks" in path.parts


def _count_pictures(dataset: Dataset, record: Record, state: ClipState) -> None:
  """Too few masks or frames of a clip."""
  for path in state.files:
    if not path.is_dir():
      continue
    count = len(_pictures(path))
    wanted = getattr(record, "masks", dataset.seconds) if _is_masks(path) else dataset.seconds
    if not count or (count < wanted and hasattr(record, "masks")):
      kind = "masks" if _is_masks(path) else "frames"
      state.problem, state.detail = "missing", f"{printable(path)}: {count} of {wanted} {kind}"
    elif count < wanted:
      state.remarks["few frames"] = f"{printable(path)}: {count} frames for {wanted} seconds"
    elif count > wanted and not hasattr(record, "masks") and not dataset.spread:
      state.remarks["more frames"] = f"{printable(path)}: {count} frames for {wanted} seconds"


def _remark(audio: np.ndarray, record: Record, context: Context, state: ClipState) -> None:
  """Remarks on the sound (int16, any shape), the length and the masks of a clip that decodes."""
  heard = getattr(record, "spoken", True)  # a stamp that nobody speaks of is silent: `stamps.silent` counts them
  if heard and audio.size and max(int(audio.max()), -int(audio.min())) < SILENT_BELOW:
    where = _sound(state.files) if context.prepared is None else record.clip  # a shard holds many clips
    state.remarks["silent"] = f"{printable(where)}: silent, below -60 dBFS"
  for path in state.files:
    if path.is_dir() and _is_masks(path):
      _look_at_masks(path, state)
    elif path.suffix.lower() in (VIDEO, *WAVES):
      _measure(path, record, context, state)


def _sound(files: Sequence[Path]) -> Path:
  return next((path for path in files if path.suffix.lower() in WAVES), files[0])


def _measure(path: Path, record: Record, context: Context, state: ClipState) -> None:
  """Length of a media file against the published one; roots of their own may have AVQA clips of any length."""
  facts: Facts = context.facts
  if path.suffix.lower() == ".npy":
    packed = path.name == waves.FILE_NAME  # the sounds of many clips
    samples = waves.num_samples(path, record.clip) if packed else _npy_samples(path)
    if samples != facts.wave_samples:
      where = f"{printable(path)}: {record.clip}" if packed else printable(path)
      state.remarks["samples"] = f"{where}: {samples} samples, expected {facts.wave_samples}"
  elif facts.duration_s is not None and (context.official or context.key != "music_avqa"):
    seconds = _duration_s(path)
    if seconds is not None and abs(seconds - facts.duration_s) > TOLERANCE_S:
      state.remarks["duration"] = f"{printable(path)}: {seconds:.1f} s long, expected {facts.duration_s:g} s"


def _npy_samples(path: Path) -> int:
  """Number of samples of an array file."""
  return arrays.read_npy_header(path).count


def _duration_s(path: Path) -> float | None:
  """Length by the header; None if it does not say."""
  with opened(path) as container:
    return container.duration / av.time_base if container.duration else None


def _look_at_masks(folder: Path, state: ClipState) -> None:
  """Masks that are empty, and masks stored as 0/1 instead of 0/255."""
  names = sorted(_pictures(folder))
  highest = {}
  for name in names:
    with pictures.opened(folder / name) as image:
      extrema = image.getextrema()
      bands = extrema if isinstance(extrema[0], tuple) else (extrema,)
      colour = image.mode not in ("LA", "RGBA", "PA")
      highest[name] = max(high for _, high in (bands if colour else bands[:-1]))
  if empty := [name for name, high in highest.items() if not high]:
    state.remarks["empty masks"] = f"{printable(folder / empty[0])}: empty" + _more(len(empty))
  if ones := [name for name, high in highest.items() if high == 1]:
    state.remarks["0/1 masks"] = f"{printable(folder / ones[0])}: values 0 and 1" + _more(len(ones))


def _more(count: int) -> str:
  return f", and {count - 1} more of this clip" if count > 1 else ""


def extra_files(dataset: Dataset, context: Context) -> tuple[dict[Path, list[str]], dict[Path, str]]:
  """Folder of media -> names in it that belong to no row, and folder that cannot be listed -> why.

  Each folder is listed once, no file is opened.
  """
  used: dict[Path, set[str]] = {}
  for state in context.states.values():
    for path in state.files:
      used.setdefault(path.parent, set()).add(path.name)
  for path in dataset.companions():
    if path.parent in used:
      used[path.parent].add(path.name)
  layout = dataset.layout
  # Where folders hold nothing but clips, a clip may lie there in a second form that is not read.
  names = {name for r in context.clips.values() for name in dataset.clip_names(r)} if layout.video else set()
  for folder in filter(None, (*layout.video, *layout.frames, *layout.wave)):
    if os.path.isdir(path := dataset.root / folder) and not any(path in other.parents for other in used):
      used.setdefault(path, set())
  found, unlisted = {}, {}
  for folder, known in sorted(used.items()):
    try:
      with os.scandir(folder) as entries:
        loose = [e for e in entries if e.name not in known and not e.name.startswith(".")]
    except OSError as error:
      unlisted[folder] = error.strerror
      continue
    media = [e.name for e in loose if _is_media(e, folder, dataset.root)]
    if extra := sorted(name for name in media if _stem(name) not in names):
      found[folder] = extra
  return found, unlisted


def _is_media(entry: os.DirEntry, folder: Path, root: Path) -> bool:
  """Whether an entry of a media folder looks like media: in the root's own folder, only files do."""
  if os.path.isdir(entry.path):  # a link to itself is none, where entry.is_dir() raises
    return folder != root
  return _stem(entry.name) != entry.name


def _stem(name: str) -> str:
  """A file name without the ending of a media file; other names stay."""
  stem, ending = os.path.splitext(name)
  return stem if ending.lower() in ENDINGS else name
