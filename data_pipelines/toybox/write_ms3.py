"""AVSBench MS3 layout: up to two of the objects to see sound, each in its own seconds; their pixels together are the mask.

As in S4 no sound comes from outside the picture. Where nothing sounds, the mask is empty.

AVSBench/Multi-sources/ms3_meta_data.csv and ms3_data/{visual_frames/<id>/<id>.mp4_{1..5}.png, audio_wav/<split>/<id>.wav,
gt_masks/<split>/<id>/<id>_{1..5}.png}: 224 x 224 RGB frames, palette masks (0 or 255) of all seconds of all splits.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.toybox import write_avs
from data_pipelines.toybox.clips import Clip, add_object, clip_id, clip_rng, finish, other_classes, write_lines, write_wav
from data_pipelines.toybox.library import Library
from data_pipelines.toybox.render import render_audio
from data_pipelines.toybox.scene import Difficulty, sample_runs

FOLDER = "AVSBench-MS3"  # names the layout, and its seeds; on disk it lies beside S4
SECONDS = write_avs.SECONDS
SETTINGS = Difficulty()
NUM_OBJECTS = (0.15, 0.5, 0.35)
TWO_VOICES = 0.75  # of the scenes with more than one object
ACTIVE = 0.7  # share of the seconds in which a voice sounds


def plan(seed: int, library: Library, split: str, index: int) -> Clip:
  """One to three objects of distinct classes, one or two of which sound now and then."""
  rng = clip_rng(seed, FOLDER, split, index)
  class_id = library.classes[index % len(library.classes)]
  others = other_classes(rng, library, int(rng.choice(3, p=NUM_OBJECTS)), class_id)
  num_voices = 2 if others and rng.random() < TWO_VOICES else 1
  always = (True,) * SECONDS
  tracks = []
  for place, name in enumerate([class_id, *others]):
    sounding = sample_runs(rng, SECONDS, ACTIVE) if place < num_voices else None
    tracks.append(add_object(rng, library, name, SETTINGS, always, sounding))
  scene = finish(rng, library, SETTINGS, tracks, [], SECONDS)
  return Clip(split, index, clip_id(seed, FOLDER, split, index), class_id, scene)


def folder(root: Path) -> Path:
  """Where the table lies."""
  return root / write_avs.FOLDER / "Multi-sources"


def write_media(root: Path, clip: Clip, library: Library) -> None:
  """Frames, masks and wav of one clip."""
  data = folder(root) / "ms3_data"
  frames, masks, waves = (
    data / "visual_frames" / clip.id,
    data / "gt_masks" / clip.split / clip.id,
    data / "audio_wav" / clip.split,
  )
  for place in (frames, masks, waves):
    place.mkdir(parents=True, exist_ok=True)
  for second in range(SECONDS):
    rgb, mask = write_avs.frame_and_mask(clip, library, second)
    Image.fromarray(rgb).save(frames / f"{clip.id}.mp4_{second + 1}.png", compress_level=1)
    Image.fromarray(np.uint8(255) * mask).convert("P").save(masks / f"{clip.id}_{second + 1}.png")
  write_wav(waves / f"{clip.id}.wav", render_audio(clip.scene, library), write_avs.WAV_RATE_HZ)


def write_annotations(root: Path, clips: Mapping[str, Sequence[Clip]], library: Library, seed: int) -> None:
  """ms3_meta_data.csv. Neither chance nor classes here: `library` and `seed` are not used."""
  del library, seed
  rows = [f"{clip.id},{split}" for split, members in clips.items() for clip in members]
  write_lines(folder(root) / "ms3_meta_data.csv", ["video_id,split", *rows])
