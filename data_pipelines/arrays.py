"""Sound that is stored as an array: `wave/<id>.npy`, and the scale of samples of any number type."""

import dataclasses
import io
import math
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipelines import limits
from data_pipelines.media import resample
from data_pipelines.schema import AGAIN, MediaError, brief

# DG-SCT and PHP store waves at this rate; an .npy file has no header that could tell it.
NPY_RATE_HZ = 32000
HEADER_BYTES = 16_384  # numpy itself refuses headers of more than 10,000


@dataclasses.dataclass(frozen=True)
class Header:
  """What an .npy file announces: the shape and type of its array, and the place in the file where its numbers begin."""

  shape: tuple[int, ...]
  dtype: np.dtype
  begin: int

  @property
  def count(self) -> int:
    """Numbers in the array."""
    return math.prod(self.shape)


def read_header(file: BinaryIO) -> Header:
  """Reads no more than the header, whatever length it announces; raises in every way that Python's parser does."""
  start = io.BytesIO(file.read(HEADER_BYTES))
  version = np.lib.format.read_magic(start)
  read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
  if not read:
    raise ValueError(f"npy version {version}")
  shape, _, dtype = read(start)  # the order of a row of samples does not matter
  if any(side < 0 for side in shape):
    raise ValueError(f"shape {shape}")
  return Header(shape, dtype, start.tell())


def read_npy_header(path: Path | str) -> Header:
  """The header of an array of numbers that the file is long enough for; raises MediaError (pickles are never opened)."""
  limits.check_file(path)
  try:
    with open(path, "rb") as file:
      found = read_header(file)
    if found.dtype.hasobject:
      raise ValueError("it holds a pickle, which is never opened")
  except Exception as error:  # the header is Python text: damaged, it fails in every way that Python's parser does
    raise MediaError(path, f"cannot be read as an array ({type(error).__name__}: {brief(error)})", AGAIN) from error
  there, wanted = Path(path).stat().st_size - found.begin, found.count * found.dtype.itemsize
  if wanted > there:
    what = f"cannot be read as an array (its header announces {found.count} numbers in {wanted} bytes, it has {there})"
    raise MediaError(path, what, AGAIN)
  return found


def read_npy_wave(path: Path | str, sample_rate_hz: int) -> np.ndarray:
  """`wave/<id>.npy` of DG-SCT and PHP, 32 kHz and any number type -> float32 [n] in [-1, 1].

  Raises MediaError: missing or broken file, or one that holds anything but finite numbers (pickles are never opened).
  """
  found = read_npy_header(path)
  limits.check_media(path, "samples", found.count, "has")
  limits.check_media(path, "duration_s", found.count / NPY_RATE_HZ, "lasts")
  try:
    with open(path, "rb") as file:  # not memory-mapped: a file that is cut meanwhile would end the process
      file.seek(found.begin)
      raw = file.read(found.count * found.dtype.itemsize)
    wave = np.frombuffer(raw, found.dtype, found.count) if found.count else np.zeros(0, found.dtype)
  except (OSError, ValueError) as error:
    raise MediaError(path, f"cannot be read as an array ({brief(error)})", AGAIN) from error
  return resample(unit_wave(wave, path), NPY_RATE_HZ, sample_rate_hz)


@dataclasses.dataclass(frozen=True)
class Range:
  """What tells the scale of samples: their largest magnitude, and whether all of them are whole numbers."""

  peak: float
  whole: bool

  @classmethod
  def of(cls, samples: np.ndarray, path: Path | str) -> "Range":
    """That of samples [n]; raises MediaError, naming `path`, if they are no finite numbers."""
    if not samples.size or samples.dtype.kind not in "fiu":
      raise MediaError(path, f"holds {samples.size} values of type {samples.dtype}, not samples", AGAIN)
    low, high = float(samples.min()), float(samples.max())  # nan and infinity come through both
    if not (np.isfinite(low) and np.isfinite(high)):
      raise MediaError(path, "holds samples that are not finite", AGAIN)
    return cls(max(-low, high), samples.dtype.kind != "f" or bool((samples == np.rint(samples)).all()))

  def __or__(self, other: "Range") -> "Range":
    """That of both together."""
    return Range(max(self.peak, other.peak), self.whole and other.whole)


def unit_wave(samples: np.ndarray, path: Path | str, around: Range | None = None) -> np.ndarray:
  """Stored samples [n] of any whole or floating type -> float32 [n] in [-1, 1]; raises MediaError, naming `path`.

  The type does not tell the scale: samples of 16 bit are also found as int32 and as floats, so the range decides: `around`,
  that of all sounds stored together, where it is known, for a quiet clip alone says little. Floats that are all whole
  numbers are of 16 bit.
  """
  found = Range.of(samples, path)
  around = around or found
  wave = samples.astype(np.float32)
  if samples.dtype.kind == "u":  # half of the range is silence, as in 8-bit wav
    return wave / 2.0 ** (8 * samples.dtype.itemsize - 1) - 1
  if samples.dtype.kind == "f" and around.peak <= 2 and not around.whole:  # true float audio does not get anywhere near 2
    return wave
  bits = 8 if samples.dtype == np.int8 else 16 if around.peak <= 32768 else 32
  return wave / np.float32(2.0 ** (bits - 1))
