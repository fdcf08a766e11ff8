"""The readers on the published label files, which are not ours to copy: read where they lie.

The numbers were counted in the files themselves, and agree with the papers where those give any.
"""

import os
import pathlib
from collections import Counter

import numpy as np
import pytest

from data_pipelines import AVE, LLP, MusicAVQA
from data_pipelines.ave import read_order

pytestmark = pytest.mark.real
ROOT = pathlib.Path(__file__).resolve().parents[1]
ANNOTATIONS = pathlib.Path(os.environ.get("PHPJAX_ANNOTATIONS", ROOT.parent / "shared" / "annotations"))


@pytest.fixture(scope="module")
def annotations() -> pathlib.Path:
  if not ANNOTATIONS.is_dir():
    pytest.fail(f"no published annotation files in {ANNOTATIONS}; set PHPJAX_ANNOTATIONS to their folder")
  return ANNOTATIONS


def test_published_ave(annotations, tmp_path):
  datasets = []
  for name in ("Annotations.txt", "Annotations_no_header.txt"):
    (root := tmp_path / name).mkdir()
    (root / "Annotations.txt").symlink_to(annotations / "ave" / name)
    for split in ("train", "val", "test"):
      (root / f"{split}Set.txt").symlink_to(annotations / "ave" / f"{split}Set.txt")
    datasets.append(AVE(root))
  dataset, rows = datasets[0], datasets[0].annotations()
  assert rows == datasets[1].annotations()
  assert len(rows) == 4143 and len({row.clip for row in rows}) == 4097
  assert [len(dataset.records(split)) for split in ("train", "val", "test")] == [3339, 402, 402]
  assert list(dict.fromkeys(dataset.classes[row.category] for row in rows)) == list(dataset.classes)
  assert (annotations / "ave/categories.txt").read_text().splitlines() == list(dataset.classes)
  labels = {s: np.stack([dataset.labels(r)["label"] for r in dataset.records(s)]) for s in dataset.splits()}
  assert [int((labels[s] < 28).sum()) for s in ("train", "val", "test")] == [27759, 3288, 3305]
  assert (labels["test"] == 28).mean() == pytest.approx(0.177861, abs=1e-6)


def test_published_ave_order_files_give_the_rows_of_the_set_files(annotations, tmp_path):
  usual = AVE(annotations / "ave")
  for name in ("Annotations.txt", "Annotations_no_header.txt"):
    (root := tmp_path / name).mkdir()
    (root / "Annotations.txt").symlink_to(annotations / "ave" / name)
    for split in ("train", "val", "test"):
      (root / f"{split}_order.h5").symlink_to(annotations / "ave" / f"{split}_order.h5")
    dataset = AVE(root)
    assert dataset.splits() == ("train", "val", "test")
    assert all(dataset.records(split) == usual.records(split) for split in dataset.splits())
  orders = [read_order(annotations / "ave" / f"{split}_order.h5") for split in ("train", "val", "test")]
  assert [len(order) for order in orders] == [3339, 402, 402]
  assert sorted(i for order in orders for i in order) == list(range(4143)), "disjoint and complete"
  for split, order in zip(("train", "val", "test"), orders, strict=True):  # the files themselves, not read by ours
    lines = (annotations / "ave/Annotations_no_header.txt").read_text().splitlines()
    assert [lines[i] for i in order] == (annotations / "ave" / f"{split}Set.txt").read_text().splitlines()


def test_published_ave_in_the_pack_of_php(annotations, tmp_path):
  (labels := tmp_path / "AVE" / "labels").mkdir(parents=True)
  header, *rows = (annotations / "ave/Annotations.txt").read_text().splitlines()
  (labels / "Annotations_with_domain.txt").write_text("\n".join([f"{header}&Domain", *(f"{row}&music" for row in rows)]))
  for name in ("categories.txt", "train_order.h5", "test_order.h5"):
    (labels / name).symlink_to(annotations / "ave" / name)
  dataset, usual = AVE(tmp_path), AVE(annotations / "ave")
  assert dataset.splits() == ("train", "test") and dataset.classes == usual.classes
  assert all(dataset.records(split) == usual.records(split) for split in dataset.splits())


def test_published_ave_leaks_and_oddities(annotations):
  dataset = AVE(annotations / "ave")
  clips = {split: {record.clip for record in dataset.records(split)} for split in dataset.splits()}
  assert len(clips["train"] & clips["test"]) == 8 and len(clips["train"] & clips["val"]) == 10
  rows = dataset.annotations()
  times = Counter(row.clip for row in rows)
  assert sum(count > 1 for count in times.values()) == 45 and max(times.values()) == 3
  assert rows[26].clip == "VWi2ENBuTbw" and (dataset.labels(rows[26])["label"] == 28).all()
  assert sum((row.start, row.end) == (0, 10) for row in rows) == 2750
  background = {s: 10 * len(dataset.records(s)) - sum(r.end - r.start for r in dataset.records(s)) for s in dataset.splits()}
  assert background == {"train": 5631, "val": 732, "test": 715}
  count = Counter(record.category for record in dataset.records("test"))
  assert {n: sorted(i for i in count if count[i] == n) for n in set(count.values())} == {
    18: [0, 3, 4, 7, 10, 14, 17, 24],
    17: [1, 2, 5, 6, 8, 15],
    16: [9, 16, 21],
    15: [26, 27],
    13: [11],
    10: [12, 18, 25],
    9: [13],
    8: [19],
    6: [20, 22, 23],
  }


