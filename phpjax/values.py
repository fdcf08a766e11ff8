"""What no field of a config may hold, whatever it is for: a part that is no part, numbers without bound, unprintable text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

SECTIONS = ("method", "encoders", "protocol", "data", "opt", "epoch_factor")
MOST = 1_000_000  # of counts and sizes: more is a slip of the keyboard, and would end in a lack of memory
MOST_SEED = 2**31 - 1
MOST_TEXT, MOST_NAME = 4000, 255  # characters of a text; bytes between two slashes, all that file systems take
TUPLES = {"tasks": str, "data.mirrored": str, "mesh": int}
# Field of opt -> (least, below); a rate of 0 switches a part off.
RATES: dict[str, tuple[float, float]] = {
  **{f"{part}.{name}": (0, math.inf) for part in ("shared", "prompts", "head") for name in ("lr", "weight_decay")},
  **{"b1": (0, 1), "b2": (0, 1), "eps": (1e-30, math.inf), "clip_norm": (1e-30, math.inf)},
  **{"min_scale": (0, math.inf), "later_shared_scale": (0, math.inf)},
}


# Fields that every run reads.
NEEDED = {
  "data": (
    "root",
    "toybox",
    "toybox_seed",
    "evaluation_split",
    "on_bad_clip",
    "crop",
    "num_threads",
    "num_workers",
    "mirrored",
  ),
  "opt": ("shared", "prompts", "head", "reference_batch_size", "lr_scaling", "b1", "b2", "eps", "clip_norm", "min_scale"),
}
NEEDED["data"] += ("mirrored", "cache_gb", "questions_per_clip")
NEEDED["opt"] += ("decay", "clip", "later_shared_scale")


def problems(config: ConfigDict) -> list[str]:
  """One line for each field that nothing can be done with; the other checks may rely on the rest."""
  if found := [f"{name}={config[name]!r:.80} must be a group of fields" for name in SECTIONS if not _is_group(config[name])]:
    return found
  if bad := [name for name, encoder in config.encoders.items() if not (_is_group(encoder) and _named(encoder, "weights"))]:
    return [f"encoders.{name} must be a group with the texts name and weights" for name in bad]
  if not _named(config.method):
    return ["method.name must be a text"]
  if gone := [f"{part}.{name}" for part, names in NEEDED.items() for name in names if name not in config[part]]:
    return [f"--config has no {', '.join(gone)} (see configs/base.py)"]
  found = [line for name, value in fields(config) for line in _value(name, value)]
  return found or [*_tuples(config), *_rates(config)]


def _is_group(value: Any) -> bool:
  return isinstance(value, ConfigDict)


def _named(group: ConfigDict, *others: str) -> bool:
  """Whether `name` and the `others` of a group are texts."""
  return all(isinstance(group.get(name), str) for name in ("name", *others))


def fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """(dotted name, value) of every field."""
  for name, value in config.items():
    if _is_group(value):
      yield from fields(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", value


def _value(name: str, value: Any, depth: int = 0) -> Iterator[str]:
  """What is wrong with a value by itself."""
  if isinstance(value, tuple | list):
    if depth > 1 or len(value) > 1000:
      yield f"{name}={value!r:.80} is nested too deep or too long"
    else:
      yield from (line for part in value for line in _value(name, part, depth + 1))
  elif isinstance(value, float) and not math.isfinite(value):
    yield f"{name}={value} must be a finite number"
  elif isinstance(value, int) and abs(value) > (most := MOST_SEED if name.endswith("seed") else MOST):
    yield f"{name}={value!r:.30} must be between -{most} and {most}"
  elif isinstance(value, str):
    if not value.isprintable() or len(value) > MOST_TEXT or any(len(part.encode()) > MOST_NAME for part in value.split("/")):
      yield f"{name}={value!r:.80} must be printable text (at most {MOST_TEXT} characters, {MOST_NAME} bytes between slashes)"


def _tuples(config: ConfigDict) -> Iterator[str]:
  """Fields that list names or numbers."""
  for name, kind in TUPLES.items():
    value = config
    for part in name.split("."):
      value = value.get(part, ())
    if not isinstance(value, tuple | list) or not all(isinstance(x, kind) and not isinstance(x, bool) for x in value):
      yield f"{name}={value!r:.80} must list {'names' if kind is str else 'whole numbers'}, as ({kind(1)!r},)"


def _rates(config: ConfigDict) -> Iterator[str]:
  """Rates and shares of the optimizer."""
  known = dict(fields(config.opt))
  for name, (least, below) in RATES.items():
    if name in known and not (isinstance(known[name], int | float) and least <= known[name] < below):
      yield f"opt.{name}={known[name]!r:.80} must be at least {least:g}" + (
        "" if math.isinf(below) else f" and below {below:g}"
      )
