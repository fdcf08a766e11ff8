"""Finished runs as others left them in their workdirs: found, read and checked, for the comparison of several.

A workdir is data from anywhere: nothing in it is run, and what is damaged costs its own run only.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import math
import os
import pathlib
import stat
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from phpjax import checkpoint, logs, manifest, workdir
from phpjax.errors import UserError
from phpjax.metrics import classes, continual

Tree = dict[str, Any]
DEPTH = 6  # folders between one that is given and the workdirs below it
WRONG = (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError)
# What a seed of its own makes of the data -> the field of that seed: the toybox's scenes; of class-incremental tasks who is in
# which, and what else a benchmark draws with it.
DATA_SEEDS = {"scenes": "data.toybox_seed", "classes": "data.class_seed"}
OF_A_SEED = ("seed", *DATA_SEEDS.values())  # what repetitions of a run may differ in
# Of a run, in this order in comparison.csv. Scores in [0, 1]; bytes; seconds.
NUMBERS = (
  "mean_accuracy",
  "forgetting",
  "bwt",
  "routing",
  "oracle",
  "pooled_last",
  "pooled_average",
  "trainable_parameters",
  "frozen_parameters",
  "peak_memory_bytes",
  "examples_per_s",
  "checkpoint_bytes",
  "seconds",
  "steps",
)


@dataclasses.dataclass(frozen=True)
class Finished:
  """A finished run.

  Attributes:
    folder: its workdir.
    results: results.json as it stands there.
    tasks: in the order in which they were learned.
    matrix: float64 [K, T], NaN where there is no score; the last row is whole.
    final: {"matrix" or "unseen": {task: last score}}; the second only where the data has such a set.
    trivial: the same of the best predictor that never looks at a clip; {"pooled": {"last": ...}} where the label set grows.
    curve: mean accuracy after each task [T]; None where rows of the matrix are not whole.
    numbers: {name of NUMBERS: value, None where it is not known}.
    scores: {"SPLIT/AFTER/TASK/METRIC": value} of every evaluation.
    rates: {task: median of the logged examples_per_s}.
    settings: {dotted field: value} that decide the result; empty without a config.json.
    data_seeds: {what of DATA_SEEDS: seed} of the parts of the data that a seed made; none without a config.json.
    place: {what: value} that makes scores comparable, but for `data_seeds`: data, split, metrics, what was left out.
    weights: {encoder: name and the first digits of its sha256}.
    versions: {what: version} of what it ran with.
    notes: what is odd about it.
  """

  folder: pathlib.Path
  results: Tree
  tasks: tuple[str, ...]
  matrix: np.ndarray
  final: dict[str, dict[str, float]]
  trivial: dict[str, dict[str, float]]
  curve: np.ndarray | None
  numbers: dict[str, float | None]
  scores: dict[str, float | None]
  rates: dict[str, float]
  settings: Tree
  data_seeds: dict[str, int]
  place: dict[str, Any]
  weights: dict[str, str]
  versions: dict[str, str]
  notes: tuple[str, ...]

  @property
  def method(self) -> str:
    """As in the config."""
    return self.results["method"]

  @property
  def compat(self) -> str:
    """As in the config, or nothing."""
    return str(self.results.get("compat", ""))

  @property
  def seed(self) -> int:
    """Of the run."""
    return self.results["seed"]

  @property
  def identity(self) -> str:
    """What all repetitions of a run share, but for what a seed made of their data."""
    chosen = {field: value for field, value in self.settings.items() if field not in OF_A_SEED}
    shared = (self.method, self.compat, self.results.get("task_id"), self.tasks, self.weights, chosen)
    return json.dumps(shared, sort_keys=True)


# -- where runs are ----------------------------------------------------------------------------------------------


def workdirs(paths: Sequence[str]) -> list[pathlib.Path]:
  """The workdirs that paths name, each once: a workdir, a folder with some below it, or a pattern such as `runs/*`.

  Raises UserError, naming all the paths at which there is nothing.
  """
  found: dict[pathlib.Path, pathlib.Path] = {}
  missing = []
  for path in paths:
    given = pathlib.Path(path).expanduser()
    places = [given] if given.exists() else [pathlib.Path(place) for place in sorted(glob.glob(str(given)))]
    if not places:
      missing.append(f"--workdir={path} does not exist")
    for folder in (folder for place in places for folder in below(place)):
      found.setdefault(folder.resolve(), folder)
  if missing:
    raise UserError("; ".join(missing))
  return list(found.values())


def below(place: pathlib.Path) -> Iterator[pathlib.Path]:
  """The workdirs at or below a folder, sorted; what lies in a workdir is not looked at, and links are not followed."""
  for folder, folders, files in os.walk(place):
    path = pathlib.Path(folder)
    if {workdir.RESULTS, workdir.CONFIG} & set(files):
      yield path
      folders.clear()
    deep = len(path.relative_to(place).parts) >= DEPTH
    folders[:] = [] if deep else sorted(name for name in folders if not name.startswith("."))


# -- one run -----------------------------------------------------------------------------------------------------


def read(folder: pathlib.Path) -> Finished:
  """A run from its workdir; raises UserError when it is unfinished or damaged, saying which in one line."""
  path = folder / workdir.RESULTS
  if not path.exists():
    raise UserError(f"{folder} is not finished: it has no {workdir.RESULTS}")
  results = workdir.read_json(path)
  config = workdir.read_json(folder / workdir.CONFIG) if (folder / workdir.CONFIG).exists() else {}
  try:
    return _finished(folder, results, config)
  except WRONG as error:
    raise UserError(f"{path} holds no results of a finished run: {type(error).__name__}: {error}") from error


def _finished(folder: pathlib.Path, results: Tree, config: Tree) -> Finished:
  """Raises one of WRONG, or UserError, for what cannot be used."""
  tasks = results["tasks"]
  if not isinstance(tasks, list) or not tasks or len(set(tasks)) < len(tasks):
    raise UserError(f"{folder / workdir.RESULTS} names no tasks")
  typed = (("method", results["method"], str), ("seed", results["seed"], int), *(("task", task, str) for task in tasks))
  for what, value, kind in typed:
    if not isinstance(value, kind):
      raise UserError(f"{folder / workdir.RESULTS} has no {what}: {value!r}")
  matrix = np.array([[number(score, math.nan) for score in row] for row in results["matrix"]], np.float64)
  if matrix.ndim != 2 or matrix.shape[1] != len(tasks) or not len(matrix) or np.isnan(matrix[-1]).any():
    raise UserError(f"{folder / workdir.RESULTS} lacks a score of a task after the last one was learned")
  if (matrix < 0).any() or (matrix > 1).any():
    raise UserError(f"{folder / workdir.RESULTS} has scores outside [0, 1]")
  settings, meta, rates = workdir.decisive(config), _meta(folder), _rates(folder)
  scores = {
    f"{one['split']}/{one['after']}/{one['task']}/{name}": number(score)
    for one in results.get("per_task", ())
    for name, score in one["scores"].items()
  }
  seeds = _data_seeds(folder, settings, scores)
  curve = continual.average_accuracy(matrix) if len(matrix) == len(tasks) and _whole(matrix) else None
  return Finished(
    folder=folder,
    results=results,
    tasks=tuple(tasks),
    matrix=matrix,
    final={"matrix": dict(zip(tasks, matrix[-1].tolist(), strict=True)), **_unseen(results)},
    trivial=_trivial(results),
    curve=curve,
    numbers=_numbers(folder, results, matrix, curve, meta, [rate for of_task in rates.values() for rate in of_task]),
    scores=scores,
    rates={task: statistics.median(found) for task, found in rates.items()},
    settings=settings,
    data_seeds=seeds,
    place=_place(results, config, meta, seeds),
    weights={str(name): _drawn(w["name"], w["sha256"], results["seed"]) for name, w in results["weights"].items()},
    versions={what: str(version) for what, version in results.get("versions", {}).items()},
    notes=_notes(results, matrix, config),
  )


def number(value: Any, missing: Any = None) -> Any:
  """A finite float, or `missing` for anything else: None, NaN, text, an absurd number."""
  if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e100 or not math.isfinite(value):
    return missing
  return float(value)


def _whole(matrix: np.ndarray) -> bool:
  """Whether no score on or below the diagonal is missing."""
  return not np.isnan(matrix[np.tril_indices(len(matrix))]).any()


def _drawn(name: str, sha256: str, seed: int) -> str:
  """An encoder's name and weights; random ones are drawn with the run's seed, and are the same in all repetitions in that."""
  return f"{name}, random, drawn by the seed" if sha256 == f"random seed {seed}" else f"{name}, sha256 {sha256[:16]}"


def _unseen(results: Tree) -> dict[str, dict[str, float]]:
  """{"unseen": {task: last score}} of the tasks that have such a set; nothing if none has."""
  last = (results.get("unseen") or [[]])[-1]
  scores = {task: number(score) for task, score in zip(results["tasks"], last, strict=False)}
  found = {task: score for task, score in scores.items() if score is not None}
  return {"unseen": found} if found else {}


def _trivial(results: Tree) -> dict[str, dict[str, float]]:
  """As `Finished.trivial`, of what stands there."""
  elsewhere, metric = results.get("trivial_predictor_elsewhere", {}), results["metric"]
  unseen = {task: found["unseen"]["scores"].get(metric[task]) for task, found in elsewhere.items() if "unseen" in found}
  pooled = {"last": results.get("pooled", {}).get("trivial")}
  kinds = {"matrix": results.get("trivial", {}), "unseen": unseen, "pooled": pooled}
  numbers = {kind: {task: number(score) for task, score in found.items()} for kind, found in kinds.items()}
  return {kind: {task: score for task, score in found.items() if score is not None} for kind, found in numbers.items()}


def _numbers(
  folder: pathlib.Path, results: Tree, matrix: np.ndarray, curve: np.ndarray | None, meta: Tree, rates: list[float]
) -> dict[str, float | None]:
  """{name of NUMBERS: value}: means, forgetting and BWT from the matrix itself; as written where its rows are not whole."""
  summary = continual.summarise(matrix) if curve is not None else {}
  parameters = results.get("parameters", {})
  trainable = [number(parameters.get("shared")), *map(number, parameters.get("per_task", {}).values())]
  pooled = results.get("pooled", {})
  if results.get("joint"):  # one model fills all rows: nothing that comes after another
    summary, pooled = {"forgetting": None, "bwt": None}, {"last": pooled.get("last")}
  found = {
    "mean_accuracy": float(matrix[-1].mean()),
    "forgetting": summary.get("forgetting", number(results.get("forgetting"))),
    "bwt": summary.get("bwt", number(results.get("bwt"))),
    "routing": _last_row(results.get("routing")),
    "oracle": _last_row(results.get("oracle")),
    "pooled_last": number(pooled.get("last")),
    "pooled_average": number(pooled.get("average")),
    "trainable_parameters": None if None in trainable else sum(trainable),
    "frozen_parameters": number(parameters.get("frozen")),
    "peak_memory_bytes": number(results.get("peak_memory_bytes")),
    "examples_per_s": statistics.median(rates) if rates else None,
    "checkpoint_bytes": _checkpoint_bytes(folder, meta),
    "seconds": number(results.get("seconds")),
    "steps": number(results.get("steps")),
  }
  return {name: found[name] for name in NUMBERS}


def _last_row(matrix: Any) -> float | None:
  """The mean of the last row of a matrix, where a run has it: the clips whose task was found, the scores if it were given."""
  scores = [number(score) for score in matrix[-1]] if matrix else [None]
  return None if None in scores else statistics.fmean(scores)


def _data_seeds(folder: pathlib.Path, settings: Tree, scores: Mapping[str, Any]) -> dict[str, int]:
  """As `Finished.data_seeds`; raises UserError for a seed that is none."""
  incremental = bool(settings) and any(what.endswith(f"/{classes.WITHIN}") for what in scores)
  made = {"scenes": settings.get("data.toybox"), "classes": incremental}
  found = {what: settings.get(field) for what, field in DATA_SEEDS.items() if made[what]}
  if wrong := [DATA_SEEDS[what] for what, seed in found.items() if not isinstance(seed, int)]:
    raise UserError(f"{folder / workdir.CONFIG} has no {' and no '.join(wrong)}")
  return found


def _place(results: Tree, config: Tree, meta: Tree, seeds: Mapping[str, int]) -> dict[str, Any]:
  """{what: value} on which runs must agree, where both have it, for their scores to stand in one table.

  The rows of class-incremental tasks are those of their seeds: runs of the same ones must agree on them.
  """
  drawn = f" ({', '.join(f'{what} of seed {seed}' for what, seed in seeds.items())})" if "classes" in seeds else ""
  data, toybox = results.get("data", {}), workdir.flatten(config).get("data.toybox")
  identity = data.get("identity") or meta.get("data") or {}
  place = {"data": data.get("name"), "evaluated on": data.get("evaluation_split")}
  place["the task at test"] = results.get("task_id")
  if toybox:  # its ids say nothing beyond its version and its seed
    place["toybox"] = identity.get("toybox")
  else:
    place |= {f"{what}{drawn}": value for what, value in identity.items()}
  for task in results["tasks"]:
    place[f"{task} metric"] = results["metric"][task]
    for what in ("counts", "missing_clips", "bad_clips"):
      splits = data.get(what, {}).get(task, {})
      place |= {f"{task} {split} {what}{drawn}": len(n) if isinstance(n, list) else n for split, n in splits.items()}
  return {what: value for what, value in place.items() if value is not None}


def _notes(results: Tree, matrix: np.ndarray, config: Tree) -> tuple[str, ...]:
  """What is odd about a run."""
  notes = []
  stored = number(results.get("mean_accuracy"))
  if stored is None or abs(stored - matrix[-1].mean()) > 1e-6:
    notes.append(f"its mean_accuracy {stored} is not the mean of its last row, {matrix[-1].mean():.6f}: the row counts")
  if skipped := number(results.get("skipped_steps")):
    notes.append(f"{skipped:.0f} steps were left out because they were not finite")
  if not config:
    notes.append(f"it has no {workdir.CONFIG}: its settings are not compared with those of others")
  return tuple(notes)


# -- beside results.json -----------------------------------------------------------------------------------------


def _rates(folder: pathlib.Path) -> dict[str, list[float]]:
  """{task: the examples_per_s of its logged steps}; a damaged line costs no other."""
  path, found = folder / logs.FILE, {}
  if not path.is_file() or path.stat().st_size > workdir.MAX_BYTES:
    return found
  for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
    try:
      record = json.loads(line)
      rate, task = number(record["examples_per_s"]), str(record["task"])
    except WRONG:
      continue
    if rate is not None:
      found.setdefault(task, []).append(rate)
  return found


def _meta(folder: pathlib.Path) -> Tree:
  """The JSON of the newest checkpoint, and its number as "step"; nothing where there is none that can be read."""
  try:
    steps = checkpoint.steps_of(folder / checkpoint.FOLDER)
    return {**checkpoint.read_meta(folder / checkpoint.FOLDER / str(steps[0])), "step": steps[0]} if steps else {}
  except (UserError, manifest.DamagedError, OSError, *WRONG):
    return {}


def _checkpoint_bytes(folder: pathlib.Path, meta: Tree) -> int | None:
  """Bytes that must be kept to open what was learned: the newest step without its optimizer, and of the steps that it needs
  the tasks that ended there. None where they are not all there."""
  try:
    step, folder = meta["step"], folder / checkpoint.FOLDER
    items = [folder / str(step) / name for name in meta["items"] if name != "live"]
    for name, number in meta["learned"].items():
      held = checkpoint.read_meta(folder / str(number))["items"] if number != step else ()
      items += [folder / str(number) / item for item in held if item == f"task_{name}"]
    return sum(map(_size, items))
  except (UserError, manifest.DamagedError, OSError, *WRONG):
    return None


def _size(folder: pathlib.Path) -> int:
  """Bytes of all files in a folder; links are not followed."""
  files = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]
  found = [status.st_size for status in map(os.lstat, files) if stat.S_ISREG(status.st_mode)]
  if not found:
    raise FileNotFoundError(folder)
  return sum(found)
