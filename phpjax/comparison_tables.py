"""The comparison as tables: numbers become text once, here, and then Markdown, LaTeX or HTML; and one CSV row for each run.

Texts come from workdirs, which are anyone's: they are cut to one short line, and every format escapes what has a
meaning in it.
"""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from phpjax.comparison import Group, Setting, Stat, trivial_stat
from phpjax.finished import DATA_SEEDS, NUMBERS, Finished

LONGEST = 120  # characters of a text from a workdir
NONE = "-"
# Header, number, what it is: columns that are there only if a run has them, where tasks are inferred or grow one label set.
SOME: tuple[tuple[str, str, str], ...] = (
  ("routing", "routing", "clips whose task was found, of the last row, mean over tasks"),
  ("oracle", "oracle", "scores if the task were given, likewise"),
  ("pooled last", "pooled_last", "accuracy over the clips of all tasks after the last one"),
  ("pooled average", "pooled_average", "mean over steps of the accuracy over the clips of the tasks so far"),
)
# Beside the scores: what a row's column says and how its number is written. Trainable: prompts, heads and shared parameters of
# all tasks. Memory: the process at its largest. Clips/s: median over logged training steps, compiling ones and waiting for data
# included. Checkpoint: what must be kept to open the model, without encoders and optimizer.
COSTS: tuple[tuple[str, str, float, int | None], ...] = (  # header, number, unit, decimals (None: three digits that count)
  ("trainable", "trainable_parameters", 1, 0),
  ("memory, GB", "peak_memory_bytes", 1e9, None),
  ("clips/s", "examples_per_s", 1, None),
  ("checkpoint, MB", "checkpoint_bytes", 1e6, None),
  ("time, s", "seconds", 1, 0),
)


@dataclasses.dataclass(frozen=True)
class Table:
  """Text cells; the first column holds names.

  Attributes:
    title, header, rows: texts, not yet escaped.
    notes: sentences below it.
    faint: the numbers of rows that are no method's.
    split: the column at which narrow pages begin a second table; 0: nowhere.
    words: whether all columns hold words rather than numbers.
  """

  title: str
  header: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]
  notes: tuple[str, ...] = ()
  faint: frozenset[int] = frozenset()
  split: int = 0
  words: bool = False


def clean(text: Any, longest: int = LONGEST) -> str:
  """One line of printable characters, cut to a length; never empty."""
  line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split()) or "?"
  return line if len(line) <= longest else line[: longest - 3] + "..."


# -- numbers -----------------------------------------------------------------------------------------------------


def written(stat: Stat, unit: float = 1.0, decimals: int | None = 1, runs: int | None = None) -> str:
  """A mean and, of several, its standard deviation, both divided by the unit; the number of runs where it is not `runs`."""
  if stat.mean is None:
    return NONE
  mean = stat.mean / unit
  places = three_digits(mean) if decimals is None else decimals
  text = f"{mean:z,.{places}f}"
  if stat.std is not None and (stat.std or unit == 0.01):  # a score says that it does not vary; a cost need not
    text += f" ± {stat.std / unit:,.{places}f}"
  return text + (f" (n={stat.n})" if runs is not None and stat.n != runs else "")


def three_digits(value: float) -> int:
  """Decimals that leave three digits that count, at most 4."""
  return min(max(2 - math.floor(math.log10(abs(value))), 0), 4) if value else 0


def percent(stat: Stat, runs: int | None = None) -> str:
  """A score in [0, 1]."""
  return written(stat, 0.01, 1, runs)


# -- tables ------------------------------------------------------------------------------------------------------


def scores(setting: Setting) -> Table:
  """Method x task: the last row of the matrix in percent, forgetting, BWT and costs."""
  some = [column for column in SOME if any(group.number(column[1]).n for group in setting.groups)]
  header = ("method", "n", *setting.tasks, "mean", "forgetting", "BWT", *(c[0] for c in some), *(c[0] for c in COSTS))
  rows = [_scores_row(setting, group, [name for _, name, _ in some]) for group in setting.groups]
  for label, seeds in setting.trivial:
    row = _trivial_row(setting, label, seeds, "matrix", len(header))
    if "pooled last" in header:
      row[header.index("pooled last")] = percent(trivial_stat(seeds, "pooled", (), "last"))
    rows.append(row)
  metrics = ", ".join(f"{task} {setting.metric[task]}" for task in setting.tasks)
  notes = (
    f"Percent after the last task: {metrics}. Mean: over the tasks of the row.",
    f"Mean ± sample standard deviation over n seeds: {_seeds(setting.groups)}.",
    "Forgetting: best score before minus last score, mean over the earlier tasks. BWT: last score minus the score just after "
    "learning, likewise.",
    "Trainable: parameters that learn, of all tasks. Memory: largest size of the process. Clips/s: training, median over "
    "logged steps. Checkpoint: what must be kept to open the model, without encoders and optimizer.",
    "Trivial: the best predictor that never looks at a clip.",
    *(f"{header.capitalize()}: {words}." for header, _, words in some),
  )
  table = _table(setting.title, header, rows, notes, len(setting.groups))
  return dataclasses.replace(table, split=len(header) - len(COSTS))


