"""Benchmarks: the table joins every part, and only it names tasks; what each says of its labels, questions and figures."""

import ast
import dataclasses
import pathlib
import pickle
import types

import jax
import numpy as np
import pytest
import small
from PIL import Image

from configs import base
from data_pipelines import DATASETS, DataError
from phpjax import evaluate, metrics, scoring, tasks
from phpjax.benchmarks import BENCHMARKS, TaskInfo
from phpjax.encoders import pretrained
from phpjax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
B, T, C, SIZE = 4, 5, 6, 8
WORDS = ("<pad>", "Is", "it")


def info_of(name: str) -> TaskInfo:
  """Six classes and three words."""
  return TaskInfo(name, T, tuple(f"class {i}" for i in range(C)), WORDS)


def batch_of(name: str, *, mask: float = 1.0) -> tuple[dict, dict]:
  """(scores as the task gives them, a batch of the dataset) of B clips, random."""
  rng = np.random.default_rng(0)
  ones = lambda *shape: rng.integers(0, 2, shape).astype(np.float32)
  inputs = {
    "id": [f"clip {i}" for i in range(B)],
    "visual": rng.integers(0, 256, (B, T, SIZE, SIZE, 3), np.uint8),
    "mask": np.full(B, mask, np.float32),
  }
  share = {"audio": rng.random((B, T, C)), "visual": rng.random((B, T, C)), "clip": rng.random((B, C))}
  share["fused"] = rng.normal(size=(B, C))
  dense = {"dense_audio": ones(B, T, C), "dense_visual": ones(B, T, C), "dense": np.float32([1, 0, 1, 1])}
  question = {"question": rng.integers(0, 3, (B, 2, 14)), "question_mask": np.float32([[1, 1], [1, 0], [1, 1], [1, 1]])}
  answer = {"label": rng.integers(0, C, (B, 2)), "type": rng.integers(0, 9, (B, 2))}
  masks = {"mask": rng.normal(size=(B, T, SIZE, SIZE))}, {"label": ones(B, T, SIZE, SIZE), "label_mask": np.ones((B, T))}
  outputs, labels = {
    "ave": ({"scores": rng.normal(size=(B, T, C))}, {"label": rng.integers(0, C, (B, T))}),
    "avvp": (share, {"label": np.ones((B, C), np.float32), **dense}),
    "avs": masks,
    "ms3": masks,
    "ave_classes_2": (
      {"scores": rng.normal(size=(B, 3, C)), "place": np.ones(B, int)},
      {"label": rng.integers(0, C, B)},
    ),
    "avqa": ({"scores": rng.normal(size=(B, 2, C))}, {**question, **answer}),
  }[name]
  return outputs, {**inputs, **labels}


# -- the table ---------------------------------------------------------------------------------------------------


def test_every_dataset_task_and_metric_is_joined():
  joined = [*BENCHMARKS.values(), *(BENCHMARKS[f"{family}_1"] for family in BENCHMARKS.families)]
  read = {getattr(benchmark, "whole", benchmark.dataset) for benchmark in joined}
  assert read == set(DATASETS.values())
  kinds = {kind for name in tasks.__all__ if issubclass(kind := getattr(tasks, name), tasks.Task)} - {tasks.Task}
  assert {benchmark.task for benchmark in joined} == kinds
  scored = {module for name in metrics.__all__ if hasattr(module := getattr(metrics, name), "MAIN")}
  assert {benchmark.metric for benchmark in joined} == scored
  assert len({benchmark.figure for benchmark in joined}) == len(joined)


@pytest.mark.parametrize("size", base.SIZES)
def test_every_benchmark_has_its_share_of_the_epochs(size):
  assert set(base.sized(size).epoch_factor) == set(BENCHMARKS)


def strings(path: pathlib.Path) -> set[str]:
  """The string constants of a file that are no docstrings."""
  tree = ast.parse(path.read_text())
  lone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
  return {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in lone}


def test_who_trains_evaluates_and_predicts_names_no_task():
  found = {path.name: names for path in (ROOT / "phpjax").glob("*.py") if (names := strings(path) & set(BENCHMARKS))}
  assert found == {}


