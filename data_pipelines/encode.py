"""One clip as it is stored in records: encoded frames, encoded masks, int16 sound, and what it was made from.

Pictures that the dataset already stores as files are kept byte for byte. Frames of videos become JPEG.
"""

import dataclasses
import functools
import io
import os
import time
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines import media as media_lib
from data_pipelines.base import Dataset
from data_pipelines.records import file_sha256
from data_pipelines.schema import DataError, Media, MediaError, Record

JPEG_QUALITY = 95
SETTLED_S = 2.0  # the coarsest clock of a file system in use (FAT)


@dataclasses.dataclass(frozen=True)
class Encoding:
  """How clips are stored.

  Attributes:
    image_size: frames of videos are made smaller until their short side has this many pixels; 0 keeps their size.
    sample_rate_hz: of the stored sound.
  """

  image_size: int = 448  # twice what encoders of 224 pixels see: the second resizing is not seen
  sample_rate_hz: int = 32000

  def __post_init__(self) -> None:
    if self.image_size < 0 or self.sample_rate_hz < 1:
      raise DataError(f"image_size must be 0 or more and sample_rate_hz positive, got {self.image_size}, {self.sample_rate_hz}")


@dataclasses.dataclass(frozen=True)
class EncodedClip:
  """frames: T jpg or png; masks: png of the first of them; audio int16 [T * S]; duration_s of the video, T of pictures."""

  frames: list[bytes]
  masks: list[bytes]
  audio: np.ndarray
  duration_s: float


def encode_clip(dataset: Dataset, record: Record, encoding: Encoding) -> EncodedClip:
  """Encodes the seconds that the reader shows of a clip; raises MediaError or OSError."""
  files = dataset.clip_files(record)
  if len(files) == 1:
    found = media_lib.read_seconds(files[0], dataset.seconds, spread=dataset.spread)
    return EncodedClip(_jpegs(found.images, encoding), [], found.audio(encoding.sample_rate_hz).reshape(-1), found.duration_s)
  # The reader itself, at one pixel: says what is missing or broken, and which samples belong to the frames.
  clip = dataset.decode_clip(record, Media(1, encoding.sample_rate_hz))
  frames, masks = ([path.read_bytes() for path in paths] for paths in dataset.pictures(record))
  return EncodedClip(frames, masks, clip["audio"].reshape(-1), float(dataset.seconds))


def _jpegs(images: list[Image.Image], encoding: Encoding) -> list[bytes]:
  """Pictures -> JPEG files; one shown twice is encoded once."""
  done = {id(image): _jpeg(image, encoding.image_size) for image in images}
  return [done[id(image)] for image in images]


def _jpeg(image: Image.Image, image_size: int) -> bytes:
  short = min(image.size)
  if 0 < image_size < short:
    size = tuple(round(side * image_size / short) for side in image.size)
    image = image.resize(size, Image.Resampling.BICUBIC)
  image.save(buffer := io.BytesIO(), "JPEG", quality=JPEG_QUALITY)
  return buffer.getvalue()


def source_files(dataset: Dataset, record: Record) -> list[Path]:
  """The files that a clip is made from, those of them that exist."""
  files = dataset.clip_files(record)
  pictures: list[Path] = []
  if len(files) > 1:
    try:
      pictures = [path for paths in dataset.pictures(record) for path in paths]
    except MediaError:  # no pictures: whoever encodes the clip hears it too and lists it
      pictures = []
  return [path for path in dict.fromkeys([*pictures, *files]) if path.is_file()]


@dataclasses.dataclass(frozen=True)
class Stamp:
  """What the file system says of a file as long as nobody touches it: inode, bytes, mtime and ctime in nanoseconds."""

  inode: int
  size: int
  mtime_ns: int
  ctime_ns: int

  @classmethod
  def of(cls, path: Path) -> "Stamp":
    status = path.stat()
    return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

  @property
  def settled(self) -> bool:
    """Whether a later change must show: one that follows at once may fall into the same tick of a coarse clock."""
    return abs(time.time_ns() - max(self.mtime_ns, self.ctime_ns)) > SETTLED_S * 1e9


@dataclasses.dataclass(frozen=True)
class Fingerprint:
  """A source file: path relative to the dataset folder, bytes, sha256."""

  path: str
  size: int
  sha256: str

  @classmethod
  def of(cls, path: Path, root: Path) -> "Fingerprint":
    stamp = Stamp.of(path)
    return cls(os.path.relpath(path, root), stamp.size, _sha256(path, stamp))

  def holds(self, path: Path, root: Path, known: Stamp | None) -> bool:
    """Whether `path` is still that file; its content is read unless its stamp is the `known` one."""
    stamp = Stamp.of(path)
    if os.path.relpath(path, root) != self.path or stamp.size != self.size:
      return False
    return stamp == known or _sha256(path, stamp) == self.sha256


def _sha256(path: Path, stamp: Stamp) -> str:
  return _kept_sha256(path, stamp) if stamp.settled else file_sha256(path)


@functools.lru_cache(maxsize=64)
def _kept_sha256(path: Path, stamp: Stamp) -> str:
  """Of a file as it is now; kept, because some files hold the sound of many clips."""
  return file_sha256(path)
