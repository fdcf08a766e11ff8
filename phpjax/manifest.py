"""The sha256 of every file of a checkpoint step, so that a byte that changed on the disk is found before it is restored."""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any

from phpjax import files

FILE = "manifest.json"


class DamagedError(ValueError):
  """A file is not what it was when it was written; the message names it."""


class UnfinishedError(DamagedError):
  """There is no manifest: the step was not finished when the run was killed."""


def write(folder: pathlib.Path) -> None:
  """Lists a folder's files in its manifest, which appears at once and whole."""
  paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != FILE]
  listed = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in paths}
  files.write_whole(folder / FILE, json.dumps({"files": listed}, indent=1))  # an empty one would condemn the step


def verify(folder: pathlib.Path, *, but: str = "") -> None:
  """Reads every listed file, those below the item `but` left out; raises DamagedError naming the first that has changed."""
  for name, wanted in _listed(folder).items():
    path = folder / name
    if but and pathlib.PurePath(name).parts[0] == but:
      continue
    if not path.is_file():
      raise DamagedError(f"{path} is missing")
    if (size := path.stat().st_size) != wanted["bytes"]:
      raise DamagedError(f"{path} has {size} bytes, {wanted['bytes']} were written")
    if _sha256(path) != wanted["sha256"]:
      raise DamagedError(f"{path} is damaged: its sha256 is not the one of {FILE}")


def _listed(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
  """{relative name: bytes and sha256}; raises DamagedError for a manifest that is not one of ours."""
  path = folder / FILE
  try:
    listed = json.loads(path.read_text(encoding="utf-8"))["files"]
    whole = all(isinstance(x["bytes"], int) and isinstance(x["sha256"], str) for x in listed.values())
  except OSError as error:
    raise UnfinishedError(f"{path} is missing: the step was not finished") from error
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
    raise DamagedError(f"{path} is damaged") from error
  if not listed or not whole or any(_leaves(name) for name in listed):
    raise DamagedError(f"{path} is damaged")
  return listed


def _leaves(name: str) -> bool:
  """Whether a name may mean something outside the folder; `write` makes none of these."""
  path = pathlib.PurePath(name)
  return path.is_absolute() or ".." in path.parts or "\0" in name


def _sha256(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
