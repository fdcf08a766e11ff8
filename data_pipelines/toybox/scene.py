"""Little audio-visual scenes with exact ground truth: what is where, what sounds when.

A `Scene` holds numbers only; the pictures and sounds it points at live in the `Library` it was sampled for.
Sampling is a pure function of the generator, rendering (`render.py`) a pure function of scene and library.
"""

import dataclasses

import numpy as np

from data_pipelines.toybox.library import Library

__all__ = [
  "Backdrop",
  "Difficulty",
  "Scene",
  "Track",
  "Voice",
  "max_overlap",
  "place",
  "sample_backdrop",
  "sample_runs",
  "sample_scene",
  "sample_track",
  "sample_voice",
]


@dataclasses.dataclass(frozen=True)
class Voice:
  """One sound source. All fields but the last three choose the waveform.

  Attributes:
    class_id: class of the sound.
    sound: index into `library.sounds[class_id]`.
    sounding: one bool per second.
    gain: linear loudness (pieces have equal RMS, so gains compare).
    repeats: strokes per second.
    phase: which second of the recording comes first.
  """

  class_id: str
  sound: int
  sounding: tuple[bool, ...]
  gain: float
  repeats: int
  phase: int


@dataclasses.dataclass(frozen=True)
class Track:
  """One visible object: its centre moves from (x0, y0) to (x1, y1) over the scene, fractions of the frame.

  Attributes:
    class_id, picture: class and index into `library.pictures[class_id]`.
    bend: sideways bulge of the path at half time, fraction of the frame (0: a straight line).
    scale: longest side of the picture, fraction of the frame.
    flip: mirrored left to right.
    visible: one bool per second.
    voice: its sound, or None for an object that never sounds.
  """

  class_id: str
  picture: int
  x0: float
  y0: float
  x1: float
  y1: float
  bend: float
  scale: float
  flip: bool
  visible: tuple[bool, ...]
  voice: Voice | None

  @property
  def sound(self) -> int | None:
    """Index of its sound in the library, None if it never sounds."""
    return None if self.voice is None else self.voice.sound

  @property
  def sounding(self) -> tuple[bool, ...]:
    """One bool per second (all False for an object without a voice)."""
    return (False,) * len(self.visible) if self.voice is None else self.voice.sounding

  def centre(self, progress: float) -> tuple[float, float]:
    """Centre (x, y) at `progress` in [0, 1] of the scene."""
    dx, dy = self.x1 - self.x0, self.y1 - self.y0
    length = max(float(np.hypot(dx, dy)), 1e-6)
    bulge = self.bend * 4 * progress * (1 - progress) / length
    return self.x0 + dx * progress - dy * bulge, self.y0 + dy * progress + dx * bulge


@dataclasses.dataclass(frozen=True)
class Backdrop:
  """Index into `library.backgrounds`, square crop (left, top, side in pixels), mirror, RGB gain, bias."""

  background: int
  crop: tuple[float, float, float]
  flip: bool
  gain: tuple[float, float, float]
  bias: float


@dataclasses.dataclass(frozen=True)
class Scene:
  """`objects` are painted in order, the last in front; `off_screen` voices belong to no visible object."""

  seconds: int
  backdrop: Backdrop
  objects: tuple[Track, ...]
  off_screen: tuple[Voice, ...]
  noise_gain: float
  noise_start: int

  @property
  def voices(self) -> tuple[Voice, ...]:
    """Every voice of the scene, those of the objects first."""
    return tuple(track.voice for track in self.objects if track.voice is not None) + self.off_screen