@pytest.mark.parametrize("labelled_only", [True, False])
def test_seconds_of_a_training_step_are_those_of_the_view(labelled_only):
  """Of the published benchmarks: S4 has masks of the first second, MS3 of all."""
  data = types.SimpleNamespace(labelled_seconds_only=labelled_only, questions_per_clip=1)
  found = {name: benchmark.train_seconds(benchmark.official[0], data) for name, benchmark in BENCHMARKS.items()}
  assert found == {"ave": 10, "avvp": 10, "avs": 1 if labelled_only else 5, "avqa": 10, "ms3": 5}
  for name in ("avs", "ms3"):
    record = types.SimpleNamespace(masks=1 if name == "avs" else 5)
    example = {"visual": np.zeros((5, 2, 2, 3)), "label": np.zeros((5, 2, 2)), "id": "a"}
    source = FakeSource([record], example)
    assert BENCHMARKS[name].view(source, "train", data)[0]["visual"].shape[0] == found[name]
    assert BENCHMARKS[name].view(source, "test", data)[0]["visual"].shape[0] == 5


class FakeSource:
  """A source whose clips are all the same."""

  def __init__(self, records: list, example: dict) -> None:
    self.records, self.example, self.bad = records, example, []

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: int) -> dict:
    return self.example


# -- scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BENCHMARKS, "ave_classes_2"])
def test_scores_are_those_of_the_real_clips_in_any_batches(name):
  benchmark, (outputs, batch) = BENCHMARKS[name], batch_of(name)
  whole = benchmark.summarise([benchmark.statistics(outputs, batch)])
  assert benchmark.main in whole and all(0 <= score <= 1 for score in whole.values())
  cut = lambda tree, s: {k: v[s] for k, v in tree.items()}
  parts = [benchmark.statistics(cut(outputs, s), cut(batch, s)) for s in (slice(0, 3), slice(3, B))]
  padding = benchmark.statistics(*batch_of(name, mask=0))
  assert {len(rows) for rows in padding.values()} == {0}
  assert benchmark.summarise([*parts, padding]) == pytest.approx(whole)


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize(("policy", "ending"), [("skip", "scored: .*on_bad_clip=error says why"), ("error", "scored")])
def test_a_split_without_a_clip_to_score_is_one_clear_line(name, policy, ending):
  outputs, batch = batch_of(name, mask=0)
  done = []
  run = types.SimpleNamespace(
    config=types.SimpleNamespace(task_id="given", eval_batch_size=B, data=types.SimpleNamespace(on_bad_clip=policy)),
    num_batches=lambda name, split: 1,
    predictor=lambda name, **how: lambda batch: outputs,
    should_stop=lambda: False,
    experiment=types.SimpleNamespace(method=types.SimpleNamespace(frozen=False, needs_query=False)),
    batches=lambda name, split, **options: iter([batch]),
    progress=types.SimpleNamespace(evaluation=lambda *told: done.append(told)),
  )
  with pytest.raises(DataError, match=f"^no clip of {name} unseen can be {ending}$"):
    scoring.score(run, name, "unseen")
  assert done == [(f"{name} unseen", 1, 1)]


def test_the_next_batch_is_predicted_before_the_numbers_of_the_last_are_fetched():
  seen, batches = [], [{"mask": np.ones(2), "id": number} for number in range(3)]

  def predict(batch):
    seen.append(("predict", batch["id"]))
    return {"scores": batch["id"] * batch["mask"]}

  def statistics(outputs, batch):
    seen.append(("fetch", batch["id"]))
    return {"hit": outputs["scores"]}

  summarise = lambda parts: {"sum": float(np.concatenate([part["hit"] for part in parts]).sum())}
  done = []
  assert evaluate.evaluate(predict, batches, statistics, summarise, on_batch=done.append) == {"sum": 6.0}
  order = [("predict", 0), ("predict", 1), ("fetch", 0), ("predict", 2), ("fetch", 1), ("fetch", 2)]
  assert seen == order and done == [1, 2, 3]
  assert evaluate.evaluate(predict, [], statistics, lambda parts: {"batches": len(parts)}, on_batch=done.append) == {
    "batches": 0
  }


# -- augmentation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, benchmark in BENCHMARKS.items() if benchmark.mirrored])
def test_clips_are_mirrored_with_their_masks(name):
  benchmark, (_, batch) = BENCHMARKS[name], batch_of(name)
  augment = pickle.loads(pickle.dumps(benchmark.augmentation()))  # a worker gets it so
  example = {key: value[0] for key, value in batch.items()}
  found = [augment(example, np.random.default_rng(seed)) for seed in range(20)]
  changed = [{key for key in example if np.any(np.asarray(one[key]) != np.asarray(example[key]))} for one in found]
  assert {frozenset(keys) for keys in changed} == {frozenset(), frozenset(benchmark.mirrored)}
  assert ("label" in benchmark.mirrored) == benchmark.labels_are_media
  for one, keys in zip(found, changed, strict=True):
    for key in keys:
      np.testing.assert_array_equal(one[key], np.flip(example[key], 2))


