"""A training step whose loss or gradient is not finite: it was not applied; this finds out why, and writes it down."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from phpjax import workdir
from phpjax.errors import UserError

Tree = dict[str, Any]
FILE = "nonfinite.json"


class StepRefused(UserError):
  """A step was not applied, and what the run has learned before it is good: to be saved."""


def leaves(tree: Any) -> list[str]:
  """Paths of the leaves (numbers, numpy or jax arrays) that hold a number that is not finite."""
  named = jax.tree_util.tree_leaves_with_path(tree)
  return [jax.tree_util.keystr(path, simple=True, separator="/") for path, leaf in named if not _finite(jax.device_get(leaf))]


def rows(batch: Mapping[str, Any]) -> dict[str, list[str]]:
  """{key: the ids of its rows that hold a number that is not finite} of a batch on the host, keys without one left out."""
  found = {
    key: [name for name, row in zip(batch["id"], value, strict=True) if not _finite(row)]
    for key, value in batch.items()
    if isinstance(value, np.ndarray)
  }
  return {key: names for key, names in found.items() if names}


def record(*, step: int, task: str, epoch: int, batch: Mapping[str, Any], metrics: Mapping[str, Any], trainable: Any) -> Tree:
  """What is known of a refused step.

  Args:
    step: of the whole run, from 1.
    task: that is being learned.
    epoch: of that task, from 0.
    batch: of the step, on the host: {key: [b, ...]} and "id".
    metrics: loss, losses and grad_norm of the step, on the host.
    trainable: the parameters that the step was to change.

  Returns:
    JSON types; numbers that are not finite as "nan", "inf" or "-inf". `batch` and `parameters` say what was not finite before
    the step; where both are empty, the step itself overflowed.
  """
  return {
    "step": step,
    "task": task,
    "epoch": epoch,
    "ids": [name for name in batch["id"] if name],
    "loss": _number(metrics["loss"]),
    "losses": {name: _number(value) for name, value in metrics["losses"].items()},
    "grad_norm": _number(metrics["grad_norm"]),
    "batch": rows(batch),
    "parameters": leaves(trainable),
  }


def write(folder: pathlib.Path, found: Tree, process: int = 0) -> pathlib.Path:
  """Writes a record into the workdir -> its path; each process has its own file, for each knows its own clips."""
  path = folder / (FILE if process == 0 else f"nonfinite.process_{process}.json")
  workdir.write_json(path, found)
  return path


def refuse(found: Tree, path: pathlib.Path) -> UserError:
  """The error that says so in one line: StepRefused, or a plain one when the parameters are not worth saving."""
  numbers = {**found["losses"], "gradient norm": found["grad_norm"]}
  numbers = ", ".join(f"{name} {float(value):g}" for name, value in numbers.items())
  where = f"step {found['step']} of task {found['task']}: loss or gradient is not finite ({numbers}; clips"
  where = f"{where} {', '.join(found['ids'])}); see {path}"
  if found["parameters"]:
    shown = ", ".join(found["parameters"][:3]) + (" ..." if len(found["parameters"]) > 3 else "")
    return UserError(
      f"{where}: {shown} were not finite before the step, so nothing more is saved and leaving out steps would not help; "
      "start again in another --workdir with lower opt.*.lr"
    )
  if found["batch"]:
    cause = "; ".join(f"{key} of {', '.join(names)}" for key, names in found["batch"].items())
    advice = f"{cause} is not finite: mend the data"
  else:
    advice = "lower opt.*.lr (in another --workdir)"
  return StepRefused(
    f"{where}; the step was not applied, all steps before it are saved: {advice}, or set --config.on_nonfinite=skip to leave "
    "such steps out"
  )


def _finite(value: Any) -> bool:
  """Whether all numbers are; whole numbers and texts always."""
  array = np.asarray(value)
  if array.dtype.kind in "biuSUO":
    return True
  return bool(np.isfinite(array if array.dtype.kind in "fc" else array.astype(np.float32)).all())  # bfloat16 is no "f"


def _number(value: Any) -> float | str:
  value = float(value)
  return value if math.isfinite(value) else str(value)
