"""What was expected in the folder against what is there, one line a file or folder, however many clips it holds."""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from data_pipelines import waves
from data_pipelines.base import Dataset
from data_pipelines.checks.findings import Context, plural
from data_pipelines.checks.labels import file_verdict, label_paths
from data_pipelines.known import Facts
from data_pipelines.media import ENDINGS
from data_pipelines.schema import printable

MAX_GROUPS = 6  # of media folders; beyond it they are summed up one level higher
MAX_UNUSED = 12
_VALIDATION = re.compile(r"(^|[_-])val")


@dataclasses.dataclass(frozen=True)
class Line:
  """One line of the tree: "+" there, "-" missing, "?" not used; the path below the root; a few words; a file's MD5."""

  mark: str
  path: str
  what: str
  md5: str = ""


def tree(dataset: Dataset, context: Context) -> list[Line]:
  """The lines of a dataset whose labels were found: labels, media, what is not used."""
  lines = label_lines(dataset, context)
  used = set(label_paths(dataset, context))
  if not context.labels_only:
    lines += media_lines(dataset, context)
    used |= {path for state in context.states.values() for path in state.files}
    used |= {context.prepared.folder} if context.prepared is not None else set()
  return lines + unused_lines(dataset, context, used)


def bare_tree(root: Path, facts: Facts, folders: Iterable[str]) -> list[Line]:
  """The lines where no labels were found: what is expected, and what the root holds."""
  folder = next((path for name in folders if (path := root / name).is_dir()), root)
  missing = [Line("-", _below(folder / names[0], root), "missing") for names in facts.labels]
  return missing + _limited([Line("?", _below(path, root), _size(path)) for path in _entries(folder)])


def label_lines(dataset: Dataset, context: Context) -> list[Line]:
  """Each expected label file, and each optional one that is there, with what its MD5 says."""
  there = label_paths(dataset, context)
  lines = []
  for path in there:
    digest, verdict, _ = file_verdict(path, context)
    lines.append(Line("+", _below(path, context.root), verdict, digest))
  names = {path.name for path in there}
  for entry in context.facts.labels:
    spared = not context.official and _VALIDATION.search(entry[0])  # who has labels of his own may do without
    if not names & set(entry) and not spared:
      lines.append(Line("-", _below(dataset.label_root / entry[0], context.root), "missing"))
  return lines


def media_lines(dataset: Dataset, context: Context) -> list[Line]:
  """The folders that hold media of clips, with their numbers."""
  files = {path for state in context.states.values() for path in state.files}
  if context.prepared is not None:
    folder = context.prepared.folder
    return [Line("+", f"{_below(folder, context.root)}/", plural(len(context.prepared.shards), "shard"))]
  if files:
    return [Line("+", f"{_below(folder, context.root)}/", what) for folder, what in _groups(files)]
  if base := getattr(dataset, "data_root", None):  # all of AVSBench's three folders are needed
    folders = [base / name for name in ("visual_frames", "audio_wav", "gt_masks")]
    return [Line("+" if f.is_dir() else "-", f"{_below(f, context.root)}/", "" if f.is_dir() else "missing") for f in folders]
  return [Line("-", _below(dataset.root, context.root) + "/", f"missing: {context.facts.media}")]


def _groups(files: set[Path]) -> list[tuple[Path, str]]:
  """Folder -> `4097 mp4`, summed up until there are few folders."""
  groups = Counter((path.parent, path.suffix[1:].lower() if path.suffix.lower() in ENDINGS else "") for path in files)
  while len(groups) > MAX_GROUPS:
    deepest = max(len(folder.parts) for folder, _ in groups)
    higher = Counter()
    for (folder, kind), count in groups.items():
      higher[folder.parent if len(folder.parts) == deepest else folder, kind] += count
    groups = higher
  said = {"": ("clip folder", "clip folders")}
  return [(f, plural(n, *said.get(kind, (kind, kind)))) for (f, kind), n in sorted(groups.items())]


def layout(context: Context) -> dict[str, int]:
  """How the clips are stored: `mp4`, `frames + npy`, `frames + wav + masks` -> clips."""
  return dict(Counter(" + ".join(map(_kind, state.files)) for state in context.states.values() if state.files))


def _kind(path: Path) -> str:
  if ".array_record-" in path.name:
    return "ArrayRecord"
  if path.suffix.lower() in ENDINGS:
    return path.name if path.name == waves.FILE_NAME else path.suffix[1:].lower()
  return "masks" if "gt_masks" in path.parts else "frames"


def unused_lines(dataset: Dataset, context: Context, used: set[Path]) -> list[Line]:
  """Entries of the folders that hold labels or the dataset which no row needs."""
  needed = {above for path in used for above in (path, *path.parents)}
  media_here = {path.parent for path in used}
  folders = dict.fromkeys((dataset.root, dataset.label_root, getattr(dataset, "data_root", dataset.root)))
  if context.labels_only:
    folders = {dataset.label_root: None}
  lines = []
  for path in (path for folder in folders for path in _entries(folder)):
    if path in needed or (path.parent in media_here and path.suffix.lower() in ENDINGS):
      continue
    if any(path in other.parents or path == other for other in folders) or (context.labels_only and path.is_dir()):
      continue
    reason = context.facts.unused.get(path.name, f"not used{', ' + size if (size := _size(path)) else ''}")
    lines.append(Line("?", _below(path, context.root), reason))
  return _limited(lines)


def _limited(lines: list[Line]) -> list[Line]:
  if len(lines) <= MAX_UNUSED:
    return lines
  return [*lines[:MAX_UNUSED], Line("?", "...", f"and {len(lines) - MAX_UNUSED} more")]


def _entries(folder: Path) -> list[Path]:
  """What a folder holds, without hidden entries; [] if there is none, or none that may be listed (`coverage.extras` tells)."""
  try:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
  except OSError:
    return []


def _size(path: Path) -> str:
  """`12 entries` of a folder, "" of a file."""
  try:
    return plural(len(os.listdir(path)), "entry", "entries") if path.is_dir() else ""
  except OSError as error:
    return f"cannot be listed ({error.strerror})"


def _below(path: Path, root: Path) -> str:
  """A path as it stands below the root, printable."""
  return printable(path.relative_to(root) if path.is_relative_to(root) else path)
