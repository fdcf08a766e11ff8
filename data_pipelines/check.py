"""python -m data_pipelines.check --dataset=ave --root=DIR: what is there of a benchmark, what is wrong, what to do next.

It reads, and never writes or touches the network. Of a root that `data_pipelines.prepare` made it looks at the records: shards
against the manifest, and every clip. Exit code 0: clean; 1: usable with gaps; 2: not usable.
"""

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path

from data_pipelines import DATASETS
from data_pipelines.checks import coverage, labels, media, records, report, stamps, traps
from data_pipelines.checks.findings import Context, Finding, open_context
from data_pipelines.checks.tree import bare_tree, layout, tree
from data_pipelines.known import FACTS
from data_pipelines.progress import Progress
from data_pipelines.schema import DataError, printable, refuse

CHECKS = (*labels.CHECKS, *traps.CHECKS, *stamps.CHECKS, records.prepared_records, *coverage.CHECKS)
EPILOG = """\
a root that data_pipelines.prepare made is checked too: its shards against the manifest (with --decode=none by size only)

exit code: 0 clean (known leaks and defects of the published files are notes), 1 usable with gaps, 2 not usable

--json prints {"root", "exit_code", "datasets": {NAME: report}, "absent": [NAME]}, absent: not found by --dataset=all, so
not checked; the keys of a report:
  dataset title root folder official toybox exit_code verdict decode seconds clips
  splits    {split: {rows, official_rows, clips, usable, missing, broken, decoded}}
  layout    {how clips are stored: clips}
  classes   [{class, rows, with_media, percent}]
  tree      [{mark (+ there, - missing, ? not used), path, what, md5}]
  findings  [{severity (note, gap, fatal), check, where, what, mend, examples}]
  next      [what to do]

examples:
  python -m data_pipelines.check --dataset=ave --root=/data
  python -m data_pipelines.check --dataset=all --root=/data --decode=sample --json > report.json
  python -m data_pipelines.check --dataset=llp --root=/data --labels_only
"""


def check(key: str, root: Path, *, decode: str = "all", labels_only: bool = False, workers: int | None = None) -> report.Report:
  """Checks one dataset below a data root; never raises for what is wrong with the data.

  Args:
    key: name in data_pipelines.DATASETS.
    root: data root, or the dataset's own folder.
    decode: which clips are decoded: "all", "sample" (50 of each split, the same ones each time) or "none".
    labels_only: look at no media at all.
    workers: threads; None: one per core.
  """
  try:
    dataset = DATASETS[key](root)
  except DataError as error:
    return _without_labels(key, root, error)
  context = open_context(key, dataset, root)
  context.decode, context.labels_only = decode, labels_only
  if not labels_only:
    records.open_records(dataset, context)
  if not labels_only and context.clips and not context.refused:
    start = time.monotonic()
    context.states = media.inspect_all(dataset, context, workers or os.cpu_count() or 1, Progress(f"check {key}"))
    context.seconds = time.monotonic() - start
  findings = [finding for one in CHECKS for finding in one(dataset, context)]
  return report.build(context, dataset, findings, tree(dataset, context), layout(context))


def _without_labels(key: str, root: Path, error: DataError) -> report.Report:
  """The report where the labels are not there, or so damaged that the reader refuses them."""
  facts = FACTS[key]
  finding = Finding("fatal", "no_labels", str(root), str(error), facts.labels_from)
  context = Context(key, root, facts, False, {}, [], {})
  return report.Report(
    dataset=key,
    title=facts.title,
    root=str(root),
    folder="",
    official=False,
    toybox=False,
    clips=0,
    splits={},
    layout={},
    classes=[],
    tree=bare_tree(root, facts, DATASETS[key].folders),
    findings=[finding],
    next=report.next_steps(context, [finding]),
    decode="none",
    seconds=0.0,
  )


