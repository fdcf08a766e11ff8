"""The sounds of DG-SCT's AVSBench pack: `AVS.npy`, one pickled table {"<name>.wav": samples} a folder.

A pickle names the code that puts it together, any code, so no other one is ever opened here. Of these, the few names that
arrays of numbers need (pickle protocols 2 to 5) are given stand-ins that can do nothing but hold numbers, and every other
name is refused before anything could run. What is loaded takes a small multiple of the file's size: `_scan` looks at
the instructions of the pickle first.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_pipelines import arrays, limits, media, transforms
from data_pipelines.base import ClipCache
from data_pipelines.schema import FETCH, MediaError, brief

FILE_NAME = "AVS.npy"
# int16 samples of a whole S4 category take 20 to 60 MB: enough for some of them, and little beside decoded clips (twice the
# default of data.cache_gb). It is not part of that budget: every decoding process may hold this much besides. Rows come in
# any order, so where the tables of a benchmark do not fit they are read again and again: `data_pipelines.prepare` takes
# the sounds out of them once.
TABLES = ClipCache(max_bytes=300_000_000)


class _Type:
  """Stands in for numpy.dtype: a code such as "f4" and a byte order."""

  __slots__ = ("code", "order")

  def __init__(self, code: str, *_: Any) -> None:
    self.code, self.order = code, "="

  def __setstate__(self, state: tuple[Any, ...]) -> None:
    self.order = state[1]

  def numbers(self, raw: bytes | bytearray | str) -> np.ndarray:
    """Bytes (from Python 2 as text) -> [n]; raises ValueError for a type that is no number."""
    if not re.fullmatch("[iu][1248]|f[248]", self.code):
      raise ValueError(f"holds values of type {self.code}")
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    return np.frombuffer(raw, np.dtype(self.code).newbyteorder(self.order))


class _Array:
  """Stands in for numpy's empty array that a pickle then fills: numbers [n], or the list of an object array."""

  __slots__ = ("content",)

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

  __slots__ = ("number",)

  def __init__(self, kind: _Type, raw: bytes) -> None:
    self.number = float(kind.numbers(raw)[0])

  def __setstate__(self, state: Any) -> None:
    raise ValueError("a number has no state")

  def __float__(self) -> float:
    return self.number


class _Buffer(_Array):
  """Stands in for what protocol 5 makes arrays with."""

  __slots__ = ()

  def __init__(self, raw: bytes | bytearray, kind: _Type, shape: tuple[int, ...], order: str, *_: Any) -> None:
    self.content = kind.numbers(raw).reshape(shape, order=order).reshape(-1)  # an order that is neither C nor F fails


class _Encoded:
  """Stands in for _codecs.encode, with which protocol 2 writes bytes; a class, for a pickle could change a function."""

  __slots__ = ()

  def __new__(cls, text: str, encoding: str) -> bytes:
    if encoding != "latin1":
      raise ValueError("holds bytes that are not spelt as latin1")
    return str.encode(text, "latin1")

  def __setstate__(self, state: Any) -> None:
    raise ValueError("bytes have no state")


_STAND_INS: dict[tuple[str, str], type] = {
  ("numpy", "ndarray"): _Array,
  ("numpy", "dtype"): _Type,
  ("_codecs", "encode"): _Encoded,
}
for _core in ("numpy.core", "numpy._core"):  # of numpy 1 and numpy 2
  _STAND_INS |= {
    (f"{_core}.multiarray", "_reconstruct"): _Array,
    (f"{_core}.multiarray", "scalar"): _Scalar,
    (f"{_core}.numeric", "_frombuffer"): _Buffer,
  }


