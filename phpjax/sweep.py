"""Runs experiments x seeds x orders of tasks, each in a process and a workdir of its own, and compares them at the end.

  python -m phpjax.sweep --config=configs/php_avqa.py:toybox --config=configs/finetune.py:toybox --seeds=4,5,6 --workdir=DIR

Workdirs are DIR/NAME_VARIANT/ORDER/seedN, each with the log of its run in log.txt; the comparison, as of phpjax.report, is
DIR/report. The plan and the hours that it may take are told first. The same command again passes over what is finished and
continues what is not. A run that fails is named at the end with the last line of its log; the others go on. What the frozen
encoders say of the clips lies in DIR/features, for all runs that ask for it.

--orders: `given` (the config's own), `reversed`, or tasks joined by "-" (avs-ave), which may leave some out.
--set=config.opt.head.lr=1e-3 changes a field in all runs; --toybox_seed=same gives each seed scenes of its own, and
--class_seed=same class-incremental tasks of its own. With --jobs=2 or more each run gets its share of the CPUs; on an
accelerator run one at a time.

Exit codes: 0 all done; 2 a run failed, or wrong arguments; 42 stopped by a signal, the runs have saved (same command again).
"""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from phpjax import cli, compat, report, sweep_jobs, workdir
from phpjax.benchmarks import BENCHMARKS, ClassIncremental
from phpjax.errors import UserError
from phpjax.progress import plain_table
from phpjax.sweep_jobs import DONE, FAILED, WAITING, Job, Pool

MAIN = (sys.executable, "-m", "phpjax.main")
GIVEN, REVERSED = "given", "reversed"
FEATURES = "features"  # the folder in which the runs share what the frozen encoders say of the clips (phpjax/query_files.py)
OWN_SEEDS = ("toybox_seed", "class_seed")  # fields of `data` that may be each run's own seed


class Stopped(Exception):
  """A signal asked to stop; the runs have saved."""


def plan(
  configs: Sequence[str],
  seeds: Sequence[int],
  orders: Sequence[str],
  folder: pathlib.Path,
  *,
  changes: Sequence[str] = (),
  own_seeds: Sequence[str] = (),
) -> list[Job]:
  """The runs, the first seed of every experiment first, those that are finished DONE and those that never can be FAILED.

  Args:
    configs: as --config of phpjax.main takes them, FILE[:VARIANT].
    seeds: each once.
    orders: see above.
    folder: holds the workdirs.
    changes: `config.a.b=value`, of all runs.
    own_seeds: those of OWN_SEEDS that are the run's.

  Raises:
    UserError: a config that cannot be read, an unknown order, or two experiments of the same name or with the same tasks.
  """
  names = [name_of(config) for config in configs]
  problems = [f"--config={configs[names.index(n)]} and another one would share a folder: {n}" for n in _repeated(names)]
  problems += [f"seed {seed} is given more than once" for seed in _repeated(seeds)]
  if problems:
    raise UserError("; ".join(problems))
  shared = [f"--config.data.query_cache={folder / FEATURES}", *(f"--{change}" for change in changes)]
  tasks = {config: [tasks_of(order, opened(config, shared)) for order in orders] for config in configs}
  for config, found in tasks.items():
    if same := _repeated(found):
      raise UserError(f"--orders={','.join(orders)}: two of them are {'-'.join(same[0])} for --config={config}")
  jobs = []
  for seed in seeds:
    for place, order in enumerate(orders):
      for name, config in zip(names, configs, strict=True):
        own = [f"--config.seed={seed}"]
        own += [f"--config.data.{field}={seed}" for field in own_seeds]
        own += [f"--config.tasks={tasks[config][place]!r}"] if order != GIVEN else []
        where = folder / name / order / f"seed{seed}"
        job = Job(name, order, seed, where, (f"--config={config}", *own, *shared, f"--workdir={where}"))
        look(job, opened(config, [*own, *shared]), own_seeds)
        jobs.append(job)
  return jobs


def look(job: Job, config: ConfigDict, own_seeds: Sequence[str]) -> None:
  """Sets the state of a job by what lies in its workdir; raises UserError for a seed of its own that nothing is drawn by."""
  if "toybox_seed" in own_seeds and not config.data.toybox:
    raise UserError(f"--toybox_seed=same: {job.name} has data of its own, not the toybox's")
  fixed = [name for name in config.tasks if name not in BENCHMARKS or not isinstance(BENCHMARKS[name], ClassIncremental)]
  if "class_seed" in own_seeds and fixed:
    raise UserError(f"--class_seed=same: {job.name} has tasks that are not class-incremental: {', '.join(fixed)}")
  stored, now = job.folder / workdir.CONFIG, workdir.plain(compat.resolve(config))
  try:
    found = workdir.differing(workdir.read_json(stored), now) if stored.is_file() else []
  except UserError as error:
    job.state, job.reason = FAILED, str(error)
    return
  if found:
    job.state, job.reason = FAILED, f"{job.folder} belongs to other settings: {', '.join(found[:4])}; take another --workdir"
  elif sweep_jobs.seconds_of(job.folder) is not None:
    job.state = DONE


def name_of(config: str) -> str:
  """configs/php_avqa.py:toybox -> php_avqa_toybox, as a folder is called."""
  path, _, variant = config.partition(":")
  stem = pathlib.PurePath(path).name.removesuffix(".py")
  return re.sub(r"[^\w.+-]", "_", f"{stem}_{variant}" if variant else stem)


def opened(config: str, arguments: Sequence[str]) -> ConfigDict:
  """What phpjax.main would make of these arguments; raises UserError."""
  values, argv = flags.FlagValues(), [MAIN[-1], f"--config={config}", *arguments]
  holder = config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv, lock_config=True)
  try:
    cli.parse_flags(argv, "", values)
    return cli.open_config(holder)
  except UserError as error:
    raise UserError(f"--config={config}: {error}") from error


