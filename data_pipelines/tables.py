"""What the readers share in reading label files: text, JSON, seconds, split names, and names that become paths."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines import limits
from data_pipelines.schema import FETCH, DataError, order_splits, printable

MAX_NAME_BYTES = 200  # file systems take 255, endings and numbers follow
MAX_TEXT = 2000  # characters of one field that is parsed further


def read_lines(path: Path) -> list[str]:
  """Lines of a text file without line ends; raises DataError if it is not text, or too large."""
  try:
    return limits.read_label_bytes(path).decode("utf-8-sig").splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); {FETCH}") from error


def read_json(path: Path) -> Any:
  """The value of a JSON file; raises DataError if it is not JSON, or too large."""
  try:
    return json.loads(limits.read_label_bytes(path).decode("utf-8-sig"))
  except DataError:
    raise
  except (OSError, ValueError, RecursionError) as error:
    raise DataError(f"{path}: cannot be read as JSON ({error}); {FETCH}") from error


def check_name(name: str, where: str) -> None:
  """Raises DataError for a clip, split or category that is no name of one file or folder: it could lead out of the root."""
  if not is_name(name):
    shown = f"{printable(repr(name)):.80}"
    raise DataError(f"{where}: {shown} cannot be the name of a file (no / in it, at most {MAX_NAME_BYTES} bytes); {FETCH}")


def is_name(name: Any) -> bool:
  """Whether a value names one file or folder inside another, and nothing above or below it."""
  if not isinstance(name, str) or name in ("", ".", "..") or set("/\\\0") & set(name):
    return False
  return len(name.encode("utf-8", "surrogatepass")) <= MAX_NAME_BYTES


def is_second(text: str) -> bool:
  """Whether a field of a label file is a whole number of seconds."""
  return text.isdecimal() and len(text) < 10


def named_splits(paths: Sequence[Path], pattern: re.Pattern[str]) -> dict[str, Path]:
  """Split name (group 1 of the compiled pattern) -> file, in the usual order of splits."""
  found = {m.group(1): p for p in paths if (m := pattern.fullmatch(p.name))}
  return {split: found[split] for split in order_splits(found)}
