"""What the data side agrees on: errors, media settings, annotation rows, split names, question types."""

import dataclasses
import hashlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

# One example or batch: arrays plus "id" (a str, or a list[str] in a batch).
Example = dict[str, Any]

# The mend of a damaged annotation file, and of a media file.
FETCH = "fetch this file again"
AGAIN = "fetch or make this file again, or let on_bad_clip='skip' leave it out"

SPLITS = ("train", "val", "test", "unseen")

# MUSIC-AVQA's nine question types (modality, kind), in the order of the benchmark's result table.
QUESTION_TYPES = (
  ("Audio", "Counting"),
  ("Audio", "Comparative"),
  ("Visual", "Counting"),
  ("Visual", "Location"),
  ("Audio-Visual", "Existential"),
  ("Audio-Visual", "Counting"),
  ("Audio-Visual", "Location"),
  ("Audio-Visual", "Comparative"),
  ("Audio-Visual", "Temporal"),
)


def printable(text: object) -> str:
  """Text, or a path as text, that every terminal and file takes: bytes that are no UTF-8 become escapes such as \\udcff."""
  return str(text).encode("utf-8", "backslashreplace").decode("utf-8")


def brief(error: object) -> str:
  """What an error of another library says, as one line of bearable length: some quote the whole file that they cannot read."""
  words = " ".join(str(error).split())
  return words if len(words) <= 300 else f"{words[:300]} ..."


class DataError(ValueError):
  """The data is missing or wrong in a way the user can mend; the message is one line, printable, that says how."""

  def __str__(self) -> str:
    return printable(super().__str__())


def refuse(error: object) -> int:
  """Prints what is wrong as one line on stderr -> exit code 2: the user can mend it."""
  print(f"error: {error}", file=sys.stderr)
  return 2


class MediaError(DataError):
  """A media file that cannot be used.

  Attributes:
    path: the file.
    reason: what is wrong with it.
    mend: what to do about it.
  """

  def __init__(self, path: Any, reason: str, mend: str) -> None:
    super().__init__(str(path), reason, mend)  # all three in args, so that the error survives pickling
    self.path, self.reason, self.mend = str(path), reason, mend

  def __str__(self) -> str:
    return printable(f"{self.path}: {self.reason}; {self.mend}")


@dataclasses.dataclass(frozen=True)
class Media:
  """How clips are decoded.

  Attributes:
    image_size: height and width of every frame, in pixels.
    sample_rate_hz: audio samples per second.
    crop: keep the aspect ratio and cut out the middle (CLIP) instead of stretching (DG-SCT, PHP).
  """

  image_size: int
  sample_rate_hz: int
  crop: bool = False

  def __post_init__(self) -> None:
    if self.image_size < 1 or self.sample_rate_hz < 1:
      raise DataError(f"image_size and sample_rate_hz must be positive, got {self}")


@dataclasses.dataclass(frozen=True)
class Record:
  """One annotation row; the datasets add their labels.

  Attributes:
    id: names the row in results and error messages.
    clip: names the media; several rows may share one clip.
  """

  id: str
  clip: str


def order_splits(names: Iterable[str]) -> tuple[str, ...]:
  """The names without repetition, known splits first in the order of SPLITS, others sorted after them."""
  found = set(names)
  return tuple(s for s in SPLITS if s in found) + tuple(sorted(found - set(SPLITS)))


def shuffled(seed: int, texts: Iterable[str]) -> list[str]:
  """Texts in the order of the sha256 of `SEED:TEXT`, the same on every machine."""
  return sorted(texts, key=lambda text: hashlib.sha256(f"{seed}:{text}".encode()).digest())


def index_of(names: tuple[str, ...]) -> Mapping[str, int]:
  """Name -> its position; raises DataError if a name stands twice."""
  table = {name: i for i, name in enumerate(names)}
  if len(table) != len(names):
    twice = sorted({n for n in names if names.count(n) > 1})
    raise DataError(f"listed more than once: {', '.join(twice)}")
  return table
