"""Decoding of mp4, wav and other files of video and sound into numpy; `arrays` reads npy, `pictures` jpg and png.

Whatever goes wrong with a file becomes a MediaError that names it, the reason and the mend.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import soxr
from PIL import Image

from data_pipelines import limits, transforms
from data_pipelines.schema import AGAIN, Media, MediaError, brief

# A stream may end this much before what its header promises (rounding, encoder delay); more means a cut file.
SLACK_S = 1.0
# Endings of the files that are read, in small letters; `present` finds the same in capitals.
VIDEO, WAVES, PICTURES = ".mp4", (".npy", ".wav"), (".jpg", ".jpeg", ".png")
ENDINGS = (VIDEO, *WAVES, *PICTURES, ".ogg")  # ogg: Tux Paint's spoken captions
# What FFmpeg may take a file for, whatever its name says: no playlists, which open the files and addresses that they name.
FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,asf,wav,w64,aiff,au,caf,flac,ogg,mp3,aac,amr"


@dataclasses.dataclass(frozen=True)
class Clip:
  """One decoded clip: visual uint8 [T, H, W, 3], audio int16 [T, S], duration_s of the file."""

  visual: np.ndarray
  audio: np.ndarray
  duration_s: float


@dataclasses.dataclass(frozen=True)
class Seconds:
  """T seconds of a video file before they are resized and resampled.

  Attributes:
    images: T pictures as they are in the file; the same object where one is shown twice.
    samples: the sound from the start of the file on.
    starts: int64 [T], the second of the file that each shows.
    duration_s: length of the file.
  """

  images: list[Image.Image]
  samples: "_Samples"
  starts: np.ndarray
  duration_s: float

  def audio(self, rate_hz: int) -> np.ndarray:
    """int16 [T, rate_hz]."""
    return transforms.cut_seconds(self.samples.wave(rate_hz), rate_hz, self.starts)


class _Damaged(Exception):
  """Bytes that FFmpeg decodes but that make no sense; the words say why."""


def present(path: Path) -> Path | None:
  """A file, or the one whose ending is in capitals (`a.MP4`), as some systems copy them; None if neither is there."""
  return next((p for p in (path, path.with_name(path.stem + path.suffix.upper())) if p.is_file()), None)


@contextlib.contextmanager
def opened(path: Path | str) -> Iterator[av.container.InputContainer]:
  """Opens a file for decoding; every failure inside the block becomes a MediaError."""
  limits.check_file(path)
  options = {"protocol_whitelist": "file", "format_whitelist": FORMATS, "max_pixels": _max_pixels()}
  try:
    # Absolute, for FFmpeg takes what stands before a colon for a protocol. Titles are not always UTF-8.
    with av.open(os.path.abspath(path), options=options, metadata_errors="ignore") as container:
      yield container
  except MediaError:
    raise
  except Exception as error:  # damaged bytes fail in every way that FFmpeg and its Python face do
    raise MediaError(path, f"cannot be decoded ({brief(getattr(error, 'strerror', None) or error)})", AGAIN) from error


def _max_pixels() -> str:
  """For FFmpeg, which checks it before it allocates a frame."""
  return str(int(min(limits.current().frame_pixels, 2**31 - 1)))


def _stream(container: av.container.InputContainer, kind: str, path: Path | str) -> av.stream.Stream:
  """The first video or audio stream, set to decode on the calling thread."""
  streams = getattr(container.streams, kind)
  if not streams:
    raise MediaError(path, f"has no {kind} track", f"a clip needs one: {AGAIN}")
  if streams[0].codec_context is None:
    raise MediaError(path, f"its {kind} track is of an unknown kind, which cannot be decoded", AGAIN)
  context = streams[0].codec_context
  if kind == "video":
    limits.check_picture(path, context.width, context.height, "frame_pixels")
    context.options = {"max_pixels": _max_pixels()}
  # The loader's threads already fill the cores, and small clips lose more to thread start than they gain.
  context.thread_count = 1
  return streams[0]


def _duration_s(container: av.container.InputContainer) -> float:
  """Length of the file; read off the packets where the header does not say it."""
  if container.duration and container.duration > 0:
    return container.duration / av.time_base
  ends = [float((p.pts + (p.duration or 0)) * p.time_base) for p in container.demux() if p.pts is not None and p.time_base]
  container.seek(0)
  return max(ends, default=0.0)


def _length_s(stream: av.stream.Stream, otherwise: float) -> float:
  """Length of one stream by its header."""
  return float(stream.duration * stream.time_base) if stream.duration and stream.time_base else otherwise


class _NearestFrames:
  """Picks from passing frames the one nearest to each wanted time (a tie goes to the earlier frame)."""

  def __init__(self, times: Sequence[float]) -> None:
    self.times, self.frames = times, []
    self.last, self.last_time = None, -np.inf

  @property
  def done(self) -> bool:
    return len(self.frames) == len(self.times)

  def add(self, frame: av.VideoFrame, time: float) -> None:
    while not self.done and time >= (wanted := self.times[len(self.frames)]) - 1e-6:
      earlier = self.last is not None and wanted - self.last_time <= time - wanted + 1e-6
      self.frames.append(self.last if earlier else frame)
    self.last, self.last_time = frame, time

  def finish(self) -> list[av.VideoFrame]:
    """All wanted frames; the last frame stays on screen after the end of the video."""
    return self.frames + [self.last] * (len(self.times) - len(self.frames))


class _Samples:
  """Collects audio frames as one mono wave that begins at the start of the clip."""

  def __init__(self, path: Path | str = "") -> None:
    self.path = path
    self.pieces: list[np.ndarray] = []
    self.form: tuple[str, int, int] | None = None  # of the first frame
    self.rate_hz, self.start_s, self.count = 0, 0.0, 0

  @property
  def end_s(self) -> float:
    return self.start_s + self.count / self.rate_hz if self.rate_hz else 0.0

  def add(self, frame: av.AudioFrame, time: float) -> None:
    """Takes the next frame; raises _Damaged if it is none of the same sound, as after a damaged byte."""
    form = (frame.format.name, frame.layout.nb_channels, frame.sample_rate)
    if self.form is None:
      if not frame.sample_rate:
        raise _Damaged("its sound has no sample rate")
      limits.check_media(self.path, "sample_rate_hz", frame.sample_rate, "has sound of")
      limits.check_media(self.path, "duration_s", abs(time), "has sound that begins at")
      self.form, self.rate_hz, self.start_s = form, frame.sample_rate, time
    if form != self.form:
      told = " to ".join(f"{kind}, {channels} channels, {rate} Hz" for kind, channels, rate in (self.form, form))
      raise _Damaged(f"its sound changes from {told}")
    if len(frame.planes) != (frame.layout.nb_channels if frame.format.is_planar else 1):  # reading on would end the process
      raise _Damaged(f"a piece of its sound has {len(frame.planes)} planes for {frame.layout.nb_channels} channels")
    piece = _mono(frame)
    self.pieces.append(piece)
    self.count += len(piece)
    limits.check_media(self.path, "duration_s", self.end_s, "has sound up to")
    held = (self.count + max(self.start_s, 0) * self.rate_hz) * frame.layout.nb_channels
    limits.check_media(self.path, "samples", held, "has sound of")

  def wave(self, rate_hz: int) -> np.ndarray:
    """float32 [n] at rate_hz; sample 0 is the start of the clip, whenever the audio itself begins."""
    wave = np.concatenate(self.pieces)
    lead = round(self.start_s * self.rate_hz)
    wave = np.pad(wave, (lead, 0)) if lead > 0 else wave[-lead:]
    return resample(wave, self.rate_hz, rate_hz)


def _mono(frame: av.AudioFrame) -> np.ndarray:
  """Samples of one frame, float32 [n] in [-1, 1], channels averaged."""
  channels = frame.layout.nb_channels
  if frame.format.name == "fltp" and channels == 1:  # mono AAC: half the time of to_ndarray
    return np.frombuffer(frame.planes[0], np.float32, frame.samples)
  x = frame.to_ndarray()
  if not frame.format.is_planar and channels > 1:
    x = x.reshape(-1, channels).T
  if x.dtype.kind == "u":  # 8-bit wav: 128 is silence
    x = (x.astype(np.float32) - 128) / 128
  elif x.dtype.kind == "i":
    x = x.astype(np.float32) / -float(np.iinfo(x.dtype).min)
  return x[0] if channels == 1 else x.mean(0, dtype=np.float32)


def resample(wave: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
  """float32 [n] -> float32 [n * to_hz / from_hz] by soxr at high quality (librosa's default)."""
  return wave if from_hz == to_hz else soxr.resample(wave, from_hz, to_hz)


def _check_end(path: Path | str, kind: str, end_s: float, promised_s: float, wanted_s: float) -> None:
  if end_s + SLACK_S < min(promised_s, wanted_s):
    raise MediaError(path, f"is cut off: its {kind} ends at {end_s:.1f} s of {promised_s:.1f} s", AGAIN)


def _images(frames: list[av.VideoFrame]) -> list[Image.Image]:
  """Decoded frames as pictures; a frame shown twice is converted once."""
  images = {id(frame): Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in frames}
  return [images[id(frame)] for frame in frames]


def _resized(images: list[Image.Image], media: Media) -> np.ndarray:
  """Pictures -> uint8 [T, H, W, 3]; one shown twice is resized once."""
  arrays = {id(image): transforms.resize_image(image, media.image_size, crop=media.crop) for image in images}
  return np.stack([arrays[id(image)] for image in images])


def _decode(
  container: av.container.InputContainer,
  streams: Sequence[av.stream.Stream],
  nearest: _NearestFrames,
  samples: _Samples,
  audio_until_s: float,
) -> None:
  """Feeds both collectors in one pass over the file and stops when they have what they want."""
  origin = (container.start_time or 0) / av.time_base
  frames, pixels, path = 0, 0, samples.path
  for frame in container.decode(streams):
    if isinstance(frame, av.VideoFrame):
      frames, pixels = frames + 1, pixels + frame.width * frame.height
      limits.check_media(path, "frames", frames, "needs")
      limits.check_media(path, "video_pixels", pixels, "needs")
      nearest.add(frame, _time(frame, nearest.last_time) - origin)
    elif samples.end_s < audio_until_s:
      samples.add(frame, _time(frame, samples.end_s) - origin)
    if nearest.done and samples.end_s >= audio_until_s:
      return


def _time(frame: av.frame.Frame, otherwise: float) -> float:
  return frame.time if frame.time is not None else max(otherwise, 0.0)


def decode_clip(path: Path | str, media: Media, seconds: int, *, spread: bool = False) -> Clip:
  """Decodes T seconds of a video file with sound.

  Args:
    path: mp4 or any container that FFmpeg reads.
    media: image size and sample rate of the result.
    seconds: T.
    spread: show T seconds spread over a longer clip (MUSIC-AVQA) instead of the first T.

  Returns:
    Clip: for each second the frame nearest to its middle and its samples; a shorter clip holds its last frame and is silent
      after its end.

  Raises:
    MediaError: as `read_seconds`.
  """
  found = read_seconds(path, seconds, spread=spread)
  return Clip(_resized(found.images, media), found.audio(media.sample_rate_hz), found.duration_s)


def read_seconds(path: Path | str, seconds: int, *, spread: bool = False) -> Seconds:
  """What `decode_clip` shows, at the file's own picture size and sample rate.

  Raises:
    MediaError: missing or broken file, no video or no audio track, a file that ends long before its stated
      length.
  """
  with opened(path) as container:
    streams = [_stream(container, kind, path) for kind in ("video", "audio")]
    duration = _duration_s(container)
    starts = transforms.pick_seconds(duration, seconds, spread=spread)
    limits.check_media(path, "duration_s", float(starts[-1] + 1), "is shown to its end at")
    nearest, samples = _NearestFrames(starts + 0.5), _Samples(path)
    _decode(container, streams, nearest, samples, float(starts[-1] + 1))
    promised = [_length_s(stream, duration) for stream in streams]
    if nearest.last is None or not samples.count:
      raise MediaError(path, f"its {'video' if nearest.last is None else 'audio'} track is empty", AGAIN)
    _check_end(path, "video", nearest.last_time, promised[0], float(starts[-1] + 0.5))
    _check_end(path, "audio", samples.end_s, promised[1], float(starts[-1] + 1))
    images = _images(nearest.finish())
  return Seconds(images, samples, starts, duration)


def decode_video(path: Path | str, times: Sequence[float], media: Media) -> tuple[np.ndarray, float]:
  """Frames nearest to `times` (rising, in seconds) -> uint8 [len(times), H, W, 3] and the file's duration in seconds.

  Raises MediaError as `decode_clip`; the file needs no audio here.
  """
  with opened(path) as container:
    stream = _stream(container, "video", path)
    duration = _duration_s(container)
    nearest = _NearestFrames(times)
    limits.check_media(path, "duration_s", float(times[-1]), "is shown up to")
    _decode(container, [stream], nearest, _Samples(path), 0.0)
    if nearest.last is None:
      raise MediaError(path, "its video track is empty", AGAIN)
    _check_end(path, "video", nearest.last_time, _length_s(stream, duration), float(times[-1]))
    return _resized(_images(nearest.finish()), media), duration


def decode_audio(path: Path | str, sample_rate_hz: int) -> np.ndarray:
  """All sound of a media file (mp4, wav, flac, mp3 ...) -> float32 [n] in [-1, 1], mono.

  Raises MediaError: missing or broken file, no audio track or an empty one.
  """
  with opened(path) as container:
    stream = _stream(container, "audio", path)
    promised = _length_s(stream, 0.0)
    samples = _Samples(path)
    _decode(container, [stream], _NearestFrames([]), samples, np.inf)
    if not samples.count:
      raise MediaError(path, "its audio track is empty", AGAIN)
    _check_end(path, "audio", samples.end_s, promised, np.inf)
  return samples.wave(sample_rate_hz)
