"""The toybox: same seed, same bytes; scenes hold what they promise; unseen things stay unseen."""

import hashlib
import time
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from data_pipelines.schema import DataError
from data_pipelines.toybox import compose as composer
from data_pipelines.toybox import write_avs
from data_pipelines.toybox.clips import interval, runs
from data_pipelines.toybox.compose import DEFAULT_SIZES, TINY_SIZES, compose, plan_all
from data_pipelines.toybox.library import MEDIA_DIR, load_library, read_manifest
from data_pipelines.toybox.render import render_audio, render_frame, render_second
from data_pipelines.toybox.scene import Scene, sample_scene

SEED = 3
SMALL_SIZES = {folder: {"train": 1, "val": 0, "test": 1, "unseen": 1} for folder in DEFAULT_SIZES}


def quiet(done: int, total: int) -> None:
  assert 0 < done <= total


@pytest.fixture(scope="module")
def library():
  return load_library()


@pytest.fixture(scope="module")
def unseen_library():
  return load_library(("test",))


@pytest.fixture(scope="module")
def plans():
  return plan_all(SEED, TINY_SIZES)


@pytest.fixture(scope="module")
def many_plans():
  return plan_all(SEED, DEFAULT_SIZES)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
  return compose(tmp_path_factory.mktemp("data") / "toybox", seed=SEED, sizes=TINY_SIZES, workers=1, progress=quiet)


def content(folder: Path) -> dict[str, str]:
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


def used(scene: Scene, of) -> set[str]:
  names = {of.pictures[track.class_id][track.picture].name for track in scene.objects}
  names |= {of.sounds[voice.class_id][voice.sound].name for voice in scene.voices}
  return names | {of.background_names[scene.backdrop.background]}


def library_of(split: str, library, unseen_library):
  return unseen_library if split == "unseen" else library


# Media and library.


def test_media_files_are_those_of_the_manifest():
  entries = read_manifest()["files"]
  for entry in entries:
    assert hashlib.sha256((MEDIA_DIR / entry["file"]).read_bytes()).hexdigest() == entry["sha256"], entry["file"]
  on_disk = {str(p.relative_to(MEDIA_DIR)) for p in MEDIA_DIR.rglob("*") if p.suffix in (".png", ".jpg", ".ogg", ".flac")}
  assert on_disk == {entry["file"] for entry in entries}
  assert (MEDIA_DIR / "README.md").is_file()


def test_known_and_unseen_libraries_share_nothing(library, unseen_library):
  groups = [
    {entry["group"] for entry in read_manifest()["files"] if entry["kind"] != "sound" and entry["split"] in of.splits}
    for of in (library, unseen_library)
  ]
  assert not groups[0] & groups[1]
  for kind in ("pictures", "sounds"):
    known, unseen = ({item.name for items in getattr(of, kind).values() for item in items} for of in (library, unseen_library))
    assert known and unseen and not known & unseen
  assert not set(library.background_names) & set(unseen_library.background_names)
  assert library.classes == unseen_library.classes and len(library.classes) == 14
  assert library.noun["keyboard"] == "a piano keyboard" and library.label["keyboard"] == "piano keyboard"


def test_a_damaged_or_missing_media_file_is_one_clear_line(tmp_path):
  (tmp_path / "manifest.json").write_text((MEDIA_DIR / "manifest.json").read_text())
  with pytest.raises(DataError, match=r"image_00\.png is missing"):
    load_library(media_dir=tmp_path)
  (tmp_path / "drum").mkdir()
  (tmp_path / "drum" / "image_00.png").write_bytes(b"no picture")
  with pytest.raises(DataError, match="damaged"):
    load_library(media_dir=tmp_path)
  with pytest.raises(DataError, match="splits"):
    load_library(("holiday",))


def test_pieces_are_one_second_of_equal_loudness(library):
  for class_id, sounds in library.sounds.items():
    for i, sound in enumerate(sounds):
      for repeats in (1, 3):
        pieces = library.pieces(class_id, i, repeats)
        assert pieces.dtype == np.float32 and pieces.shape[1] == 32000 and 1 <= len(pieces) <= 3
        rms = np.sqrt(np.mean(pieces**2, axis=1))
        assert np.all(rms < 0.1001) and np.all(rms > 0.03), sound.name
        assert np.abs(pieces).max() <= 1.2001


# Scenes.


def test_a_scene_is_a_pure_function_of_its_seed(library):
  for seed in range(20):
    first, second = (sample_scene(np.random.default_rng([seed, 1]), library, seconds=6) for _ in range(2))
    assert first == second
    fresh = load_library() if seed == 0 else library
    a, b = render_frame(first, library, 2.25, 64), render_frame(second, fresh, 2.25, 64)
    assert np.array_equal(a[0], b[0]) and all(np.array_equal(x, y) for x, y in zip(a[1], b[1], strict=True))
    assert np.array_equal(render_second(first, library, 4), render_second(second, fresh, 4))


