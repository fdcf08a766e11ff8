"""Tux-21: the protocol against an independent computation of it, decoding, damage, `check`, and the real stamps.

The real stamps are not ours to copy: PHPJAX_TUX names a folder that holds `stamps`; without it their test (`real`) fails.
"""

import collections
import hashlib
import json
import os
import pathlib
import pickle
import shutil

import fabricate
import numpy as np
import pytest
from check_roots import run_command, told  # noqa: F401
from PIL import Image

from data_pipelines import DataError, Media, MediaError, TuxPaint, check, media, prepare, transforms
from data_pipelines.base import ClipCache
from data_pipelines.tuxpaint import CATEGORIES, LANGUAGES

MEDIA = Media(image_size=16, sample_rate_hz=8000)
CLASSES = {  # class -> folders of its stamps
  "animals/birds": ("animals/birds", "animals/birds/cartoon"),
  "animals/fish": ("animals/fish",),
  "animals/mammals": ("animals/mammals",),
  "animals/mammals/rodents": ("animals/mammals/rodents", "animals/mammals/rodents/mice/small"),
  "clothes": ("clothes",),
  "food/fruit": ("food/fruit", "food/plastic/fruit"),
  "tools": ("tools",),
  "plants/flowers": ("plants/flowers",),
  "seasonal/easter": ("seasonal/easter",),
  "sports": ("sports", "sports/toys"),
  "village": ("village",),
  "vehicles/cars": ("vehicles/cars",),
}
SIZES = dict(zip(CLASSES, (8, 9, 10, 11, 12, 13, 14, 8, 9, 10, 11, 18), strict=True))
SPEECH = (("fr", "ro", ""), ("ro", "ca"), ("", "ml"), (), ("xx_YY", "ast"), ("de", "fr"))
FIRST = ("fr", "ro", "en", "", "ast", "fr")  # which of these is heard


def text_of(category: str, i: int) -> str:
  """Captions: some things were drawn twice, one is drawn in two classes, and some have letters beyond ASCII."""
  return (
    "An egg\u2019s shell." if i == 0 and category in ("animals/birds", "seasonal/easter") else f"A {category} {i // 3 * 2}."
  )


