"""Decoding of mp4, wav, npy, jpg and png files into numpy.

Whatever goes wrong with a file becomes a MediaError that names it, the reason and the mend.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import soxr
from PIL import Image

from data_pipelines import transforms
from data_pipelines.schema import Media, MediaError

AGAIN = "fetch or make this file again, or let on_bad_clip='skip' leave it out"
# A stream may end this much before what its header promises (rounding, encoder delay); more means a cut file.
SLACK_S = 1.0
# DG-SCT and PHP store waves at this rate; an .npy file has no header that could tell it.
NPY_RATE_HZ = 32000
# Endings of the files that are read, in small letters; `present` finds the same in capitals.
VIDEO, WAVES, PICTURES = ".mp4", (".npy", ".wav"), (".jpg", ".jpeg", ".png")
ENDINGS = (VIDEO, *WAVES, *PICTURES)


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
def _opened(path: Path | str) -> Iterator[av.container.InputContainer]:
  """Opens a file for decoding; every failure inside the block becomes a MediaError."""
  if not Path(path).is_file():
    raise MediaError(path, "no such file", AGAIN)
  try:
    with av.open(str(path), metadata_errors="ignore") as container:  # titles are not always UTF-8
      yield container
  except (av.error.FFmpegError, _Damaged) as error:
    raise MediaError(path, f"cannot be decoded ({getattr(error, 'strerror', error)})", AGAIN) from error


def _stream(container: av.container.InputContainer, kind: str, path: Path | str) -> av.stream.Stream:
  """The first video or audio stream, set to decode on the calling thread."""
  streams = getattr(container.streams, kind)
  if not streams:
    raise MediaError(path, f"has no {kind} track", f"a clip needs one: {AGAIN}")
  if streams[0].codec_context is None:
    raise MediaError(path, f"its {kind} track is of an unknown kind, which cannot be decoded", AGAIN)
  # The loader's threads already fill the cores, and small clips lose more to thread start than they gain.
  streams[0].codec_context.thread_count = 1
  return streams[0]


def _duration_s(container: av.container.InputContainer) -> float:
  """Length of the file; read off the packets where the header does not say it."""
  if container.duration:
    return container.duration / av.time_base
  ends = [float((p.pts + (p.duration or 0)) * p.time_base) for p in container.demux() if p.pts is not None]
  container.seek(0)
  return max(ends, default=0.0)


def _length_s(stream: av.stream.Stream, otherwise: float) -> float:
  """Length of one stream by its header."""
  return float(stream.duration * stream.time_base) if stream.duration else otherwise


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

  def __init__(self) -> None:
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
      self.form, self.rate_hz, self.start_s = form, frame.sample_rate, time
    if form != self.form:
      told = " to ".join(f"{kind}, {channels} channels, {rate} Hz" for kind, channels, rate in (self.form, form))
      raise _Damaged(f"its sound changes from {told}")
    if len(frame.planes) != (frame.layout.nb_channels if frame.format.is_planar else 1):  # reading on would end the process
      raise _Damaged(f"a piece of its sound has {len(frame.planes)} planes for {frame.layout.nb_channels} channels")
    piece = _mono(frame)
    self.pieces.append(piece)
    self.count += len(piece)

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
  for frame in container.decode(streams):
    if isinstance(frame, av.VideoFrame):
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
  with _opened(path) as container:
    streams = [_stream(container, kind, path) for kind in ("video", "audio")]
    duration = _duration_s(container)
    starts = transforms.pick_seconds(duration, seconds, spread=spread)
    nearest, samples = _NearestFrames(starts + 0.5), _Samples()
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
  with _opened(path) as container:
    stream = _stream(container, "video", path)
    duration = _duration_s(container)
    nearest = _NearestFrames(times)
    _decode(container, [stream], nearest, _Samples(), 0.0)
    if nearest.last is None:
      raise MediaError(path, "its video track is empty", AGAIN)
    _check_end(path, "video", nearest.last_time, _length_s(stream, duration), float(times[-1]))
    return _resized(_images(nearest.finish()), media), duration


def decode_audio(path: Path | str, sample_rate_hz: int) -> np.ndarray:
  """All sound of a media file (mp4, wav, flac, mp3 ...) -> float32 [n] in [-1, 1], mono.

  Raises MediaError: missing or broken file, no audio track or an empty one.
  """
  with _opened(path) as container:
    stream = _stream(container, "audio", path)
    promised = _length_s(stream, 0.0)
    samples = _Samples()
    _decode(container, [stream], _NearestFrames([]), samples, np.inf)
    if not samples.count:
      raise MediaError(path, "its audio track is empty", AGAIN)
    _check_end(path, "audio", samples.end_s, promised, np.inf)
  return samples.wave(sample_rate_hz)


def read_npy_wave(path: Path | str, sample_rate_hz: int) -> np.ndarray:
  """`wave/<id>.npy` of DG-SCT and PHP, 32 kHz and any number type -> float32 [n] in [-1, 1].

  Raises MediaError: missing or broken file, or one that holds anything but finite numbers (pickles are never opened).
  """
  try:
    with open(path, "rb") as file:
      wave = np.lib.format.read_array(file, allow_pickle=False).reshape(-1)
  except Exception as error:  # the header is Python text: damaged, it fails in every way that Python's parser does
    reason = f"cannot be read as an array ({type(error).__name__}: {error})"
    raise MediaError(path, reason.replace("\n", " "), AGAIN) from error
  return resample(unit_wave(wave, path), NPY_RATE_HZ, sample_rate_hz)


@dataclasses.dataclass(frozen=True)
class Range:
  """What tells the scale of samples: their largest magnitude, and whether all of them are whole numbers."""

  peak: float
  whole: bool

  @classmethod
  def of(cls, samples: np.ndarray, path: Path | str) -> "Range":
    """That of samples [n]; raises MediaError, naming `path`, if they are no finite numbers."""
    if not samples.size or samples.dtype.kind not in "fiu":
      raise MediaError(path, f"holds {samples.size} values of type {samples.dtype}, not samples", AGAIN)
    low, high = float(samples.min()), float(samples.max())  # nan and infinity come through both
    if not (np.isfinite(low) and np.isfinite(high)):
      raise MediaError(path, "holds samples that are not finite", AGAIN)
    return cls(max(-low, high), samples.dtype.kind != "f" or bool((samples == np.rint(samples)).all()))

  def __or__(self, other: "Range") -> "Range":
    """That of both together."""
    return Range(max(self.peak, other.peak), self.whole and other.whole)


def unit_wave(samples: np.ndarray, path: Path | str, around: Range | None = None) -> np.ndarray:
  """Stored samples [n] of any whole or floating type -> float32 [n] in [-1, 1]; raises MediaError, naming `path`.

  The type does not tell the scale: samples of 16 bit are also found as int32 and as floats, so the range decides: `around`,
  that of all sounds stored together, where it is known, for a quiet clip alone says little. Floats that are all whole
  numbers are of 16 bit.
  """
  found = Range.of(samples, path)
  around = around or found
  wave = samples.astype(np.float32)
  if samples.dtype.kind == "u":  # half of the range is silence, as in 8-bit wav
    return wave / 2.0 ** (8 * samples.dtype.itemsize - 1) - 1
  if samples.dtype.kind == "f" and around.peak <= 2 and not around.whole:  # true float audio does not get anywhere near 2
    return wave
  bits = 8 if samples.dtype == np.int8 else 16 if around.peak <= 32768 else 32
  return wave / np.float32(2.0 ** (bits - 1))


def read_image(path: Path | str, media: Media) -> np.ndarray:
  """jpg or png -> uint8 [H, W, 3], bicubic; raises MediaError."""
  return transforms.resize_image(_load_image(path), media.image_size, crop=media.crop)


def read_mask(path: Path | str, media: Media) -> np.ndarray:
  """Mask png (1-bit, palette, grey, colour) -> uint8 [H, W] in {0, 1}, nearest pixel; raises MediaError."""
  image = _load_image(path)
  if image.mode in ("LA", "RGBA", "PA"):
    image = image.convert("RGB")  # opaque alpha would read as foreground
  binary = transforms.binarise(np.asarray(image), indices=image.mode == "P")
  return transforms.resize_mask(binary, media.image_size, crop=media.crop)


def _load_image(path: Path | str) -> Image.Image:
  try:
    with Image.open(path) as image:
      image.load()
      return image
  except FileNotFoundError as error:
    raise MediaError(path, "no such file", AGAIN) from error
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
    raise MediaError(path, f"cannot be decoded as a picture ({error})".replace("\n", " "), AGAIN) from error


def read_frames(folder: Path, media: Media, seconds: int) -> np.ndarray:
  """A folder of numbered jpg or png frames -> uint8 [T, H, W, 3], the files of `frame_files`.

  Raises MediaError: no folder, no pictures in it, or a broken picture.
  """
  chosen = frame_files(folder, seconds)
  pictures = {path: read_image(path, media) for path in dict.fromkeys(chosen)}
  return np.stack([pictures[path] for path in chosen])


def frame_files(folder: Path, seconds: int) -> list[Path]:
  """T of the numbered jpg or png files of a folder, spread evenly over it; raises MediaError if it holds none.

  The digits of the names and the frames per second do not matter: LLP's 80 files (8 a second) give ten, as ten do; of
  fewer than T some are shown twice.
  """
  found = folder.iterdir() if folder.is_dir() else ()
  # Names with a leading dot are leavings of the systems that packed the folder ("._00000001.jpg"), and no pictures.
  paths = [p for p in found if p.suffix.lower() in PICTURES and not p.name.startswith(".")]
  if not paths:
    raise MediaError(folder, "holds no frames (jpg or png)", AGAIN)
  paths.sort(key=lambda p: [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", p.name)])
  return [paths[i] for i in transforms.pick_files(len(paths), seconds)]
