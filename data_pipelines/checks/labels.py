"""Checks of the label files that all benchmarks share: splits, counts, known MD5s, leaks and repeats. No media are touched."""

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

from data_pipelines import ave, limits
from data_pipelines.base import Dataset
from data_pipelines.checks.findings import (
  Context,
  Finding,
  class_names,
  distinct,
  named_classes,
  plural,
  row_classes,
)
from data_pipelines.known import NEEDED, UNKNOWN_NAMES, LabelFile, identify
from data_pipelines.schema import DataError

AS_PUBLISHED = "as in the official files"


def damaged_labels(dataset: Dataset, context: Context) -> list[Finding]:
  """Label files that cannot be read, each in the reader's own line."""
  return [Finding("fatal", "damaged_labels", str(dataset.label_root), message) for message in context.damaged]


def splits(dataset: Dataset, context: Context) -> list[Finding]:
  """Splits that are missing or empty."""
  found = []
  for split in dict.fromkeys((*NEEDED, *(context.facts.splits if context.official else ()), *context.splits)):
    if context.splits.get(split) or (context.damaged and split not in context.splits):
      continue
    state = "is empty" if split in context.splits else "is not there"
    use = {"train": "training needs it", "test": "evaluation needs it"}.get(split, "no settings can be chosen on it")
    what = f"the split {state}; {use}"
    found.append(Finding("fatal" if split in NEEDED else "gap", "splits", split, what, context.labels_from))
  return found


def counts(dataset: Dataset, context: Context) -> list[Finding]:
  """Rows and clips of each split against the published numbers, and rows per class where the rows differ."""
  found = []
  for split, rows in context.splits.items():
    if not rows or not (facts := context.split_facts(split)):
      continue
    clips = len({record.clip for record in rows})
    if facts.variant:
      found.append(Finding("note", "counts", split, f"{len(rows)} rows: the version {facts.variant}"))
    if len(rows) != facts.rows:
      what = f"{len(rows)} rows, official {facts.rows}" + _one_off(len(rows) - facts.rows)
      found.append(Finding("gap", "counts", split, what, context.labels_from, _class_changes(context, split)))
    elif facts.clips is not None and clips != facts.clips:
      what = f"{clips} clips in {len(rows)} rows, official {facts.clips}"
      found.append(Finding("gap", "counts", split, what, context.labels_from))
    elif changes := _class_changes(context, split):
      found.append(Finding("gap", "counts", split, "other rows per class than the official", examples=changes))
  return found + _all_clips(context)


def _all_clips(context: Context) -> list[Finding]:
  """Distinct clips of all splits, where each split has its published rows."""
  wanted, splits = context.facts.all_clips, context.facts.splits
  if not context.official or wanted is None:
    return []
  clips = {record.clip for split in splits for record in context.splits.get(split, ())}
  complete = all(len(context.splits.get(split, ())) == versions[0].rows for split, versions in splits.items())
  if not complete or len(clips) == wanted:
    return []
  return [Finding("gap", "counts", "all splits", f"{len(clips)} clips, official {wanted}", context.labels_from)]


def _one_off(difference: int) -> str:
  if difference == -1:
    return ": one is lost, as when a headerless file is read as if its first line were a header, or a download was cut"
  return ": one too many" if difference == 1 else ""


def _class_changes(context: Context, split: str) -> tuple[str, ...]:
  """`Bark: 136 rows, official 137` of every class that differs."""
  facts = context.split_facts(split)
  if not facts or not facts.classes:
    return ()
  have = Counter(c for record in context.splits[split] for c in row_classes(record))
  pairs = enumerate(zip(context.facts.class_names, facts.classes, strict=True))
  return tuple(f"{name}: {have[i]} rows, official {wanted}" for i, (name, wanted) in pairs if have[i] != wanted)


def label_paths(dataset: Dataset, context: Context) -> list[Path]:
  """The label files that are there, known names first."""
  names = [name for entry in context.facts.labels for name in entry] + list(context.facts.optional)
  return [path for name in names if (path := dataset.find_file(name))]