@dataclasses.dataclass(frozen=True)
class Difficulty:
  """How scenes are drawn. Fixed once, never tuned to scores.

  Attributes:
    scale: range of an object's longest side, fraction of the frame.
    speed: largest distance an object travels per scene, fraction of the frame.
    bend: largest sideways bulge of a path.
    overlap: how much two pictures may overlap: 1 - distance / (sum of half sides); 0 = touching squares.
    lanes: objects stay in separate upright lanes, so that left and right never change.
    voiced: probability that an object has a sound at all.
    active: probability that a voice sounds in a second (drawn in runs).
    off_screen: probability of a sound from no visible object.
    off_screen_gain, gain: ranges of linear loudness.
    jitter: strength of colour changes of the background.
    noise: range of the noise floor's RMS (a piece has RMS 0.1 at gain 1).
  """

  scale: tuple[float, float] = (0.25, 0.55)
  speed: float = 0.4
  bend: float = 0.12
  overlap: float = 0.35
  lanes: bool = False
  voiced: float = 0.75
  active: float = 0.6
  off_screen: float = 0.3
  off_screen_gain: tuple[float, float] = (0.4, 0.9)
  gain: tuple[float, float] = (0.6, 1.4)
  jitter: float = 0.15
  noise: tuple[float, float] = (0.001, 0.006)


def sample_scene(
  rng: np.random.Generator,
  library: Library,
  *,
  seconds: int,
  num_objects: tuple[int, int] = (1, 3),
  **difficulty,
) -> Scene:
  """Draws a scene of objects of distinct classes.

  Args:
    rng: the only source of chance.
    library: the known or the unseen pictures and sounds.
    seconds: length.
    num_objects: smallest and largest number of visible objects.
    **difficulty: fields of `Difficulty`.
  """
  settings = Difficulty(**difficulty)
  count = int(rng.integers(num_objects[0], num_objects[1] + 1))
  order = rng.permutation(len(library.classes))
  chosen = [library.classes[i] for i in order[:count]]
  always = (True,) * seconds
  tracks = []
  for class_id in chosen:
    voice = None
    if rng.random() < settings.voiced:
      voice = sample_voice(rng, library, class_id, settings.gain, sample_runs(rng, seconds, settings.active))
    tracks.append(sample_track(rng, library, class_id, settings, always, voice))
  off_screen = ()
  if rng.random() < settings.off_screen:
    class_id = library.classes[order[count]]
    sounding = sample_runs(rng, seconds, settings.active)
    off_screen = (sample_voice(rng, library, class_id, settings.off_screen_gain, sounding),)
  return assemble(rng, library, settings, tracks, off_screen, seconds)


def assemble(
  rng: np.random.Generator,
  library: Library,
  settings: Difficulty,
  tracks: list[Track],
  off_screen: tuple[Voice, ...],
  seconds: int,
) -> Scene:
  """Places the tracks, adds backdrop and noise floor -> Scene."""
  low, high = settings.noise
  return Scene(
    seconds,
    sample_backdrop(rng, library, settings.jitter),
    place(rng, tracks, settings),
    tuple(off_screen),
    float(rng.uniform(low, high)),
    int(rng.integers(96000)),
  )


def sample_runs(rng: np.random.Generator, seconds: int, active: float) -> tuple[bool, ...]:
  """On and off in runs of some seconds, on for a share `active` of the time; at least one second is on."""
  stay = 0.6
  states = [bool(rng.random() < active)]
  for draw, fresh in rng.random((seconds - 1, 2)):
    states.append(states[-1] if draw < stay else bool(fresh < active))
  if not any(states):
    states[int(rng.integers(seconds))] = True
  return tuple(states)


def sample_voice(
  rng: np.random.Generator,
  library: Library,
  class_id: str,
  gain: tuple[float, float],
  sounding: tuple[bool, ...],
) -> Voice:
  """A sound of the class with random loudness, strokes per second (short sounds are repeated) and phase."""
  sound = int(rng.integers(len(library.sounds[class_id])))
  length = len(library.sounds[class_id][sound].wave) / 32000
  choices = (2, 3, 4) if length < 0.5 else (1, 1, 1, 2, 3)
  return Voice(class_id, sound, sounding, float(rng.uniform(*gain)), int(rng.choice(choices)), int(rng.integers(3)))


def sample_track(
  rng: np.random.Generator,
  library: Library,
  class_id: str,
  settings: Difficulty,
  visible: tuple[bool, ...],
  voice: Voice | None,
) -> Track:
  """A picture of the class at a random size; `place` gives it its path."""
  picture = int(rng.integers(len(library.pictures[class_id])))
  scale = float(rng.uniform(*settings.scale))
  return Track(class_id, picture, 0.5, 0.5, 0.5, 0.5, 0.0, scale, bool(rng.random() < 0.5), visible, voice)


