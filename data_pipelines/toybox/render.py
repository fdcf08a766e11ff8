"""Turns scenes into pixels and samples. Pure functions of (scene, library, time, size)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data_pipelines.toybox.library import SAMPLE_RATE_HZ, Library

if TYPE_CHECKING:
  from data_pipelines.toybox.scene import Backdrop, Scene, Track, Voice

# Alpha from which a pixel belongs to an object: soft shadows and glass are near or below it (media README).
MASK_ALPHA = 128
# Up to this level the mixture is left as it is; above it bends towards 1.
CLIP_KNEE = 0.6


def render_frame(scene: Scene, library: Library, t_seconds: float, size: int) -> tuple[np.ndarray, list[np.ndarray]]:
  """Paints one frame.

  Args:
    t_seconds: moment, 0 <= t < scene.seconds.
    size: height and width of the frame in pixels.

  Returns:
    rgb uint8 [size, size, 3] and, per object, the alpha uint8 [size, size] of its visible part (times what
    nearer objects let through); all zero in seconds in which the object is not visible.
  """
  if not 0 <= t_seconds < scene.seconds:
    raise ValueError(f"t_seconds {t_seconds} is outside [0, {scene.seconds})")
  rgb = library.last("backdrop", (scene.backdrop, size), lambda: render_backdrop(scene.backdrop, library, size)).copy()
  alphas = [np.zeros((size, size), np.uint8) for _ in scene.objects]
  for i, track in enumerate(scene.objects):
    if not track.visible[int(t_seconds)]:
      continue
    sprite, where, part = _position(track, library, t_seconds / scene.seconds, size)
    sprite = sprite[part]
    alpha = sprite[..., 3]
    behind = 255 - alpha.astype(np.uint16)
    under = rgb[where]
    under[:] = sprite[..., :3] + (under * behind[..., None] // 255).astype(np.uint8)
    for nearer in alphas[:i]:
      nearer[where] = nearer[where] * behind // 255
    alphas[i][where] = alpha
  return rgb, alphas


def sounding_mask(scene: Scene, alphas: list[np.ndarray], second: int) -> np.ndarray:
  """Pixels of the visible objects that sound in `second` -> bool [H, W] (alpha >= 128 after occlusion)."""
  mask = np.zeros(alphas[0].shape, bool) if alphas else np.zeros((0, 0), bool)
  for track, alpha in zip(scene.objects, alphas, strict=True):
    if track.sounding[second]:
      mask |= alpha >= MASK_ALPHA
  return mask


def render_backdrop(backdrop: Backdrop, library: Library, size: int) -> np.ndarray:
  """Cropped, mirrored and tinted background -> uint8 [size, size, 3]."""
  left, top, side = backdrop.crop
  image = Image.fromarray(library.backgrounds[backdrop.background])
  image = image.resize((size, size), Image.BILINEAR, box=(left, top, left + side, top + side))
  if backdrop.flip:
    image = image.transpose(Image.FLIP_LEFT_RIGHT)
  levels = np.arange(256, dtype=np.float32)[None] * np.asarray(backdrop.gain, np.float32)[:, None] + backdrop.bias
  table = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
  return np.array(image.point(table.reshape(-1).tolist()))


def render_second(scene: Scene, library: Library, t: int) -> np.ndarray:
  """The mixture of second `t` -> float32 [32000] in (-1, 1)."""
  start = (scene.noise_start + 7919 * t) % (3 * SAMPLE_RATE_HZ)
  wave = library.noise()[start : start + SAMPLE_RATE_HZ] * np.float32(scene.noise_gain)
  for voice in scene.voices:
    if voice.sounding[t]:
      pieces = library.pieces(voice.class_id, voice.sound, voice.repeats)
      wave += np.float32(voice.gain) * pieces[_piece(voice, t, len(pieces))]
  return soft_clip(wave)


def render_audio(scene: Scene, library: Library) -> np.ndarray:
  """The whole sound track -> float32 [seconds * 32000]."""
  return np.concatenate([render_second(scene, library, t) for t in range(scene.seconds)])


def soft_clip(wave: np.ndarray) -> np.ndarray:
  """Leaves |x| <= 0.6 alone, bends the rest smoothly below 1; changes `wave` [n] in place, returns it."""
  loud = np.abs(wave) > CLIP_KNEE
  if loud.any():
    room = 1 - CLIP_KNEE
    high = wave[loud]
    wave[loud] = np.sign(high) * (CLIP_KNEE + room * np.tanh((np.abs(high) - CLIP_KNEE) / room) * np.float32(0.999))
  return wave


def _piece(voice: Voice, t: int, count: int) -> int:
  """Which second of the recording is heard: it runs on through a run of sounding seconds, looped."""
  start = t
  while start > 0 and voice.sounding[start - 1]:
    start -= 1
  return (voice.phase + t - start) % count


def _position(
  track: Track, library: Library, progress: float, size: int
) -> tuple[np.ndarray, tuple[slice, slice], tuple[slice, slice]]:
  """Sprite, the slices of the frame it covers, and the slices of the sprite that lie inside the frame."""
  sprite = library.sprite(track.class_id, track.picture, max(2, round(track.scale * size)), track.flip)
  height, width = sprite.shape[:2]
  x, y = track.centre(progress)
  left, top = round(x * size - width / 2), round(y * size - height / 2)
  rows = slice(max(0, top), max(0, min(size, top + height)))
  columns = slice(max(0, left), max(0, min(size, left + width)))
  part = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
  return sprite, (rows, columns), part