def test_no_clip_is_mirrored_where_questions_say_left():
  assert [name for name, benchmark in BENCHMARKS.items() if not benchmark.mirrored] == ["avqa"]


# -- protocols ---------------------------------------------------------------------------------------------------


def avvp_logits(seed=0):
  """Logits of four clips as a method gives them, and labels with no, one, two and three classes."""
  rng = np.random.default_rng(seed)
  logits = {m: rng.normal(0, 3, (B, T, C)).astype(np.float32) for m in ("visual", "audio")}
  label = np.float32([[0] * C, [0, 1] + [0] * (C - 2), [0, 0, 1, 0, 0, 1], [1, 0, 0, 1, 1, 0]])
  return logits, {"label": label, "mask": np.float32([1, 1, 0, 1])}


def parsing(protocol):
  return dataclasses.replace(small.task("avvp", num_classes=C), seconds=T, protocol=protocol)


def test_a_task_learns_its_protocol_from_its_benchmark():
  made = small.modules()
  for protocol in BENCHMARKS["avvp"].protocols:
    assert BENCHMARKS["avvp"].make_task(info_of("avvp"), made, protocol).protocol == protocol
  assert BENCHMARKS["avvp"].make_task(info_of("avvp"), made).protocol == "official"
  assert BENCHMARKS["ave"].make_task(info_of("ave"), made, "official") == BENCHMARKS["ave"].make_task(info_of("ave"), made)
  for name in ("ave", "avvp"):
    with pytest.raises(ValueError, match=f"protocol.{name}='weak'.*'official'"):
      BENCHMARKS[name].make_task(info_of(name), made, "weak")
  assert parsing("released") != parsing("official"), "two compiled steps"


def test_the_released_loss_is_one_softmax_per_clip_against_labels_as_they_are():
  """-sum_k y_k log p_k of the time average of both modalities' logits (php: LLP)."""
  (logits, batch), task = avvp_logits(), parsing("released")
  fused = (logits["visual"].astype(np.float64) + logits["audio"]).mean(1)
  log_share = fused - np.log(np.exp(fused).sum(-1, keepdims=True))
  per_clip = -(batch["label"] * log_share).sum(-1)
  loss, gradient = jax.value_and_grad(lambda o: task.loss(o, batch))(logits)
  assert loss == pytest.approx((per_clip * batch["mask"]).sum() / 3, rel=1e-5)
  expected = batch["label"].sum(-1, keepdims=True) * np.exp(log_share) - batch["label"]
  expected = (expected * batch["mask"][:, None] / 3 / T)[:, None].repeat(T, 1)
  for m in ("visual", "audio"):
    np.testing.assert_allclose(gradient[m], expected, rtol=1e-4, atol=1e-6)


def test_the_released_protocol_has_no_background_and_nothing_to_calibrate():
  task, logits = parsing("released"), avvp_logits()[0]
  assert task.text_classes() == task.classes and task.init_calibration() == {}
  assert task.calibrate({}, logits) is logits
  assert all((x == 0).all() for x in jax.tree.leaves(task.init_head(jax.random.key(0))))
  official = parsing("official")
  assert official.text_classes()[-1] == "background" and official.init_calibration()


@pytest.mark.parametrize("protocol", BENCHMARKS["avvp"].protocols)
def test_both_protocols_give_all_scores(protocol):
  (logits, batch), benchmark = avvp_logits(), BENCHMARKS["avvp"]
  outputs = jax.device_get(parsing(protocol).scores(logits))
  dense = {k: v for k, v in batch_of("avvp")[1].items() if k.startswith("dense")}
  stats = benchmark.statistics(outputs, {**batch, **dense})
  scores = benchmark.summarise([stats])
  assert {"segment/Type@AV", "event/Event@AV", "released_accuracy", "released_accuracy_repeated"} <= set(scores)
  fused = (logits["visual"] + logits["audio"]).mean(1)
  scored = [3]  # clip 0 has no label, 1 no dense labels, 2 is padding
  assert scores["released_accuracy"] == np.mean([fused[n].argmax() == batch["label"][n].argmax() for n in scored])
  assert stats["fused"].shape == (2, C)