def test_scenes_hold_what_they_promise(library):
  scenes = [sample_scene(np.random.default_rng(i), library, seconds=8) for i in range(300)]
  assert {len(scene.objects) for scene in scenes} == {1, 2, 3}
  for scene in scenes:
    classes = [track.class_id for track in scene.objects] + [voice.class_id for voice in scene.off_screen]
    assert len(set(classes)) == len(classes)
    assert all(0.25 <= track.scale <= 0.55 for track in scene.objects)
    for progress in (0, 0.5, 1):
      assert all(-0.05 <= value <= 1.05 for track in scene.objects for value in track.centre(progress))
  tracks = [track for scene in scenes for track in scene.objects]
  assert 0.15 < np.mean([track.sound is None for track in tracks]) < 0.35
  assert any(any(track.sounding) and not all(track.sounding) for track in tracks)
  assert 0.2 < np.mean([bool(scene.off_screen) for scene in scenes]) < 0.4
  with pytest.raises(ValueError, match="t_seconds"):
    render_frame(scenes[0], library, 8.0, 32)


def test_silence_is_quiet_and_sound_is_not(library):
  for i in range(30):
    scene = sample_scene(np.random.default_rng(i), library, seconds=5)
    wave = render_audio(scene, library)
    assert wave.shape == (5 * 32000,) and wave.dtype == np.float32 and np.abs(wave).max() < 1
    for t in range(5):
      assert np.array_equal(wave[t * 32000 : (t + 1) * 32000], render_second(scene, library, t))
      loud = np.sqrt(np.mean(render_second(scene, library, t) ** 2))
      assert (loud > 0.01) == any(voice.sounding[t] for voice in scene.voices)


def composite_by_hand(scene: Scene, of, t: float, size: int) -> list[np.ndarray]:
  """Visible alpha of each object in float, painted on a padded canvas."""
  visible = []
  for track in scene.objects:
    layer = np.zeros((3 * size, 3 * size))
    sprite = of.sprite(track.class_id, track.picture, max(2, round(track.scale * size)), track.flip)[..., 3] / 255
    x, y = track.centre(t / scene.seconds)
    top = size + round(y * size - sprite.shape[0] / 2)
    left = size + round(x * size - sprite.shape[1] / 2)
    if track.visible[int(t)]:
      layer[top : top + sprite.shape[0], left : left + sprite.shape[1]] = sprite
    layer = layer[size : 2 * size, size : 2 * size]
    visible = [below * (1 - layer) for below in visible] + [layer]
  return visible


def test_alpha_is_that_of_the_visible_part(library):
  for i in range(40):
    scene = sample_scene(np.random.default_rng(i), library, seconds=4, num_objects=(2, 3), overlap=0.9, speed=0.1)
    _, alphas = render_frame(scene, library, 1.5, 96)
    for alpha, exact in zip(alphas, composite_by_hand(scene, library, 1.5, 96), strict=True):
      assert np.abs(alpha - 255 * exact).max() <= 2  # integers round down once per layer in front


def test_runs():
  assert runs([0, 1, 1, 0, 1]) == [(1, 3), (4, 5)] and runs([]) == [] and runs([1]) == [(0, 1)]
  assert interval(-2, 2, 4) == (True, True, False, False)


# Composing.


def test_the_number_of_workers_changes_no_byte(tmp_path):
  one = compose(tmp_path / "one", seed=SEED, sizes=SMALL_SIZES, workers=1, progress=quiet)
  two = compose(tmp_path / "two", seed=SEED, sizes=SMALL_SIZES, workers=2, progress=quiet)
  assert content(one) == content(two)
  assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_another_seed_gives_other_scenes(plans):
  other = plan_all(SEED + 1, TINY_SIZES)
  for folder, splits in plans.items():
    for split, clips in splits.items():
      assert all(a.scene != b.scene for a, b in zip(clips, other[folder][split], strict=True))


def test_the_same_settings_return_at_once(root):
  stamp = (root / "AVE" / "Annotations.txt").stat().st_mtime_ns
  start = time.perf_counter()
  assert compose(root, seed=SEED, sizes=TINY_SIZES, progress=lambda *_: pytest.fail("composed again")) == root
  assert time.perf_counter() - start < 1
  assert (root / "AVE" / "Annotations.txt").stat().st_mtime_ns == stamp


def test_other_settings_replace_a_toybox_but_nothing_else(tmp_path):
  sizes = {"AVSBench": {"train": 1}}
  out = compose(tmp_path / "data", seed=0, sizes=sizes, workers=1, progress=quiet)
  first = content(out)
  assert content(compose(out, seed=1, sizes=sizes, workers=1, progress=quiet)) != first
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.txt").write_text("years of work")
  with pytest.raises(DataError, match="not a toybox"):
    compose(tmp_path / "mine", sizes=sizes, workers=1)
  assert (tmp_path / "mine" / "thesis.txt").is_file()


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr(write_avs, "write_media", fail)
  with pytest.raises(OSError, match="disk full"):
    compose(tmp_path / "data", sizes={"AVSBench": {"train": 1}}, workers=1)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sizes", [{"AVA": {"train": 1}}, {"AVE": {"trial": 1}}, {"AVE": {"train": -1}}])
