"""Properties of the scores: order, batches, padding change nothing; worked examples; trivial predictors."""

import inspect
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import music_avqa
from phpjax.benchmarks import BENCHMARKS
from phpjax.metrics import ave, avqa, avs, avvp, continual, grounding, retrieval, rows

METRICS = {benchmark.metric.__name__.rpartition(".")[2]: benchmark.metric for benchmark in BENCHMARKS.values()}
SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=25, deadline=None, derandomize=True)


def ave_inputs(rng: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
  return rng.normal(size=(n, 10, 6)), rng.integers(0, 6, (n, 10))


def avvp_inputs(rng: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
  # Sparse enough that some clips are empty, dense enough that runs touch.
  return tuple(rng.random((n, 10, 4)) < rng.choice([0.0, 0.1, 0.6], (n, 1, 4)) for _ in range(4))


def avs_inputs(rng: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
  label = rng.random((n, 5, 8, 8)) < rng.random((n, 5, 1, 1)) - 0.2  # a fifth of the masks is empty
  return rng.normal(size=(n, 5, 8, 8)).astype(np.float32), label


def avqa_inputs(rng: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
  return rng.normal(size=(n, 7)), rng.integers(0, 7, n), rng.integers(0, 9, n)


INPUTS = {"ave": ave_inputs, "avvp": avvp_inputs, "avs": avs_inputs, "avqa": avqa_inputs}


def batch_statistics(name: str, inputs: tuple[np.ndarray, ...], mask: np.ndarray) -> dict[str, np.ndarray]:
  """The statistics of one batch, from the same inputs as `evaluate`."""
  if name == "ave":
    return ave.statistics(ave.decide(inputs[0]), inputs[1], background=5, mask=mask)
  if name == "avqa":
    return avqa.statistics(inputs[0].argmax(-1), *inputs[1:], mask=mask)
  return METRICS[name].statistics(*inputs, mask=mask)


def same(one: dict[str, float], other: dict[str, float]) -> None:
  assert one.keys() == other.keys()
  for key in one:
    assert one[key] == pytest.approx(other[key], abs=1e-12), key


@pytest.mark.parametrize("name", METRICS)
@given(seed=SEEDS, n=st.integers(1, 9))
@FEW
def test_scores_lie_in_zero_to_one_and_hold_the_main_one(name, seed, n):
  scores = METRICS[name].evaluate(*INPUTS[name](np.random.default_rng(seed), n))
  assert METRICS[name].MAIN in scores
  assert all(type(score) is float and 0 <= score <= 1 for score in scores.values())


@pytest.mark.parametrize("name", METRICS)
@given(seed=SEEDS, n=st.integers(1, 9))
@FEW
def test_order_of_the_clips_changes_nothing(name, seed, n):
  rng = np.random.default_rng(seed)
  inputs = INPUTS[name](rng, n)
  order = rng.permutation(n)
  one, other = [METRICS[name].evaluate(*arrays) for arrays in (inputs, [array[order] for array in inputs])]
  if name == "avs":  # which clips share a group of four is part of the official score
    one, other = [{key: scores[key] for key in ("miou", "f")} for scores in (one, other)]
  same(one, other)


@pytest.mark.parametrize("name", METRICS)
@given(seed=SEEDS, n=st.integers(1, 9), batch_size=st.integers(1, 5))
@FEW
def test_batches_and_padding_change_nothing(name, seed, n, batch_size):
  rng = np.random.default_rng(seed)
  inputs = INPUTS[name](rng, n)
  whole = METRICS[name].evaluate(*inputs)
  padding = -n % batch_size
  # Padding holds anything but NaN: the loader writes zeros, and random rows are the harder case.
  padded = [np.concatenate([array, extra]) for array, extra in zip(inputs, INPUTS[name](rng, padding), strict=True)]
  mask = np.concatenate([np.ones(n), np.zeros(padding)]).astype(np.float32)
  same(whole, METRICS[name].evaluate(*padded, mask=mask))
  parts = [
    batch_statistics(name, tuple(array[s : s + batch_size] for array in padded), mask[s : s + batch_size])
    for s in range(0, n + padding, batch_size)
  ]
  same(whole, METRICS[name].summarise(rows.join(parts)))


@pytest.mark.parametrize("name", METRICS)
def test_nothing_to_score_and_unequal_lengths_are_refused(name):
  inputs = INPUTS[name](np.random.default_rng(0), 4)
  with pytest.raises(ValueError, match="no example to score"):
    METRICS[name].evaluate(*inputs, mask=np.zeros(4))
  with pytest.raises(ValueError, match="disagree on the number of examples"):
    METRICS[name].evaluate(inputs[0][:3], *inputs[1:])


@pytest.mark.parametrize("name", ["ave", "avs", "avqa"])
def test_nan_scores_are_refused_unless_they_are_padding(name):
  scores, *labels = INPUTS[name](np.random.default_rng(0), 4)
  scores[3] = np.nan
  with pytest.raises(ValueError, match="NaN"):
    METRICS[name].evaluate(scores, *labels)
  METRICS[name].evaluate(scores, *labels, mask=np.array([1, 1, 1, 0]))


@pytest.mark.parametrize("name", METRICS)
def test_the_truth_itself_scores_one(name):
  inputs = INPUTS[name](np.random.default_rng(1), 6)
  if name == "ave":
    scores = ave.evaluate(np.eye(6)[inputs[1]], inputs[1])
  elif name == "avvp":
    scores = avvp.evaluate(*inputs[2:], *inputs[2:])
  elif name == "avs":
    label = np.concatenate([inputs[1], np.ones((2, 5, 8, 8), bool)])
    label[..., 0, 0] = True  # no empty mask: its F is not defined
    scores = avs.evaluate(np.where(label, 9.0, -9.0), label)
  else:
    scores = avqa.evaluate(np.eye(7)[inputs[1]], *inputs[1:])
  assert all(score == pytest.approx(1, abs=1e-6) for score in scores.values()), scores


def test_every_benchmark_has_the_same_names():
  for name, module in METRICS.items():
    assert isinstance(module.MAIN, str) and callable(module.summarise), name
    for function in (module.statistics, module.evaluate, module.trivial):
      assert "mask" in inspect.signature(function).parameters, name


# Worked examples, by hand.


def test_ave_worked_example():
  label = np.array([[5, 5, 0, 0, 0, 0, 5, 5, 5, 5]])
  everywhere = ave.evaluate(np.eye(6)[np.zeros_like(label)], label)
  assert everywhere == {"segment_accuracy": 0.4, "background_recall": 0.0, "event_segment_accuracy": 1.0}
  assert ave.trivial(label, background=5) == (
    "background",
    {"segment_accuracy": 0.6, "background_recall": 1.0, "event_segment_accuracy": 0.0},
  )


def test_ave_relevance_of_exactly_one_half_is_background():
  predicted = ave.decide_two_heads(np.array([[0.0, 1e-6, -1e-6]]), np.array([[0.0, 1.0]]))
  np.testing.assert_array_equal(predicted, [[2, 1, 2]])


def strip(*runs: tuple[int, int]) -> np.ndarray:
  grid = np.zeros((1, 10, 1))
  for start, end in runs:
    grid[:, start:end] = 1
  return grid


def test_avvp_worked_example():
  scores = avvp.evaluate(strip((0, 4)), strip((0, 8)), strip((0, 8)), strip((0, 4)))
  assert scores["segment/A"] == scores["segment/V"] == pytest.approx(2 / 3)
  assert scores["segment/AV"] == 1
  assert scores["segment/Type@AV"] == pytest.approx(7 / 9)
  assert scores["segment/Event@AV"] == pytest.approx(16 / 24)
  assert scores["event/A"] == 1


@pytest.mark.parametrize(
  "predicted, truth, expected",
  [
    ([(0, 4), (5, 8)], [(0, 8)], [1, 1, 0]),
    ([(0, 10)], [(0, 4)], [0, 1, 1]),
    ([(0, 1), (2, 3)], [(0, 3)], [0, 2, 1]),
    ([(0, 5), (6, 10)], [(0, 10)], [1, 1, 0]),
    ([], [], [0, 0, 0]),
  ],
)
def test_avvp_event_matching(predicted, truth, expected):
  counts = avvp.event_counts(strip(*predicted) > 0, strip(*truth) > 0)
  np.testing.assert_array_equal(counts[:, 0, 0], expected)


def test_avvp_decision_needs_second_and_clip():
  on = avvp.decide(np.array([[[0.5, 0.9], [0.4, 0.9]]]), np.array([[0.5, 0.4]]))
  np.testing.assert_array_equal(on, [[[True, False], [False, False]]])


def test_avs_worked_examples():
  logits, label = np.array([[[[4, -4], [4, -4]]]]), np.array([[[[1, 0], [0, 0]]]])
  scores = avs.evaluate(logits, label)
  assert scores["miou"] == pytest.approx(0.5)
  assert scores["f"] == pytest.approx(1.3 * 0.5 / 1.15)
  assert avs.evaluate(np.array([[[[2, -1], [0.5, -3]]]]), label)["f"] == pytest.approx(1)
  empty = avs.evaluate(logits, 0 * label)
  assert (empty["miou"], empty["f"]) == (pytest.approx(0.5), 0)


def test_avs_frames_without_a_label_do_not_count():
  logits, label = avs_inputs(np.random.default_rng(2), 3)
  label_mask = np.array([[1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
  scores = avs.evaluate(logits, label, label_mask=label_mask)
  first, second = avs.evaluate(logits[:1, :1], label[:1, :1]), avs.evaluate(logits[1:2], label[1:2])
  assert scores["miou"] == pytest.approx((first["miou"] + second["miou"]) / 2)
  assert scores["f"] == pytest.approx((first["f"] + second["f"]) / 2)


def test_avqa_worked_example():
  hit = np.array([True, False, True, False])
  assert avqa.summarise({"hit": hit, "type": np.array([0, 0, 1, 3])}) == {
    "accuracy": 0.5,
    "Audio": pytest.approx(2 / 3),
    "Audio/Counting": 0.5,
    "Audio/Comparative": 1.0,
    "Visual": 0.0,
    "Visual/Location": 0.0,
  }


def test_avqa_type_out_of_range_is_refused():
  with pytest.raises(ValueError, match="question types must lie in 0 to 8, found 0 to 9"):
    avqa.statistics(np.zeros(2, int), np.zeros(2, int), np.array([0, 9]))


def test_avqa_types_are_those_of_the_reader():
  assert tuple(map(tuple, music_avqa.QUESTION_TYPES)) == avqa.QUESTION_TYPES


# Trivial predictors.


def test_ave_trivial_is_the_best_of_all_constants():
  _, label = ave_inputs(np.random.default_rng(3), 8)
  name, scores = ave.trivial(label, background=5)
  constants = [ave.evaluate(np.broadcast_to(np.eye(6)[c], (8, 10, 6)), label)[ave.MAIN] for c in range(6)]
  assert scores[ave.MAIN] == max(constants)
  assert name == ("background" if np.argmax(constants) == 5 else f"class {np.argmax(constants)}")


def test_avvp_scores_of_the_release():
  """Labels with one, two and three classes, none; the best class is the first, another, the first, any."""
  label = np.array([[0, 1, 0, 0], [0, 1, 0, 1], [1, 1, 0, 1], [0, 0, 0, 0]])
  fused = np.array([[0.1, 2, 0, 0], [0, 1, 0, 3], [5, 0, 0, 1], [9, 0, 0, 0]])
  scores = avvp.released(fused, label)
  assert scores["released_accuracy"] == pytest.approx(2 / 3)
  assert scores["released_accuracy_repeated"] == pytest.approx((1 + 0 + 3) / (1 + 2 + 3))
  assert scores["any_label_accuracy"] == 1
  golden = np.load(pathlib.Path(__file__).parent / "golden" / "metrics" / "php_simplified.npz")
  scores = avvp.released(golden["llp_segment_scores"].mean(1), golden["llp_multi_hot"])
  assert scores["released_accuracy"] == pytest.approx(golden["llp_top1"], rel=1e-6)


@given(seed=SEEDS)
@FEW
def test_avvp_trivial_is_the_best_of_all_constants_and_the_closed_form_is_right(seed):
  _, _, audio, visual = avvp_inputs(np.random.default_rng(seed), 5)
  _, scores = avvp.trivial(audio, visual)
  candidates = np.concatenate([np.zeros((1, 4), bool), np.eye(4, dtype=bool)])
  constants = [
    avvp.evaluate(np.broadcast_to(a, audio.shape), np.broadcast_to(v, audio.shape), audio, visual)
    for a in candidates
    for v in candidates
  ]
  assert scores[avvp.MAIN] >= max(constant[avvp.MAIN] for constant in constants) - 1e-12
  closed = avvp._constant_score(candidates, audio)
  np.testing.assert_allclose(closed, [constants[5 * a]["segment/A"] for a in range(5)], atol=1e-12)


def test_avs_trivial_finds_the_centre():
  centre = np.zeros((8, 8), bool)
  centre[2:6, 2:6] = True
  label = np.broadcast_to(centre, (3, 5, 8, 8))
  name, scores = avs.trivial(label, centre.astype(float))
  assert name.startswith("mean mask") and scores["miou"] == pytest.approx(1)
  assert avs.trivial(0 * label, centre.astype(float))[0] == "nothing"
  assert avs.trivial(0 * label + 1, centre.astype(float))[0] == "everything"


def test_avs_trivial_is_no_worse_than_its_candidates():
  rng = np.random.default_rng(4)
  _, label = avs_inputs(rng, 6)
  label_mask = np.ones((6, 5))
  label_mask[0, 1:] = 0
  _, scores = avs.trivial(label, label.mean((0, 1)), label_mask=label_mask)
  for logit in (-9.0, 9.0):
    constant = avs.evaluate(np.full(label.shape, logit), label, label_mask=label_mask)["miou"]
    assert scores["miou"] >= constant - 1e-12


def test_avqa_trivial_counts_training_answers_only():
  train = np.array([3, 3, 4, 5]), np.array([0, 0, 0, 1])
  name, scores = avqa.trivial(*train, np.array([3, 5, 3, 0]), np.array([0, 1, 2, 1]))
  assert name == "majority answer per question type"
  # Type 2 has no training question, so it gets the most frequent answer of all, 3.
  assert scores == {
    "accuracy": 0.75,
    "Audio": pytest.approx(2 / 3),
    "Audio/Counting": 1.0,
    "Audio/Comparative": 0.5,
    "Visual": 1.0,
    "Visual/Counting": 1.0,
  }


# Sequences of tasks.


@given(seed=SEEDS, num_tasks=st.integers(1, 6), future=st.sampled_from([None, float("nan"), 0.3]))
@FEW
def test_scores_of_tasks_not_yet_learned_are_not_read(seed, num_tasks, future):
  scores = np.random.default_rng(seed).random((num_tasks, num_tasks))
  lower = [[score if j <= i else future for j, score in enumerate(row)] for i, row in enumerate(scores)]
  summary = continual.summarise(lower)
  same(summary, continual.summarise(scores))
  assert 0 <= summary["mean_accuracy"] <= 1 and -1 <= summary["forgetting"] <= 1
  assert summary["forgetting_since_learned"] == -summary["bwt"]
  assert summary["forgetting"] >= summary["forgetting_since_learned"] - 1e-12


def test_unfinished_sequence():
  rows_of_two = [[0.9, None, None], [0.8, 0.7, None]]
  assert continual.summarise(rows_of_two)["mean_accuracy"] == pytest.approx(0.75)
  assert continual.forgetting(rows_of_two)[-1] == pytest.approx(0.1)
  first = continual.summarise([[0.9]])
  assert (first["mean_accuracy"], first["forgetting"], first["bwt"]) == (0.9, 0, 0)
  assert str(first["bwt"]) == str(first["lpi_forgetting"]) == "0.0"


@pytest.mark.parametrize("matrix", [[], [[None]], [[0.5, None], [None, 0.5]], [[0.5], [0.5]]])
def test_incomplete_matrices_are_refused(matrix):
  with pytest.raises(ValueError, match="accuracy matrix"):
    continual.summarise(matrix)


def test_pooled_accuracy_is_that_of_all_clips_at_once():
  """Hits of single clips, as a protocol counts them, against the matrix of the same hits."""
  rng = np.random.default_rng(3)
  task = np.repeat([0, 1, 2, 3], [2, 9, 4, 1])
  hits = rng.random((4, len(task))) < 0.6
  matrix = [[hits[k, task == j].mean() if j <= k else None for j in range(4)] for k in range(4)]
  found = continual.pooled_accuracy(matrix, [2, 9, 4, 1])
  assert found == pytest.approx([hits[k, task <= k].mean() for k in range(4)], abs=1e-12)
  assert found[-1] == pytest.approx(hits[-1].mean()) != pytest.approx(continual.average_accuracy(matrix)[-1], abs=0.01)
  assert continual.pooled_accuracy(matrix[:2], [2, 9, 4, 1]) == pytest.approx(found[:2]), "an unfinished sequence"
  same = continual.pooled_accuracy(matrix, [5] * 4)
  assert same == pytest.approx(continual.average_accuracy(matrix)), "tasks of equal size"


@pytest.mark.parametrize("counts", [[3], [3, 4, 5], [3, 0], [3, float("nan")]])
def test_pooling_needs_the_clips_of_each_task(counts):
  with pytest.raises(ValueError, match="pooling 2 tasks needs the number of clips of each"):
    continual.pooled_accuracy([[0.5, None], [0.4, 0.6]], counts)


def protocol_forgetting(matrix: list[list[float]]) -> float:
  """As Tux-21's baselines count it: the last score is among the best."""
  return float(np.mean([max(row[j] for row in matrix[j:]) - matrix[-1][j] for j in range(len(matrix) - 1)]))


def test_forgetting_is_that_of_tux21_but_for_tasks_that_gain_in_the_last_step():
  fading = [[0.9, None, None], [0.5, 0.8, None], [0.5, 0.6, 0.9]]
  assert continual.forgetting(fading)[-1] == pytest.approx(protocol_forgetting(fading)) == pytest.approx(0.3)
  gaining = [[0.9, None, None], [0.5, 0.8, None], [1.0, 0.6, 0.9]]
  assert protocol_forgetting(gaining) == pytest.approx(0.1) and continual.forgetting(gaining)[-1] == pytest.approx(0.05)


def test_fwt_needs_the_scores_ahead():
  with pytest.raises(ValueError, match="just before it is learned"):
    continual.fwt([[0.5, None], [0.4, 0.6]], [0.1, 0.1])


# Retrieval and referring expressions.


def captioned(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """n clips, one to four captions of each in any order, the clip of each caption."""
  owner = rng.permutation(np.repeat(np.arange(n), rng.integers(1, 5, n)))
  return rng.normal(size=(n, 3)), rng.normal(size=(len(owner), 3)), owner


@given(seed=SEEDS, n=st.integers(1, 9))
@FEW
def test_retrieval_scores_depend_on_no_order_and_no_length(seed, n):
  rng = np.random.default_rng(seed)
  items, captions, owner = captioned(rng, n)
  scores = retrieval.evaluate(items, captions, owner)
  assert all(0 <= score <= 1 for name, score in scores.items() if "med" not in name and "mean" not in name)
  assert all(1 <= score <= len(owner) for name, score in scores.items() if "med" in name or "mean" in name)
  order, place = rng.permutation(n), rng.permutation(len(owner))
  moved = retrieval.evaluate(items[order], 7 * captions[place], np.argsort(order)[owner[place]])
  same(scores, moved)


@given(seed=SEEDS, n=st.integers(1, 9), batch_size=st.integers(1, 5))
@FEW
def test_batches_of_queries_and_padding_change_nothing(seed, n, batch_size):
  rng = np.random.default_rng(seed)
  items, captions, owner = captioned(rng, n)
  number, whole = np.arange(n), retrieval.statistics(items, captions, np.arange(n), owner)
  padding = -n % batch_size
  query = np.concatenate([items, np.full((padding, 3), np.nan)])
  asked, mask = np.pad(number, (0, padding), constant_values=-1), np.pad(np.ones(n), (0, padding))
  parts = [
    retrieval.statistics(query[b], captions, asked[b], owner, mask=mask[b])
    for b in (slice(start, start + batch_size) for start in range(0, n + padding, batch_size))
  ]
  same(retrieval.summarise(whole), retrieval.summarise(rows.join(parts)))


def test_retrieval_worked_example(monkeypatch):
  """Five captions of a clip at the ranks 4, 1, 3, 30, 12 (from 1): the precision takes them in ascending order."""
  angle = np.linspace(0.01, 1.5, 40)  # the farther, the less similar
  captions = np.stack([np.cos(angle), np.sin(angle)], -1)
  owner = np.ones(40, int)
  owner[[3, 0, 2, 29, 11]] = 0
  query = np.array([[1.0, 0.0]])
  found = retrieval.statistics(query, captions, np.array([0]), owner)
  assert found["rank"].tolist() == [0] and found["precision"][0] == pytest.approx((1 / 1 + 2 / 3 + 3 / 4) / 5)
  single = retrieval.statistics(query, captions, np.array([7]), np.where(np.arange(40) == 2, 7, 0))
  assert retrieval.summarise(single) == {
    "R@1": 0, "R@5": 1, "R@10": 1, "R@50": 1, "medR": 3, "meanR": 3, "mAP@10": pytest.approx(1 / 3),
  }  # fmt: skip
  many = np.repeat(query, 5, 0)
  monkeypatch.setattr(retrieval, "BLOCK", 2)
  assert retrieval.statistics(many, captions, np.zeros(5, int), owner)["rank"].tolist() == [0] * 5


def test_ties_in_a_gallery_go_to_the_smaller_index():
  gallery = np.ones((4, 2))
  ranks = retrieval.statistics(np.ones((4, 2)), gallery, np.arange(4), np.arange(4))["rank"]
  assert ranks.tolist() == [0, 1, 2, 3]


def test_a_gallery_without_an_answer_and_nan_are_refused():
  items, captions, owner = captioned(np.random.default_rng(0), 4)
  with pytest.raises(ValueError, match="nothing for 1 owners of queries, 4 among them"):
    retrieval.statistics(items[:1], captions, np.array([4]), owner)
  with pytest.raises(ValueError, match="gallery hold NaN"):
    retrieval.statistics(items, captions * np.nan, np.arange(4), owner)
  with pytest.raises(ValueError, match="no example to score"):
    retrieval.summarise(retrieval.statistics(items, captions, np.arange(4), owner, mask=np.zeros(4)))


def boxed(rng: np.random.Generator, n: int) -> tuple[np.ndarray, ...]:
  corner, size = rng.random((n, 12, 2)), 0.1 + rng.random((n, 12, 2))
  truth = np.concatenate([rng.random((n, 2)), 0.1 + rng.random((n, 2))], -1)
  return np.concatenate([corner, corner + size], -1), rng.normal(size=(n, 12)), truth


@given(seed=SEEDS, n=st.integers(1, 9))
@FEW
def test_box_scores_depend_on_no_order_and_no_batches(seed, n):
  rng = np.random.default_rng(seed)
  boxes, scores, truth = boxed(rng, n)
  whole = grounding.evaluate(boxes, scores, truth)
  assert all(0 <= score <= 1 for score in whole.values())
  for kind in ("giou", "iou"):
    assert whole[f"{kind}/P@1"] <= whole[f"{kind}/P@5"] <= whole[f"{kind}/P@10"]
  assert all(whole[f"giou/P@{k}"] <= whole[f"iou/P@{k}"] for k in grounding.FIRST), "the generalised IoU is never larger"
  rows_of, columns = rng.permutation(n), rng.permutation(12)
  same(whole, grounding.evaluate(boxes[rows_of][:, columns], scores[rows_of][:, columns], truth[rows_of]))
  parts = [grounding.statistics(boxes[[i, 0]], scores[[i, 0]], truth[[i, 0]], mask=np.array([1, 0])) for i in range(n)]
  same(whole, grounding.summarise(rows.join(parts)))


def test_boxes_worked_example():
  truth = np.array([[0.0, 0.0, 2.0, 1.0]])  # x, y, width, height
  boxes = np.array([[[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 4.0, 0.5], [0.0, 0.0, 2.0, 1.0]]])
  found = grounding.overlaps(boxes[0], np.array([0.0, 0.0, 2.0, 1.0]))
  assert found["iou"].tolist() == pytest.approx([1 / 2, 1 / 3, 1])
  assert found["giou"].tolist() == pytest.approx([1 / 2, 1 / 3 - 1 / 4, 1])
  assert grounding.evaluate(boxes, np.array([[1.0, 2.0, 0.0]]), truth)["giou/P@1"] == 0
  assert grounding.evaluate(boxes, np.array([[2.0, 1.0, 0.0]]), truth)["giou/P@1"] == 1
  none = grounding.evaluate(boxes, np.full((1, 3), -np.inf), truth)
  assert set(none.values()) == {0.0}, "where there is no box, none is right"


def test_avvp_trivial_of_the_release_is_the_best_class():
  label = np.array([[1, 1, 0], [0, 1, 1], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
  best, scores = avvp.trivial_released(label, np.array([1, 1, 1, 1, 0]))
  assert best == 1 and scores == {
    "released_accuracy": 2 / 4, "released_accuracy_repeated": 3 / 6, "any_label_accuracy": 3 / 4,
  }  # fmt: skip
