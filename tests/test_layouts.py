"""Every layout in which a benchmark is distributed: found without being told, and read like the official one."""

import json
import os
import pathlib
import shutil

import fabricate
import h5py
import numpy as np
import pytest
from fabricated import every_layout

from data_pipelines import AVE, DATASETS, AVSBench, AVSBenchMS3, DataError, Media, MediaError, MusicAVQA, check
from data_pipelines.base import ClipCache, Dataset
from data_pipelines.schema import printable

MEDIA = Media(image_size=16, sample_rate_hz=8000)
NOT_UTF8 = os.fsdecode(b"clips\xff")


def shapes(example: dict) -> dict[str, tuple]:
  return {key: (value.dtype, value.shape) for key, value in example.items() if key != "id"}


def seen_and_heard(example: dict) -> tuple[int, int]:
  """The numbers of the fabricated clips whose colour and whose tone an example has."""
  middle = example["visual"][:, 8, 8].astype(int)
  tint = np.median(np.abs(middle[:, 1] - middle[:, 2])) / fabricate.TINT
  tone = np.median(np.abs(np.fft.rfft(example["audio"])).argmax(1))  # in Hz, for each row is a second
  return round(tint), round((tone - fabricate.LOWEST_HZ) / fabricate.STEP_HZ)


@every_layout
def test_every_layout_gives_the_labels_and_shapes_of_the_official_one(layout_roots, name, layout):
  dataset, official = (DATASETS[name](layout_roots[name, kind]) for kind in (layout, "official"))
  assert {"train", "test"} <= set(dataset.splits()) <= set(official.splits())
  assert dataset.classes == official.classes
  for split in dataset.splits():
    assert dataset.records(split) == official.records(split) != []
    assert dataset.coverage(split)["missing"] == []
    for record in dataset.records(split):
      example = dataset.decode(record, MEDIA)
      assert shapes(example) == shapes(official.decode(record, MEDIA))
      assert seen_and_heard(example) == (fabricate.number(record.clip),) * 2
      assert len(np.unique(example["visual"][:, 8, 8, 0])) >= dataset.seconds // 2, "frames differ"
      assert (np.abs(example["audio"]).max(1) > 3000).all(), "and every second is heard"
      for key, value in official.labels(record).items():
        np.testing.assert_array_equal(dataset.labels(record)[key], value)


@every_layout
def test_endings_in_capitals_are_found(layout_roots, name, layout, tmp_path):
  root = shutil.copytree(layout_roots[name, layout], tmp_path / "data")
  media_files = [p for p in root.rglob("*.*") if p.suffix in (".mp4", ".wav", ".npy", ".jpg", ".png") and p.name != "AVS.npy"]
  for path in media_files:
    path.rename(path.with_suffix(path.suffix.upper()))
  dataset, before = DATASETS[name](root), DATASETS[name](layout_roots[name, layout])
  for record in dataset.records("train"):
    found, wanted = dataset.decode(record, MEDIA), before.decode(record, MEDIA)
    assert media_files and all(np.array_equal(found[key], wanted[key]) for key in wanted)
  report = check.check(name, root, workers=1)
  assert not {f.check for f in report.findings} & {"missing", "unreadable", "extra", "duration", "samples"} - (
    {"duration"} if name == "music_avqa" else set()
  )


@pytest.mark.parametrize(("name", "layout"), [("ave", "php"), ("llp", "dg_sct"), ("music_avqa", "dg_sct")])
def test_packs_may_hold_wav_instead_of_npy(layout_roots, name, layout, tmp_path):
  root = shutil.copytree(layout_roots[name, layout], tmp_path / "data")
  before = DATASETS[name](root).examples("train", MEDIA, cache=ClipCache())[0]["audio"]
  for path in root.rglob("*.npy"):
    samples = (np.load(path) * 32767).astype(np.int16)
    path.unlink()
    fabricate.write_wav(path.with_suffix(".wav"), samples, 32000)
  after = DATASETS[name](root).examples("train", MEDIA, cache=ClipCache())[0]["audio"]
  np.testing.assert_allclose(before, after, atol=2)


def test_the_packs_of_all_benchmarks_share_one_root(tmp_path):
  for name, layouts in fabricate.LAYOUTS.items():
    layouts["dg_sct"](tmp_path)
    assert DATASETS[name](tmp_path).coverage("train")["missing"] == []
  assert AVSBench(tmp_path).root == AVSBenchMS3(tmp_path).root == tmp_path / "AVSBench_data"