def _scores_row(setting: Setting, group: Group, some: Sequence[str]) -> list[str]:
  n = len(group.runs)
  tasks = [percent(group.score(task), n) if task in group.runs[0].tasks else NONE for task in setting.tasks]
  whole = [percent(group.number(name), n) for name in ("mean_accuracy", "forgetting", "bwt", *some)]
  costs = [written(group.number(name), unit, decimals, n) for _, name, unit, decimals in COSTS]
  return [group.label, str(n), *tasks, *whole, *costs]


def _seeds(groups: Sequence[Group]) -> str:
  """The seeds of most rows, and of each that has others."""
  listed = [", ".join(map(str, group.seeds)) for group in groups]
  most = max(listed, key=listed.count)
  others = [f"of {group.label}: {seeds}" for group, seeds in zip(groups, listed, strict=True) if seeds != most]
  return "; ".join([most, *others])


def _trivial_row(setting: Setting, label: str, seeds: Sequence[Any], kind: str, width: int) -> list[str]:
  stats = [trivial_stat(seeds, kind, setting.tasks, task) for task in (*setting.tasks, "")]
  row = [label, str(max(stat.n for stat in stats)), *map(percent, stats)]
  return row + [NONE] * (width - len(row))


def unseen(setting: Setting) -> Table | None:
  """The same scores on objects that no training clip shows; None where no run has them."""
  if not any("unseen" in run.final for group in setting.groups for run in group.runs):
    return None
  header = ("method", "n", *setting.tasks, "mean")
  rows = []
  for group in setting.groups:
    n = len(group.runs)
    cells = [percent(group.score(task, "unseen"), n) for task in setting.tasks]
    rows.append([group.label, str(n), *cells, percent(group.mean_score("unseen"), n)])
  rows += [_trivial_row(setting, label, seeds, "unseen", len(header)) for label, seeds in setting.trivial]
  return _table(f"{setting.title}: unseen objects", header, rows, ("Percent, as above.",), len(setting.groups))


def differences(setting: Setting) -> Table | None:
  """The settings that are not the same in all rows, a line for each value of each; None where there are none."""
  rows = []
  for field, texts in setting.differing.items():
    usual = max(texts, key=texts.count)
    for value in (*(text for text in dict.fromkeys(texts) if text != usual), usual):
      labels = [group.label for group, text in zip(setting.groups, texts, strict=True) if text == value]
      rows.append([field, value or NONE, "the others" if value == usual and len(labels) > 1 else "; ".join(labels)])
  if not rows:
    return None
  notes = ("Options of a method are listed where rows of that method differ; all else that is not listed is the same.",)
  title = f"{setting.title}: settings that differ between rows"
  return dataclasses.replace(_table(title, ("setting", "value", "rows"), rows, notes, len(rows), 1000), words=True)


def _table(
  title: str,
  header: Iterable[str],
  rows: Iterable[Iterable[str]],
  notes: Iterable[str],
  methods: int,
  longest: int = LONGEST,
) -> Table:
  """A table of clean texts, its rows from number `methods` on faint."""
  cells = tuple(tuple(clean(cell, longest) for cell in row) for row in rows)
  faint = frozenset(range(methods, len(cells)))
  return Table(clean(title, 300), tuple(map(clean, header)), cells, tuple(clean(note, 1000) for note in notes), faint)


# -- formats -----------------------------------------------------------------------------------------------------


def markdown_text(text: str) -> str:
  """Text that Markdown shows as it is."""
  text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
  return "".join(f"\\{c}" if c in "\\`*_{}[]|#~$!" else c for c in text)


def markdown(table: Table) -> str:
  """A heading, a table and its notes."""
  line = lambda cells: f"| {' | '.join(map(markdown_text, cells))} |"
  rule = f"|---|{('---|' if table.words else '---:|') * (len(table.header) - 1)}"
  lines = [f"### {markdown_text(table.title)}", "", line(table.header), rule, *map(line, table.rows), ""]
  return "\n".join([*lines, *(f"{markdown_text(note)}\n" for note in table.notes)])


TEX = {
  "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
  "|": r"\textbar{}", '"': "''", "`": r"\textasciigrave{}", "±": r"$\pm$", "[": "{[}", "]": "{]}", "*": "{*}",  # after a \\
  **{c: f"\\{c}" for c in "{}$&#%_"},
}  # fmt: skip


