"""AVSBench S4 layout: several objects to see, one of them sounds; its pixels are the mask.

S4 clips have a single source, so no sound comes from outside the picture here.

AVSBench/Single-source/s4_meta_data.csv and s4_data/{visual_frames,audio_wav,gt_masks}/<split>/<category>/...:
five 224 x 224 RGB frames and 1-bit masks per clip (train split: mask of the first frame only), wav at 16 kHz.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.toybox.clips import (
  Clip,
  add_object,
  clip_id,
  clip_rng,
  finish,
  other_classes,
  write_lines,
  write_wav,
)
from data_pipelines.toybox.library import Library
from data_pipelines.toybox.render import render_audio, render_frame, sounding_mask
from data_pipelines.toybox.scene import Difficulty

FOLDER = "AVSBench"
SECONDS = 5
FRAME_SIZE = 224
WAV_RATE_HZ = 16000
SETTINGS = Difficulty()
NUM_OBJECTS = (0.2, 0.45, 0.35)
# An empty mask rewards painting nothing, so pauses are few; the first second, which train labels, is none.
PAUSE = 0.15


def plan(seed: int, library: Library, split: str, index: int) -> Clip:
  """One to three objects of distinct classes, one sounding, so that only listening tells which to segment."""
  rng = clip_rng(seed, FOLDER, split, index)
  class_id = library.classes[index % len(library.classes)]
  sounding = [True] * SECONDS
  if rng.random() < PAUSE:
    sounding[int(rng.integers(1, SECONDS))] = False
  always = (True,) * SECONDS
  tracks = [add_object(rng, library, class_id, SETTINGS, always, tuple(sounding))]
  for other in other_classes(rng, library, int(rng.choice(3, p=NUM_OBJECTS)), class_id):
    tracks.append(add_object(rng, library, other, SETTINGS, always, None))
  scene = finish(rng, library, SETTINGS, tracks, [], SECONDS)
  return Clip(split, index, clip_id(seed, FOLDER, split, index), class_id, scene)


def category(class_id: str, library: Library) -> str:
  """Label without blanks, as in AVSBench ("piano_keyboard")."""
  return library.label[class_id].replace(" ", "_")


def frame_and_mask(clip: Clip, library: Library, second: int) -> tuple[np.ndarray, np.ndarray]:
  """The frame in the middle of `second`, uint8 [224, 224, 3], and its mask, bool [224, 224]."""
  rgb, alphas = render_frame(clip.scene, library, second + 0.5, FRAME_SIZE)
  return rgb, sounding_mask(clip.scene, alphas, second)


def write_media(root: Path, clip: Clip, library: Library) -> None:
  """Frames, masks and wav of one clip."""
  data = root / FOLDER / "Single-source" / "s4_data"
  place = Path(clip.split, category(clip.class_id, library))
  frames, masks = data / "visual_frames" / place / clip.id, data / "gt_masks" / place / clip.id
  waves = data / "audio_wav" / place
  for folder in (frames, masks, waves):
    folder.mkdir(parents=True, exist_ok=True)
  for second in range(SECONDS):
    rgb, mask = frame_and_mask(clip, library, second)
    file = f"{clip.id}_{second + 1}.png"
    Image.fromarray(rgb).save(frames / file, compress_level=1)
    if clip.split != "train" or second == 0:
      Image.fromarray(mask).save(masks / file)
  write_wav(waves / f"{clip.id}.wav", render_audio(clip.scene, library), WAV_RATE_HZ)


def write_annotations(root: Path, clips: Mapping[str, Sequence[Clip]], library: Library, seed: int) -> None:
  """s4_meta_data.csv and categories.txt. No chance here: `seed` is not used."""
  del seed
  folder = root / FOLDER / "Single-source"
  rows = [f"{clip.id},0,{category(clip.class_id, library)},{split}" for split, members in clips.items() for clip in members]
  write_lines(folder / "s4_meta_data.csv", ["name,start_time,category,split", *rows])
  write_lines(root / FOLDER / "categories.txt", [category(class_id, library) for class_id in library.classes])