def test_released_seconds_have_the_class_of_more_than_half_the_softmax():
  logits, _ = avvp_logits()
  outputs = jax.device_get(parsing("released").scores(logits))
  for m in ("visual", "audio"):
    share = np.exp(logits[m].astype(np.float64))
    share /= share.sum(-1, keepdims=True)
    np.testing.assert_allclose(outputs[m], share, rtol=1e-4, atol=1e-6)
    said = metrics.avvp.decide(outputs[m], outputs["clip"])
    np.testing.assert_array_equal(said, outputs[m] >= 0.5)
    assert said.any() and said.sum(-1).max() == 1


def test_class_texts_of_the_audio_side_come_from_their_own_tower():
  asked = {}

  def tower(name, seed):
    opened = pretrained.load("tiny_text", "random", modality="text", seed=seed, depth=1)
    listen = lambda texts, length: asked.setdefault(name, list(texts)) and opened.tokenizer(texts, length)
    return dataclasses.replace(opened, tokenizer=listen)

  task = dataclasses.replace(parsing("released"), classes=("Dog", "Frying_(food)"), num_classes=2)
  text, audio_text = tower("text", 0), tower("audio_text", 1)
  both, swapped = task.constants({"text": text, "audio_text": audio_text}), task.constants({"text": audio_text})
  np.testing.assert_array_equal(both["audio_text"], swapped["audio_text"])
  assert np.abs(both["audio_text"] - task.constants({"text": text})["audio_text"]).max() > 1e-3
  assert asked["audio_text"] == ["The sounds of Dog", "The sounds of Frying_(food)"]
  assert asked["text"] == ["x x x x Dog.", "x x x x Frying (food)."]


# -- labels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_trivial_predictor_is_scored_like_any_other(name):
  benchmark, (_, batch) = BENCHMARKS[name], batch_of(name)
  if benchmark.asks:  # here a row is a question, elsewhere a clip
    asked = batch["question_mask"] > 0
    batch = {"label": batch["label"][asked], "type": batch["type"][asked]}
  count = len(batch["label"])
  labels = lambda: ({k: batch[k][i] for k in benchmark.label_keys} for i in range(count))
  which, scores = benchmark.trivial(benchmark.train_labels(labels()), benchmark.test_labels(labels()), info_of(name))
  assert which and set(scores) <= set(benchmark.summarise([benchmark.statistics(*batch_of(name))]))
  assert 0 <= scores[benchmark.main] <= 1


def test_the_mean_mask_is_that_of_the_labelled_seconds():
  _, batch = batch_of("avs")
  label_mask = np.float32([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0] * 5, [1] * 5])
  rows = ({"label": label, "label_mask": mask} for label, mask in zip(batch["label"], label_mask, strict=True))
  found = BENCHMARKS["avs"].train_labels(rows)["mean_mask"]
  np.testing.assert_allclose(found, batch["label"][label_mask > 0].mean(0), rtol=1e-6)
  none = BENCHMARKS["avs"].train_labels(iter([{"label": batch["label"][0], "label_mask": 0 * label_mask[0]}]))
  np.testing.assert_array_equal(none["mean_mask"], np.zeros((SIZE, SIZE)))


def test_dense_labels_are_asked_for_where_they_are_scored():
  rows = [types.SimpleNamespace(dense=dense) for dense in (False, True)]
  assert "AVVP_eval_audio.csv" in BENCHMARKS["avvp"].unusable("val", rows[:1])
  assert BENCHMARKS["avvp"].unusable("val", rows) == ""
  assert [name for name, benchmark in BENCHMARKS.items() if name != "avvp" and benchmark.unusable("val", rows)] == []


# -- questions and figures ---------------------------------------------------------------------------------------


def test_who_asks_gets_a_question_and_nobody_else():
  for name, benchmark in BENCHMARKS.items():
    found = benchmark.question("Is it?" if benchmark.asks else None, info_of(name))
    if not benchmark.asks:
      assert found == {}
      continue
    assert found["question"].tolist() == [[[1, 2] + [0] * 12]] and found["question_mask"].tolist() == [[1.0]]
    with pytest.raises(UserError, match="question"):
      benchmark.question("Is it blue?", info_of(name))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_examples_become_a_picture(name, tmp_path):
  benchmark, (outputs, batch) = BENCHMARKS[name], batch_of(name)
  rows = [
    {**{k: v[i] for k, v in batch.items()}, "outputs": {k: v[i] for k, v in outputs.items()}}
    for i in range(benchmark.figure_rows)
  ]
  path = tmp_path / f"{benchmark.figure}.png"
  benchmark.draw(rows, info_of(name), path)
  with Image.open(path) as image:
    assert min(image.size) > 100
