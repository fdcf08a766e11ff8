"""What a run has left in its workdir, for tests that compare runs."""

import json
import pathlib
from typing import Any

import numpy as np
import small

from phpjax import checkpoint, predict

NOT_COMPARED = ("seconds", "peak_memory_bytes", "versions")


def results(folder: pathlib.Path) -> dict[str, Any]:
  """results.json."""
  return json.loads((folder / "results.json").read_text())


def comparable(folder: pathlib.Path, *, but: tuple[str, ...] = ()) -> dict[str, Any]:
  """The same without what differs between any two runs, and without `but`."""
  return {k: v for k, v in results(folder).items() if k not in (*NOT_COMPARED, *but)}


def logged(folder: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl."""
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
  """The committed ones, newest first."""
  folder = folder / checkpoint.FOLDER
  return [folder / str(step) for step in checkpoint.steps_of(folder)]


def learned(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """{array: its value} of all that a run has learned by its newest checkpoint, read as `phpjax.load` does."""
  newest = checkpoints(folder)[0]
  _, items = predict.open_step(newest.parent, int(newest.name))
  return {f"{name}/{path}": x for name, tree in items.items() for path, x in small.flat(tree).items()}