def test_llp_frames_of_eight_a_second_are_spread(layout_roots):
  dataset = DATASETS["llp"](layout_roots["llp", "scripts"])
  visual = dataset.decode(dataset.records("train")[0], MEDIA)["visual"]
  np.testing.assert_allclose(visual[:, 8, 8, 0], 3 * (1 + np.linspace(0, 79, 10).astype(int)), atol=1)


# AVE.


def test_ave_set_files_win_over_order_files(tmp_path):
  root = fabricate.make_ave(tmp_path / "AVE")
  fabricate.write_orders(root, {"train": [2], "val": [0]})
  dataset = AVE(root)
  assert dataset.splits() == ("train", "val", "test", "unseen")
  assert [r.clip for r in dataset.records("train")] == list(fabricate.CLIP_IDS[:2])
  assert [r.clip for r in dataset.records("val")] == [fabricate.CLIP_IDS[0]]


def write_order(path: pathlib.Path, content: object, name: str = "order") -> None:
  path.unlink()
  with h5py.File(path, "w") as file:
    file[name] = content


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (np.array([0, 3, 7]), r"2 of its 3 row numbers, the first 3, do not exist: .*Annotations\.txt has 3 rows"),
    (np.array([-1]), "the first -1, do not exist"),
    (np.array([0, 1, 2, 0]), "it lists 4 rows: .* has 3 rows"),
    (np.array([0.0, 1.0]), r"float64 \[2\], not row numbers"),
    (np.array([[0, 1]]), r"int64 \[1, 2\], not row numbers"),
  ],
)
def test_ave_order_that_does_not_fit_is_one_clear_line(layout_roots, tmp_path, content, words):
  root = shutil.copytree(layout_roots["ave", "dg_sct"] / "AVE", tmp_path / "AVE")
  write_order(root / "train_order.h5", content)
  with pytest.raises(DataError, match=rf"train_order\.h5: .*{words}") as caught:
    AVE(root).records("train")
  assert "\n" not in str(caught.value)


def test_a_huge_ave_order_file_is_refused_by_its_size(layout_roots, tmp_path):
  root = shutil.copytree(layout_roots["ave", "dg_sct"] / "AVE", tmp_path / "AVE")
  (root / "train_order.h5").unlink()
  with h5py.File(root / "train_order.h5", "w") as file:
    file.create_dataset("order", shape=(10**13,), dtype=np.int64, chunks=(10**6,))  # 80 TB in a few bytes
  with pytest.raises(DataError, match=r"train_order\.h5: its dataset 'order' announces 1e\+13 label rows, more"):
    AVE(root).records("train")
  with h5py.File(root / "train_order.h5", "w") as file:
    file.create_group("order")
  with pytest.raises(DataError, match="has no readable dataset 'order'"):
    AVE(root).records("train")


def test_ave_order_file_that_cannot_be_read_is_one_clear_line(layout_roots, tmp_path):
  root = shutil.copytree(layout_roots["ave", "dg_sct"] / "AVE", tmp_path / "AVE")
  write_order(root / "train_order.h5", np.array([0]), "avadataset")
  (root / "test_order.h5").write_bytes(b"<html>404 not found</html>")
  for split in ("train", "test"):
    with pytest.raises(DataError, match=rf"{split}_order\.h5: has no readable dataset 'order'") as caught:
      AVE(root).records(split)
    assert "\n" not in str(caught.value)
  (root / "Annotations.txt").unlink()
  with pytest.raises(DataError, match=r"no Annotations\.txt or Annotations_with_domain\.txt in"):
    AVE(root).records("unseen")


def test_what_is_missing_of_ave_names_both_kinds_of_split_files(tmp_path):
  with pytest.raises(DataError, match=r"no \*Set\.txt or \*_order\.h5 in"):
    AVE(tmp_path)


# AVSBench.


