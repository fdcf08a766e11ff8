"""The sounds of DG-SCT's AVSBench pack: `AVS.npy`, one pickled table {"<name>.wav": samples} a folder.

A pickle names the code that puts it together, any code, so no other one is ever opened here. Of these, the four names that
arrays of numbers need are given stand-ins that can do nothing but hold numbers, and every other name is refused before
anything could run.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_pipelines import media, transforms
from data_pipelines.base import ClipCache
from data_pipelines.schema import FETCH, DataError, MediaError

FILE_NAME = "AVS.npy"
# int16 samples of a whole S4 category take 20 to 60 MB: enough for some of them, and little beside decoded clips.
TABLES = ClipCache(max_bytes=600_000_000)


class _Type:
  """Stands in for numpy.dtype: a code such as "f4" and a byte order."""

  def __init__(self, code: str, *_: Any) -> None:
    self.code, self.order = code, "="

  def __setstate__(self, state: tuple[Any, ...]) -> None:
    self.order = state[1]

  def numbers(self, raw: bytes) -> np.ndarray:
    """Bytes -> [n]; raises ValueError for a type that is no number."""
    if not re.fullmatch("[iu][1248]|f[248]", self.code):
      raise ValueError(f"holds values of type {self.code}")
    return np.frombuffer(raw, np.dtype(self.code).newbyteorder(self.order))


class _Array:
  """Stands in for numpy's empty array that a pickle then fills: numbers [n], or the list of an object array."""

  def __init__(self, *_: Any) -> None:
    self.content: Any = None

  def __setstate__(self, state: tuple[Any, ...]) -> None:
    _, shape, kind, by_column, raw = state
    if isinstance(raw, list):
      self.content = raw
    else:
      self.content = kind.numbers(raw).reshape(shape, order="F" if by_column else "C").reshape(-1)


class _Scalar:
  """Stands in for one number of a numpy type."""

  def __init__(self, kind: _Type, raw: bytes) -> None:
    self.number = float(kind.numbers(raw)[0])

  def __setstate__(self, state: Any) -> None:
    raise ValueError("a number has no state")

  def __float__(self) -> float:
    return self.number


_STAND_INS: dict[tuple[str, str], type] = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Type}
for _core in ("numpy.core.multiarray", "numpy._core.multiarray"):  # of numpy 1 and numpy 2
  _STAND_INS |= {(_core, "_reconstruct"): _Array, (_core, "scalar"): _Scalar}


class _Refused(Exception):
  """A pickle that asks for more than arrays."""


class _Arrays(pickle.Unpickler):
  """Loads arrays of numbers, and Python's plain types around them."""

  def find_class(self, module: str, name: str) -> type:
    if (module, name) not in _STAND_INS:
      raise _Refused(f"{module}.{name}")
    return _STAND_INS[module, name]


def read_wave(path: Path, name: str, sample_rate_hz: int) -> np.ndarray:
  """The sound of clip `name` in an AVS.npy -> float32 [n] in [-1, 1]; safe to call from many threads.

  Raises:
    MediaError: a missing or broken file, or one without this clip.
    DataError: a file that would run code if it were opened as usual.
  """
  table = _table(path)
  if (key := _key(table, name)) is None:
    raise MediaError(path, f"has no sound {name + '.wav'!r} among its {len(table)}", media.AGAIN)
  return media.resample(table[key].astype(np.float32) / 32768, media.NPY_RATE_HZ, sample_rate_hz)


def has_wave(path: Path, name: str) -> bool:
  """Whether an AVS.npy holds the sound of clip `name`; raises as `read_wave`, but for a missing clip."""
  return _key(_table(path), name) is not None


def _table(path: Path) -> dict[str, np.ndarray]:
  """`read_table`, of late ones from memory."""
  return TABLES.fetch(_identity(path), lambda: read_table(path))


def _key(table: dict[str, np.ndarray], name: str) -> str | None:
  """Under which of its names a clip stands in a table."""
  return next((key for key in (f"{name}.wav", name) if key in table), None)


def read_table(path: Path) -> dict[str, np.ndarray]:
  """All sounds of an AVS.npy: name -> int16 [n] at 32 kHz; raises as `read_wave`."""
  try:
    with open(path, "rb") as file:
      _check_header(file)
      (table,) = _Arrays(file).load().content
      return {str(name): _int16(samples, path) for name, samples in table.items()}
  except _Refused as error:
    why = f"asks for {error}, which arrays of numbers do not need, and was not opened"
    raise DataError(f"{path}: {why}; {FETCH} from a source that you trust") from None
  except MediaError:
    raise
  except Exception as error:  # the bytes of a damaged pickle are wrong instructions: they fail in every way there is
    reason = f"cannot be read as a table of sounds ({type(error).__name__}: {error})"
    raise MediaError(path, reason.replace("\n", " "), media.AGAIN) from error


def _check_header(file: BinaryIO) -> None:
  """Moves behind the header of an .npy file; raises ValueError if it announces anything but one pickled object."""
  version = np.lib.format.read_magic(file)
  read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
  if not read:
    raise ValueError(f"npy version {version}")
  shape, _, dtype = read(file)
  if shape != () or dtype.char != "O":
    raise ValueError(f"an array of type {dtype} and shape {shape}")


def _int16(samples: Any, path: Path) -> np.ndarray:
  """Samples as they are kept: a quarter of the memory of float64, and what every decoded clip holds in the end."""
  wave = samples.content if isinstance(samples, _Array) else np.array(samples, np.float32)
  return transforms.to_int16(media.unit_wave(wave, path))


def _identity(path: Path) -> tuple[str, int, int]:
  """Name, time and size of a file, so that a new one of the same name is read anew; raises MediaError."""
  try:
    found = path.stat()
  except OSError as error:
    raise MediaError(path, "no such file", media.AGAIN) from error
  return str(path), found.st_mtime_ns, found.st_size
