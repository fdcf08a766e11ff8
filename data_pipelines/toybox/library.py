"""The embedded pictures, sounds and backgrounds (public domain and CC0, see media/README.md) as arrays.

The manifest splits `train` and `val` are the KNOWN objects, used by the train, val and test scenes and
by pretraining; its split `test` holds the UNSEEN ones, used by the `unseen` sets only.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from data_pipelines.schema import DataError

MEDIA_DIR = Path(__file__).parent / "media"
SAMPLE_RATE_HZ = 32000
KNOWN = ("train", "val")
UNSEEN = ("test",)

# Every one-second piece is brought to this RMS, so that a voice's gain alone says which of two is louder.
PIECE_RMS = 0.1
# A piece is scaled to at most this peak (clicks have a tiny RMS); the mixture is clipped softly anyway.
PIECE_PEAK = 1.2
# The tail of a decaying recording is not called a sounding second below this share of its loudest piece.
QUIET_SHARE = 0.2
FADE_SAMPLES = 160
# Bound of the sprite cache (a sprite of 50 px takes 10 kB).
MAX_SPRITES = 6000


@dataclasses.dataclass(frozen=True)
class Picture:
  """One cut-out picture: `name` ("drum/image_00.png"), `rgba` uint8 [h, w, 4] (straight alpha)."""

  name: str
  rgba: np.ndarray


@dataclasses.dataclass(frozen=True)
class Sound:
  """One recording: `name` ("drum/sound_00.ogg"), `wave` float32 [n], mono, 32 kHz, at most 3 s."""

  name: str
  wave: np.ndarray


@dataclasses.dataclass(frozen=True)
class Library:
  """Pictures, sounds and backgrounds of some manifest splits, with caches of what rendering needs again.

  Attributes:
    splits: the manifest splits it was made of.
    classes: the 14 class ids, in manifest order.
    noun: class id -> noun phrase ("a drum").
    sounding: class id -> what one hears ("a drum is beaten").
    label: class id -> the noun without its article ("piano keyboard"), used as category name.
    pictures, sounds: class id -> list of `Picture`, `Sound`.
    backgrounds: list of uint8 [120, 160, 3].
    background_names: file names of the backgrounds, in the same order.
  """

  splits: tuple[str, ...]
  classes: tuple[str, ...]
  noun: dict[str, str]
  sounding: dict[str, str]
  label: dict[str, str]
  pictures: dict[str, list[Picture]]
  sounds: dict[str, list[Sound]]
  backgrounds: list[np.ndarray]
  background_names: list[str]
  cache: dict[tuple, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)
  sprites: dict[tuple, np.ndarray] = dataclasses.field(default_factory=dict, repr=False, compare=False)

  def sprite(self, class_id: str, picture: int, side: int, flip: bool) -> np.ndarray:
    """Picture with its longest side `side` pixels -> premultiplied uint8 [h, w, 4]."""
    key = (class_id, picture, side, flip)
    found = self.sprites.get(key)
    if found is None:
      found = _sprite(self.pictures[class_id][picture].rgba, side, flip)
      while len(self.sprites) >= MAX_SPRITES:
        self.sprites.pop(next(iter(self.sprites)), None)
      self.sprites[key] = found
    return found

  def pieces(self, class_id: str, sound: int, repeats: int) -> np.ndarray:
    """The seconds of a sound -> float32 [pieces, 32000] of equal RMS, each of `repeats` equal strokes."""
    key = ("pieces", class_id, sound, repeats)
    if key not in self.cache:
      self.cache[key] = _pieces(self.sounds[class_id][sound].wave, repeats)
    return self.cache[key]

  def last(self, name: str, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What `make` gave for the latest `key`: one slot per name, as the frames of a clip share a backdrop."""
    found = self.cache.get((name,))
    if found is None or found[0] != key:
      self.cache[(name,)] = found = (key, make())
    return found[1]

  def noise(self) -> np.ndarray:
    """Four seconds of unit white noise, float32 [128000]; a scene's noise floor is a window of it."""
    key = ("noise",)
    if key not in self.cache:
      self.cache[key] = np.random.default_rng(0).standard_normal(4 * SAMPLE_RATE_HZ, dtype=np.float32)
    return self.cache[key]


def read_manifest(media_dir: Path = MEDIA_DIR) -> dict:
  """The parsed manifest.json (keys `classes`, `files`, ...). Raises DataError if it is not there."""
  path = media_dir / "manifest.json"
  if not path.is_file():
    raise DataError(f"toybox: {path} is missing; reinstall the package (its data files belong to it)")
  return json.loads(path.read_text(encoding="utf-8"))


