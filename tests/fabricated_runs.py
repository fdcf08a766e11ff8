"""Workdirs of finished runs made of numbers, for tests of what compares them."""

import json
import pathlib
import zlib
from typing import Any

import numpy as np

from phpjax.workdir import write_json

TASKS = ("ave", "avvp", "avs", "avqa")
METRIC = {"ave": "segment_accuracy", "avvp": "segment/Type@AV", "avs": "miou", "avqa": "accuracy"}
WEIGHTS = {"visual": {"name": "nano_vit", "sha256": "a1"}, "audio": {"name": "nano_ast", "sha256": "b2"}}


def matrix_of(seed: int, size: int, best: float = 0.9) -> list[list[float | None]]:
  """Deterministic scores [T, T], None above the diagonal."""
  scores = np.random.default_rng(seed).uniform(0.1, best, (size, size))
  return [[float(scores[i, j]) if j <= i else None for j in range(size)] for i in range(size)]


def forgetting_of(matrix: list[list[float | None]]) -> float:
  """By its definition, in plain Python."""
  last = len(matrix) - 1
  lost = [max(matrix[i][j] for i in range(j, last)) - matrix[last][j] for j in range(last)]
  return sum(lost) / len(lost) if lost else 0.0


def bwt_of(matrix: list[list[float | None]]) -> float:
  """By its definition, in plain Python."""
  last = len(matrix) - 1
  gained = [matrix[last][j] - matrix[j][j] for j in range(last)]
  return sum(gained) / len(gained) if gained else 0.0


def results_of(method: str, seed: int, tasks: tuple[str, ...] = TASKS, **changes: Any) -> dict[str, Any]:
  """A results.json, as phpjax.results writes it, in what a comparison reads."""
  matrix = matrix_of(zlib.crc32(f"{method} {seed} {tasks}".encode()), len(tasks))
  metric = {task: METRIC.get(task, "accuracy") for task in tasks}
  splits = {"train": 8, "val": 4, "test": 6}
  return {
    "method": method,
    "tasks": list(tasks),
    "metric": metric,
    "matrix": matrix,
    "unseen": [[None if x is None else x / 2 for x in row] for row in matrix],
    "mean_accuracy": sum(matrix[-1]) / len(tasks),
    "forgetting": forgetting_of(matrix),
    "bwt": bwt_of(matrix),
    "per_task": [
      {"after": tasks[i], "task": tasks[j], "split": "test", "scores": {metric[tasks[j]]: matrix[i][j], "other": 0.25}}
      for i in range(len(tasks))
      for j in range(i + 1)
    ],
    "trivial": {task: 0.1 + 0.05 * at for at, task in enumerate(TASKS) if task in tasks},
    "trivial_predictor_elsewhere": {task: {"unseen": {"name": "x", "scores": {metric[task]: 0.05}}} for task in tasks},
    "parameters": {"frozen": 1000, "shared": 100, "per_task": {task: 10 + at for at, task in enumerate(tasks)}},
    "seed": seed,
    "steps": 400,
    "skipped_steps": 0,
    "seconds": 500.0 + 10 * seed,
    "peak_memory_bytes": 3_600_000_000,
    "data": {
      "name": "toybox-default",
      "identity": {"toybox": "version 1"},
      "counts": {task: splits for task in tasks},
      "missing_clips": {task: dict.fromkeys(splits, 0) for task in tasks},
      "bad_clips": {task: {split: [] for split in splits} for task in tasks},
      "evaluation_split": "test",
    },
    "weights": WEIGHTS,
    "versions": {"phpjax": "0.1.0", "jax": "0.10.2", "backend": "cpu", "devices": 1},
    "compat": "paper",
    "task_id": "given",
    **changes,
  }