def file_verdict(path: Path, context: Context) -> tuple[str, str, LabelFile | None]:
  """MD5 of a label file ("" if it was not read), what it is in words, and what is known of it."""
  if path.stat().st_size > limits.current().label_bytes:
    return "", "too large to be a label file", None
  try:
    digest, known = identify(path)
  except DataError:  # no text: the reader says so where it needs the file
    return "", "not text", None
  except OSError as error:
    return "", f"cannot be read ({error.strerror})", None
  if known:
    renamed = not same_file(known.name, path.name, context)
    return digest, f"official {known.name} under another name" if renamed else known.what, known
  if not context.official or path.name in UNKNOWN_NAMES or "unseen" in path.name:
    return digest, "" if not context.official else "no MD5 of this file is published", None
  return digest, "not a known file", None


def same_file(known: str, name: str, context: Context) -> bool:
  """Whether two names stand for one label file."""
  return known == name or any({known, name} <= set(entry) for entry in context.facts.labels)


def files(dataset: Dataset, context: Context) -> list[Finding]:
  """Label files that are not the published ones, by their MD5s."""
  if not context.official:
    return []
  found = []
  for path in label_paths(dataset, context):
    _, verdict, known = file_verdict(path, context)
    if known and known.damage:
      found.append(Finding("gap", "files", str(path), f"{verdict}: {known.damage}", known.mend))
    elif "under another name" in verdict:
      found.append(Finding("gap", "files", str(path), verdict, context.labels_from))
    elif verdict == "not a known file":
      what = "not a known file: its labels are not the published ones"
      found.append(Finding("gap", "files", str(path), what, context.labels_from))
  return found


def leaks(dataset: Dataset, context: Context) -> list[Finding]:
  """Clips that stand in two splits."""
  clips = {split: {record.clip for record in rows} for split, rows in context.splits.items()}
  found = []
  for one, other in itertools.combinations(clips, 2):
    if both := clips[one] & clips[other]:
      number, examples = len(both), distinct(both)
      pair = f"{one}/{other}"
      if context.facts.leaks_by_design:
        what = f"{plural(number, 'clip')} in both: the benchmark splits questions, not clips"
        found.append(Finding("note", "leaks", pair, what, examples=examples))
        continue
      known = context.facts.leaks.get((one, other), 0) if context.official else 0
      what = f"{plural(number, 'clip')} in both" + (f", {AS_PUBLISHED}" if number == known else "")
      mend = "" if number == known else "take these clips out of one of the two"
      found.append(Finding("note" if number == known else "gap", "leaks", pair, what, mend, examples))
  return found


def repeats(dataset: Dataset, context: Context) -> list[Finding]:
  """Rows that stand twice in a split, and ids that do."""
  found = []
  for split, rows in context.splits.items():
    facts = context.split_facts(split)
    same = repeated(rows)
    if same:
      what = f"{plural(len(same), 'row')} repeated word for word"
      found.append(Finding("gap", "repeats", split, what, "remove them", distinct(record.id for record in same)))
    ids = repeated(record.id for record in rows)
    if len(ids) > len(same):
      known = facts is not None and facts.repeated_ids == len(ids)
      # Male and female speech in one clip of AVE; two answers to one question of AVQA.
      what = f"{plural(len(ids), 'row')} with the id of another row" + (f", {AS_PUBLISHED}" if known else "")
      gap = not known and not isinstance(dataset, ave.AVE)
      mend = "keep one row of each id" if gap else ""
      found.append(Finding("gap" if gap else "note", "repeats", split, what, mend, distinct(ids)))
  return found


def repeated(values: Iterable[Hashable]) -> list:
  """Every value that an equal one came before."""
  seen: set[Hashable] = set()
  return [value for value in values if value in seen or seen.add(value)]


def unused_classes(dataset: Dataset, context: Context) -> list[Finding]:
  """Classes that training never sees."""
  names, rows = class_names(context, dataset), context.splits.get("train", ())
  have = {name for record in rows for name in named_classes(names, record)}
  missing = tuple(name for name in names if name not in have)
  if not have or not missing:
    return []
  return [Finding("note", "unused_classes", "train", f"{len(missing)} of {len(names)} classes have no row", examples=missing)]


Check = Callable[[Dataset, Context], list[Finding]]
CHECKS: tuple[Check, ...] = (
  damaged_labels,
  splits,
  counts,
  files,
  leaks,
  repeats,
  unused_classes,
)
