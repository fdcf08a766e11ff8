"""Tux-21, Tux Paint's stamps as a class-incremental benchmark: a picture, what it shows, and that spoken by volunteers.

The user's own stamps, GPL 2 with parts under other free licences, as Debian's package unpacks them:

  apt-get download tuxpaint-stamps-default && dpkg-deb -x tuxpaint-stamps-default_*.deb DIR

A stamp is `<name>.png`, cut out on a transparent ground, with `<name>.txt`, whose first line is its caption in English, and the
spoken captions `<name>_desc_<language>.ogg` or `.wav` (English: also without a language). Mirrored and flipped copies, drawings
(.svg) and sound effects are not read. The protocol, on version 2022.06.04-1: 362 pictures, 331 captions, 3012 pairs of picture
and speech.

- A class is the folder of the picture, without folders that only tell its style, and no more than three deep. Those of at least
  8 pictures count, symbols (letters, digits, signs) do not: 21.
- Classes in the order of the sha256 of `SEED:CLASS` make tasks of 3.
- Captions of a class in the order of the sha256 of `SEED:CAPTION`: the first quarter, rounded, is for testing. All pictures
  that have a test caption, of whatever class, are for testing, all others for training: nothing that was drawn twice, or is
  spoken of in many languages, stands on both sides.
"""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Hashable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_pipelines import media as media_lib
from data_pipelines import pictures, transforms
from data_pipelines.base import ClipLayout, Dataset
from data_pipelines.schema import FETCH, DataError, Example, Media, Record, index_of, shuffled
from data_pipelines.tables import is_name, read_lines

SPEECH_SECONDS = 2  # of a spoken caption that are heard
MIN_PICTURES, CLASS_DEPTH, CLASSES_PER_TASK = 8, 3, 3
# Folders that tell how a thing is drawn, not what it is.
STYLES = frozenset({"cartoon", "filled", "lowercase", "outlined", "plastic", "toys", "uppercase"})
# By the number of stamps of the whole package that are spoken of in each (925 to 6), then by name. A picture is heard in the
# first that it has, so in French; a language that is not listed comes after these.
LANGUAGES = ("fr", "ro", "ru", "bg", "ca", "es", "be", "el", "da", "lt", "nl", "en", "pt_BR", "ml")
CATEGORIES = (
  "animals/birds",
  "animals/fish",
  "animals/insects",
  "animals/mammals",
  "animals/mammals/bovines",
  "animals/mammals/rodents",
  "clothes",
  "food/fruit",
  "food/vegetables",
  "household",
  "household/tools",
  "plants/flowers",
  "seasonal/christmas",
  "seasonal/easter",
  "seasonal/halloween",
  "space/planets",
  "sports",
  "town",
  "town/houses",
  "town/monuments",
  "town/roadsigns",
)
GET = "apt-get download tuxpaint-stamps-default && dpkg-deb -x tuxpaint-stamps-default_*.deb"
_SPOKEN = re.compile(r"(.+)_desc(?:_([a-z]{2,3}(?:_[A-Z]{2})?))?\.(?:ogg|wav)")


@dataclasses.dataclass(frozen=True)
class Stamp(Record):
  """A picture of class `category` (index) and its caption.

  Attributes:
    caption: written, in English.
    language: of the spoken caption, "" if there is none: silence.
    spoken: its file, relative to the stamps folder, "" if there is none.
  """

  category: int
  caption: str
  language: str
  spoken: str


@dataclasses.dataclass(frozen=True)
class _Picture:
  """A stamp on disk: its class, its path without ending, and language -> name of the file of its spoken caption."""

  category: str
  clip: str
  spoken: dict[str, str]


