"""AVE layout (AVE_Dataset.zip of Tian et al., ECCV 2018): one audible and visible event per 10 s clip.

One or two objects are seen; a sound from outside the picture may be heard.
AVE/<id>.mp4, Annotations.txt (header, `&`-separated), {train,val,test,unseen}Set.txt, categories.txt.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipelines.toybox.clips import (
  CLIP_SECONDS,
  Clip,
  add_object,
  clip_id,
  clip_rng,
  finish,
  interval,
  other_classes,
  runs,
  sample_interval,
  write_lines,
  write_mp4,
)
from data_pipelines.toybox.library import Library
from data_pipelines.toybox.scene import Difficulty, sample_voice

FOLDER = "AVE"
HEADER = "Category&VideoID&Quality&StartTime&EndTime"
SETTINGS = Difficulty()
# In AVE two thirds of the rows last the whole clip and 17 % of the seconds are background; here more are.
WHOLE_CLIP = 0.3
EVENT_SECONDS = (3, 9)
# Chance that the object comes and goes with the event instead of being there all the time.
COMES_AND_GOES = 0.3
SILENT_OBJECT = 0.5


def plan(seed: int, library: Library, split: str, index: int) -> Clip:
  """One event: its object is visible and audible in [start, end) and silent otherwise.

  Beside it there may be an object that never sounds, and a softer sound of a class that is not to be seen.
  """
  rng = clip_rng(seed, FOLDER, split, index)
  class_id = library.classes[index % len(library.classes)]
  silent, hidden = other_classes(rng, library, 2, class_id)
  sounding = (True,) * CLIP_SECONDS
  if rng.random() >= WHOLE_CLIP:
    sounding = sample_interval(rng, CLIP_SECONDS, *EVENT_SECONDS)
  visible = (True,) * CLIP_SECONDS
  if rng.random() < COMES_AND_GOES:
    ((start, end),) = runs(sounding)
    visible = interval(start - int(rng.integers(3)), end + int(rng.integers(3)), CLIP_SECONDS)
  tracks = [add_object(rng, library, class_id, SETTINGS, visible, sounding)]
  if rng.random() < SILENT_OBJECT:
    tracks.append(add_object(rng, library, silent, SETTINGS, (True,) * CLIP_SECONDS, None))
  off_screen = []
  if rng.random() < SETTINGS.off_screen:
    heard = sample_interval(rng, CLIP_SECONDS, 2, 6)
    off_screen.append(sample_voice(rng, library, hidden, SETTINGS.off_screen_gain, heard))
  scene = finish(rng, library, SETTINGS, tracks, off_screen, CLIP_SECONDS)
  return Clip(split, index, clip_id(seed, FOLDER, split, index), class_id, scene)


def row(clip: Clip, library: Library) -> str:
  """The annotation row, read off the scene: seconds in which the clip's class is both visible and audible."""
  (track,) = (track for track in clip.scene.objects if track.class_id == clip.class_id)
  ((start, end),) = runs(v and s for v, s in zip(track.visible, track.sounding, strict=True))
  return f"{library.label[clip.class_id]}&{clip.id}&good&{start}&{end}"


def write_media(root: Path, clip: Clip, library: Library) -> None:
  """AVE/<id>.mp4."""
  folder = root / FOLDER
  folder.mkdir(parents=True, exist_ok=True)
  write_mp4(folder / f"{clip.id}.mp4", clip.scene, library)


def write_annotations(root: Path, clips: Mapping[str, Sequence[Clip]], library: Library, seed: int) -> None:
  """Annotations.txt with every row, one set file per split, categories.txt. No chance: `seed` is unused."""
  del seed
  folder = root / FOLDER
  rows = {split: [row(clip, library) for clip in members] for split, members in clips.items()}
  write_lines(folder / "Annotations.txt", [HEADER, *(line for lines in rows.values() for line in lines)])
  for split, lines in rows.items():
    write_lines(folder / f"{split}Set.txt", lines)
  write_lines(folder / "categories.txt", [library.label[class_id] for class_id in library.classes])
