"""Compares finished runs: one table of methods and tasks, mean and standard deviation over seeds, what each costs, and figures.

  python -m phpjax.report --workdir=runs/php_avqa_toybox --workdir=runs/finetune_toybox --out=runs/report

--workdir names a run, a folder with runs below it, or a pattern in quotes (--workdir='runs/*_toybox'), and may be repeated.
Runs that differ in nothing but their seed are one row; other settings, orders of tasks or encoder weights make other rows,
other data another table, and what differs stands beside it. Unfinished and damaged runs are named and left out.

Into --out: report.html (one file, works from disk), comparison.md, comparison.tex (needs booktabs and graphicx) and
comparison.csv (a row for each run, all its numbers). Beyond results.json, clips/s is the median of the examples_per_s in
metrics.jsonl, and checkpoint bytes are those of the newest checkpoint and of the finished tasks that it needs, without the
optimizer.

Exit codes: 0 done; 2 nothing to compare, or wrong arguments.
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from phpjax import cli, comparison, comparison_figures, comparison_page, comparison_tables, finished
from phpjax.comparison import Setting
from phpjax.comparison_tables import clean
from phpjax.errors import UserError

NAMED = 4  # runs that an error names


def write(paths: Sequence[str], out: pathlib.Path) -> tuple[str, list[str]]:
  """Compares the runs at these paths -> (the tables as Markdown, what a reader has to know, one line each).

  Args:
    paths: as of --workdir.
    out: the folder for the four files, made if it is missing.

  Raises:
    UserError: a path does not exist, no finished run is left, or the folder cannot be written to.
  """
  runs, notes = [], []
  for folder in finished.workdirs(paths):
    try:
      runs.append(finished.read(folder))
    except UserError as error:
      notes.append(f"left out: {error}")
  if not runs:
    told = [*notes[:NAMED], *([f"and {len(notes) - NAMED} more"] if len(notes) > NAMED else [])]
    raise UserError("; ".join([f"no finished run to compare in {', '.join(paths)}", *map(clean, told)]))
  settings, found = comparison.compare(runs)
  notes = [clean(note, 400) for note in [*notes, *found]]
  text = markdown(settings, notes)
  tables = [table for setting in settings for table in tables_of(setting)]
  drawn = [comparison_figures.draw(setting) for setting in settings]
  contents = {
    "comparison.md": text,
    "comparison.csv": comparison_tables.csv_text(settings),
    "comparison.tex": "% needs \\usepackage{booktabs,graphicx}\n" + "\n".join(map(comparison_tables.latex, tables)),
    "report.html": comparison_page.page(settings, drawn, notes),
  }
  try:
    out.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
      temporary = out / f"{name}.tmp"
      temporary.write_text(content, encoding="utf-8")
      os.replace(temporary, out / name)
  except OSError as error:
    raise UserError(f"cannot write to --out={out}: {error}") from error
  return text, notes


def tables_of(setting: Setting) -> list[comparison_tables.Table]:
  """The tables of a setting, in the order of the page."""
  made = (comparison_tables.scores, comparison_tables.unseen, comparison_tables.differences)
  return [table for make in made if (table := make(setting)) is not None]


def markdown(settings: Sequence[Setting], notes: Sequence[str]) -> str:
  """All tables, and the notes below them."""
  parts = [comparison_tables.markdown(table) for setting in settings for table in tables_of(setting)]
  listed = [f"- {comparison_tables.markdown_text(note)}" for note in notes]
  return "\n".join([*parts, *(["### Take note", "", *listed, ""] if listed else [])])


def main(argv: list[str]) -> None:
  """Command line."""
  values = flags.FlagValues()  # its own: those of another command stay as they are
  flags.DEFINE_multi_string("workdir", [], "A run, a folder with runs below it, or a pattern; repeat it.", flag_values=values)
  flags.DEFINE_string("out", None, "Folder for the report, made if it is missing.", flag_values=values)
  rest = cli.parse_flags(argv, __doc__, values)[1:]
  problems = [f"--{name} is missing" for name in ("workdir", "out") if not values[name].value]
  if rest:
    problems.append(f"unexpected arguments {' '.join(rest)}: give each --workdir=, or a pattern in quotes")
  if problems:
    raise UserError("; ".join(problems))
  out = pathlib.Path(values.out).expanduser()
  text, notes = write(values.workdir, out)
  print(text)
  for note in notes:
    print(f"note: {note}", file=sys.stderr)
  print(f"see {out / 'report.html'}; comparison.md, .csv and .tex lie beside it", file=sys.stderr)


if __name__ == "__main__":
  sys.exit(cli.guarded(lambda: main(sys.argv)))
