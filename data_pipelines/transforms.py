"""Small pure functions on decoded media: which seconds, resizing, int16 audio, masks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image


def pick_seconds(available: float, seconds: int, *, spread: bool) -> np.ndarray:
  """Which seconds of a clip an example shows -> int64 [T], the start of each in seconds.

  Without `spread` they are 0..T-1, because labels are given per second from the start of the clip. With it, a
  longer clip gives T seconds evenly spread over its whole length, truncated to whole seconds: the linspace
  rule that DG-SCT applies to MUSIC-AVQA's 60 s clips, so that mp4 files and one-per-second frame folders show
  the same seconds.
  """
  whole = round(available)
  if not spread or whole <= seconds:
    return np.arange(seconds)
  return np.linspace(0, whole - 1, seconds).astype(np.int64)


def pick_files(count: int, wanted: int) -> np.ndarray:
  """Which of `count` frame files stand for `wanted` seconds -> int64 [wanted] (DG-SCT: cut linspace)."""
  return np.linspace(0, count - 1, wanted).astype(np.int64)


def resize_image(image: Image.Image, size: int, *, crop: bool = False) -> np.ndarray:
  """Any Pillow image -> uint8 [size, size, 3], bicubic; `crop` as in `square`."""
  rgb = image if image.mode == "RGB" else image.convert("RGB")
  return np.asarray(square(rgb, size, Image.Resampling.BICUBIC, crop=crop), np.uint8)


def square(image: Image.Image, size: int, resample: Image.Resampling, *, crop: bool) -> Image.Image:
  """size x size: stretched, aspect ratio not kept (DG-SCT, PHP); or, with `crop`, the middle of the picture whose short side
  was resized (CLIP)."""
  short = min(image.size)
  wanted = tuple(int(size * side / short) for side in image.size) if crop else (size, size)
  image = image if image.size == wanted else image.resize(wanted, resample)
  left, top = ((side - size) // 2 for side in wanted)
  return image.crop((left, top, left + size, top + size)) if wanted != (size, size) else image


def binarise(mask: np.ndarray, *, indices: bool = False) -> np.ndarray:
  """Stored mask [H, W] or [H, W, C] -> uint8 [H, W] in {0, 1}: strictly above half.

  Half of white (255; of 16-bit pictures 65535), so that faint noise in a mask without object stays background. But masks are
  also found as 1-bit, as 0/1 and as palette `indices`, 0 and 1 or 0 and 255: of these, half of their own largest value.
  """
  values = mask.max(-1) if mask.ndim == 3 else mask
  largest = float(values.max(initial=0))
  white = largest if indices or largest <= 1 else 255 if largest <= 255 else 65535
  return (values.astype(np.float32) > 0.5 * white).astype(np.uint8)


def resize_mask(mask: np.ndarray, size: int, *, crop: bool = False) -> np.ndarray:
  """uint8 [H, W] -> uint8 [size, size], nearest neighbour, so that no new values appear; `crop` as in `square`."""
  return np.asarray(square(Image.fromarray(mask), size, Image.Resampling.NEAREST, crop=crop), np.uint8)


def to_int16(wave: np.ndarray) -> np.ndarray:
  """Float samples in [-1, 1] -> int16 of the same shape; louder samples are clipped."""
  return np.clip(np.rint(wave * 32768.0), -32768, 32767).astype(np.int16)


def cut_seconds(wave: np.ndarray, rate_hz: int, starts: np.ndarray) -> np.ndarray:
  """float32 [n] -> int16 [T, rate_hz]: the second that begins at each of `starts`, zeros beyond the end."""
  out = np.zeros((len(starts), rate_hz), np.int16)
  for row, start in zip(out, starts, strict=True):
    piece = wave[start * rate_hz : (start + 1) * rate_hz]
    row[: len(piece)] = to_int16(piece)
  return out


def flip(example: Mapping[str, Any], rng: np.random.Generator, *, keys: Sequence[str]) -> dict[str, Any]:
  """Half of the examples mirrored left to right, all seconds alike: the arrays [T, H, W, ...] under `keys`, as new arrays."""
  if rng.random() >= 0.5:
    return dict(example)
  return {**example, **{key: np.ascontiguousarray(example[key][:, :, ::-1]) for key in keys}}
