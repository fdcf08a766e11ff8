"""Decoding: the right frame and second, every way a file can be broken, masks, and speed."""

import pathlib
import pickle
import subprocess
import sys
import time

import av
import fabricate
import numpy as np
import pytest
from PIL import Image

from data_pipelines import arrays, media, pictures, transforms
from data_pipelines.schema import DataError, Media, MediaError

MEDIA = Media(image_size=16, sample_rate_hz=8000)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return fabricate.write_mp4(tmp_path_factory.mktemp("clip") / "clip.mp4")


def loudness(audio: np.ndarray) -> np.ndarray:
  """Root mean square of each second, from int16 [T, S]."""
  return np.sqrt((audio / 32768.0)[:, 500:-500] ** 2).mean(-1)


def reds(visual: np.ndarray) -> np.ndarray:
  return visual[:, 8, 8, 0].astype(int)


def test_second_of_sound_lies_beside_its_frame(clip):
  got = media.decode_clip(clip, MEDIA, 10)
  assert got.visual.shape == (10, 16, 16, 3) and got.visual.dtype == np.uint8
  assert got.audio.shape == (10, 8000) and got.audio.dtype == np.int16
  assert got.duration_s == pytest.approx(10, abs=0.1)
  np.testing.assert_allclose(reds(got.visual), fabricate.levels(10), atol=6)
  np.testing.assert_allclose(loudness(got.audio), [0.127, 0.255] * 5, atol=0.01)


def test_label_per_second_datasets_read_the_first_seconds_of_a_longer_clip(tmp_path):
  path = fabricate.write_mp4(tmp_path / "long.mp4", seconds=13)
  visual = media.decode_clip(path, MEDIA, 10).visual
  np.testing.assert_allclose(reds(visual), fabricate.levels(13)[:10], atol=6)


def test_spread_covers_the_whole_clip_with_matching_sound(tmp_path):
  path = fabricate.write_mp4(tmp_path / "long.mp4", seconds=30)
  got = media.decode_clip(path, MEDIA, 10, spread=True)
  seconds = [0, 3, 6, 9, 12, 16, 19, 22, 25, 29]
  np.testing.assert_allclose(reds(got.visual), fabricate.levels(30)[seconds], atol=6)
  np.testing.assert_allclose(loudness(got.audio), [(0.127, 0.255)[s % 2] for s in seconds], atol=0.01)


def test_short_clip_holds_its_last_frame_and_is_silent(tmp_path):
  got = media.decode_clip(fabricate.write_mp4(tmp_path / "short.mp4", seconds=4), MEDIA, 10)
  np.testing.assert_allclose(reds(got.visual)[3:], fabricate.levels(4)[3], atol=6)
  assert loudness(got.audio)[3] > 0.2 and np.abs(got.audio[5:]).max() == 0


def test_sound_that_starts_late_stays_in_its_seconds(tmp_path):
  got = media.decode_clip(fabricate.write_mp4(tmp_path / "late.mp4", audio_from_s=4), MEDIA, 10)
  np.testing.assert_allclose(loudness(got.audio), [0] * 4 + [0.127, 0.255] * 3, atol=0.02)


def test_decode_video_gives_frames_at_times_and_the_duration(clip):
  frames, duration = media.decode_video(clip, [2.1, 2.2, 7.6], MEDIA)
  np.testing.assert_allclose(reds(frames), fabricate.levels(10)[[2, 2, 7]], atol=6)
  assert duration == pytest.approx(10, abs=0.1)


def test_pick_seconds():
  assert transforms.pick_seconds(10.4, 10, spread=True).tolist() == list(range(10))
  assert transforms.pick_seconds(60, 10, spread=True).tolist() == [0, 6, 13, 19, 26, 32, 39, 45, 52, 59]
  assert transforms.pick_seconds(60, 10, spread=False).tolist() == list(range(10))


def cut(path: pathlib.Path, out: pathlib.Path, share: float) -> pathlib.Path:
  """The first part of a file."""
  data = path.read_bytes()
  out.write_bytes(data[: int(len(data) * share)])
  return out


