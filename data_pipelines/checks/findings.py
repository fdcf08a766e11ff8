"""What the checks share: findings, the state of each clip, and the context in which a dataset is checked."""

import dataclasses
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

from data_pipelines import ave, avsbench, llp, music_avqa, tuxpaint
from data_pipelines.base import Dataset
from data_pipelines.known import FACTS, Facts, SplitFacts
from data_pipelines.prepared import PreparedStore
from data_pipelines.schema import DataError, Record, printable

SEVERITIES = ("note", "gap", "fatal")  # index = exit code


@dataclasses.dataclass(frozen=True)
class Finding:
  """One thing worth saying.

  Attributes:
    severity: "note" (known and harmless), "gap" (usable without it) or "fatal" (not usable).
    check: which check found it.
    where: the split or file.
    what: the sentence.
    mend: what to do about it, "" if nothing.
    examples: all clips, rows or files concerned.
  """

  severity: str
  check: str
  where: str
  what: str
  mend: str = ""
  examples: tuple[str, ...] = ()

  def line(self, count: int = 3) -> str:
    """All in one line, with a few examples."""
    more = f" and {len(self.examples) - count} more" if len(self.examples) > count else ""
    shown = f": {', '.join(self.examples[:count])}{more}" if self.examples else ""
    return printable(f"{self.where}: {self.what}{shown}")


@dataclasses.dataclass
class ClipState:
  """What is on disk of one clip.

  Attributes:
    files: its media files, () if any is missing.
    problem: why it cannot be used: "" (it can), "missing", "zero-byte", "truncated" or "unreadable".
    detail: the problem in words, with the file.
    remarks: kind -> words, for what does not keep the clip from being used.
    decoded: whether decoding it was tried.
  """

  files: tuple[Path, ...] = ()
  problem: str = ""
  detail: str = ""
  remarks: dict[str, str] = dataclasses.field(default_factory=dict)
  decoded: bool = False


@dataclasses.dataclass
class Context:
  """A dataset and all that is known of it while it is checked.

  Attributes:
    key: its name in data_pipelines.DATASETS.
    root: the data root as given.
    facts: what is known of the benchmark.
    official: the labels claim to be the published ones (no category list or vocabulary of their own).
    splits: split -> rows, of all splits that can be read.
    damaged: the messages of those that cannot.
    clips: every distinct clip: its key -> its first row.
    states: the same keys -> what is on disk, {} if the media were not asked for.
    prepared: the records that stand in for the media, None for a raw root; refused: why those that are there cannot be used.
    shards: damaged file of the records -> what is wrong; closed: split none of whose clips can be read -> why.
    decode: "all", "sample" or "none"; labels_only: no media are looked at.
    seconds: how long the media took.
  """

  key: str
  root: Path
  facts: Facts
  official: bool
  splits: dict[str, list[Record]]
  damaged: list[str]
  clips: dict[Hashable, Record]
  states: dict[Hashable, ClipState] = dataclasses.field(default_factory=dict)
  prepared: PreparedStore | None = None
  refused: str = ""
  shards: dict[str, str] = dataclasses.field(default_factory=dict)
  closed: dict[str, str] = dataclasses.field(default_factory=dict)
  decode: str = "all"
  labels_only: bool = False
  seconds: float = 0.0

  @property
  def labels_from(self) -> str:
    """Where lost label files can be had again."""
    return self.facts.labels_from if self.official else self._own("the label files")

  @property
  def media_from(self) -> str:
    """Where lost media can be had again."""
    if self.prepared is not None:
      return "mend the raw media and run the same data_pipelines.prepare again: it makes their shards anew"
    return self.facts.media_from if self.official else self._own("the media")

  def _own(self, what: str) -> str:
    if toybox := toybox_root(self.root):
      return f"remove the toybox and make it again: python -m data_pipelines.toybox --out={toybox}"
    return f"put {what} there, or take the rows out of the label files"

  def split_facts(self, split: str) -> SplitFacts | None:
    """The published version of a split that has as many rows, or else the usual one; None for roots of their own."""
    versions = self.facts.splits.get(split, ()) if self.official else ()
    rows = len(self.splits.get(split, ()))
    return next((v for v in versions if v.rows == rows), versions[0] if versions else None)


def open_context(key: str, dataset: Dataset, root: Path) -> Context:
  """Reads the rows of all splits; a split that cannot be read becomes a message in `damaged`."""
  splits: dict[str, list[Record]] = {}
  damaged: list[str] = []
  clips: dict[Hashable, Record] = {}
  for split in dataset.splits():
    try:
      splits[split] = dataset.records(split)
    except DataError as error:
      damaged.append(str(error))
  for rows in splits.values():
    for record in rows:
      clips.setdefault(dataset.clip_key(record), record)
  return Context(key, root, FACTS[key], is_official(key, dataset), splits, list(dict.fromkeys(damaged)), clips)


def is_official(key: str, dataset: Dataset) -> bool:
  """Whether a root has the official classes and words: a list of its own with other names makes it another dataset."""
  if key == "music_avqa":
    return dataset.vocabulary == {"words": list(music_avqa.WORDS), "answers": list(music_avqa.ANSWERS)}
  if key == "avsbench_ms3":
    return not dataset.find_file("categories.txt")
  if key == "tux21":  # classes follow from the pictures that are there: most of them tell the package, even a damaged one
    return 2 * len(set(dataset.classes) & set(tuxpaint.CATEGORIES)) > len(tuxpaint.CATEGORIES)
  official = {"ave": ave.CATEGORIES, "llp": llp.CATEGORIES, "avsbench": avsbench.CATEGORIES}[key]
  return tuple(dataset.classes) == official


def class_names(context: Context, dataset: Dataset) -> tuple[str, ...]:
  """The classes that coverage is counted by, in order."""
  official = context.facts.class_names if context.official or context.key == "music_avqa" else ()
  return official or tuple(dataset.classes)


def row_classes(record: Any) -> tuple[int | str, ...]:
  """The classes of a row, as indices into `class_names` (AVSBench: as names); () if it has none."""
  match record:
    case ave.Event():
      return (record.category,)
    case llp.Parsing():
      return tuple(sorted(set(record.weak)))
    case music_avqa.Question():
      return (record.type,)
    case avsbench.Segmentation():
      return (record.category,) if record.category else ()
    case tuxpaint.Stamp():
      return (record.category,)
  return ()


def named_classes(names: tuple[str, ...], record: Any) -> tuple[str, ...]:
  """The names of a row's classes."""
  return tuple(c if isinstance(c, str) else names[c] for c in row_classes(record))


def plural(count: int, name: str, many: str = "") -> str:
  """`1 clip`, `2 clips`; `many` where the plural is irregular."""
  return f"{count} {name if count == 1 else many or name + 's'}"


def distinct(names: Iterable[str]) -> tuple[str, ...]:
  """Sorted, each once, printable."""
  return tuple(sorted({printable(name) for name in names}))


def toybox_root(root: Path) -> Path | None:
  """The root or the folder above it, whichever `python -m data_pipelines.toybox` made."""
  return next((folder for folder in (root, root.parent) if (folder / "toybox.json").is_file()), None)