def class_results_of(method: str, seed: int, class_seed: int, num_tasks: int = 3, **changes: Any) -> dict[str, Any]:
  """The same of class-incremental tasks, whose rows and their number are those of the class seed."""
  tasks = tuple(f"tux21_{at + 1}" for at in range(num_tasks))
  found = results_of(method, seed, tasks, unseen=[], trivial_predictor_elsewhere={}, task_id="inferred")
  for one in found["per_task"]:
    one["scores"] = {**one["scores"], "accuracy_within_task": 0.75}
  rows = {task: {"train": 40 + class_seed, "test": 10 + (class_seed + at) % 5} for at, task in enumerate(tasks)}
  found["data"] |= {"name": "user", "counts": rows, "missing_clips": {}, "bad_clips": {}}
  found["data"]["identity"] = {f"{task} test": f"{rows[task]['test']} rows, {at}{class_seed}" for at, task in enumerate(tasks)}
  curve = [0.9 - 0.1 * at - 0.01 * seed for at in range(num_tasks)]
  pooled = {"last": curve[-1], "average": sum(curve) / num_tasks, "curve": curve, "trivial": 0.02 * (class_seed + 1)}
  return {**found, "trivial": {task: 0.01 * (class_seed + 1) for task in tasks}, "pooled": pooled, **changes}


def class_run(folder: pathlib.Path, method: str, seed: int, class_seed: int, **changes: Any) -> pathlib.Path:
  """A whole workdir of a class-incremental run."""
  results = class_results_of(method, seed, class_seed, **changes)
  return write(folder, results, config_of(results, **{"data.toybox": "", "data.class_seed": class_seed}))


def config_of(results: dict[str, Any], toybox_seed: int | None = None, **changes: Any) -> dict[str, Any]:
  """The config.json of a run with these results; `changes` are {"a.b": value}."""
  seed = results["seed"]
  config: dict[str, Any] = {
    "seed": seed,
    "tasks": results["tasks"],
    "batch_size": 8,
    "method": {"name": results["method"], "compat": results["compat"]},
    "opt": {"head": {"lr": 0.002}},
    "data": {"toybox": "default", "toybox_seed": seed if toybox_seed is None else toybox_seed, "root": ""},
    "log_every_steps": 10,
  }
  for field, value in changes.items():
    node, *path = config, *field.split(".")
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = value
  return config


def write(folder: pathlib.Path, results: Any, config: Any = None, rates: dict[str, list[float]] | None = None) -> pathlib.Path:
  """A workdir; without a config it has none."""
  folder.mkdir(parents=True)
  (folder / "results.json").write_text(results if isinstance(results, str) else json.dumps(results))
  if config is not None:
    write_json(folder / "config.json", config)
  lines = [{"step": 1, "task": task, "examples_per_s": rate} for task, found in (rates or {}).items() for rate in found]
  (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  return folder


def run(folder: pathlib.Path, method: str, seed: int, *, toybox_seed: int | None = None, **changes: Any) -> pathlib.Path:
  """A whole workdir; `changes` with a dot are of the config, the others of the results."""
  results = results_of(method, seed, **{k: v for k, v in changes.items() if "." not in k})
  config = config_of(results, toybox_seed, **{k: v for k, v in changes.items() if "." in k})
  return write(folder, results, config, {task: [1.0, 20.0 + seed, 30.0] for task in results["tasks"]})


def checkpoints(folder: pathlib.Path) -> int:
  """Three checkpoints of a run of two tasks; returns the bytes of what must be kept."""
  sizes = {1: {"task_ave": 100, "shared": 70, "live": 900}, 2: {"task_avs": 50, "shared": 70}, 3: {"shared": 70, "state": 5}}
  learned = {"ave": 1, "avs": 2}
  for step, items in sizes.items():
    needs = sorted(number for number in learned.values() if number < step)
    meta = {"version": 2, "items": sorted(items), "needs": needs, "learned": learned, "data": {"toybox": "version 1"}}
    for name, size in items.items():
      (folder / "checkpoints" / str(step) / name / "d").mkdir(parents=True)
      (folder / "checkpoints" / str(step) / name / "d" / "0").write_bytes(b"x" * size)
    (folder / "checkpoints" / str(step) / "meta").mkdir()
    (folder / "checkpoints" / str(step) / "meta" / "metadata").write_text(json.dumps(meta))
  return 100 + 50 + 70 + 5
