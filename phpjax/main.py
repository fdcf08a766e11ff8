"""Command line: `python -m phpjax.main --config=configs/php_avqa.py:toybox --workdir=DIR`.

Exit codes: 0 done; 2 something the user can mend, named in one line; 42 stopped by a signal after saving (run the same
command again); 75 nothing was finished for config.watchdog_minutes: the stacks of all threads are in the workdir and on
stderr (run the same command again; 1, after twice the time, where even the watchdog could not run).
"""

from __future__ import annotations

import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import flags
from ml_collections import config_flags

from phpjax import checks, cli, compat, experiment, results, run, train
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
  needs_workdir = _MODE.value != "dry_run"
  found = checks.problems(config) + (["--workdir is missing"] if needs_workdir and not _WORKDIR.value else [])
  if found:
    raise UserError("; ".join(found))
  if _MODE.value == "dry_run":
    with run.open_run(config, None) as opened:
      print(results.dry_run(opened, run.begin))
    return
  folder = pathlib.Path(_WORKDIR.value).expanduser()
  {"train": train.train_and_evaluate, "evaluate": train.evaluate_again}[_MODE.value](config, folder)


def run_cli() -> int:
  """Entry point -> exit code."""
  return cli.guarded(lambda: main(cli.parse_flags(sys.argv, __doc__)), {run.Stopped: EXIT_STOPPED})


if __name__ == "__main__":
  sys.exit(run_cli())