# Instructions of pickles: those that remember something, those that make sets, and those that make little beyond their bytes.
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_SETS = frozenset({"EMPTY_SET", "FROZENSET", "ADDITEMS"})
_SMALL = frozenset(
  {"GET", "BINGET", "LONG_BINGET", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
  | {"NONE", "NEWTRUE", "NEWFALSE", "MARK", "POP", "POP_MARK", "APPEND", "APPENDS", "SETITEM", "SETITEMS"}
  | {"FRAME", "PROTO", "STOP"}
)


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
    MediaError: a missing or broken file, one without this clip, or one that would run code if it were opened as usual.
  """
  table = _table(path)
  if (key := _key(table, name)) is None:
    raise MediaError(path, f"has no sound {name + '.wav'!r} among its {len(table)}", media.AGAIN)
  return media.resample(table[key].astype(np.float32) / 32768, arrays.NPY_RATE_HZ, sample_rate_hz)


def num_samples(path: Path, name: str) -> int | None:
  """Length of the sound of clip `name` in an AVS.npy, None if it holds none; raises as `read_wave` else."""
  table = _table(path)
  return None if (key := _key(table, name)) is None else len(table[key])


def _table(path: Path) -> dict[str, np.ndarray]:
  """`read_table`, of late ones from memory."""
  return TABLES.fetch(_identity(path), lambda: read_table(path))


def _key(table: dict[str, np.ndarray], name: str) -> str | None:
  """Under which of its names a clip stands in a table."""
  return next((key for key in (f"{name}.wav", name) if key in table), None)


def read_table(path: Path) -> dict[str, np.ndarray]:
  """All sounds of an AVS.npy: name -> int16 [n] at 32 kHz; raises as `read_wave`."""
  limits.check_file(path, "table_bytes")
  try:
    with open(path, "rb") as file:
      _check_header(file)
      content = io.BytesIO(file.read())  # from a file, a damaged length would allocate what it asks for
    size = len(content.getbuffer())
    _scan(content, size)
    content.seek(0)
    (table,) = _Arrays(content, encoding="latin1").load().content
    return _unit_waves(_flat(table, size), path)
  except _Refused as error:
    why = f"asks for {brief(error)}, which arrays of numbers do not need, and was not opened"
    raise MediaError(path, why, f"{FETCH} from a source that you trust") from None
  except MediaError:
    raise
  except Exception as error:  # the bytes of a damaged pickle are wrong instructions: they fail in every way there is
    reason = f"cannot be read as a table of sounds ({type(error).__name__}: {brief(error)})"
    raise MediaError(path, reason, media.AGAIN) from error


def _check_header(file: BinaryIO) -> None:
  """Moves behind the header of an .npy file; raises ValueError if it announces anything but one pickled object."""
  found = arrays.read_header(file)
  if found.shape != () or found.dtype.char != "O":
    raise ValueError(f"an array of type {found.dtype} and shape {found.shape}")
  file.seek(found.begin)


def _scan(content: BinaryIO, size: int) -> None:
  """Refuses a pickle whose few bytes would make much: raises ValueError, and as pickletools does on damaged ones.

  Whoever writes a pickle numbers what it remembers in order, from 0 or 1, so no place can be above the number of those before
  it by more than 1; and no honest file has more than one text, list, tuple or array in four bytes, or sets.
  """
  places, made = 0, 0
  for code, argument, _ in pickletools.genops(content):
    if code.name in _PUTS:
      if argument is not None and argument > places + 1:
        raise ValueError(f"remembers something at place {argument} of {places}")
      places += 1
    elif code.name not in _SMALL:
      if code.name in _SETS:
        raise ValueError("holds a set")
      made += 1
  if 4 * made > size + 40_000:
    raise ValueError(f"makes {made} objects of {size} bytes")


def _flat(table: dict[Any, Any], size: int) -> dict[str, np.ndarray]:
  """Name -> samples [n] of any type; raises ValueError where a sound is no plain row of numbers, or is told many times.

  A sample takes at least one byte of the file: where there are more, names share their samples, or lists do.
  """
  found: dict[str, np.ndarray] = {}
  total = 0
  for name, samples in table.items():
    if not isinstance(name, str):
      raise ValueError("the name of a sound is no text")
    row = samples.content if isinstance(samples, _Array) else samples
    if isinstance(row, list) and all(isinstance(x, (int, float, _Scalar)) for x in row):
      row = np.array(row, np.float64)  # whole numbers stay whole
    if not isinstance(row, np.ndarray):
      raise ValueError(f"the sound {name!r:.80} is no row of numbers")
    found[name] = row
    if (total := total + len(row)) > size:
      raise ValueError(f"holds more than {size} samples in {size} bytes")
  return found


def _unit_waves(sounds: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
  """Samples as they are kept, int16: a quarter of the memory of float64, and what every decoded clip holds in the end.

  All sounds of a table that are of one type have one scale, whatever a quiet one looks like alone.
  """
  ranges: dict[np.dtype, arrays.Range] = {}
  for wave in sounds.values():
    found = arrays.Range.of(wave, path)
    ranges[wave.dtype] = ranges[wave.dtype] | found if wave.dtype in ranges else found
  return {name: transforms.to_int16(arrays.unit_wave(wave, path, ranges[wave.dtype])) for name, wave in sounds.items()}


def _identity(path: Path) -> tuple[str, int, int]:
  """Name, time and size of a file, so that a new one of the same name is read anew; raises MediaError."""
  try:
    found = path.stat()
  except OSError as error:
    raise MediaError(path, "no such file", media.AGAIN) from error
  return str(path), found.st_mtime_ns, found.st_size
