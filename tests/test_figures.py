"""Every figure is drawn from made-up data, and leaves matplotlib's global state alone."""

import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

from phpjax import figures

CLASSES = ("drum", "guitar", "piano keyboard with a very long name")


def made_up_results(num_learned: int = 3) -> dict:
  tasks = ["ave", "avvp", "avs"]
  matrix = [[0.9 - 0.1 * (i - j) if j <= i else None for j in range(3)] for i in range(num_learned)]
  return {
    "method": "php",
    "tasks": tasks,
    "metric": dict.fromkeys(tasks, "accuracy"),
    "matrix": matrix,
    "trivial": dict.fromkeys(tasks, 0.3),
    "mean_accuracy": 0.8,
    "forgetting": 0.15,
    "unseen": None,
    "data": {"evaluation_split": "test"},
  }


def clip(rng: np.random.Generator, seconds: int = 10) -> dict:
  return {"id": "clip_1", "visual": rng.integers(0, 256, (seconds, 16, 16, 3), dtype=np.uint8)}


def looks_drawn(path, out) -> None:
  """The png is at `out`, of a sensible size, and not of one colour."""
  assert path == out
  with Image.open(path) as image:
    assert min(image.size) >= 200 and max(image.size) <= 4000
    assert len(image.convert("RGB").getcolors(1 << 24)) > 10


@pytest.mark.parametrize("draw", [figures.accuracy_matrix, figures.score_over_tasks])
@pytest.mark.parametrize("num_learned", [1, 3])
def test_results(tmp_path, draw, num_learned):
  out = tmp_path / "figures" / "one.png"  # the folder is made
  looks_drawn(draw(made_up_results(num_learned), out), out)


def test_unseen_matrix_makes_a_second_panel(tmp_path):
  results = made_up_results()
  one = figures.accuracy_matrix(results, tmp_path / "one.png")
  results["unseen"] = [[0.5, None, None], [0.5, None, None], [0.4, None, 0.2]]  # no such set for avvp
  two = figures.accuracy_matrix(results, tmp_path / "two.png")
  with Image.open(one) as first, Image.open(two) as second:
    assert second.width > 1.5 * first.width


def test_ave_timelines(tmp_path):
  rng = np.random.default_rng(0)
  examples = [clip(rng) | {key: rng.integers(0, 4, 10) for key in ("label", "prediction")} for _ in range(2)]
  looks_drawn(figures.ave_timelines(examples, CLASSES, tmp_path / "ave.png"), tmp_path / "ave.png")


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_avvp_timelines(tmp_path, share):
  rng = np.random.default_rng(0)

  def grids() -> dict[str, np.ndarray]:
    return {modality: (rng.random((10, 3)) < share).astype(np.float32) for modality in ("audio", "visual")}

  examples = [clip(rng) | {"truth": grids(), "prediction": grids()} for _ in range(2)]
  looks_drawn(figures.avvp_timelines(examples, CLASSES, tmp_path / "avvp.png"), tmp_path / "avvp.png")


def test_avs_overlays(tmp_path):
  rng = np.random.default_rng(0)
  masks = {key: rng.random((5, 16, 16)) > 0.5 for key in ("label", "prediction")}
  examples = [clip(rng, 5) | masks | {"iou": rng.random(5)} for _ in range(2)]
  looks_drawn(figures.avs_overlays(examples, tmp_path / "avs.png"), tmp_path / "avs.png")


def test_avqa_examples(tmp_path):
  rng = np.random.default_rng(0)
  example = {
    "type": "Audio/Counting",
    "question": "Is $x$ or _y^ heard, and is \\frac $ no mathematics?",
    "answer": "two",
    "top": [("two", 0.7), ("more than ten", 0.2), ("no", 0.05), ("yes", 0.01)],
  }
  examples = [clip(rng) | example, clip(rng, 1) | example]
  looks_drawn(figures.avqa_examples(examples, tmp_path / "avqa.png"), tmp_path / "avqa.png")


def test_overlay_tints_the_mask_and_only_the_mask():
  frame, mask = np.full((8, 8, 3), 100, np.uint8), np.zeros((8, 8))
  mask[2:6, 2:6] = 1
  image = figures.overlay(frame, mask, "#0000FF")
  on = image[..., 2].astype(int) - image[..., 0] > 50
  np.testing.assert_array_equal(on, mask > 0)
  np.testing.assert_array_equal(image[2, 2], [0, 0, 255])  # the rim is opaque


def test_runs_and_label_places():
  assert figures._runs(np.array([3, 3, 1, 3])) == [(0, 2), (2, 3), (3, 4)]
  assert figures.ones(np.array([1, 0, 1, 1])) == [(0, 1), (2, 4)]
  places = figures._spread([50, 50, 51, 90], 5)
  assert np.all(np.diff(np.sort(places)) >= 5 - 1e-3) and places[3] == 90 and places[0] < places[2]


def test_global_state_of_matplotlib_is_left_alone(tmp_path):
  before, pyplot = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
  figures.score_over_tasks(made_up_results(), tmp_path / "one.png")
  assert dict(matplotlib.rcParams) == before
  assert ("matplotlib.pyplot" in sys.modules) == pyplot
