"""The report of a checked dataset: one object, told as text or as JSON."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.checks import coverage
from data_pipelines.checks.findings import SEVERITIES, Context, Finding, plural, toybox_root
from data_pipelines.checks.tree import Line
from data_pipelines.schema import printable

VERDICTS = ("clean", "usable with gaps", "not usable")  # index = exit code
EXAMPLES = 3  # told in the text; JSON has all
CLASSES = 8
WIDTH = 128


@dataclasses.dataclass
class Report:
  """What `check` found out about one dataset; the fields are the keys of the JSON object.

  Attributes:
    dataset: its name; title: the benchmark's.
    root: the data root as given; folder: where the dataset was found, "" if nowhere.
    official: the labels claim to be the published ones; toybox: the root was made by data_pipelines.toybox.
    exit_code: 0, 1 or 2; verdict: the same in words.
    clips: distinct clips of all splits.
    splits: split -> rows, official_rows, clips, usable, missing, broken, decoded (clips).
    layout: how clips are stored -> clips.
    classes: objects of class, rows, with_media, percent.
    tree: objects of mark (+ there, - missing, ? not used), path, what, md5.
    findings: objects of severity (note, gap, fatal), check, where, what, mend, examples (all of them).
    next: what to do, in order.
    decode: "all", "sample", "none", or "labels only"; seconds: how long the media took.
  """

  dataset: str
  title: str
  root: str
  folder: str
  official: bool
  toybox: bool
  clips: int
  splits: dict[str, dict[str, int]]
  layout: dict[str, int]
  classes: list[dict[str, Any]]
  tree: list[Line]
  findings: list[Finding]
  next: list[str]
  decode: str
  seconds: float
  exit_code: int = 0
  verdict: str = ""

  def __post_init__(self) -> None:
    self.exit_code = max((SEVERITIES.index(f.severity) for f in self.findings), default=0)
    self.verdict = VERDICTS[self.exit_code]

  def as_json(self) -> dict[str, Any]:
    """All fields as plain types."""
    return dataclasses.asdict(self)


def next_steps(context: Context, findings: Sequence[Finding]) -> list[str]:
  """One or two lines: the mend of what weighs most, then how to go on."""
  command = f"python -m data_pipelines.{{}} --dataset={context.key} --root={context.root}"
  worst = max((SEVERITIES.index(f.severity) for f in findings), default=0)
  if worst == 0:
    if context.labels_only or context.decode == "none":
      return ["look at the media too: " + command.format("check")]
    if context.prepared is not None:
      return [f"train on it with --config.data.root={context.root}"]
    if context.facts.unprepared:
      return ["train on it as it is"]
    return ["train on it as it is, or make it faster to read: " + command.format("prepare") + " --out=DIR"]
  mends = [f.mend for f in findings if f.mend and SEVERITIES.index(f.severity) == worst]
  steps = list(dict.fromkeys(mends))[:1]
  bad_clips = any(f.check in ("missing", "zero_byte", "truncated", "unreadable") for f in findings)
  if worst == 1 and bad_clips:
    steps.append("or train on the clips that are there: --config.data.on_bad_clip=skip")
  return steps


def as_text(report: Report) -> str:
  """The report as lines for people: a clean dataset fits on a screen."""
  kind = "toybox" if report.toybox else "official labels" if report.official else "labels of its own"
  blocks = [[f"{report.title}: {report.folder or report.root}" + (f" ({kind})" if report.folder else "")]]
  blocks += [_splits(report), _classes(report), _tree(report)]
  for severity, title in (("fatal", "not usable because"), ("gap", "gaps"), ("note", "notes")):
    if found := [f for f in report.findings if f.severity == severity]:
      # A mend that the next finding has as well is told once, there.
      same = [f.mend == after.mend for f, after in itertools.pairwise(found)] + [False]
      found = [dataclasses.replace(f, mend="") if again else f for f, again in zip(found, same, strict=True)]
      blocks.append([title, *(line for f in found for line in _finding(f, report.root))])
  if report.next:
    blocks.append(["next", *(f"  {step}" for step in report.next)])
  blocks.append([f"{report.dataset}: {report.verdict} (exit {report.exit_code})"])
  return printable("\n\n".join("\n".join(block) for block in blocks if block))


def table(rows: Iterable[Sequence[Any]]) -> list[str]:
  """Rows of equal length -> lines; the first column to the left, the others to the right."""
  rows = [[str(cell) for cell in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    "  " + "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
    for row in rows
  ]


def _splits(report: Report) -> list[str]:
  if not report.splits:
    return []
  keys = [key for key in ("rows", "official_rows", "clips", "usable", "missing", "broken") if _has(report, key)]
  if all(row.get("official_rows", row["rows"]) == row["rows"] for row in report.splits.values()):
    keys = [key for key in keys if key != "official_rows"]
  head = ["split", *(key.replace("official_rows", "official") for key in keys)]
  cells = [[split, *(row.get(key, "") for key in keys)] for split, row in report.splits.items()]
  if len(cells) > 1:  # clips may stand in several splits
    total = {"rows": sum(row["rows"] for row in report.splits.values()), "clips": report.clips}
    cells.append(["all", *(total.get(key, "") for key in keys)])
  lines = table([head, *cells])
  return [*lines, *_how(report)]


def _has(report: Report, key: str) -> bool:
  return any(key in row for row in report.splits.values())


def _how(report: Report) -> list[str]:
  """In which form the clips are there, and how many of them were decoded."""
  if not report.layout:
    return []
  stored = ", ".join(f"{plural(count, 'clip')} as {kind}" for kind, count in report.layout.items())
  decoded = sum(row["decoded"] for row in report.splits.values())
  how = {"all": "all decoded", "sample": f"{decoded} decoded", "none": "none decoded"}[report.decode]
  return [f"  {stored}; {how} in {report.seconds:.0f} s" if decoded else f"  {stored}; {how}"]


def _classes(report: Report) -> list[str]:
  """The classes that have not all their media."""
  short = sorted((row for row in report.classes if row["with_media"] < row["rows"]), key=lambda row: row["percent"])
  if not short or not any(row["with_media"] for row in report.classes):
    return []
  cells = [(row["class"], row["rows"], row["with_media"], f"{row['percent']:.1f}") for row in short[:CLASSES]]
  more = [f"  and {len(short) - CLASSES} more, see --json"] if len(short) > CLASSES else []
  title = f"classes without all their media ({len(short)} of {len(report.classes)})"
  return [title, *table([("class", "rows", "with media", "percent"), *cells]), *more]


def _tree(report: Report) -> list[str]:
  if not report.tree:
    return []
  width = min(48, max(len(line.path) for line in report.tree))
  return [f"files below {report.root}", *(f"  {x.mark} {x.path:<{width}}  {x.what}".rstrip() for x in report.tree)]


def _finding(finding: Finding, root: str) -> list[str]:
  """`  test: 3 of 402 clips cut off` with a few examples and the mend."""
  root = root.rstrip("/")
  where = str(Path(finding.where).relative_to(root)) if Path(finding.where).is_relative_to(root) else finding.where
  head = f"  {where}: {finding.what}" if where not in ("", ".") else f"  {finding.what}"
  shown, more = finding.examples[:EXAMPLES], len(finding.examples) - EXAMPLES
  shown = [example.replace(f"{root}/", "") for example in shown]
  if finding.severity == "note":  # one line each: as many examples as it takes
    while shown and len(head) + sum(map(len, shown)) > WIDTH - 20:
      shown, more = shown[:-1], more + 1
    if not shown:
      return [head]
  if shown and sum(map(len, shown)) + len(head) < WIDTH:
    lines = [f"{head}: {', '.join(shown)}" + (f" and {more} more" if more > 0 else "")]
  else:
    lines = [head, *(f"    {example}" for example in shown), *([f"    and {more} more, see --json"] if more > 0 else [])]
  return [*lines, *([f"    -> {finding.mend}"] if finding.mend else [])]


def build(context: Context, dataset: Any, findings: list[Finding], tree: list[Line], layout: dict[str, int]) -> Report:
  """Puts a report together."""
  return Report(
    dataset=context.key,
    title=context.facts.title,
    root=str(context.root),
    folder=str(dataset.root),
    official=context.official,
    toybox=toybox_root(dataset.root) is not None,
    clips=len({record.clip for record in context.clips.values()}),
    splits=coverage.split_table(dataset, context),
    layout=layout,
    classes=coverage.class_table(dataset, context),
    tree=tree,
    findings=findings,
    next=next_steps(context, findings),
    decode="labels only" if context.labels_only else context.decode,
    seconds=round(context.seconds, 1),
  )