def present(root: Path) -> list[str]:
  """The datasets whose label files lie below a root."""
  return [key for key, reader in DATASETS.items() if reader.locate(root)]


def parse(arguments: list[str] | None) -> argparse.Namespace:
  """Reads the command line; a wrong one ends the program with exit code 2."""
  parser = argparse.ArgumentParser(
    prog="python -m data_pipelines.check",
    description="Says what is there of a benchmark's files, what is wrong, and what to do next. Never uses the network.",
    epilog=EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--dataset", required=True, choices=(*DATASETS, "all"), help="all: each one found below the root, the others are named"
  )
  parser.add_argument("--root", required=True, type=Path, help="data root, or the dataset's own folder")
  parser.add_argument(
    "--decode",
    choices=("all", "sample", "none"),
    default="all",
    help=f"{media.SAMPLE} clips of each split are a sample; none: only names (also in AVS.npy) and sizes (default all)",
  )
  parser.add_argument("--labels_only", action="store_true", help="look at the label files only, not at media")
  parser.add_argument("--json", action="store_true", help="print one JSON object instead of text; its keys: see below")
  parser.add_argument("--workers", type=int, help="threads that decode (default: one per core)")
  options = parser.parse_args(arguments)
  if options.workers is not None and options.workers < 1:
    parser.error("--workers must be 1 or more")
  return options


def main(arguments: list[str] | None = None) -> int:
  """Checks, prints the report -> exit code."""
  options = parse(arguments)
  root = options.root.expanduser()
  if not root.is_dir():
    return _refuse(f"{root}: no such folder; --root names the folder that holds the benchmarks", root, options.json)
  keys = present(root) if options.dataset == "all" else [options.dataset]
  if not keys:
    folders = ", ".join(dict.fromkeys(reader.folders[0] for reader in DATASETS.values()))
    return _refuse(f"{root}: no benchmark found; expected one of the folders {folders} with label files", root, options.json)
  absent = [key for key in DATASETS if key not in keys] if options.dataset == "all" else []
  settings = {"decode": options.decode, "labels_only": options.labels_only, "workers": options.workers}
  reports = {}
  for key in keys:
    try:
      reports[key] = check(key, root, **settings)
    except KeyboardInterrupt:
      return _refuse(f"stopped while checking {key}; --decode=sample takes less time", root, options.json)
    except Exception as error:  # a fault of this command, not of the data: never to be taken for a verdict
      return _refuse(f"{key}: {_unexpected(error)}", root, options.json)
    if not options.json:
      print(report.as_text(reports[key]), end="\n\n" if key != keys[-1] else "\n", flush=True)
  code = max(found.exit_code for found in reports.values())
  if options.json:
    found = {"root": str(root), "exit_code": code, "datasets": {k: r.as_json() for k, r in reports.items()}, "absent": absent}
    print(json.dumps(found, indent=1))
  elif options.dataset == "all":
    missing = [f"not found below {printable(root)}, so not checked: {', '.join(absent)}"] if absent else []
    print("\n" + "\n".join([*missing, *(f"{key}: {found.verdict}" for key, found in reports.items())]))
  return code


def _unexpected(error: Exception) -> str:
  """An error that no check foresaw, in one line, with the place in the code for whoever mends it."""
  place = traceback.extract_tb(error.__traceback__)[-1]
  words = f"{type(error).__name__}: {printable(error)}" if str(error) else type(error).__name__
  line = f"the check itself failed ({words}, at {Path(place.filename).name}:{place.lineno}), nothing is known of this data"
  return f"{' '.join(line.split())}; please report it"


def _refuse(message: str, root: Path, as_json: bool) -> int:
  """One line on stderr; with --json an object without datasets on stdout as well."""
  if as_json:
    print(json.dumps({"root": str(root), "exit_code": 2, "error": message, "datasets": {}}, indent=1))
  return refuse(message)


if __name__ == "__main__":
  sys.exit(main())
