"""Scores of predictors that need no network, on the published label files; the numbers were counted in these files."""

import os
import pathlib

import numpy as np
import pytest

from data_pipelines import AVE, LLP, MusicAVQA
from phpjax.metrics import ave, avqa, avvp

pytestmark = pytest.mark.real
ROOT = pathlib.Path(__file__).resolve().parents[1]
ANNOTATIONS = pathlib.Path(os.environ.get("PHPJAX_ANNOTATIONS", ROOT.parent / "shared" / "annotations"))
GOLDEN = pathlib.Path(os.environ.get("PHPJAX_GOLDEN_METRICS", ROOT / "tests" / "golden" / "metrics"))
COLUMNS = ("A", "V", "AV", "Type@AV", "Event@AV")


@pytest.fixture(scope="module", autouse=True)
def annotations() -> None:
  if not ANNOTATIONS.is_dir():
    pytest.fail(f"no published annotation files in {ANNOTATIONS}; set PHPJAX_ANNOTATIONS to their folder")


def labels(dataset, split: str, *keys: str) -> list[np.ndarray]:
  rows = [dataset.labels(record) for record in dataset.records(split)]
  return [np.stack([row[key] for row in rows]) for key in keys]


def test_ave_always_background_and_a_perfect_category():
  (label,) = labels(AVE(ANNOTATIONS / "ave"), "test", "label")
  name, scores = ave.trivial(label, background=28)
  assert name == "background" and scores[ave.MAIN] == pytest.approx(0.177861, abs=1e-6)
  category = np.where((label < 28).any(1), label.min(1), 0)
  scores = ave.evaluate_two_heads(np.ones(label.shape), np.eye(28)[category], label)
  assert scores[ave.MAIN] == pytest.approx(0.8221, abs=5e-5) and scores["background_recall"] == 0
  assert scores["event_segment_accuracy"] == 1


@pytest.mark.parametrize("split", ["val", "test"])
def test_avvp_rows_of_predictors_without_a_network(split):
  """Equal those of the official evaluator on the same files."""
  dataset, golden = LLP(ANNOTATIONS / "avvp"), dict(np.load(GOLDEN / "avvp.npz", allow_pickle=False))
  weak, audio, visual = labels(dataset, split, "label", "dense_audio", "dense_visual")
  empty = [int((~grid.any((1, 2))).sum()) for grid in (audio, visual, audio * visual)]
  assert [audio.sum(), visual.sum(), (audio * visual).sum(), *empty] == golden[f"official_{split}_gt_counts"].tolist()
  speech = np.eye(weak.shape[1])[dataset.classes.index("Speech")]
  same = {"weak_oracle_all_segments": weak[:, None], "all_negative": 0 * weak[:, None], "always_speech": speech}
  said = {name: (np.broadcast_to(grid, audio.shape),) * 2 for name, grid in same.items()} | {"gt_oracle": (audio, visual)}
  best = 100 * avvp.trivial(audio, visual)[1][avvp.MAIN]
  for name, grids in said.items():
    scores, expected = avvp.evaluate(*grids, audio, visual), golden[f"official_{split}_{name}"]
    found = [100 * scores[f"{level}/{column}"] for level in avvp.LEVELS for column in COLUMNS]
    assert found == pytest.approx(expected.tolist(), abs=1e-4), name
    assert name not in ("all_negative", "always_speech") or best >= expected[3] - 1e-6


def test_always_speech_under_the_protocol_of_the_release():
  """A clip stands there once per label; one clip lists a label twice, which only the release counts twice: 1373 of 2179."""
  dataset = LLP(ANNOTATIONS / "avvp")
  (weak,) = labels(dataset, "test", "label")
  best, scores = avvp.trivial_released(weak)
  assert dataset.classes[best] == "Speech"
  assert scores["released_accuracy"] == pytest.approx(625 / 1200)
  items = [record for record in dataset.records("test") for _ in record.weak]
  assert len(items) == 2179 and sum(0 in record.weak for record in items) == 1373
  (twice,) = [record for record in dataset.records("test") if len(set(record.weak)) < len(record.weak)]
  assert 0 not in twice.weak and len(twice.weak) == len(set(twice.weak)) + 1
  assert scores["released_accuracy_repeated"] == pytest.approx(1373 / (2179 - 1), abs=1e-9)


def test_avqa_always_yes_and_the_majority_of_each_type():
  dataset = MusicAVQA(ANNOTATIONS / "music_avqa")
  answer, kind = labels(dataset, "test", "label", "type")
  yes = np.full_like(answer, dataset.classes.index("yes"))
  assert 100 * avqa.summarise(avqa.statistics(yes, answer, kind))["accuracy"] == pytest.approx(26.23, abs=0.005)
  _, scores = avqa.trivial(answer, kind, answer, kind)  # with the answers of the test itself
  by_type = [48.83, 54.24, 32.78, 19.14, 53.17, 35.64, 16.29, 50.40, 16.75]
  assert 100 * scores["accuracy"] == pytest.approx(35.79, abs=0.005)
  assert [100 * scores["/".join(names)] for names in avqa.QUESTION_TYPES] == pytest.approx(by_type, abs=0.005)