@pytest.mark.parametrize(
  "header", ["Name, START_TIME ,category,Split", ",name,start_time,category,split", "split,category,name"]
)
def test_s4_columns_are_found_by_name(layout_roots, tmp_path, header):
  root = shutil.copytree(layout_roots["avsbench", "official"] / "AVSBench", tmp_path / "AVSBench")
  path = root / "Single-source/s4_meta_data.csv"
  names = [name.strip().lower() for name in header.split(",")]
  rows = [
    dict(zip(("", "name", "start_time", "category", "split"), ("7", *line.split(",")), strict=True))
    for line in path.read_text().splitlines()[1:]
  ]
  fabricate.write_lines(path, [header, *(",".join(row[name] for name in names) for row in rows)])
  assert AVSBench(root).records("test") == AVSBench(layout_roots["avsbench", "official"]).records("test")


def test_ms3_columns_are_found_by_name_and_ids_stand_first(layout_roots, tmp_path):
  root = shutil.copytree(layout_roots["avsbench_ms3", "official"] / "AVSBench", tmp_path / "AVSBench")
  path = root / "Multi-sources/ms3_meta_data.csv"
  lines = [line.split(",") for line in path.read_text().splitlines()[1:]]
  fabricate.write_lines(path, ["video,a_obj,split", *(f"{clip},guitar,{split}" for clip, split in lines)])
  assert AVSBenchMS3(root).records("test") == AVSBenchMS3(layout_roots["avsbench_ms3", "official"]).records("test")


@pytest.mark.parametrize(("rows", "words"), [
  (["name,split", "a,train,x"], r"ms3_meta_data\.csv:2: expected 2 fields, got 'a,train,x'"),
  (["a", "b"], r"ms3_meta_data\.csv: expected the columns name, split, got 'a'"),
])  # fmt: skip
def test_a_table_of_other_columns_is_one_clear_line(tmp_path, rows, words):
  root = fabricate.make_ms3(tmp_path / "AVSBench")
  fabricate.write_lines(root / "Multi-sources/ms3_meta_data.csv", rows)
  with pytest.raises(DataError, match=words):
    AVSBenchMS3(root)


def test_ms3_has_masks_in_all_seconds_of_all_splits(layout_roots):
  dataset = AVSBenchMS3(layout_roots["avsbench_ms3", "official"])
  assert dataset.classes == () and dataset.splits() == ("train", "val", "test")
  truth = np.zeros((5, 16, 16), np.uint8)
  truth[..., :8] = 1
  for split in dataset.splits():
    (record,) = dataset.records(split)
    example = dataset.decode(record, MEDIA)
    assert example["label_mask"].tolist() == [1] * 5 and "class" not in example
    np.testing.assert_array_equal(example["label"], truth)
    np.testing.assert_allclose(example["visual"][:, 8, 8, 0], [10, 20, 30, 40, 50], atol=2)


@pytest.mark.parametrize("stored", [1, 255])
def test_ms3_masks_of_any_index_and_empty_ones(layout_roots, tmp_path, stored):
  from PIL import Image

  root = shutil.copytree(layout_roots["avsbench_ms3", "official"] / "AVSBench", tmp_path / "AVSBench")
  mask = np.zeros((16, 16), np.uint8)
  folder = root / "Multi-sources/ms3_data/gt_masks/test/test_ms3_0"
  Image.fromarray(mask).convert("P").save(folder / "test_ms3_0_2.png")
  mask[3:5] = stored
  Image.fromarray(mask, mode="P").save(folder / "test_ms3_0_1.png")
  label = AVSBenchMS3(root).examples("test", MEDIA, cache=ClipCache())[0]["label"]
  np.testing.assert_array_equal(label[0], mask > 0)
  assert not label[1].any() and label[2].any()


# MUSIC-AVQA.


def change_answers(folder: pathlib.Path) -> None:
  """A copy of the annotations in which every answer is "two"."""
  for path in folder.glob("*.json"):
    path.write_text(json.dumps([{**row, "anser": "two"} for row in json.loads(path.read_text())]))


@pytest.mark.parametrize("above", ["", "data", "labels"])
@pytest.mark.parametrize("update", ["json_update", "update"])
def test_json_wins_over_its_update_which_can_be_named(tmp_path, above, update):
  root = fabricate.make_music_avqa(tmp_path / "MUSIC-AVQA", labels=str(pathlib.PurePath(above, "json")))
  fabricate.write_questions(root / above / update)
  change_answers(root / above / update)
  answers = lambda dataset: {dataset.classes[record.answer] for record in dataset.records("train")}
  usual, other = MusicAVQA(tmp_path), MusicAVQA(root / above / update)
  assert answers(usual) == {"one", "no", "more than ten"} and answers(other) == {"two"}
  assert usual.root == other.root == root and other.coverage("train")["missing"] == []
  shutil.rmtree(root / above / "json")
  assert answers(MusicAVQA(tmp_path)) == {"two"}