def tasks_of(order: str, config: ConfigDict) -> tuple[str, ...]:
  """The tasks in the order of that name; raises UserError for a name that is none."""
  if order == GIVEN:
    return tuple(config.tasks)
  if order == REVERSED:
    return tuple(reversed(config.tasks))
  tasks = tuple(order.split("-"))
  if not set(tasks) <= {*config.epoch_factor, *config.tasks}:
    known = ", ".join(dict.fromkeys((*config.tasks, *config.epoch_factor)))
    raise UserError(f"unknown order {order!r}: it is {GIVEN}, {REVERSED}, or tasks joined by '-', of {known}")
  return tasks


def _repeated(values: Sequence[Any]) -> list[Any]:
  return [value for value in dict.fromkeys(values) if values.count(value) > 1]


def told(jobs: Sequence[Job], slots: int) -> str:
  """The plan as a table, and the hours it may take."""
  words = {DONE: "finished", FAILED: "cannot run"}
  begun = lambda job: "continues" if (job.folder / workdir.CONFIG).is_file() else "new"
  cells = [[job.name, job.order, str(job.seed), words.get(job.state) or begun(job)] for job in jobs]
  lines = plain_table(["experiment", "order", "seed", "state"], cells)
  todo = sum(job.state == WAITING for job in jobs)
  estimate = sweep_jobs.in_words(*sweep_jobs.time_left(jobs, slots)) if todo else "nothing to do"
  lines += [f"{job} cannot run: {job.reason}" for job in jobs if job.state == FAILED]
  return "\n".join([*lines, f"{todo} of {len(jobs)} runs to do, {slots} at a time; time: {estimate}"])


def run(jobs: Sequence[Job], folder: pathlib.Path, *, slots: int, retries: int, command: Sequence[str] = MAIN) -> None:
  """Runs what is to do and compares all that is finished.

  Args:
    jobs: of `plan`.
    folder: theirs.
    slots: processes at a time.
    retries: how often a run that stopped is run again.
    command: what a job's arguments are appended to.

  Raises:
    UserError: runs failed; all of them are named.
    Stopped: by a signal.
  """
  say = lambda text: print(" ".join(text.split()), file=sys.stderr, flush=True)
  code = Pool(jobs, command, slots=slots, retries=retries, say=say).run()
  if code == sweep_jobs.EXIT_STOPPED:
    say("stopped; the same command continues")
    raise Stopped
  if any(job.state == DONE for job in jobs):
    compare(folder)
  if failed := [job for job in jobs if job.state == FAILED]:
    raise UserError(f"{len(failed)} of {len(jobs)} runs failed: " + "; ".join(f"{job} ({job.reason})" for job in failed))


def compare(folder: pathlib.Path) -> None:
  """Writes and prints the comparison of all runs in a folder; raises UserError."""
  text, notes = report.write([str(folder)], folder / "report")
  print(text)
  for note in notes:
    print(f"note: {note}", file=sys.stderr)
  print(f"see {folder / 'report' / 'report.html'}", file=sys.stderr)


def main(argv: list[str]) -> None:
  """Command line."""
  values = flags.FlagValues()  # its own: those of another command stay as they are
  own = {"flag_values": values}
  flags.DEFINE_multi_string("config", [], "An experiment, FILE[:VARIANT]; repeat it.", **own)
  flags.DEFINE_list("seeds", ["0"], "Seeds of every experiment.", **own)
  flags.DEFINE_list("orders", [GIVEN], "Orders of the tasks.", **own)
  flags.DEFINE_string("workdir", None, "Folder of the sweep.", **own)
  flags.DEFINE_integer("jobs", 1, "Runs at a time.", lower_bound=1, **own)
  flags.DEFINE_multi_string("set", [], "config.a.b=value, a change of all runs; repeat it.", **own)
  flags.DEFINE_enum("toybox_seed", None, ["same"], "same: scenes of each seed's own.", **own)
  flags.DEFINE_enum("class_seed", None, ["same"], "same: class-incremental tasks of each seed's own.", **own)
  flags.DEFINE_integer("retries", 3, "How often a run that stopped (exit code 42 or 75) is run again.", lower_bound=0, **own)
  flags.DEFINE_bool("dry_run", False, "Print the plan and stop.", **own)
  flags.DEFINE_bool("report", False, "Compare what is finished and stop.", **own)
  rest = cli.parse_flags(argv, __doc__, values)[1:]
  problems = [f"unexpected arguments {' '.join(rest)}: options start with --"] if rest else []
  problems += ["--workdir is missing"] if not values.workdir else []
  problems += ["--config is missing"] if not values.config and not values.report else []
  problems += [f"--seeds={seed} is no number from 0" for seed in values.seeds if not re.fullmatch(r"\d{1,9}", seed)]
  problems += [f"--set={each} is not config.FIELD=VALUE" for each in values.set if not re.match(r"config\.[\w.]+=", each)]
  if problems:
    raise UserError("; ".join(problems))
  folder = pathlib.Path(values.workdir).expanduser()
  if values.report:
    return compare(folder)
  seeds = [int(seed) for seed in values.seeds]
  same = [field for field in OWN_SEEDS if values[field].value]
  jobs = plan(values.config, seeds, values.orders, folder, changes=values.set, own_seeds=same)
  print(told(jobs, values.jobs), flush=True)
  if not values.dry_run:
    run(jobs, folder, slots=values.jobs, retries=values.retries)


if __name__ == "__main__":
  sys.exit(cli.guarded(lambda: main(sys.argv), {Stopped: sweep_jobs.EXIT_STOPPED}))
