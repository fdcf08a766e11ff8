"""How much a file may ask for: what is larger is refused in one line, before memory or hours are spent on it.

A few damaged or hostile bytes can announce any size, so what a file claims is compared with these limits, and what it gives
is counted while it is decoded. Raise one for a process and all its workers by the environment variable PHPJAX_LIMITS, such as
PHPJAX_LIMITS=duration_s=7200,pixels=150000000.
"""

import dataclasses
import functools
import math
import os
import stat
from pathlib import Path

from data_pipelines.schema import AGAIN, FETCH, DataError, MediaError

VARIABLE = "PHPJAX_LIMITS"


@dataclasses.dataclass(frozen=True)
class Limits:
  """The most that is read; the defaults are several times what any published benchmark holds.

  Attributes:
    media_bytes: of one media file.
    table_bytes: of one AVS.npy, the sounds of many clips: it is read whole.
    label_bytes: of one label file or manifest: it is read whole. Its objects in memory take some ten times this.
    label_rows: row numbers in one order file of AVE.
    duration_s: how much of a clip is decoded. Files may be longer where only their beginning is shown.
    pixels: of one picture, frame or mask, width times height; Pillow's own limit is the highest.
    frame_pixels: of one frame of a video, of which all that are shown are held at once; 8K has 33 million.
    aspect: the long side of a picture by its short one.
    frames: decoded for one clip, whether they are shown or not.
    video_pixels: of all those frames together.
    samples: of one sound as it is in the file, all channels together.
    sample_rate_hz: of sound in a file.
  """

  media_bytes: float = 4e9
  table_bytes: float = 2e9
  label_bytes: float = 64 << 20
  label_rows: float = 1e6
  duration_s: float = 1200
  pixels: float = 64e6
  frame_pixels: float = 36e6
  aspect: float = 100
  frames: float = 150_000
  video_pixels: float = 1e11
  samples: float = 120e6
  sample_rate_hz: float = 768_000


HIGHEST = {"pixels": 178_956_970}  # Pillow refuses more whatever it is told here


def current() -> Limits:
  """The limits of now; raises DataError if PHPJAX_LIMITS is not understood."""
  return parse(os.environ.get(VARIABLE, ""))


@functools.lru_cache(maxsize=8)
def parse(text: str) -> Limits:
  """`duration_s=7200,pixels=1e8` -> Limits; raises DataError."""
  known = [field.name for field in dataclasses.fields(Limits)]
  raised: dict[str, float] = {}
  for part in filter(None, (part.strip() for part in text.split(","))):
    name, _, number = part.partition("=")
    try:
      value = float(number)
    except ValueError:
      value = math.nan
    if name not in known or not 0 < value <= HIGHEST.get(name, math.inf):  # nan too
      most = f" of at most {HIGHEST[name]}" if name in HIGHEST else ""
      raise DataError(f"{VARIABLE}: {part!r:.80} is no NAME=NUMBER{most}; the names are {', '.join(known)}")
    raised[name] = value
  return Limits(**raised)


def excess(name: str, value: float, what: str) -> tuple[str, str] | None:
  """(reason, mend) where `value` is more than the limit `name`, else None; `what` says whose it is, as "its sound has"."""
  if (most := getattr(current(), name)) >= value:  # what is not a number is refused too
    return None
  unit = {"s": " s", "hz": " Hz"}.get(name.rpartition("_")[2], f" {name.replace('_', ' ')}")
  unit = " (long side by short)" if name == "aspect" else unit
  needed = f"{VARIABLE}={name}={value:.10g}"
  return f"{what} {value:.10g}{unit}, more than the limit of {most:.10g}", f"make it smaller, or if you trust it set {needed}"


def check_media(path: Path | str, name: str, value: float, what: str) -> None:
  """Raises MediaError, naming `path`, where `value` is more than the limit `name`."""
  if found := excess(name, value, what):
    raise MediaError(path, *found)


def check_file(path: Path | str, name: str = "media_bytes") -> None:
  """Raises MediaError for a file of more bytes than the limit `name`, and for what is no file: a pipe would never end."""
  try:
    status = Path(path).stat()
  except (OSError, ValueError) as error:
    reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be opened ({error})"
    raise MediaError(path, reason, AGAIN) from error
  if not stat.S_ISREG(status.st_mode):
    raise MediaError(path, "no such file", AGAIN)
  check_media(path, name, status.st_size, "has")


def check_picture(path: Path | str, width: int, height: int, name: str = "pixels") -> None:
  """Raises MediaError for pictures of more than the limit `name`, and for stripes: cut to a square they would grow."""
  if min(width, height) < 1:
    raise MediaError(path, f"is {width} x {height} pixels, which is no picture", AGAIN)
  check_media(path, name, width * height, f"is {width} x {height},")
  check_media(path, "aspect", max(width, height) / min(width, height), f"is {width} x {height},")


def read_label_bytes(path: Path) -> bytes:
  """The content of a label file or manifest.

  Raises:
    DataError: it is too large or no plain file.
    OSError: it cannot be read; FileNotFoundError if there is none.
  """
  if not stat.S_ISREG((status := path.stat()).st_mode):
    raise DataError(f"{path}: is no file; {FETCH}")
  if found := excess("label_bytes", status.st_size, "has"):
    raise DataError(f"{path}: {found[0]}; {found[1]}")
  return path.read_bytes()
