"""The readers on the published label files, which are not ours to copy: read where they lie.

The numbers were counted in the files themselves, and agree with the papers where those give any.
"""

import os
import pathlib

import numpy as np
import pytest

from data_pipelines import AVE, LLP, MusicAVQA

pytestmark = pytest.mark.real
ROOT = pathlib.Path(__file__).resolve().parents[1]
ANNOTATIONS = pathlib.Path(os.environ.get("PHPJAX_ANNOTATIONS", ROOT.parent / "shared" / "annotations"))


@pytest.fixture(scope="module")
def annotations() -> pathlib.Path:
  if not ANNOTATIONS.is_dir():
    pytest.skip(f"no published annotation files in {ANNOTATIONS}; set PHPJAX_ANNOTATIONS to their folder")
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
  assert speech == 1373


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
  yes = np.mean([dataset.classes[r.answer] == "yes" for r in records])
  assert yes == pytest.approx(0.2623, abs=5e-5)
  for name, key in (("ques_vocab.txt", "words"), ("ans_vocab.txt", "answers")):
    text = (annotations / "music_avqa" / name).read_text()
    assert text.splitlines() == dataset.vocabulary[key]
