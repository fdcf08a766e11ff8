"""Findings about the media, drawn from the states of the clips, and how many rows of each split and class they leave."""

from collections import Counter
from collections.abc import Hashable

from data_pipelines import waves
from data_pipelines.base import Dataset
from data_pipelines.checks.findings import Context, Finding, class_names, named_classes, plural
from data_pipelines.checks.labels import Check
from data_pipelines.checks.media import extra_files
from data_pipelines.known import NEEDED
from data_pipelines.schema import Record, printable

BROKEN = ("zero-byte", "truncated", "unreadable")
_AGAIN = "fetch them again, or leave them out with --config.data.on_bad_clip=skip"
# Remark -> what is said of the clips, severity, mend.
REMARKS = {
  "duration": ("{} of another length", "gap", "cut them to the published seconds; shorter ones are filled up with silence"),
  "samples": ("{} whose .npy has another length", "gap", "make the waves again: 32 kHz, the whole clip"),
  "silent": ("{} without sound", "gap", "look whether the sound track was lost"),
  "few frames": ("{} with too few frames: some are shown twice", "gap", "extract one frame a second"),
  "more frames": ("{} with more frames than seconds: spread evenly here, PHP's release took the first", "note", ""),
  "empty masks": ("{} with an empty mask", "gap", "a sounding object must be there: fetch the masks again"),
  "0/1 masks": ("{} whose masks hold 0 and 1 instead of 0 and 255: read as the same", "note", ""),
  "cut at the end": ("{} cut at the very end, which decode", "note", ""),
}


def no_media(dataset: Dataset, context: Context) -> list[Finding]:
  """Nothing to learn from at all, or in a split that a run needs."""
  if not context.states:
    return []
  if all(state.problem == "missing" for state in context.states.values()):
    what = f"no media: none of {plural(len(context.states), 'clip')} has a file ({context.facts.media})"
    return [Finding("fatal", "no_media", str(dataset.root), what, context.media_from)]
  found = []
  for split, rows in context.splits.items():
    if split in NEEDED and rows and not any(is_usable(dataset, context, r) for r in rows):
      found.append(Finding("fatal", "no_media", split, "no clip of this split can be used", context.media_from))
  return found


def is_usable(dataset: Dataset, context: Context, record: Record) -> bool:
  """Whether the media of a row are there and, as far as it was tried, decode."""
  return not context.states[dataset.clip_key(record)].problem


def split_clips(dataset: Dataset, context: Context, split: str) -> dict[Hashable, Record]:
  """The distinct clips of a split: key -> first row."""
  clips: dict[Hashable, Record] = {}
  for record in context.splits[split]:
    clips.setdefault(dataset.clip_key(record), record)
  return clips


def problems(dataset: Dataset, context: Context) -> list[Finding]:
  """Missing, empty, cut and unreadable clips of each split."""
  found = []
  for split in context.splits if context.states else ():
    clips = split_clips(dataset, context, split)
    for problem in ("missing", *BROKEN):
      bad = {key: record for key, record in clips.items() if context.states[key].problem == problem}
      if not bad:
        continue
      details = tuple(context.states[key].detail for key in bad)
      said = {"missing": "without media", "unreadable": "that cannot be decoded", "truncated": "cut off"}
      what = f"{len(bad)} of {plural(len(clips), 'clip')} {said.get(problem, 'with an empty file')}"
      mend = context.media_from if problem == "missing" else _AGAIN
      found.append(Finding("gap", problem.replace("-", "_"), split, what, mend, details))
  return found


def remarks(dataset: Dataset, context: Context) -> list[Finding]:
  """What is odd about clips that decode."""
  found = []
  for split in context.splits if context.states else ():
    states = [context.states[key] for key in split_clips(dataset, context, split)]
    for kind, (said, severity, mend) in REMARKS.items():
      examples = tuple(state.remarks[kind] for state in states if kind in state.remarks)
      if kind == "empty masks" and (context.key != "avsbench" or not context.official):
        severity, mend = "note", ""  # nothing that is seen sounds: as it may be in MS3 and in the toybox
      if examples:
        what = said.format(plural(len(examples), "clip"))
        found.append(Finding(severity, kind.replace(" ", "_").replace("/", "_"), split, what, mend, examples))
  return found


def extras(dataset: Dataset, context: Context) -> list[Finding]:
  """Media that belong to no row, and names that are no UTF-8 and so can belong to none."""
  found = []
  raw = bool(context.states) and context.prepared is None
  extra, unlisted = extra_files(dataset, context) if raw else ({}, {})
  for folder, words in unlisted.items():
    found.append(Finding("gap", "unlisted", str(folder), f"cannot be listed ({words})", "give this user the right to read it"))
  for folder, names in extra.items():
    odd = tuple(printable(name) for name in names if _undecodable(name))
    if odd:
      what = f"{plural(len(odd), 'name')} not in UTF-8, which no row can mean"
      found.append(Finding("gap", "names", str(folder), what, "rename them to the ids of their rows", odd))
    if plain := tuple(name for name in names if not _undecodable(name)):
      what = f"{plural(len(plain), 'entry', 'entries')} of no row"
      found.append(Finding("note", "extra", str(folder), what, examples=plain))
  return found


def _undecodable(name: str) -> bool:
  """Whether a name from a listing holds bytes that are no UTF-8."""
  return any("\udc80" <= letter <= "\udcff" for letter in name)


def split_table(dataset: Dataset, context: Context) -> dict[str, dict[str, int]]:
  """Split -> rows, clips, and (media looked at) usable, missing, broken, decoded clips."""
  table = {}
  for split, rows in context.splits.items():
    clips = split_clips(dataset, context, split)
    table[split] = {"rows": len(rows), "clips": len(clips)}
    if facts := context.split_facts(split):
      table[split]["official_rows"] = facts.rows
    if context.states:
      states = [context.states[key] for key in clips]
      count = Counter(state.problem for state in states)
      broken = sum(count[kind] for kind in BROKEN)
      decoded = sum(state.decoded for state in states)
      table[split] |= {"usable": count[""], "missing": count["missing"], "broken": broken, "decoded": decoded}
  return table


def class_table(dataset: Dataset, context: Context) -> list[dict[str, str | int | float]]:
  """For each class: its rows over all splits, those with usable media, and their percentage; [] without media."""
  if not context.states:
    return []
  names = class_names(context, dataset)
  rows, usable = Counter(), Counter()
  for record in (r for members in context.splits.values() for r in members):
    for name in named_classes(names, record):
      rows[name] += 1
      usable[name] += is_usable(dataset, context, record)
  return [
    {"class": name, "rows": rows[name], "with_media": usable[name], "percent": round(100 * usable[name] / rows[name], 1)}
    for name in names
    if rows[name]
  ]


def packed_sounds(dataset: Dataset, context: Context) -> list[Finding]:
  """Sounds packed into tables that together are more than a process keeps: they are read again and again."""
  tables = {path for state in context.states.values() for path in state.files if path.name == waves.FILE_NAME}
  megabytes, kept = sum(path.stat().st_size for path in tables) // 1_000_000, waves.TABLES.max_bytes // 1_000_000
  if megabytes <= kept:
    return []
  what = f"{plural(len(tables), 'table')} {waves.FILE_NAME} of {megabytes} MB, of which a process keeps {kept} MB"
  return [Finding("note", "packed_sounds", str(dataset.root), f"{what}: slow to train on before data_pipelines.prepare")]


CHECKS: tuple[Check, ...] = (no_media, problems, remarks, extras, packed_sounds)
