"""What the layouts share: clips, their seeds and names, timelines, encoding of video and audio."""

import dataclasses
import hashlib
import wave
import zlib
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soxr

from data_pipelines.toybox.library import KNOWN, SAMPLE_RATE_HZ, UNSEEN, Library
from data_pipelines.toybox.render import MASK_ALPHA, render_audio, render_frame
from data_pipelines.toybox.scene import (
  Difficulty,
  Scene,
  Track,
  Voice,
  assemble,
  sample_track,
  sample_voice,
)

VIDEO_SIZE = 128
VIDEO_FPS = 4
CLIP_SECONDS = 10
# An object called visible shows at least this share of its area; tried so often, on frames of this size.
LEAST_SHOWN = 0.4
PLACEMENTS = 20
LOOK_SIZE = 48
# Letters and digits as in YouTube ids, without the two signs that shells and tables trip over.
ID_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


@dataclasses.dataclass(frozen=True)
class Clip:
  """One clip to be written: `class_id` is the class it was drawn for (each class equally often)."""

  split: str
  index: int
  id: str
  class_id: str
  scene: Scene


def manifest_splits(split: str) -> tuple[str, ...]:
  """Manifest splits whose pictures, sounds and backgrounds a benchmark split may use."""
  return UNSEEN if split == "unseen" else KNOWN


def clip_rng(seed: int, benchmark: str, split: str, index: int) -> np.random.Generator:
  """The generator of one clip: independent of every other clip and of the order of work."""
  return np.random.default_rng([seed, zlib.crc32(f"{benchmark}/{split}".encode()), index])


def clip_id(seed: int, benchmark: str, split: str, index: int) -> str:
  """A YouTube-like id of 11 letters and digits."""
  digest = hashlib.sha256(f"{seed}/{benchmark}/{split}/{index}".encode()).digest()
  return "".join(ID_LETTERS[byte % len(ID_LETTERS)] for byte in digest[:11])


def other_classes(rng: np.random.Generator, library: Library, count: int, *taken: str) -> list[str]:
  """`count` distinct classes, none of them among `taken`."""
  free = [class_id for class_id in library.classes if class_id not in taken]
  return [free[i] for i in rng.permutation(len(free))[:count]]


def interval(start: int, end: int, seconds: int) -> tuple[bool, ...]:
  """True in the seconds start <= t < end."""
  return tuple(start <= t < end for t in range(seconds))


def sample_interval(rng: np.random.Generator, seconds: int, shortest: int, longest: int) -> tuple[bool, ...]:
  """One run of `shortest` to `longest` seconds at a random place."""
  length = int(rng.integers(shortest, longest + 1))
  start = int(rng.integers(seconds - length + 1))
  return interval(start, start + length, seconds)


def runs(flags: Iterable[bool]) -> list[tuple[int, int]]:
  """Maximal runs of True -> half-open intervals (start, end)."""
  found: list[tuple[int, int]] = []
  for t, flag in enumerate(flags):
    if flag and found and found[-1][1] == t:
      found[-1] = (found[-1][0], t + 1)
    elif flag:
      found.append((t, t + 1))
  return found


def add_object(
  rng: np.random.Generator,
  library: Library,
  class_id: str,
  settings: Difficulty,
  visible: tuple[bool, ...],
  sounding: tuple[bool, ...] | None,
) -> Track:
  """An object with given timelines; `sounding` None: it has no sound. `assemble` gives it its path."""
  voice = None if sounding is None else sample_voice(rng, library, class_id, settings.gain, sounding)
  return sample_track(rng, library, class_id, settings, visible, voice)


def finish(
  rng: np.random.Generator,
  library: Library,
  settings: Difficulty,
  tracks: list[Track],
  off_screen: list[Voice],
  seconds: int,
) -> Scene:
  """Shuffles who is in front, places the objects and adds the backdrop; draws anew what hides an object."""
  for _ in range(PLACEMENTS):
    shuffled = [tracks[i] for i in rng.permutation(len(tracks))]
    scene = assemble(rng, library, settings, shuffled, tuple(off_screen), seconds)
    if least_shown(scene, library) >= LEAST_SHOWN:
      break
  return scene


def least_shown(scene: Scene, library: Library) -> float:
  """Smallest share of an object's area, over objects and five moments, that nothing in front of it covers."""
  least = 1.0
  if len(scene.objects) < 2:
    return least
  bare = [dataclasses.replace(scene, objects=(track,), off_screen=()) for track in scene.objects]
  for t in np.linspace(0, scene.seconds, 6)[1:] - 0.5:
    _, alphas = render_frame(scene, library, float(t), LOOK_SIZE)
    for alone, alpha in zip(bare, alphas, strict=True):
      _, (whole,) = render_frame(alone, library, float(t), LOOK_SIZE)
      area = np.count_nonzero(whole >= MASK_ALPHA)
      if area:
        least = min(least, np.count_nonzero(alpha >= MASK_ALPHA) / area)
  return least


def write_mp4(path: Path, scene: Scene, library: Library) -> None:
  """H.264 (128 x 128, 4 frames/s) and AAC (32 kHz, mono); frame k shows the moment k / 4 s.

  One thread and no time stamps of the day: the same scene gives the same bytes.
  """
  with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
    video = container.add_stream("libx264", rate=VIDEO_FPS, options={"preset": "veryfast", "crf": "20", "g": "8"})
    video.width = video.height = VIDEO_SIZE
    video.pix_fmt = "yuv420p"
    video.thread_count = 1
    audio = container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="mono", options={"aac_coder": "fast"})
    audio.bit_rate = 64000
    for k in range(scene.seconds * VIDEO_FPS):
      rgb, _ = render_frame(scene, library, k / VIDEO_FPS, VIDEO_SIZE)
      frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
      frame.pts, frame.time_base = k, Fraction(1, VIDEO_FPS)
      container.mux(video.encode(frame))
    container.mux(video.encode(None))
    sound = av.AudioFrame.from_ndarray(render_audio(scene, library)[None], format="fltp", layout="mono")
    sound.sample_rate, sound.pts, sound.time_base = SAMPLE_RATE_HZ, 0, Fraction(1, SAMPLE_RATE_HZ)
    container.mux(audio.encode(sound))
    container.mux(audio.encode(None))


def write_wav(path: Path, samples: np.ndarray, rate_hz: int) -> None:
  """float32 [n] at 32 kHz -> 16-bit mono wav at `rate_hz`."""
  resampled = soxr.resample(samples, SAMPLE_RATE_HZ, rate_hz)
  pcm = np.rint(np.clip(resampled, -1, 1) * 32767).astype("<i2")
  with wave.open(str(path), "wb") as file:
    file.setnchannels(1)
    file.setsampwidth(2)
    file.setframerate(rate_hz)
    file.writeframes(pcm.tobytes())


def write_lines(path: Path, lines: Iterable[str]) -> None:
  """Text lines, each ended by a newline, on every system the same bytes."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