def load_library(splits: tuple[str, ...] = KNOWN, media_dir: Path = MEDIA_DIR) -> Library:
  """Reads the pictures, sounds and backgrounds of the given manifest splits.

  Args:
    splits: of "train", "val", "test"; train + val = known objects, test = unseen objects.
    media_dir: folder of manifest.json.

  Raises:
    DataError: a split that does not exist, a missing file, or one whose sha256 is not the manifest's.
  """
  manifest = read_manifest(media_dir)
  known = {entry["split"] for entry in manifest["files"]}
  if not splits or set(splits) - known:
    raise DataError(f"toybox: splits {splits} are not all among {sorted(known)}")
  infos = manifest["classes"]
  library = Library(
    splits=tuple(splits),
    classes=tuple(info["id"] for info in infos),
    noun={info["id"]: info["noun"] for info in infos},
    sounding={info["id"]: info["sounding"] for info in infos},
    label={info["id"]: _without_article(info["noun"]) for info in infos},
    pictures={info["id"]: [] for info in infos},
    sounds={info["id"]: [] for info in infos},
    backgrounds=[],
    background_names=[],
  )
  for entry in manifest["files"]:
    if entry["split"] not in splits:
      continue
    content = _read(media_dir / entry["file"], entry["sha256"])
    if entry["kind"] == "image":
      rgba = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))
      library.pictures[entry["class"]].append(Picture(entry["file"], rgba))
    elif entry["kind"] == "sound":
      library.sounds[entry["class"]].append(Sound(entry["file"], _decode(content, entry["seconds"])))
    else:
      library.backgrounds.append(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
      library.background_names.append(entry["file"])
  return library


def _without_article(noun: str) -> str:
  first, _, rest = noun.partition(" ")
  return rest if first in ("a", "an") else noun


def _read(path: Path, sha256: str) -> bytes:
  if not path.is_file():
    raise DataError(f"toybox: {path} is missing; reinstall the package (its data files belong to it)")
  content = path.read_bytes()
  if hashlib.sha256(content).hexdigest() != sha256:
    raise DataError(f"toybox: {path} is damaged (its sha256 is not the manifest's); reinstall the package")
  return content


def _decode(content: bytes, seconds: float) -> np.ndarray:
  """Ogg Vorbis or FLAC bytes -> float32 [n] at 32 kHz; cut to the manifest's length (codecs pad the end)."""
  with av.open(io.BytesIO(content)) as container:
    frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
  wave = np.concatenate([frame.reshape(-1) for frame in frames])
  if wave.dtype.kind == "i":
    wave = wave.astype(np.float32) / np.iinfo(wave.dtype).max
  return wave.astype(np.float32)[: round(seconds * SAMPLE_RATE_HZ)]


def _sprite(rgba: np.ndarray, side: int, flip: bool) -> np.ndarray:
  """Resizes on premultiplied colour, so that transparent pixels leave no dark or bright rim."""
  height, width = rgba.shape[:2]
  scale = side / max(height, width)
  size = (max(1, round(width * scale)), max(1, round(height * scale)))
  alpha = rgba[..., 3:].astype(np.float32)
  planes = np.concatenate([rgba[..., :3] * (alpha / 255), alpha], axis=-1)
  resized = np.stack(
    [np.asarray(Image.fromarray(np.ascontiguousarray(planes[..., c])).resize(size, Image.BICUBIC)) for c in range(4)],
    axis=-1,
  )
  # Bicubic overshoots: colour may be neither negative nor brighter than its own alpha allows.
  resized[..., 3] = np.clip(resized[..., 3], 0, 255)
  resized[..., :3] = np.clip(resized[..., :3], 0, resized[..., 3:])
  pixels = np.rint(resized).astype(np.uint8)
  return np.ascontiguousarray(pixels[:, ::-1] if flip else pixels)


def _pieces(wave: np.ndarray, repeats: int) -> np.ndarray:
  """Cuts a recording into seconds (the loud ones), each made of `repeats` equal strokes, at equal RMS."""
  rate = SAMPLE_RATE_HZ
  stroke = rate // repeats
  count = max(1, -(-(len(wave) - rate // 4) // rate))
  pieces = []
  for i in range(count):
    strokes = np.zeros((repeats, stroke), np.float32)
    source = wave[i * rate : i * rate + stroke]
    strokes[:, : len(source)] = source
    strokes[:, -FADE_SAMPLES:] *= np.linspace(1, 0, FADE_SAMPLES, dtype=np.float32)
    piece = np.zeros(rate, np.float32)
    piece[: repeats * stroke] = strokes.reshape(-1)
    if i:
      piece[:FADE_SAMPLES] *= np.linspace(0, 1, FADE_SAMPLES, dtype=np.float32)
    pieces.append(piece)
  rms = np.array([np.sqrt(np.mean(piece**2)) for piece in pieces])
  loud = [piece for piece, value in zip(pieces, rms, strict=True) if value >= QUIET_SHARE * rms.max()]
  stack = np.stack(loud)
  gain = PIECE_RMS / np.sqrt(np.mean(stack**2, axis=1, keepdims=True))
  return (stack * np.minimum(gain, PIECE_PEAK / np.abs(stack).max(axis=1, keepdims=True))).astype(np.float32)
