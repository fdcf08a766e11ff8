"""Media files with mutated bytes: what comes out is an example or a MediaError, in bounded memory and time."""

import io
import pathlib

import fabricate
import numpy as np
import pytest
from fuzzing import counts, mutated, one_line, peak_bytes, run_cases
from PIL import Image

from data_pipelines import arrays, media, pictures, waves
from data_pipelines.schema import Media, MediaError

MEDIA = Media(image_size=16, sample_rate_hz=8000)
MORE_BYTES = 1_500_000_000  # what all cases of a test may add to the process; each of them alone is far below


def encoded(kind: str) -> bytes:
  """A small picture."""
  levels = np.arange(24 * 16, dtype=np.uint16).reshape(16, 24)
  image = Image.fromarray(levels * 170) if kind == "16bit" else Image.fromarray(levels.astype(np.uint8)).convert(kind)
  image.save(buffer := io.BytesIO(), "JPEG" if kind == "RGB" else "PNG")
  return buffer.getvalue()


def npy(values: np.ndarray) -> bytes:
  np.save(buffer := io.BytesIO(), values, allow_pickle=values.dtype.hasobject)
  return buffer.getvalue()


def wav(folder: pathlib.Path) -> bytes:
  return fabricate.write_wav(folder / "a.wav", (fabricate.tones(2, 8000) * 32767).astype(np.int16), 8000).read_bytes()


READERS = {
  "mp4": lambda path: media.decode_clip(path, MEDIA, 3),
  "mp4_spread": lambda path: media.decode_clip(path, MEDIA, 2, spread=True),
  "mp4_sound": lambda path: media.decode_audio(path, 16000),
  "mp4_frames": lambda path: media.decode_video(path, [0.0, 1.5], MEDIA),
  "wav": lambda path: media.decode_audio(path, 16000),
  "npy": lambda path: arrays.read_npy_wave(path, 8000),
  "avs": lambda path: waves.read_wave(path, "b", 8000),
  "jpg": lambda path: pictures.read_image(path, Media(16, 8000, crop=True)),
  "png": lambda path: pictures.read_image(path, MEDIA),
  "16bit": lambda path: pictures.read_image(path, MEDIA),
  "mask": lambda path: pictures.read_mask(path, Media(16, 8000, crop=True)),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
  """A good file for every reader."""
  folder = tmp_path_factory.mktemp("whole")
  clip = fabricate.mp4_bytes(seconds=3)
  table = {f"{name}.wav": fabricate.tones(1, 2000, i) for i, name in enumerate("abc")}
  return {
    **dict.fromkeys(("mp4", "mp4_spread", "mp4_sound", "mp4_frames"), clip),
    "wav": wav(folder),
    "npy": npy(fabricate.tones(1, 4000)),
    "avs": npy(np.array(table, object)),
    "jpg": encoded("RGB"),
    "png": encoded("RGBA"),
    "16bit": encoded("16bit"),
    "mask": encoded("P"),
  }


def read(kind: str, path: pathlib.Path) -> str:
  """ "" or the message of a MediaError; everything else goes on."""
  waves.TABLES._entries.clear()
  waves.TABLES._keys.clear()
  waves.TABLES.num_bytes = 0
  try:
    READERS[kind](path)
  except MediaError as error:
    assert str(path) in str(error)
    return one_line(str(error))
  return ""


@counts(60, 3000)
@pytest.mark.parametrize("kind", READERS)
def test_mutated_media_are_read_or_refused(kind, count, whole, tmp_path):
  path, before = tmp_path / f"a.{kind}", peak_bytes()
  outcomes = set()
  path.write_bytes(whole[kind])
  assert read(kind, path) == ""

  def check(data):
    path.write_bytes(mutated(data, whole[kind]))
    outcomes.add(bool(read(kind, path)))

  run_cases(count, check)
  assert True in outcomes, "no case was damaged enough to be refused"
  assert peak_bytes() - before < MORE_BYTES
