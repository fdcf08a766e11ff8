"""The files of a run: config.json, results.json, and the rule that a workdir belongs to one config."""

from __future__ import annotations

import json
import pathlib
import stat
from typing import Any

from ml_collections import ConfigDict

from phpjax import files
from phpjax.errors import UserError, writing

MAX_BYTES = 64 << 20
CONFIG, RESULTS = "config.json", "results.json"
# Fields that may differ when a workdir is continued: they say where and how a run works, not what it computes (of weights
# the checkpoint knows the sha256), or what to do when something goes wrong that stopped the run before.
ELSEWHERE = (
  "resume",
  "mesh",
  "log_every_steps",
  "save_every_steps",
  "on_nonfinite",
  "watchdog_minutes",
  "data.root",
  "data.num_threads",
  "data.num_workers",
  "data.cache_gb",
  "data.query_cache",
  "data.on_bad_clip",
  *(f"encoders.{modality}.weights" for modality in ("visual", "audio", "text", "audio_text")),
)
# Of those, what may differ between the hosts of one run.
OF_A_HOST = ("data.root", "data.num_threads", "data.num_workers", "data.cache_gb", "data.query_cache")
OF_A_HOST += tuple(field for field in ELSEWHERE if field.endswith(".weights"))


def plain(config: ConfigDict) -> dict[str, Any]:
  """The config as JSON types."""
  return json.loads(config.to_json())


def decisive(config: dict[str, Any]) -> dict[str, Any]:
  """{dotted field: value} without the fields that do not decide the result."""
  return {k: v for k, v in flatten(config).items() if k not in ELSEWHERE}


def common(config: ConfigDict) -> dict[str, Any]:
  """{dotted field: value} that all processes of a run must share: all but where each host keeps its files and how it reads."""
  return {field: value for field, value in flatten(plain(config)).items() if field not in OF_A_HOST}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"a": {"b": 1}} -> {"a.b": 1}."""
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
  return flat


def differing(there: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """The fields that decide the result and are not the same in two configs."""
  old, new = decisive(there), decisive(now)
  return sorted(k for k in old.keys() | new if old.get(k) != new.get(k))


def claim(workdir: pathlib.Path, config: ConfigDict, *, primary: bool = True) -> None:
  """Writes config.json, or checks that the one there is of the same run; raises UserError naming what differs.

  primary: False on all processes but the first: they only check.
  """
  path, now = workdir / CONFIG, plain(config)
  there = read_json(path) if path.is_file() else now
  if found := differing(there, now):
    old, new = flatten(there), flatten(now)
    shown = ", ".join(f"{k} (there {old.get(k)!s:.80}, now {new.get(k)})" for k in found[:4])
    raise UserError(
      f"--workdir={workdir} belongs to another config: {shown}{' ...' if len(found) > 4 else ''}; "
      "take another --workdir or the old settings"
    )
  if primary and not path.is_file():
    update(workdir, config)


def update(workdir: pathlib.Path, config: ConfigDict, *, primary: bool = True) -> None:
  """Makes config.json say where the data and the weights are now, once the run was found to be able to go on with them."""
  path, now = workdir / CONFIG, plain(config)
  if not primary or (path.is_file() and read_json(path) == now):
    return
  with writing(workdir):
    workdir.mkdir(parents=True, exist_ok=True)
  write_json(path, now)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object, which is data and never run; raises UserError when it is missing, damaged, no object or far too large."""
  try:
    if not stat.S_ISREG((status := path.stat()).st_mode) or status.st_size > MAX_BYTES:
      raise UserError(f"{path} is no file of at most {MAX_BYTES} bytes: is this a workdir of phpjax.main?")
    found = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}; is this a workdir of phpjax.main?") from error
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path} is not valid JSON ({error}): delete it and run again") from error
  if not isinstance(found, dict):
    raise UserError(f"{path} holds no JSON object: delete it and run again")
  return found


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a file that appears at once and whole; raises UserError when it cannot be written."""
  text = json.dumps(value, indent=1, allow_nan=False) + "\n"
  with writing(path):
    files.write_whole(path, text)