def test_published_llp(annotations):
  dataset = LLP(annotations / "avvp")
  assert dataset.splits() == ("train", "val", "test")
  assert [len(dataset.records(split)) for split in dataset.splits()] == [10000, 649, 1200]
  for split, cells in {"val": (8089, 6115, 5078), "test": (14576, 11789, 9592)}.items():
    labels = [dataset.labels(record) for record in dataset.records(split)]
    audio, visual = (np.stack([x[key] for x in labels]) for key in ("dense_audio", "dense_visual"))
    assert (audio.sum(), visual.sum(), (audio * visual).sum()) == cells
    assert all(x["dense"] == 1 for x in labels)
  assert all(dataset.labels(record)["dense"] == 0 for record in dataset.records("train"))
  assert [sum(len(r.weak) for r in dataset.records(split)) for split in ("train", "test")] == [16057, 2179]
  # Protocol of the released PHP: the target is the active class of the lowest index, every label once.
  speech = sum(len(r.weak) for r in dataset.records("test") if 0 in r.weak)
  assert speech == 1373 and speech / 2179 == pytest.approx(0.630106, abs=1e-6)


def test_published_llp_splits_and_defects(annotations):
  dataset = LLP(annotations / "avvp")
  ids = {split: [record.clip for record in dataset.records(split)] for split in dataset.splits()}
  everything = [name for names in ids.values() for name in names]
  assert len(everything) == len(set(everything)) == len({name[:11] for name in everything}) == 11849
  test = dataset.records("test")
  labels = [dataset.labels(record) for record in test]
  empty = [sum(not (x["dense_audio"] * x["dense_visual"]).any() for x in labels)]
  empty += [sum(not x[key].any() for x in labels) for key in ("dense_audio", "dense_visual")]
  assert empty == [174, 6, 121]
  assert Counter(len(r.weak) for r in dataset.records("train")) == {1: 4032, 2: 5879, 3: 89}
  (twice,) = [r for split in ("val", "test") for r in dataset.records(split) if len(set(r.weak)) < len(r.weak)]
  assert twice.clip == "LcFWKgFphXI_20_30" and dataset.labels(twice)["label"].sum() == len(set(twice.weak))
  spans = {kind: dataset._spans(kind) for kind in ("audio", "visual")}
  assert [len(set(spans[kind]) - set(everything)) for kind in spans] == [8, 7]
  unequal = 0
  for record in (*dataset.records("val"), *test):
    heard_or_seen = {label for *_, label in (*record.audio, *record.visual)}
    unequal += set(record.weak) != heard_or_seen
  assert unequal == 81


def test_published_llp_damaged_copy_is_tolerated(annotations, tmp_path):
  for path in (annotations / "avvp").glob("*.csv"):
    if path.stem not in ("AVVP_eval_audio", "AVVP_eval_audio_corrupted_copy"):
      (tmp_path / path.name).symlink_to(path)
  (tmp_path / "AVVP_eval_audio.csv").symlink_to(annotations / "avvp/AVVP_eval_audio_corrupted_copy.csv")
  dataset = LLP(tmp_path)
  assert sum(dataset.labels(r)["dense_audio"].sum() for r in dataset.records("test")) == 14568


def test_published_music_avqa(annotations):
  dataset = MusicAVQA(annotations / "music_avqa")
  assert [len(dataset.records(split)) for split in ("val", "test")] == [4595, 9185]
  records = dataset.records("test")
  assert np.bincount([r.type for r in records]).tolist() == [1022, 601, 1199, 1228, 995, 1274, 927, 1115, 824]
  assert max(len(r.tokens) for r in records) == 14
  assert len({r.clip for r in records}) == 6399
  assert [len(dataset.vocabulary[key]) for key in ("words", "answers")] == [93, 42]
  val = dataset.records("val")
  assert len({r.clip for r in val}) == 3815 and len({r.clip for r in val} & {r.clip for r in records}) == 2296
  assert "ten" not in {dataset.classes[r.answer] for r in (*val, *records)}
  assert len({r.answer for r in (*val, *records)}) == 41
  for rows, count in ((records, 55), (val, 27)):  # ids that stand twice are both read
    answers: dict[str, list[int]] = {}
    for row in rows:
      answers.setdefault(row.id, []).append(row.answer)
    assert Counter(map(len, answers.values())) == {1: len(rows) - 2 * count, 2: count}
    assert rows is val or all(len(set(pair)) == len(pair) for pair in answers.values())
  yes = np.mean([dataset.classes[r.answer] == "yes" for r in records])
  assert yes == pytest.approx(0.2623, abs=5e-5)
  for name, key in (("ques_vocab.txt", "words"), ("ans_vocab.txt", "answers")):
    text = (annotations / "music_avqa" / name).read_text()
    assert text.splitlines() == dataset.vocabulary[key]


def test_published_music_avqa_questions_of_each_modality(annotations):
  kind = np.array([record.type for record in MusicAVQA(annotations / "music_avqa").records("test")])
  assert [int((kind // 2 == k).sum()) for k in (0, 1)] == [1623, 2427] and (kind >= 4).sum() == 5135
