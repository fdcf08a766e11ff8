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


@pytest.mark.parametrize(
  ("predictor", "expected"),
  [
    ("weak labels", [76.12, 60.35, 52.61, 63.03, 71.73, 63.03, 55.75, 44.69, 54.49, 61.60]),
    ("nothing", [0.50, 10.08, 14.50, 8.36, 0.00] * 2),
    ("Speech", [16.56, 4.07, 4.27, 8.30, 10.65, 9.31, 2.35, 2.39, 4.68, 6.33]),
  ],
)
def test_avvp_rows_of_predictors_without_a_network(predictor, expected):
  dataset = LLP(ANNOTATIONS / "avvp")
  weak, audio, visual = labels(dataset, "test", "label", "dense_audio", "dense_visual")
  speech = np.eye(weak.shape[1])[dataset.classes.index("Speech")]
  said = {"weak labels": weak[:, None], "nothing": 0 * weak[:, None], "Speech": speech[None, None]}[predictor]
  said = np.broadcast_to(said, audio.shape)
  scores = avvp.evaluate(said, said, audio, visual)
  assert [100 * scores[f"{level}/{c}"] for level in avvp.LEVELS for c in COLUMNS] == pytest.approx(expected, abs=0.01)


def test_always_speech_under_the_protocol_of_the_release():
  """A clip stands there once per label; one clip lists a label twice, which only the release counts twice: 1373 of 2179."""
  dataset = LLP(ANNOTATIONS / "avvp")
  (weak,) = labels(dataset, "test", "label")
  best, scores = avvp.trivial_released(weak)
  assert dataset.classes[best] == "Speech"
  assert scores["released_accuracy"] == pytest.approx(625 / 1200)
  items = [record for record in dataset.records("test") for _ in record.weak]
  assert len(items) == 2179 and sum(0 in record.weak for record in items) == 1373
  assert scores["released_accuracy_repeated"] == pytest.approx(1373 / 2179, abs=5e-4)


def test_avqa_always_yes_and_the_majority_of_each_type():
  dataset = MusicAVQA(ANNOTATIONS / "music_avqa")
  answer, kind = labels(dataset, "test", "label", "type")
  yes = np.full_like(answer, dataset.classes.index("yes"))
  assert 100 * avqa.summarise(avqa.statistics(yes, answer, kind))["accuracy"] == pytest.approx(26.23, abs=0.005)
  _, scores = avqa.trivial(answer, kind, answer, kind)  # with the answers of the test itself
  by_type = [48.83, 54.24, 32.78, 19.14, 53.17, 35.64, 16.29, 50.40, 16.75]
  assert 100 * scores["accuracy"] == pytest.approx(35.79, abs=0.005)
  assert [100 * scores["/".join(names)] for names in avqa.QUESTION_TYPES] == pytest.approx(by_type, abs=0.005)