def sample_backdrop(rng: np.random.Generator, library: Library, jitter: float) -> Backdrop:
  """A random background, cropped to a square (85 to 100 % of its height), tinted, mirrored half the time."""
  background = int(rng.integers(len(library.backgrounds)))
  height, width = library.backgrounds[background].shape[:2]
  across, down, zoom = rng.random(3)
  side = min(height, width) * (0.85 + 0.15 * zoom)
  gain = 1 + jitter * rng.uniform(-1, 1) + 0.5 * jitter * rng.uniform(-1, 1, 3)
  crop = (float(across * (width - side)), float(down * (height - side)), float(side))
  return Backdrop(
    background,
    crop,
    bool(rng.random() < 0.5),
    tuple(float(g) for g in gain),
    float(60 * jitter * rng.uniform(-1, 1)),
  )


def place(rng: np.random.Generator, tracks: list[Track], settings: Difficulty) -> tuple[Track, ...]:
  """Draws paths that stay inside and overlap little: the best of eight draws if none is good enough."""
  best, best_overlap = None, np.inf
  for _ in range(8):
    moved = _lanes(rng, tracks, settings) if settings.lanes else _free(rng, tracks, settings)
    overlap = max_overlap(moved)
    if overlap < best_overlap:
      best, best_overlap = moved, overlap
    if best_overlap <= settings.overlap:
      break
  return tuple(best)


def max_overlap(tracks: list[Track] | tuple[Track, ...]) -> float:
  """Largest 1 - distance / (sum of half sides) over all pairs and five moments; 0 for fewer than two."""
  worst = 0.0
  for i, first in enumerate(tracks):
    for second in tracks[:i]:
      for progress in (0.0, 0.25, 0.5, 0.75, 1.0):
        (ax, ay), (bx, by) = first.centre(progress), second.centre(progress)
        reach = (first.scale + second.scale) / 2
        worst = max(worst, 1 - max(abs(ax - bx), abs(ay - by)) / reach)
  return worst


def _free(rng: np.random.Generator, tracks: list[Track], settings: Difficulty) -> list[Track]:
  moved = []
  for track in tracks:
    margin = 0.45 * track.scale
    u0, v0, u1, v1, b = rng.random(5)
    span = 1 - 2 * margin
    x0, y0 = margin + span * u0, margin + span * v0
    reach = settings.speed
    x1 = float(np.clip(x0 + reach * (2 * u1 - 1), margin, 1 - margin))
    y1 = float(np.clip(y0 + reach * (2 * v1 - 1), margin, 1 - margin))
    moved.append(dataclasses.replace(track, x0=float(x0), y0=float(y0), x1=x1, y1=y1, bend=float(settings.bend * (2 * b - 1))))
  return moved


def _lanes(rng: np.random.Generator, tracks: list[Track], settings: Difficulty) -> list[Track]:
  """Random order from left to right; in its lane an object moves up or down and a little sideways."""
  count = len(tracks)
  lane = 1 / count
  moved: list[Track] = list(tracks)
  for position, i in enumerate(rng.permutation(count)):
    track = tracks[int(i)]
    scale = min(track.scale, 1.15 * lane)
    free = max(0.0, 0.5 * (lane - 0.8 * scale))
    u0, u1, v0, v1, b = rng.random(5)
    middle = lane * (position + 0.5)
    y0 = 0.45 * scale + (1 - 0.9 * scale) * v0
    y1 = float(np.clip(y0 + settings.speed * (2 * v1 - 1), 0.45 * scale, 1 - 0.45 * scale))
    moved[int(i)] = dataclasses.replace(
      track,
      scale=scale,
      x0=float(middle + free * (2 * u0 - 1)),
      x1=float(middle + free * (2 * u1 - 1)),
      y0=float(y0),
      y1=y1,
      bend=float(0.25 * settings.bend * (2 * b - 1)),
    )
  return moved