def cut_between_packets(path: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
  """The first half of a file, cut where a decoder does not notice."""
  with av.open(str(path)) as container:
    positions = sorted(packet.pos for packet in container.demux() if packet.pos)
  out.write_bytes(path.read_bytes()[: positions[len(positions) // 2]])
  return out


def broken_files(folder: pathlib.Path) -> dict[str, tuple[pathlib.Path, str]]:
  """What is wrong -> (file, words the message must hold)."""
  whole = fabricate.write_mp4(folder / "whole.mp4")
  fast = fabricate.write_mp4(folder / "fast.mp4", faststart=True, size=64)
  (folder / "empty.mp4").touch()
  (folder / "text.mp4").write_text("<html>404 not found</html>")
  fabricate.write_wav(folder / "sound.mp4", np.zeros(16000, np.int16), 16000)
  return {
    "missing": (folder / "missing.mp4", "no such file"),
    "folder": (folder, "no such file"),
    "empty": (folder / "empty.mp4", "cannot be decoded"),
    "text": (folder / "text.mp4", "cannot be decoded"),
    "index cut off": (cut(whole, folder / "cut.mp4", 0.7), "cannot be decoded"),
    "data cut off": (cut(fast, folder / "cut_fast.mp4", 0.5), "cannot be decoded"),
    "cut off between packets": (cut_between_packets(fast, folder / "clean.mp4"), "is cut off: its video"),
    "no sound": (fabricate.write_mp4(folder / "mute.mp4", audio=False), "no audio track"),
    "no picture": (folder / "sound.mp4", "no video track"),
  }


def test_broken_files_are_one_line_that_names_them(tmp_path):
  for what, (path, words) in broken_files(tmp_path).items():
    with pytest.raises(MediaError) as caught:
      media.decode_clip(path, MEDIA, 10)
    message = str(caught.value)
    assert words in message and str(path) in message and "skip" in message and "\n" not in message, what


DECODE = """
import sys
from data_pipelines import media
from data_pipelines.schema import Media, MediaError
try:
  media.decode_clip(sys.argv[1], Media(16, 8000), 10)
except MediaError as error:
  print(error)
"""


def test_sound_that_changes_its_channels_does_not_end_the_process(tmp_path):
  content = bytearray(fabricate.mp4_bytes())
  content[content.rfind(b"stsz") + 29] = 101  # the fourth piece of sound becomes 6 MB long, and decodes to 20 channels
  (tmp_path / "a.mp4").write_bytes(content)
  done = subprocess.run([sys.executable, "-c", DECODE, str(tmp_path / "a.mp4")], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith(f"{tmp_path}/a.mp4: cannot be decoded (") and "on_bad_clip='skip'" in done.stdout


@pytest.mark.parametrize(
  ("second", "words"),
  [
    (("fltp", "stereo", 8000), "fltp, 1 channels, 8000 Hz to fltp, 2 channels, 8000 Hz"),
    (("fltp", "mono", 16000), "to fltp, 1 channels, 16000 Hz"),
    (("s16p", "mono", 8000), "to s16p, 1 channels, 8000 Hz"),
  ],
)
def test_sound_of_two_kinds_in_one_file_is_refused(second, words):
  samples = media._Samples()
  for form, layout, rate in (("fltp", "mono", 8000), second):
    frame = av.AudioFrame(form, layout, 16)
    frame.sample_rate = rate
    if (form, layout, rate) == second:
      with pytest.raises(media._Damaged, match=f"its sound changes from .*{words}"):
        samples.add(frame, 0.0)
    else:
      samples.add(frame, 0.0)
  assert samples.count == 16


def test_a_track_that_nothing_decodes_is_named(tmp_path):
  path = fabricate.write_wav(tmp_path / "a.wav", np.zeros(8000, np.int16), 8000)
  content = bytearray(path.read_bytes())
  content[20:22] = b"\x01\xf1"  # the number of the codec
  path.write_bytes(content)
  with pytest.raises(MediaError, match=r"a\.wav: its audio track is of an unknown kind"):
    media.decode_audio(path, 8000)


@pytest.mark.parametrize(("place", "byte"), [(6, b"("), (0x60, b"("), (0x71, b")"), (0x34, b"B"), (11, b"\x00"), (0x1A, b"O")])
def test_damaged_headers_of_arrays_are_one_line(tmp_path, place, byte):
  path = fabricate.write_npy(tmp_path / "a.npy", np.ones(2000, np.float32) / 2)
  content = path.read_bytes()
  path.write_bytes(content[:place] + byte + content[place + 1 :])
  with pytest.raises(MediaError, match=r"a\.npy: cannot be read as an array") as caught:
    arrays.read_npy_wave(path, 8000)
  assert "\n" not in str(caught.value)


def test_endings_in_capitals_are_those_of_the_same_file(tmp_path):
  (tmp_path / "a.MP4").touch()
  assert media.present(tmp_path / "a.mp4") == tmp_path / "a.MP4" and media.present(tmp_path / "A.mp4") is None
  (tmp_path / "a.mp4").touch()
  assert media.present(tmp_path / "a.mp4") == tmp_path / "a.mp4"


def test_media_error_survives_pickling():
  error = pickle.loads(pickle.dumps(MediaError("a.mp4", "is cut off", "fetch it again")))
  assert isinstance(error, DataError) and str(error) == "a.mp4: is cut off; fetch it again"


def test_wav_is_exact_at_its_own_rate(tmp_path):
  samples = np.random.default_rng(0).integers(-32768, 32767, (8000, 2)).astype(np.int16)
  wave = media.decode_audio(fabricate.write_wav(tmp_path / "a.wav", samples, 8000), 8000)
  np.testing.assert_allclose(wave, samples.astype(np.float64).mean(1) / 32768, atol=1e-6)
  mono = media.decode_audio(fabricate.write_wav(tmp_path / "b.wav", samples[:, 0].copy(), 8000), 8000)
  np.testing.assert_array_equal(transforms.to_int16(mono), samples[:, 0])
  silence = np.full(800, 128, np.uint8)
  silent = media.decode_audio(fabricate.write_wav(tmp_path / "c.wav", silence, 8000), 8000)
  np.testing.assert_array_equal(silent, np.zeros(800, np.float32))


def test_resampling_keeps_pitch_and_length(tmp_path):
  samples = (fabricate.tones(2, 44100) * 32767).astype(np.int16)
  wave = media.decode_audio(fabricate.write_wav(tmp_path / "a.wav", samples, 44100), 16000)
  assert abs(len(wave) - 32000) <= 1
  assert np.abs(np.fft.rfft(wave[:16000])).argmax() == 250
  with pytest.raises(MediaError, match="no audio track"):
    media.decode_audio(fabricate.write_mp4(tmp_path / "mute.mp4", audio=False, seconds=1), 16000)


@pytest.mark.parametrize("stored", [np.float32, np.float64, np.int16, "floats of int16 size"])
def test_npy_waves_of_any_number_type(tmp_path, stored):
  wave = fabricate.tones(10, 32000)
  whole = stored in (np.int16, "floats of int16 size")
  array = (wave * 32768).astype(np.int16) if whole else wave
  np.save(tmp_path / "a.npy", array.astype(np.float32 if stored == "floats of int16 size" else stored))
  got = arrays.read_npy_wave(tmp_path / "a.npy", 32000)
  np.testing.assert_allclose(got, wave, atol=1e-4)
  assert len(arrays.read_npy_wave(tmp_path / "a.npy", 8000)) == 80000


@pytest.mark.parametrize(
  ("stored", "scale", "centre"),
  [
    (np.int8, 128, 0),
    (np.uint8, 128, 128),
    (np.uint16, 32768, 32768),
    (np.int32, 32768, 0),  # 16 bit in 32
    (np.int32, 2**31, 0),
    (np.int64, 32768, 0),
    (np.float16, 1, 0),
    (np.float64, 2**31, 0),
    (np.float32, 32768, 0),
  ],
)
def test_the_scale_of_samples_is_found(stored, scale, centre):
  wave = fabricate.tones(1, 4000).astype(np.float64)
  got = arrays.unit_wave((wave * scale + centre).astype(stored), "a.npy")
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, wave, atol=1e-2 if scale == 128 else 1e-3)


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.float32])
@pytest.mark.parametrize("samples", [[20000, -20000], [1, -1, 0, 0], [-32768, 0], [32767, -32768]])
def test_whole_numbers_are_of_16_bit_however_quiet_or_loud(samples, kind):
  np.testing.assert_array_equal(arrays.unit_wave(np.array(samples, kind), "a.npy"), np.float32(samples) / 32768)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_named(tmp_path, wrong):
  fabricate.write_npy(tmp_path / "a.npy", np.array([0, wrong, 0], np.float32))
  with pytest.raises(MediaError, match=r"a\.npy: holds samples that are not finite"):
    arrays.read_npy_wave(tmp_path / "a.npy", 8000)


def test_npy_pickles_are_never_opened(tmp_path):
  np.save(tmp_path / "a.npy", np.array({"x.wav": [1.0]}, object), allow_pickle=True)
  np.save(tmp_path / "b.npy", np.array(["text"]))
  (tmp_path / "c.npy").write_bytes(b"\x93NUMPY")
  (tmp_path / "d.npy").write_bytes(pickle.dumps([1.0]))
  np.savez(tmp_path / "e.npz", np.zeros(3))
  (tmp_path / "e.npz").rename(tmp_path / "e.npy")
  for name in ("a.npy", "b.npy", "c.npy", "d.npy", "e.npy", "missing.npy"):
    with pytest.raises(MediaError, match=name):
      arrays.read_npy_wave(tmp_path / name, 32000)


def test_masks_agree_however_they_are_stored(tmp_path):
  truth = (np.random.default_rng(0).random((20, 20)) > 0.5).astype(np.uint8)
  palette = Image.fromarray(truth, mode="P")
  palette.putpalette([0, 0, 0, 128, 0, 0])
  white = Image.fromarray(truth * 255)
  images = {
    "0/1": Image.fromarray(truth),
    "0/255": white,
    "palette": palette,
    "grey palette": white.convert("P"),  # MS3: indices 0 and 255
    "1-bit": white.convert("1"),
    "rgb": white.convert("RGB"),
    "rgba": white.convert("RGBA"),
  }
  for name, image in images.items():
    path = tmp_path / f"{name.replace('/', '_')}.png"
    image.save(path)
    np.testing.assert_array_equal(pictures.read_mask(path, Media(20, 8000)), truth, err_msg=name)
  small = pictures.read_mask(path, Media(7, 8000))
  assert small.shape == (7, 7) and set(np.unique(small)) <= {0, 1}
  Image.new("L", (20, 20)).save(tmp_path / "black.png")
  assert not pictures.read_mask(tmp_path / "black.png", Media(20, 8000)).any()


def test_crops_keep_the_aspect_ratio_and_the_middle(tmp_path):
  wide = np.zeros((20, 60, 3), np.uint8)
  wide[:, 20:40] = 200  # the middle third, a square
  Image.fromarray(wide).save(tmp_path / "wide.png")
  Image.fromarray(wide[..., 0]).save(tmp_path / "mask.png")
  stretched, cropped = (pictures.read_image(tmp_path / "wide.png", Media(10, 8000, crop)) for crop in (False, True))
  assert stretched.shape == cropped.shape == (10, 10, 3)
  assert (cropped[:, 2:-2] == 200).all() and cropped.min() > 150 and not stretched[:, :2].any() and not stretched[:, -2:].any()
  assert pictures.read_mask(tmp_path / "mask.png", Media(10, 8000, crop=True)).all()
  assert pictures.read_mask(tmp_path / "mask.png", Media(10, 8000)).mean() == 0.4


@pytest.mark.parametrize(
  ("values", "indices", "expected"),
  [
    ([0, 100, 127, 128, 255], False, [0, 0, 0, 1, 1]),
    ([3, 3], False, [0, 0]),  # noise in a mask without object
    ([0, 100, 120], False, [0, 0, 0]),
    ([0, 1], False, [0, 1]),
    ([1, 1], False, [1, 1]),
    ([0, 0], True, [0, 0]),
    ([0, 1], True, [0, 1]),
    ([0, 255], True, [0, 1]),
    ([0, 5, 10], True, [0, 0, 1]),  # strictly above half
    ([0, 3], True, [0, 1]),
  ],
)
def test_masks_are_cut_strictly_above_half(values, indices, expected):
  assert transforms.binarise(np.array([values], np.uint8), indices=indices).tolist() == [expected]


def test_masks_of_16_bit_and_of_nothing():
  assert transforms.binarise(np.array([[0, 300, 32767, 32768, 65535]], np.uint16)).tolist() == [[0, 0, 0, 1, 1]]
  assert transforms.binarise(np.zeros((0, 4), np.uint8)).shape == (0, 4)


def test_nearly_black_masks_are_empty_but_for_palettes(tmp_path):
  image = Image.new("L", (8, 8), 3)
  image.save(tmp_path / "grey.png")
  image = Image.new("P", (8, 8), 3)
  image.putpalette([0, 0, 0] * 3 + [255, 0, 0])
  image.save(tmp_path / "palette.png")
  means = [pictures.read_mask(tmp_path / f"{name}.png", Media(8, 8000)).mean() for name in ("grey", "palette")]
  assert means == [0, 1]


def test_frame_folders_are_sorted_by_number(tmp_path):
  folder = fabricate.write_frames(tmp_path / "frames", 20, "{}.jpg")
  (folder / "notes.txt").write_text("not a frame")
  got = pictures.read_frames(folder, MEDIA, 10)
  assert got.shape == (10, 16, 16, 3)
  expected = 10 * (1 + np.linspace(0, 19, 10).astype(int))
  np.testing.assert_allclose(got[:, 4, 4, 0], expected, atol=2)


@pytest.mark.parametrize("digits", [4, 6, 8])
@pytest.mark.parametrize(
  ("count", "numbers"),
  [
    (10, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    (16, [1, 2, 4, 6, 7, 9, 11, 12, 14, 16]),  # and not the first ten
    (80, [1, 9, 18, 27, 36, 44, 53, 62, 71, 80]),  # LLP at 8 frames a second
    (7, [1, 1, 2, 3, 3, 4, 5, 5, 6, 7]),
    (1, [1] * 10),
  ],
)
def test_ten_frames_are_spread_over_any_number_of_files(tmp_path, digits, count, numbers):
  """The cut linspace of DG-SCT and LAVISH, counted by hand."""
  folder = fabricate.write_frames(tmp_path / "frames", count, f"{{:0{digits}d}}.jpg", grey=3)
  got = pictures.read_frames(folder, MEDIA, 10)
  np.testing.assert_allclose(got[:, 4, 4, 0], 3 * np.array(numbers), atol=1)


def test_leavings_of_other_systems_are_no_frames(tmp_path):
  folder = fabricate.write_frames(tmp_path / "frames", 10)
  for name in ("._00000001.jpg", ".DS_Store", "Thumbs.db", "00000001.jpg.part"):
    (folder / name).write_bytes(b"x")
  (folder / "\u00b2.jpg").write_bytes((folder / "00000010.jpg").read_bytes())  # a digit that is no number
  assert pictures.read_frames(folder, MEDIA, 11).shape == (11, 16, 16, 3)


def test_broken_pictures_are_named(tmp_path):
  folder = fabricate.write_frames(tmp_path / "frames", 10)
  cut(folder / "00000003.jpg", folder / "00000003.jpg", 0.5)
  with pytest.raises(MediaError, match=r"00000003\.jpg: cannot be decoded as a picture"):
    pictures.read_frames(folder, MEDIA, 10)
  with pytest.raises(MediaError, match="holds no frames"):
    pictures.read_frames(tmp_path / "nothing", MEDIA, 10)


def test_a_clip_decodes_in_milliseconds(tmp_path):
  path = fabricate.write_mp4(tmp_path / "clip.mp4", size=128, fps=4, rate_hz=32000)
  seconds = []
  for _ in range(8):
    start = time.process_time()
    media.decode_clip(path, Media(64, 16000), 10)
    seconds.append(time.process_time() - start)
  assert min(seconds) < 0.04  # 0.015 on an idle core; the rest is for a busy one