class TuxPaint(Dataset):
  """Examples have visual [1, H, W, 3], audio [1, 2 * rate], and add label int32 (): the class index.

  Attributes:
    seed: decides the order of the classes in `groups` and the test captions; the protocol has 0 to 4.
    uncaptioned: pictures, without ending, that have no caption and so are no stamps.
    unpictured: captions, without ending, that have no picture.
  """

  name = "tux21"
  folders = ("stamps", "usr/share/tuxpaint/stamps")
  label_files = ("*/*.txt", "*/*/*.txt")
  layout = ClipLayout(video=(), frames=(), wave=())  # picture and sound lie side by side
  seconds = 1
  hint = f"get the stamps with: {GET} {{root}}"

  def __init__(self, root: Path | str, seed: int = 0) -> None:
    """Finds the stamps below a data root, or at it, and reads their captions.

    Raises DataError: no stamps, a caption that cannot be read, a folder that cannot be listed, a seed that is no number of 0 or
    more.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
      raise DataError(f"TuxPaint: the seed must be a whole number of at least 0, got {seed!r:.80}")
    super().__init__(root)
    self.label_root, self.seed = self.root, int(seed)
    self.uncaptioned: list[str] = []
    self.unpictured: list[str] = []
    self._companions: list[Path] = []
    found = [picture for place, names in _folders(self.root) for picture in self._stamps(place, names)]
    counts = Counter(picture.category for picture in found)
    self.classes = tuple(sorted(name for name, count in counts.items() if count >= MIN_PICTURES))
    if not self.classes:
      raise DataError(f"{self.root}: no class has {MIN_PICTURES} pictures; " + self.hint.format(root=root))
    self._index = index_of(self.classes)
    self._pictures = sorted((x for x in found if x.category in self._index), key=lambda x: f"{x.clip}.png".split("/"))
    self._captions = [self._read_caption(picture) for picture in self._pictures]

  @classmethod
  def _labels(cls, folder: Path) -> list[Path]:
    """Captions that lie beside their pictures, one or two folders down: a folder that holds some, of any name, holds stamps."""
    found = ([p for p in folder.glob(pattern) if p.with_suffix(".png").is_file()] for pattern in cls.label_files)
    return sorted(next(filter(None, found), []))

  def _stamps(self, place: tuple[str, ...], names: list[str]) -> Iterator[_Picture]:
    """The stamps of one folder whose class may count; notes what else belongs to them or should."""
    category = "/".join([part for part in place if part not in STYLES][:CLASS_DEPTH])
    if category.split("/")[0] in ("", "symbols"):
      return
    at = lambda name: "/".join((*place, name))
    stems = {ending: {n.removesuffix(ending) for n in names if n.endswith(ending)} for ending in (".png", ".svg", ".txt")}
    drawn = {stem for stem in stems[".png"] if not stem.endswith(("_mirror", "_flip"))}
    self.uncaptioned += map(at, sorted(drawn - stems[".txt"]))
    self.unpictured += map(at, sorted(stems[".txt"] - drawn - stems[".svg"]))
    spoken: dict[str, dict[str, str]] = {}
    for name in names:  # sorted, so that .ogg comes before .wav
      if match := _SPOKEN.fullmatch(name):
        spoken.setdefault(match[1], {}).setdefault(match[2] or "en", at(name))
    self._companions += (self.root / "/".join(place), *(self.root / at(name) for name in names))
    yield from (_Picture(category, at(stem), spoken.get(stem, {})) for stem in drawn & stems[".txt"])

  def _read_caption(self, picture: _Picture) -> str:
    path = self.root / f"{picture.clip}.txt"
    caption = next(iter(read_lines(path)), "").strip()
    if not caption:
      raise DataError(f"{path}: its first line should be the caption in English; {FETCH}")
    return caption

  def groups(self) -> tuple[tuple[str, ...], ...]:
    """The classes of each task, in the order in which this seed learns them: 7 tasks of 3."""
    order = shuffled(self.seed, self.classes)
    return tuple(tuple(order[i : i + CLASSES_PER_TASK]) for i in range(0, len(order), CLASSES_PER_TASK))

  def test_captions(self) -> set[str]:
    """The captions of the test set of this seed: of each class a quarter, rounded (a half up)."""
    chosen: set[str] = set()
    for name in self.classes:
      order = shuffled(self.seed, {c for x, c in zip(self._pictures, self._captions, strict=True) if x.category == name})
      chosen.update(order[: (len(order) + 2) // 4])
    return chosen

  def splits(self) -> tuple[str, ...]:
    return ("train", "test")

  def _read(self, split: str) -> list[Stamp]:
    return [self._row(x, caption, next(iter(_languages(x)), "")) for x, caption in self._of(split)]

  def pairs(self, split: str) -> list[Stamp]:
    """All pairs of picture and speech of a split: a row for each language that a picture is spoken of in, which `decode` takes.

    Their ids are `<clip>:<language>`; pictures without any speech have no row. Raises DataError for an unknown split.
    """
    self.records(split)
    rows = [self._row(x, caption, language) for x, caption in self._of(split) for language in _languages(x)]
    return [dataclasses.replace(row, id=f"{row.clip}:{row.language}") for row in rows]

  def _of(self, split: str) -> Iterator[tuple[_Picture, str]]:
    """The pictures of a split and their captions, in the order of their paths."""
    chosen = self.test_captions()
    pairs = zip(self._pictures, self._captions, strict=True)
    return ((picture, caption) for picture, caption in pairs if (caption in chosen) == (split == "test"))

  def _row(self, picture: _Picture, caption: str, language: str) -> Stamp:
    spoken = picture.spoken.get(language, "")
    return Stamp(picture.clip, picture.clip, self._index[picture.category], caption, language, spoken)

  def class_of(self, record: Stamp) -> str:
    return self.classes[record.category]

  def labels(self, record: Stamp) -> Example:
    return {"label": np.int32(record.category)}

  def path_names(self, record: Stamp) -> tuple[str, ...]:
    return PurePosixPath(record.clip).parts

  def clip_key(self, record: Stamp) -> Hashable:
    return record.clip, record.language

  def _paths(self, record: Stamp) -> tuple[Path, ...]:
    """The picture, and the spoken caption of a row that has one."""
    return tuple(self.root / name for name in (f"{record.clip}.png", record.spoken) if name)

  def clip_files(self, record: Stamp) -> tuple[Path, ...]:
    files = self._paths(record)
    return files if all(path.is_file() for path in files) else ()

  def companions(self) -> list[Path]:
    return self._companions

  def decode_clip(self, record: Stamp, media: Media) -> Example:
    """The media of a row; raises MediaError.

    Returns:
      visual uint8 [1, H, W, 3], the picture in the middle of a white square, and audio int16 [1, 2 * sample_rate_hz], the first
      SPEECH_SECONDS of its spoken caption, zeros after its end and where there is none.
    """
    picture, *sounds = self._paths(record)
    clip = self._zero_clip(media)
    clip["visual"][0] = pictures.read_on_white(picture, media)
    for sound in sounds:
      wave = media_lib.decode_audio(sound, media.sample_rate_hz)[: clip["audio"].shape[1]]
      clip["audio"][0, : len(wave)] = transforms.to_int16(wave)
    return clip

  def _zero_clip(self, media: Media) -> Example:
    samples = SPEECH_SECONDS * media.sample_rate_hz
    return {**super()._zero_clip(media), "audio": np.zeros((self.seconds, samples), np.int16)}

  def coverage(self, split: str) -> dict[str, Any]:
    """As of every dataset, and "silent": the clips without any spoken caption."""
    return {**super().coverage(split), "silent": [record.clip for record in self.records(split) if not record.spoken]}


def _languages(picture: _Picture) -> list[str]:
  """The languages that a picture is spoken of in, those of most stamps first."""
  others = sorted(picture.spoken.keys() - set(LANGUAGES))
  return [language for language in (*LANGUAGES, *others) if language in picture.spoken]


def _folders(root: Path) -> Iterator[tuple[tuple[str, ...], list[str]]]:
  """(parts of its path, names of its files) of every folder below the stamps folder; links to folders are not followed.

  Hidden names, and those that no message could show or no row could mean, are left out; a folder that cannot be listed would
  change the classes, so it raises DataError.
  """

  def refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); give this user the right to read it") from error

  plain = lambda names: sorted(n for n in names if is_name(n) and n.isprintable() and not n.startswith("."))
  for folder, below, names in os.walk(root, onerror=refuse):
    below[:] = plain(below)
    yield Path(folder).relative_to(root).parts, plain(names)