@pytest.fixture(scope="module")
def stamps(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A data root with stamps of 12 classes that count and all kinds of files that do not; shared, never to be written to."""
  root = tmp_path_factory.mktemp("tux")
  at = root / "usr/share/tuxpaint/stamps"
  for category, folders in CLASSES.items():
    for i in range(SIZES[category]):
      clip = f"{folders[i % len(folders)]}/thing{i}"
      fabricate.write_stamp(at, clip, text_of(category, i), languages=SPEECH[i % len(SPEECH)], index=i)
  for i in range(9):
    fabricate.write_stamp(at, f"symbols/lowercase/letter{i}", f"{i}")
    fabricate.write_stamp(at, f"people/person{i}", f"person {i}") if i < 7 else None
    fabricate.write_lines(at / f"people/person{7 + i}.txt", [f"person {i}"])
    (at / f"people/person{7 + i}.svg").write_text("<svg/>")
  for ending in ("_mirror.png", "_flip.png", "_mirror_flip.png"):
    shutil.copy(at / "clothes/thing1.png", at / f"clothes/thing0{ending}")
  fabricate.write_wav(at / "clothes/thing3.wav", np.zeros(100, np.int16), 8000)  # a sound effect is no speech
  (at / "clothes/thing0.dat").write_text("colorable")
  return root


@pytest.fixture
def copy(stamps, tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(stamps / "usr/share/tuxpaint/stamps", tmp_path / "stamps"))


# The protocol.


def ranked(seed: int, texts: set[str]) -> list[str]:
  keys = {hashlib.sha256(bytes(f"{seed}:{text}", "utf-8")).hexdigest(): text for text in texts}
  return [keys[key] for key in sorted(keys)]


@pytest.mark.parametrize("seed", range(5))
def test_order_of_classes_and_test_captions(stamps, seed):
  dataset = TuxPaint(stamps, seed)
  assert dataset.classes == tuple(sorted(CLASSES))
  order = ranked(seed, set(CLASSES))
  assert dataset.groups() == tuple(tuple(order[k : k + 3]) for k in (0, 3, 6, 9))
  chosen = set()
  for category, size in SIZES.items():
    texts = {text_of(category, i) for i in range(size)}
    chosen |= set(ranked(seed, texts)[: int(np.floor(len(texts) / 4 + 0.5))])
  rows = {split: dataset.records(split) for split in dataset.splits()}
  assert list(rows) == ["train", "test"] and len(rows["train"]) + len(rows["test"]) == sum(SIZES.values())
  assert {row.caption for row in rows["test"]} == chosen == dataset.test_captions()
  assert not {row.caption for row in rows["train"]} & chosen
  for row in rows["train"] + rows["test"]:
    category, i = dataset.classes[row.category], int(row.clip.rsplit("thing", 1)[1])
    assert (
      row.caption == text_of(category, i) and row.id == row.clip == f"{CLASSES[category][i % len(CLASSES[category])]}/thing{i}"
    )


def test_the_seed_changes_tasks_and_captions_but_no_label(stamps):
  of = lambda seed: TuxPaint(stamps, seed)
  labels = lambda d: {r.id: r.category for split in d.splits() for r in d.records(split)}
  assert labels(of(0)) == labels(of(1)) and of(0).groups() != of(1).groups() and of(0).test_captions() != of(1).test_captions()
  assert of(0).groups() == of(np.int64(0)).groups() == TuxPaint(stamps).groups()


@pytest.mark.parametrize("seed", [-1, 0.5, True, "0", None])
def test_seeds_that_are_none(stamps, seed):
  with pytest.raises(DataError, match="the seed must be a whole number of at least 0"):
    TuxPaint(stamps, seed)


def test_one_language_each_and_all_pairs(stamps):
  dataset = TuxPaint(stamps)
  rows = [row for split in dataset.splits() for row in dataset.records(split)]
  for row in rows:
    i = int(row.clip.rsplit("thing", 1)[1])
    assert row.language == FIRST[i % 6]
    assert bool(row.spoken) == bool(row.language) and row.spoken.startswith(f"{row.clip}_desc" if row.spoken else "")
    assert not row.spoken or (dataset.root / row.spoken).is_file()
  pairs = [row for split in dataset.splits() for row in dataset.pairs(split)]
  assert len(pairs) == len({row.id for row in pairs}) == sum(len(SPEECH[i % 6]) for size in SIZES.values() for i in range(size))
  languages = collections.defaultdict(list)
  for row in pairs:
    languages[row.clip].append(row.language)
    assert row.id == f"{row.clip}:{row.language}"
  assert languages["clothes/thing0"] == ["fr", "ro", "en"] and languages["clothes/thing4"] == ["ast", "xx_YY"]
  for split in dataset.splits():
    assert {row.clip for row in dataset.pairs(split)} <= {row.clip for row in dataset.records(split)}
  romanian = next(row for row in dataset.pairs("train") if row.language == "ro" and row.clip.endswith("thing0"))
  french = next(row for row in dataset.records("train") if row.clip == romanian.clip)
  heard = [dataset.decode(row, MEDIA)["audio"] for row in (french, romanian)]
  assert dataset.clip_key(french) != dataset.clip_key(romanian) and (heard[0] != heard[1]).any()
  with pytest.raises(DataError, match="no split 'val'"):
    dataset.pairs("val")


def test_coverage_names_the_silent_ones(stamps):
  dataset = TuxPaint(stamps)
  for split in dataset.splits():
    clips = [row.clip for row in dataset.records(split)]
    silent = [clip for clip in clips if int(clip.rsplit("thing", 1)[1]) % 6 == 3]
    assert dataset.coverage(split) == {"clips": len(clips), "missing": [], "silent": silent} and silent


# Where stamps lie.


@pytest.mark.parametrize("below", ["", "usr/share/tuxpaint", "usr/share/tuxpaint/stamps"])
def test_where_the_stamps_may_lie(stamps, below):
  assert TuxPaint(stamps / below).records("test") == TuxPaint(stamps).records("test")


def test_folders_of_any_name(copy, tmp_path):
  before = TuxPaint(copy).records("test")
  odd = copy.rename(tmp_path / os.fsdecode(b"stamps of mine \xff"))
  dataset = TuxPaint(odd)
  assert dataset.records("test") == before and dataset.decode(before[0], MEDIA)["visual"].any()
  (odd / f"{before[0].clip}.png").unlink()
  with pytest.raises(MediaError, match=r"mine \\udcff/.*png: no such file"):
    dataset.decode(before[0], MEDIA)


def test_no_stamps_says_how_to_get_them(tmp_path):
  (tmp_path / "AVE/labels").mkdir(parents=True)
  (tmp_path / "AVE/labels/Annotations.txt").write_text("Bark&aaaaaaaaaaa&good&0&10")
  with pytest.raises(DataError, match=r"apt-get download tuxpaint-stamps-default && dpkg-deb -x .*\.deb ") as caught:
    TuxPaint(tmp_path)
  assert str(caught.value).endswith(str(tmp_path)) and "\n" not in str(caught.value)
  fabricate.make_tux21(tmp_path / "stamps", pictures=7)
  with pytest.raises(DataError, match="no class has 8 pictures; get the stamps with"):
    TuxPaint(tmp_path)


# Decoding.


def test_shapes_types_and_zeros(stamps):
  dataset = TuxPaint(stamps)
  for media_ in (MEDIA, Media(24, 16000, crop=True)):
    for row in dataset.records("test")[:6]:
      example, zeros = dataset.decode(row, media_), dataset.zeros(row, media_)
      size, rate_hz = media_.image_size, media_.sample_rate_hz
      assert example["visual"].shape == (1, size, size, 3) and example["visual"].dtype == np.uint8
      assert example["audio"].shape == (1, 2 * rate_hz) and example["audio"].dtype == np.int16
      assert example["label"].dtype == np.int32 and example["label"].shape == () and example["label"] == row.category
      assert zeros.keys() == example.keys() and zeros["id"] == example["id"] and zeros["mask"] == 0
      assert all(zeros[k].shape == example[k].shape and zeros[k].dtype == example[k].dtype for k in example.keys() - {"id"})
      assert not any(zeros[k].any() for k in zeros.keys() - {"id"})


def test_pictures_stand_in_the_middle_of_a_white_square(copy):
  clip = TuxPaint(copy).records("train")[0].clip
  pixels = np.zeros((8, 12, 4), np.uint8)  # 12 wide, 8 high: the left half red, the right half clear
  pixels[:, :6] = (200, 10, 0, 255)
  Image.fromarray(pixels).save(copy / f"{clip}.png")
  dataset = TuxPaint(copy)
  row = next(row for row in dataset.records("train") if row.clip == clip)
  (shown,) = dataset.decode(row, Media(12, 8000))["visual"]
  wanted = np.full((12, 12, 3), 255, np.uint8)
  wanted[2:10, :6] = (200, 10, 0)
  np.testing.assert_array_equal(shown, wanted)
  half = np.full((12, 8, 4), 128, np.uint8)  # upright, half clear: white shines through
  Image.fromarray(half).save(copy / f"{clip}.png")
  (shown,) = dataset.decode(row, Media(12, 8000))["visual"]
  assert (shown[:, :2] == 255).all() and (shown[:, 10:] == 255).all() and np.abs(shown[:, 2:10].astype(int) - 191).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_pictures_of_every_mode(copy, mode):
  dataset = TuxPaint(copy)
  row = dataset.records("train")[0]
  Image.new("RGB", (9, 9), "white").convert(mode).save(copy / f"{row.clip}.png")
  assert (dataset.decode(row, MEDIA)["visual"] == 255).all()


def test_speech_is_cut_and_filled_up_to_two_seconds(copy):
  dataset = TuxPaint(copy)
  row = next(row for row in dataset.records("train") if row.spoken.endswith(".wav"))
  samples = (fabricate.tones(3, 8000) * 32767).astype(np.int16)
  for count in (24_000, 16_000, 5_000):
    fabricate.write_wav(copy / row.spoken, samples[:count], 8000)
    audio = dataset.decode(row, MEDIA)["audio"]
    np.testing.assert_array_equal(audio[0, :count], samples[: min(count, 16_000)])
    assert audio.shape == (1, 16_000) and not audio[0, count:].any()
  ogg = next(row for row in dataset.records("train") if row.spoken.endswith(".ogg"))
  (heard,) = dataset.decode(ogg, MEDIA)["audio"]
  wave = media.decode_audio(copy / ogg.spoken, 8000)
  assert 7_900 < len(wave) < 8_600 and np.abs(heard[:8000].astype(int)).mean() > 1000 and not heard[len(wave) :].any()
  np.testing.assert_array_equal(heard[: len(wave)], transforms.to_int16(wave))


def test_silence_where_nobody_speaks(stamps):
  dataset = TuxPaint(stamps)
  row = next(row for row in dataset.records("train") if row.clip == "clothes/thing3" or not row.spoken)
  example = dataset.decode(row, MEDIA)
  assert not example["audio"].any() and example["mask"] == 1 and example["visual"].any() and len(dataset.clip_files(row)) == 1


def test_sources_survive_pickling(stamps):
  source = TuxPaint(stamps, 3).examples("test", MEDIA, cache=ClipCache())
  again = pickle.loads(pickle.dumps(source))
  assert again.ids == source.ids and again.dataset.groups() == source.dataset.groups()
  np.testing.assert_array_equal(again[0]["audio"], source[0]["audio"])


# Damage.


def test_damaged_and_lost_media_are_named_or_left_out(copy):
  dataset = TuxPaint(copy)
  cut, lost, deaf, empty = [row for row in dataset.records("train") if row.spoken][:4]
  whole = (copy / f"{cut.clip}.png").read_bytes()
  (copy / f"{cut.clip}.png").write_bytes(whole[: len(whole) // 2])
  (copy / f"{lost.clip}.png").unlink()
  (copy / deaf.spoken).unlink()
  (copy / empty.spoken).write_bytes(b"RIFF")
  for row, words in (
    (cut, f"{cut.clip}.png: cannot be decoded as a picture"),
    (lost, f"{lost.clip}.png: no such file"),
    (deaf, f"{deaf.spoken}: no such file"),
    (empty, f"{empty.spoken}: cannot be decoded"),
  ):
    with pytest.raises(MediaError) as caught:
      dataset.decode(row, MEDIA)
    assert words in str(caught.value) and "fetch or make this file again" in str(caught.value) and "\n" not in str(caught.value)
  source = dataset.examples("train", MEDIA, on_bad_clip="skip", cache=ClipCache())
  masks = {source.ids[i]: float(source[i]["mask"]) for i in range(len(source))}
  bad = {row.id for row in (cut, lost, deaf, empty)}
  assert {name for name, mask in masks.items() if not mask} == bad == {name for name, _ in source.bad}
  assert set(dataset.coverage("train")["missing"]) == {lost.clip, deaf.clip}


def test_limits_hold_before_memory_is_spent(copy, monkeypatch):
  dataset = TuxPaint(copy)
  row = next(row for row in dataset.records("train") if row.spoken.endswith(".wav"))
  Image.new("RGBA", (20_000, 300)).save(copy / f"{row.clip}.png")  # few pixels, but not on a square
  with pytest.raises(MediaError, match=r"png: is 20000 x 300, which on a square needs 400000000 pixels, more than the limit"):
    dataset.decode(row, MEDIA)
  Image.new("RGBA", (30, 30)).save(copy / f"{row.clip}.png")
  monkeypatch.setenv("PHPJAX_LIMITS", "duration_s=0.5")
  with pytest.raises(MediaError, match=r"desc.*wav: has sound up to .* more than the limit of 0.5"):
    dataset.decode(row, MEDIA)


@pytest.mark.parametrize(
  ("content", "words"), [(b"", "its first line"), (b"\n\nA hat.\n", "its first line"), (b"\xff\xfe", "UTF-8")]
)
def test_damaged_captions_are_named(copy, content, words):
  path = copy / "clothes/thing5.txt"
  path.write_bytes(content)
  with pytest.raises(DataError, match=words) as caught:
    TuxPaint(copy)
  assert str(caught.value).startswith(str(path)) and "fetch this file again" in str(caught.value)


def test_captions_of_classes_that_do_not_count_are_not_read(copy):
  before = TuxPaint(copy).records("test")
  for path in ("symbols/lowercase/letter0.txt", "people/person0.txt"):
    (copy / path).write_bytes(b"\xff")
  assert TuxPaint(copy).records("test") == before


def test_names_that_no_message_can_show_are_no_stamps(copy):
  before = [TuxPaint(copy).records(split) for split in ("train", "test")]
  for name in (b"line\nbreak", b"caf\xe9", b"back\\slash", b"._thing0", b"\x1b[31mred", b"x" * 220):
    for ending in (".png", ".txt"):
      shutil.copy(copy / f"clothes/thing0{ending}", copy / "clothes" / os.fsdecode(name + ending.encode()))
  (copy / "clothes/up").symlink_to(copy, target_is_directory=True)  # its own parent
  (copy / "clothes/aside.png").mkdir()
  assert [TuxPaint(copy).records(split) for split in ("train", "test")] == before


def test_a_link_to_what_is_no_picture_is_not_opened(copy):
  dataset = TuxPaint(copy)
  row = dataset.records("train")[0]
  (copy / f"{row.clip}.png").unlink()
  os.mkfifo(copy / f"{row.clip}.png")
  with pytest.raises(MediaError, match="no such file"):
    dataset.decode(row, MEDIA)


def test_folders_that_cannot_be_listed_are_named(copy, monkeypatch):
  scandir = os.scandir

  def refuse(path="."):
    if str(path).endswith("clothes"):
      raise PermissionError(13, "Permission denied", str(path))
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refuse)
  with pytest.raises(DataError, match=r"clothes: cannot be listed \(Permission denied\); give this user"):
    TuxPaint(copy)


# The commands.


def note(report: dict, name: str) -> str:
  (found,) = told(report, "note", name)
  return found["what"]


def test_check_counts_stamps_of_ones_own(run, stamps):
  code, text, report = run("tux21", stamps)
  total = sum(SIZES.values())
  assert code == 0 and not report["official"] and report["clips"] == total, text
  assert note(report, "stamps").startswith(f"{total} pictures, ") and " 12 classes, " in note(report, "stamps")
  tests = [len(TuxPaint(stamps, seed).records("test")) for seed in range(5)]
  assert note(report, "stamps").endswith(f"for testing with seeds 0 to 4: {' '.join(map(str, tests))}")
  assert report["splits"]["test"]["rows"] == report["splits"]["test"]["decoded"] == tests[0]
  (silent,) = told(report, "note", "silent")
  assert silent["what"] == f"{len(silent['examples'])} pictures without a spoken caption: shown in silence"
  assert {row["class"]: row["rows"] for row in report["classes"]} == SIZES
  assert not told(report, "note", "extra") and report["next"] == ["train on it as it is"]


def official(root: pathlib.Path) -> pathlib.Path:
  """Stamps of the published classes, 8 pictures each."""
  return fabricate.make_tux21(root, classes=CATEGORIES)


def test_check_against_the_published_numbers(run, tmp_path):
  root = official(tmp_path / "stamps")
  code, _, report = run("tux21", tmp_path)
  (counts,) = told(report, "gap", "stamps")
  assert code == 1 and report["official"]
  assert counts["what"].startswith(
    "168 pictures, official 362; 168 captions, official 331; 168 picture-and-speech pairs, official 3012"
  )
  assert counts["what"].endswith("official 97 89 92 96 94") and "classes" not in counts["what"]
  (root / "town/thing0.png").unlink()  # 7 are left
  (root / "clothes/thing0.txt").rename(root / "clothes/other.txt")
  code, _, report = run("tux21", tmp_path)
  (counts,) = told(report, "gap", "stamps")
  assert code == 1 and report["official"] and "19 classes, official 21" in counts["what"]
  assert counts["examples"] == ["class clothes", "class town"] and "dpkg-deb -x" in counts["mend"]
  halves = {f["what"]: f["examples"] for f in told(report, "gap", "halves")}
  assert halves == {
    "1 picture without a caption: left out": ["clothes/thing0"],
    "2 captions without a picture: left out": ["clothes/other", "town/thing0"],
  }


def test_check_of_damage(run, copy):
  dataset = TuxPaint(copy)
  broken, deaf = [row for row in dataset.records("test") if row.spoken][:2]
  (copy / f"{broken.clip}.png").write_bytes(b"\x89PNG")
  (copy / deaf.spoken).write_bytes(b"")
  shutil.copy(copy / "clothes/thing0.png", copy / os.fsdecode(b"clothes/caf\xe9.png"))
  code, text, report = run("tux21", copy)
  assert code == 1 and told(report, "gap", "unreadable")[0]["examples"][0].startswith(
    f"{copy}/{broken.clip}.png: cannot be decoded"
  )
  assert told(report, "gap", "zero_byte")[0]["examples"] == [f"{copy}/{deaf.spoken}: is empty (0 bytes)"]
  assert told(report, "gap", "names")[0]["examples"] == [r"caf\udce9.png"]
  assert "on_bad_clip=skip" in text


def test_check_without_stamps(tmp_path, capsys):
  assert check.main(["--dataset=tux21", f"--root={tmp_path}"]) == 2
  assert "apt-get download tuxpaint-stamps-default && dpkg-deb -x" in capsys.readouterr().out.split("next\n")[1]


def test_check_all_finds_stamps_among_others(stamps, capsys):
  assert check.main(["--dataset=all", f"--root={stamps}", "--labels_only", "--json"]) == 0
  report = json.loads(capsys.readouterr().out)
  assert list(report["datasets"]) == ["tux21"] and report["absent"] == ["ave", "llp", "avsbench", "avsbench_ms3", "music_avqa"]


def test_prepare_says_that_there_is_no_need(stamps, tmp_path, capsys):
  assert prepare.main(["--dataset=tux21", f"--root={stamps}", f"--out={tmp_path}"]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: tux21 needs no preparation: ") and not any(tmp_path.iterdir())


# The real stamps.


@pytest.mark.real
def test_real_stamps(run):
  folder = os.environ.get("PHPJAX_TUX")
  assert folder, "set PHPJAX_TUX to a folder that holds `stamps` of tuxpaint-stamps-default"
  datasets = [TuxPaint(folder, seed) for seed in range(5)]
  assert datasets[0].groups()[0] == ("household", "sports", "town/monuments")
  spoken = collections.Counter()
  for dataset, tests in zip(datasets, (97, 89, 92, 96, 94), strict=True):
    rows = [row for split in dataset.splits() for row in dataset.records(split)]
    pairs = [row for split in dataset.splits() for row in dataset.pairs(split)]
    assert len(dataset.records("test")) == tests and len(rows) == 362 and len(pairs) == 3012
    assert len({row.caption for row in rows}) == 331 and dataset.classes == CATEGORIES
    assert len(dataset.groups()) == 7 and {len(group) for group in dataset.groups()} == {3}
    assert collections.Counter(row.language for row in rows) == {"fr": 350, "": 12}
    spoken = collections.Counter(row.language for row in pairs)
  assert spoken.keys() == set(LANGUAGES) - {"lt"} and (spoken["fr"], spoken["es"], spoken["ml"]) == (350, 343, 6)
  code, text, report = run("tux21", folder)  # decodes all of them
  assert code == 0 and sum(split["decoded"] for split in report["splits"].values()) == 362, text
  assert "3012 picture-and-speech pairs, 12 without any speech; for testing with seeds 0 to 4: 97 89 92 96 94" in text
  for row in datasets[0].records("test")[::10]:  # as the published baselines compose them
    picture = Image.open(datasets[0].root / f"{row.clip}.png").convert("RGBA")
    square = Image.new("RGBA", [max(picture.size)] * 2, "white")
    square.alpha_composite(picture, tuple((max(picture.size) - side) // 2 for side in picture.size))
    wanted = np.asarray(square.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC))
    example = datasets[0].decode(row, Media(64, 16000))
    np.testing.assert_array_equal(example["visual"][0], wanted)
    assert example["audio"].shape == (1, 32000) and example["audio"].any() == bool(row.spoken)