def latex_text(text: str) -> str:
  """Text that LaTeX sets as it is; what is not ASCII becomes a question mark."""
  return "".join(TEX.get(c, c if c.isascii() else "?") for c in text)


# No wider than the text, and no larger than it is.
FITTING = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"


def halves(table: Table) -> tuple[Table, ...]:
  """The scores and, of the methods, the costs as two tables; a table that is not to be split as it is."""
  if not table.split:
    return (table,)
  left, right = slice(0, table.split), slice(table.split, None)
  costs = tuple((row[0], *row[right]) for at, row in enumerate(table.rows) if at not in table.faint)
  return (
    dataclasses.replace(table, header=table.header[left], rows=tuple(row[left] for row in table.rows), split=0),
    Table(f"{table.title}: costs", (table.header[0], *table.header[right]), costs),
  )


def latex(table: Table) -> str:
  """Table environments for booktabs, two where the table is wider than a page."""
  return "\n".join(map(_latex, halves(table)))


def _latex(table: Table) -> str:
  line = lambda cells: "    " + " & ".join(map(latex_text, cells)) + r" \\"
  body = [*map(line, table.rows)]
  if table.faint and len(table.faint) < len(table.rows):
    body.insert(min(table.faint), r"    \midrule")
  caption = " ".join(map(latex_text, (f"{table.title}.", *table.notes)))
  columns = "l" + ("l" if table.words else "r") * (len(table.header) - 1)
  return "\n".join(
    [r"\begin{table}", r"  \centering", rf"  \caption{{{caption}}}", r"  \vspace{1ex}", f"  {FITTING}",
     rf"  \begin{{tabular}}{{{columns}}}", r"    \toprule", line(table.header), r"    \midrule", *body,
     r"    \bottomrule", r"  \end{tabular}}", r"\end{table}", ""]
  )  # fmt: skip


def html_table(table: Table) -> str:
  """A table that scrolls by itself where it is wider than the page, and its notes."""
  text = lambda cell: html.escape(cell)
  head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in table.header)
  rows = []
  for at, row in enumerate(table.rows):
    cells = f'<th scope="row">{text(row[0])}</th>' + "".join(f"<td>{text(cell)}</td>" for cell in row[1:])
    rows.append(f"<tr{' class=faint' if at in table.faint else ''}>{cells}</tr>")
  notes = "".join(f"<p class=note>{text(note)}</p>" for note in table.notes)
  kind = "scroll words" if table.words else "scroll"
  return f"<div class='{kind}'><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{notes}"


# -- all numbers -------------------------------------------------------------------------------------------------


def csv_text(settings: Sequence[Setting]) -> str:
  """A row for each run: where it stands in the comparison, all its numbers, nothing where there is none."""
  rows = [
    {"table": clean(setting.title, 300), "row": clean(group.label), **_numbers_of(run)}
    for setting in settings
    for group in setting.groups
    for run in group.runs
  ]
  absent = {name for _, name, _ in SOME if all(row[name] is None for row in rows)}
  columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in absent]
  out = io.StringIO()
  writer = csv.DictWriter(out, columns, restval="", extrasaction="ignore", lineterminator="\n")
  writer.writeheader()
  writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
  return out.getvalue()


def _numbers_of(run: Finished) -> dict[str, Any]:
  """{column: value}; `last/SPLIT/TASK`, `matrix/AFTER/TASK`, `score/SPLIT/AFTER/TASK/METRIC` in [0, 1]."""
  found: dict[str, Any] = {
    "workdir": str(run.folder), "method": run.method, "compat": run.compat, "order": " ".join(run.tasks), "seed": run.seed,
    **{field.removeprefix("data."): run.data_seeds.get(what) for what, field in DATA_SEEDS.items()},
    **{name: run.numbers[name] for name in NUMBERS},
  }  # fmt: skip
  split = str(run.place.get("evaluated on", "matrix"))
  for kind, scored in run.final.items():
    found |= {f"last/{split if kind == 'matrix' else kind}/{task}": score for task, score in scored.items()}
  for kind, scored in run.trivial.items():
    found |= {f"trivial/{split if kind == 'matrix' else kind}/{task}": score for task, score in scored.items()}
  for after, row in zip(run.tasks, run.matrix.tolist(), strict=False):
    found |= {f"matrix/{after}/{task}": score for task, score in zip(run.tasks, row, strict=True)}
  found |= {f"examples_per_s/{task}": rate for task, rate in run.rates.items()}
  found |= {f"score/{what}": score for what, score in run.scores.items()}
  return {clean(key): value for key, value in found.items()}


def _cell(value: Any) -> Any:
  """Numbers as they are; text so that no spreadsheet takes it for a formula."""
  if isinstance(value, int | float) and not isinstance(value, bool):
    return value if math.isfinite(value) else ""
  text = "" if value is None else clean(value, 1000)
  return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
