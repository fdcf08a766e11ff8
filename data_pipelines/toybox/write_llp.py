"""LLP layout (AVVP): one to three classes per 10 s clip, each with its own audible and visible seconds.

LLP/video/<id>.mp4, AVVP_train.csv, AVVP_{val,test,unseen}_pd.csv (weak labels), AVVP_eval_{audio,visual}.csv
(dense rows of val, test and unseen), categories.txt. Tab-separated with header; filename = <id>_0_10.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.toybox.clips import (
  CLIP_SECONDS,
  Clip,
  add_object,
  clip_id,
  clip_rng,
  finish,
  other_classes,
  runs,
  sample_interval,
  write_lines,
  write_mp4,
)
from data_pipelines.toybox.library import Library
from data_pipelines.toybox.scene import Difficulty, sample_runs, sample_voice

FOLDER = "LLP"
SETTINGS = Difficulty()
NUM_CLASSES = (0.35, 0.45, 0.2)
# Kinds of an event: seen and heard, heard only, seen only.
BOTH, AUDIO, VISUAL = "both", "audio", "visual"
MORE_KINDS = (0.5, 0.25, 0.25)
MAIN_BOTH = 0.85
ALWAYS_VISIBLE = 0.4


def plan(seed: int, library: Library, split: str, index: int) -> Clip:
  """Every clip has something to see and something to hear; seen and heard seconds are drawn apart."""
  rng = clip_rng(seed, FOLDER, split, index)
  count = 1 + int(rng.choice(3, p=NUM_CLASSES))
  class_id = library.classes[index % len(library.classes)]
  tracks, off_screen = [], []
  for name, kind in zip([class_id, *other_classes(rng, library, count - 1, class_id)], _kinds(rng, count), strict=True):
    sounding = sample_runs(rng, CLIP_SECONDS, 0.55)
    visible = (True,) * CLIP_SECONDS
    if rng.random() >= ALWAYS_VISIBLE:
      visible = sample_interval(rng, CLIP_SECONDS, 3, 8)
    if kind == AUDIO:
      off_screen.append(sample_voice(rng, library, name, SETTINGS.gain, sounding))
    else:
      tracks.append(add_object(rng, library, name, SETTINGS, visible, sounding if kind == BOTH else None))
  scene = finish(rng, library, SETTINGS, tracks, off_screen, CLIP_SECONDS)
  return Clip(split, index, clip_id(seed, FOLDER, split, index), class_id, scene)


def _kinds(rng: np.random.Generator, count: int) -> list[str]:
  if count == 1:
    return [BOTH]
  more = [str(rng.choice([BOTH, AUDIO, VISUAL], p=MORE_KINDS)) for _ in range(count - 1)]
  if rng.random() < MAIN_BOTH:
    return [BOTH, *more]
  return [str(rng.choice([AUDIO, VISUAL])), BOTH, *more[1:]]


def name(class_id: str, library: Library) -> str:
  """Label without blanks or commas, as in LLP ("piano_keyboard")."""
  return library.label[class_id].replace(" ", "_")


def filename(clip: Clip) -> str:
  """<11-char id>_<start>_<end>."""
  return f"{clip.id}_0_{CLIP_SECONDS}"


def dense(clip: Clip, library: Library) -> dict[str, list[tuple[int, int, str]]]:
  """{"audio", "visual"} -> rows (onset, offset, label), read off the scene, in class order."""
  heard = {class_id: [False] * CLIP_SECONDS for class_id in library.classes}
  seen = {class_id: [False] * CLIP_SECONDS for class_id in library.classes}
  for voice in clip.scene.voices:
    heard[voice.class_id] = [a or b for a, b in zip(heard[voice.class_id], voice.sounding, strict=True)]
  for track in clip.scene.objects:
    seen[track.class_id] = [a or b for a, b in zip(seen[track.class_id], track.visible, strict=True)]
  return {
    kind: [(start, end, name(class_id, library)) for class_id in library.classes for start, end in runs(table[class_id])]
    for kind, table in (("audio", heard), ("visual", seen))
  }


def weak(clip: Clip, library: Library) -> str:
  """Comma-separated classes that are heard or seen at all, in class order."""
  found = {label for rows in dense(clip, library).values() for _, _, label in rows}
  return ",".join(label for label in (name(c, library) for c in library.classes) if label in found)


def write_media(root: Path, clip: Clip, library: Library) -> None:
  """LLP/video/<id>.mp4."""
  folder = root / FOLDER / "video"
  folder.mkdir(parents=True, exist_ok=True)
  write_mp4(folder / f"{clip.id}.mp4", clip.scene, library)


def write_annotations(root: Path, clips: Mapping[str, Sequence[Clip]], library: Library, seed: int) -> None:
  """Weak lists, dense rows and categories.txt. No chance here: `seed` is not used."""
  del seed
  folder = root / FOLDER
  for split, members in clips.items():
    table = "AVVP_train.csv" if split == "train" else f"AVVP_{split}_pd.csv"
    rows = [f"{filename(clip)}\t{weak(clip, library)}" for clip in members]
    write_lines(folder / table, ["filename\tevent_labels", *rows])
  for kind in ("audio", "visual"):
    rows = [
      f"{filename(clip)}\t{start}\t{end}\t{label}"
      for split, members in clips.items()
      if split != "train"
      for clip in members
      for start, end, label in dense(clip, library)[kind]
    ]
    write_lines(folder / f"AVVP_eval_{kind}.csv", ["filename\tonset\toffset\tevent_labels", *rows])
  write_lines(folder / "categories.txt", [name(class_id, library) for class_id in library.classes])
