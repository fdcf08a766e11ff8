"""Command line: `python -m phpjax.main --config=configs/php_avqa.py:toybox --workdir=DIR`.

Exit codes: 0 done; 1 an error of the program, or of several processes another one was lost; 2 something the user can mend,
named in one line; 42 stopped by a signal, all that was done is saved (run the same command again); 75 nothing was finished for
config.watchdog_minutes: the stacks of all threads are in the workdir and on stderr (run the same command again; 1, after twice
the time, where even the watchdog could not run).

Several processes: the same command on every host, with --coordinator_address, --num_processes and --process_id where JAX
cannot tell them from SLURM, Cloud TPU, GKE or Open MPI; --workdir lies on a file system that all of them share.
"""

from __future__ import annotations

import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import flags
from ml_collections import ConfigDict, config_flags

from phpjax import checks, cli, compat, distributed, experiment, opening, results, run, sharding, signals, train, workdir
from phpjax.errors import UserError

EXIT_STOPPED = 42
MODES = ("train", "evaluate", "dry_run")

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with an optional :variant.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: results, checkpoints, figures. Continued if it exists.")
_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  MODES,
  "train: learn and evaluate; evaluate: evaluate a workdir again; dry_run: print "
  "config, data counts, parameters and memory, and stop.",
)
_ADDRESS = flags.DEFINE_string("coordinator_address", None, "Several processes: HOST:PORT of process 0, a free port there.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Several processes: how many; 1 runs alone, whatever is detected.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Several processes: the number of this one, from 0.")
_STARTUP = flags.DEFINE_float("startup_timeout_s", 300.0, "Several processes: seconds to wait for the last one.", lower_bound=1)
_LIST = flags.DEFINE_bool("list", False, "Print methods, tasks, encoders and datasets, and stop.")


def main(argv: list[str]) -> None:
  """Dispatches; absl calls it."""
  if len(argv) > 1:
    raise UserError(f"unexpected arguments {' '.join(argv[1:])}: options start with --")
  if _LIST.value:
    print(experiment.listing())
    return
  if _CONFIG.value is None:
    raise UserError("--config is missing: for example --config=configs/php_avqa.py:toybox")
  cli.use_compile_cache()
  config = compat.resolve(cli.open_config(_CONFIG))
  connect(config)
  needs_workdir = _MODE.value != "dry_run"
  found = checks.problems(config) + (["--workdir is missing"] if needs_workdir and not _WORKDIR.value else [])
  if found:
    raise UserError("; ".join(found))
  if _MODE.value == "dry_run":
    with opening.open_run(config, None) as opened:
      table = results.dry_run(opened, run.begin)
    if distributed.is_primary():
      print(table)
    return
  folder = pathlib.Path(_WORKDIR.value).expanduser()
  {"train": train.train_and_evaluate, "evaluate": train.evaluate_again}[_MODE.value](config, folder)


def connect(config: ConfigDict) -> None:
  """Joins the other processes of the run, if there are any, and says where this one stands; raises UserError."""
  place = distributed.find(_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS.value, _STARTUP.value)
  if place is None:
    return
  packages = {
    "phpjax": sys.modules[__package__].__version__,
    **{name: results.version(name) for name in ("jax", "jaxlib", "orbax-checkpoint")},
  }
  folder = str(pathlib.Path(_WORKDIR.value).expanduser().resolve()) if _WORKDIR.value else None
  facts = {"--mode": _MODE.value, "--workdir": folder, **packages, **workdir.common(config)}
  distributed.start(place, facts, _STARTUP.value)
  batches = {field: config[field] for field in ("batch_size", "eval_batch_size") if field in config}
  mesh = sharding.make_mesh(tuple(config.mesh)).shape if "mesh" in config else {}
  print(distributed.banner(mesh, batches, packages), file=sys.stderr)


def run_cli() -> int:
  """Entry point -> exit code."""
  return distributed.end_together(command, good=(0, EXIT_STOPPED))


def command() -> int:
  """The same for one process of several; a signal while there is nothing to save ends them all."""
  with signals.ending(lambda name: distributed.end_now(EXIT_STOPPED, f"was stopped by {name}: the same command continues")):
    return cli.guarded(lambda: main(cli.parse_flags(sys.argv, __doc__)), {signals.Stopped: EXIT_STOPPED})


if __name__ == "__main__":
  sys.exit(run_cli())