def test_unknown_sizes_are_refused(tmp_path, sizes):
  with pytest.raises(DataError, match="toybox"):
    compose(tmp_path / "data", sizes=sizes)


def test_command(root, capsys):
  from data_pipelines.toybox.__main__ import main

  (root.parent / "full").mkdir(exist_ok=True)
  (root.parent / "full" / "x").write_text("x")
  assert main([f"--out={root.parent / 'full'}", "--size=tiny"]) == 2
  assert capsys.readouterr().err.startswith("error: toybox: ")
  with pytest.raises(SystemExit) as stopped:
    main(["--out=x", "--seed=-1"])
  assert stopped.value.code == 2
  assert set(composer.SIZES) == {"default", "tiny"}


def test_unseen_things_appear_in_unseen_only(many_plans, library, unseen_library):
  seen: dict[bool, set[str]] = {False: set(), True: set()}
  for splits in many_plans.values():
    for split, clips in splits.items():
      for clip in clips:
        seen[split == "unseen"] |= used(clip.scene, library_of(split, library, unseen_library))
  allowed = {split: {e["file"] for e in read_manifest()["files"] if (e["split"] == "test") == split} for split in (False, True)}
  assert seen[False] == allowed[False] and seen[True] == allowed[True]  # and everything is used


PROMISES = {  # number of objects, share of clips with a sound from outside, share of objects that never sound
  "AVE": ({1, 2}, (0.05, 0.4), (0.1, 0.6)),  # one event per clip, and at most one more object
  "LLP": ({1, 2, 3}, (0.01, 0.3), (0.05, 0.4)),
  "AVSBench": ({1, 2, 3}, (0.0, 0.0), (0.3, 0.8)),  # S4 has a single source, and it is seen
  "AVSBench-MS3": ({1, 2, 3}, (0.0, 0.0), (0.1, 0.5)),
  "MUSIC-AVQA": ({1, 2, 3}, (0.1, 0.5), (0.05, 0.4)),
}


@pytest.mark.parametrize("folder", PROMISES)
def test_the_clips_of_each_layout_hold_what_scenes_promise(many_plans, folder):
  """Numbers of objects, movement, size, silence and sounds from outside, over all training clips."""
  numbers, outside, silent = PROMISES[folder]
  scenes = [clip.scene for clip in many_plans[folder]["train"]]
  tracks = [track for scene in scenes for track in scene.objects]
  assert {len(scene.objects) for scene in scenes} == numbers
  assert outside[0] <= np.mean([bool(scene.off_screen) for scene in scenes]) <= outside[1]
  assert silent[0] <= np.mean([not any(track.sounding) for track in tracks]) <= silent[1]
  if folder != "AVSBench":
    assert np.mean([any(t.sounding) and not all(t.sounding) for t in tracks]) > 0.3, "sounds come and go"
  paths = [np.hypot(t.x1 - t.x0, t.y1 - t.y0) for t in tracks]
  assert np.mean(paths) > 0.1 and max(paths) > 0.3, "objects move"
  assert np.std([track.scale for track in tracks]) > 0.04, "and differ in size"


def test_every_clip_is_another_scene(many_plans):
  for splits in many_plans.values():
    clips = [clip for members in splits.values() for clip in members]
    assert len({clip.id for clip in clips}) == len(clips) == len({repr(clip.scene) for clip in clips})


def test_classes_are_balanced(many_plans, library):
  for splits in many_plans.values():
    for clips in splits.values():
      counts = Counter(clip.class_id for clip in clips)
      assert len(counts) == len(library.classes) and max(counts.values()) - min(counts.values()) <= 1


def test_mp4_is_h264_and_aac_of_ten_seconds(root, plans, library):
  clip = plans["LLP"]["test"][0]
  with av.open(str(root / "LLP" / "video" / f"{clip.id}.mp4")) as container:
    video, audio = container.streams.video[0], container.streams.audio[0]
    assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
    assert (video.width, video.height, video.average_rate, audio.rate) == (128, 128, 4, 32000)
    assert abs(container.duration / av.time_base - 10) < 0.05
    frames = {float(frame.time): frame.to_ndarray(format="rgb24") for frame in container.decode(video)}
  assert sorted(frames) == [k / 4 for k in range(40)]
  for t in (0.5, 6.5):
    rgb, _ = render_frame(clip.scene, library, t, 128)
    assert np.abs(rgb.astype(int) - frames[t]).mean() < 6
  with av.open(str(root / "LLP" / "video" / f"{clip.id}.mp4")) as container:
    wave = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0) if frame.pts >= 0])[:320000]
  truth = render_audio(clip.scene, library)
  assert np.corrcoef(wave, truth[: len(wave)])[0, 1] > 0.95