def test_questions_of_one_id_are_all_read(tmp_path):
  rows = [fabricate.question("00000001", 7, ("Audio", "Counting"), "How many?", [], answer) for answer in ("one", "two")]
  (tmp_path / "avqa-test.json").write_text(json.dumps(rows))
  records = MusicAVQA(tmp_path).records("test")
  assert [record.id for record in records] == ["00000001/7"] * 2
  assert [MusicAVQA(tmp_path).classes[record.answer] for record in records] == ["one", "two"]


# Names and rows that nobody expects.


def doubled(dataset: Dataset) -> Dataset:
  """The same dataset with every line of its tables twice."""
  for path in dataset.label_root.iterdir():
    if path.suffix in (".txt", ".csv") and path.name != "categories.txt":
      path.write_text("".join(2 * f"{line}\n" for line in path.read_text().splitlines() if "split" not in line))
    elif path.suffix == ".json":
      path.write_text(json.dumps(2 * json.loads(path.read_text())))
  return type(dataset)(dataset.root)


@pytest.mark.parametrize("name", fabricate.LAYOUTS)
def test_rows_that_stand_twice_are_read_twice(layout_roots, tmp_path, name):
  layout = "no_header" if name == "ave" else "official"  # a header is the first line only
  dataset = DATASETS[name](shutil.copytree(layout_roots[name, layout], tmp_path / "data"))
  before = dataset.records("train")
  after = doubled(dataset)
  assert sorted(map(repr, after.records("train"))) == sorted(2 * list(map(repr, before)))
  source = after.examples("train", MEDIA, cache=ClipCache())
  assert all(source[i]["mask"] == 1 for i in range(len(source)))


@pytest.mark.parametrize("name", fabricate.LAYOUTS)
def test_folders_whose_names_are_no_utf8(layout_roots, tmp_path, name):
  root = pathlib.Path(shutil.copytree(layout_roots[name, "official"], tmp_path / NOT_UTF8))
  dataset = DATASETS[name](root)
  assert dataset.examples("train", MEDIA, cache=ClipCache())[0]["visual"].any()
  for path in dataset.clip_files(dataset.records("train")[0]):
    path.unlink() if path.is_file() else shutil.rmtree(path)
  source = DATASETS[name](root).examples("train", MEDIA, on_bad_clip="skip", cache=ClipCache())
  source[0]
  with pytest.raises(MediaError) as caught:
    DATASETS[name](root).examples("train", MEDIA, cache=ClipCache())[0]
  for text in (source.bad[0][1], str(caught.value)):
    assert r"clips\udcff" in text and text.encode("utf-8").isascii()
  with pytest.raises(DataError, match=r"clips\\udcff"):
    DATASETS[name](root / "nowhere")


def test_frames_whose_names_are_no_utf8(layout_roots, tmp_path):
  root = shutil.copytree(layout_roots["ave", "dg_sct"], tmp_path / "data")
  folder = root / "AVE/frames" / fabricate.CLIP_IDS[0]
  (folder / "00000010.jpg").rename(folder / os.fsdecode(b"00000010\xff.jpg"))
  dataset = AVE(root)
  record = dataset.records("train")[0]
  np.testing.assert_allclose(dataset.decode(record, MEDIA)["visual"][:, 8, 8, 0], 10 * np.arange(1, 11), atol=2)
  (folder / os.fsdecode(b"00000010\xff.jpg")).write_bytes(b"")
  with pytest.raises(MediaError) as caught:
    dataset.decode(record, MEDIA)
  assert r"00000010\udcff.jpg: cannot be decoded" in str(caught.value) and str(caught.value).encode("utf-8")


def test_ids_that_no_terminal_takes_are_refused(tmp_path):
  row = fabricate.question("\ud800\n", 7, ("Audio", "Counting"), "How many?", [], "one")
  (tmp_path / "avqa-test.json").write_text(json.dumps([row]))
  with pytest.raises(DataError, match=r"question 1 \(question_id 7\): .*names no clip and question") as caught:
    MusicAVQA(tmp_path).records("test")
  assert "\n" not in str(caught.value) and str(caught.value).encode("utf-8")
  assert printable("clip ü") == "clip ü"
