"""A published video decodes to the frames and samples that are stated of it.

PHPJAX_REAL_VIDEO names the folder with bigbuckbunny.mp4: H.264, 1280 x 720, 25 frames a second, 132 frames; AAC, six channels
at 48 kHz, 249 x 1024 samples. A missing file is a failure, not a skip: these tests run only when asked for (marker `real`).
"""

import itertools
import os
import pathlib

import av
import numpy as np
import pytest

from data_pipelines import AVE, Media, media, transforms
from data_pipelines.base import ClipCache
from data_pipelines.encode import Encoding
from data_pipelines.prepare import Options, prepare

pytestmark = pytest.mark.real
MEDIA = Media(image_size=64, sample_rate_hz=16000)


@pytest.fixture(scope="module")
def video() -> pathlib.Path:
  folder = os.environ.get("PHPJAX_REAL_VIDEO")
  assert folder, "set PHPJAX_REAL_VIDEO to the folder with bigbuckbunny.mp4"
  path = pathlib.Path(folder) / "bigbuckbunny.mp4"
  assert path.is_file(), f"no such file: {path}"
  return path


@pytest.fixture(scope="module")
def frames(video) -> np.ndarray:
  """Every frame of the file, decoded without this project, uint8 [132, 64, 64, 3]."""
  with av.open(str(video)) as container:
    return np.stack([transforms.resize_image(frame.to_image(), MEDIA.image_size) for frame in container.decode(video=0)])


def test_all_stated_frames(video, frames):
  visual, duration_s = media.decode_video(video, np.arange(132) / 25, MEDIA)
  assert len(frames) == 132 and duration_s == pytest.approx(5.31, abs=0.005)
  np.testing.assert_array_equal(visual, frames)
  assert all((one != other).any() for one, other in itertools.pairwise(visual))


def test_all_stated_samples(video):
  wave = media.decode_audio(video, 48000)
  assert wave.dtype == np.float32 and wave.shape == (249 * 1024,)
  assert media.decode_audio(video, 16000).shape == (84_992,)
  with av.open(str(video)) as container:
    assert container.streams.audio[0].codec_context.layout.nb_channels == 6
    channels = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
  np.testing.assert_allclose(wave, channels.mean(0), atol=1e-6)


def test_seconds_of_a_clip(video, frames):
  """Seconds 0 to 4 show the frames nearest to their middles; seconds 5 to 9 hold the last one, and the sound ends at 5.31 s."""
  clip = media.decode_clip(video, MEDIA, 10)
  # 0.5 s lies between frames 12 (0.48 s) and 13 (0.52 s): a tie goes to the earlier one.
  np.testing.assert_array_equal(clip.visual, frames[[12, 37, 62, 87, 112, 131, 131, 131, 131, 131]])
  wave = media.decode_audio(video, 16000)
  padded = np.pad(transforms.to_int16(wave), (0, 160_000 - len(wave))).reshape(10, 16000)
  np.testing.assert_array_equal(clip.audio, padded)
  assert clip.duration_s == pytest.approx(5.31, abs=0.005) and not clip.audio[6:].any()


def test_records_of_it(video, tmp_path):
  (root := tmp_path / "raw/AVE").mkdir(parents=True)
  (root / "trainSet.txt").write_text("Mandolin&bigbuckbunny&good&0&5")
  (root / "bigbuckbunny.mp4").symlink_to(video)
  prepare("ave", tmp_path / "raw", tmp_path / "out", Encoding(sample_rate_hz=16000), 8, Options(strict=True))
  raw, again = (AVE(folder).examples("train", MEDIA, cache=ClipCache())[0] for folder in (tmp_path / "raw", tmp_path / "out"))
  np.testing.assert_array_equal(raw["audio"], again["audio"])
  assert np.abs(raw["visual"].astype(int) - again["visual"]).mean() < 2
