"""Whose prompts and whose heads answer: heads side by side, prompts clip by clip, and the oracle beside them."""

import dataclasses
import types

import jax
import numpy as np
import pytest
import small

from phpjax import optimizer, routing, sharding
from phpjax.answers import ORACLE, ROUTED, Answers
from phpjax.metrics import classes as metric
from phpjax.steps import Steps

MADE = small.modules()
PAIR = {m: MADE[m] for m in ("visual", "audio")}
ROWS, CLASSES = 8, 3
GROUPS = ("ave_classes_1", "ave_classes_2", "ave_classes_3")
LATER = "a task that is not learned yet"


def settings():
  config = small.config_of("linear_probe").opt
  config.decay, config.clip = "decoupled", "label"
  return optimizer.settings(config)


def answers(method, names, task_of, *, infer, centroids=None, total=4, constants=lambda name: {}):
  """Everything that `names` has learned, at random; `centroids` per task decide where clips go."""
  tasks = {name: task_of(name) for name in names}
  planned = {**tasks, **{f"{LATER} {i}": None for i in range(total - len(names))}}
  infos = {name: types.SimpleNamespace(classes=tuple(f"{name} {i}" for i in range(CLASSES))) for name in names}
  encoders = {m: types.SimpleNamespace(module=module) for m, module in MADE.items()}
  experiment = types.SimpleNamespace(tasks=planned, method=method, infos=infos, encoders=encoders)
  params = small.params_of(method, tasks, MADE)
  fresh = {name: {"head": t.init_state(), "method": method.init_task_state(t)} for name, t in tasks.items()}
  state = {"shared": {}, "tasks": fresh}
  for name, rows in (centroids or {}).items():
    state["tasks"][name]["centroids"] = rows
  mesh = sharding.make_mesh((-1, 1))
  steps = Steps(PAIR, method, settings(), mesh, compile_effort=0)
  return Answers(experiment, steps, mesh, params, state, constants, infer)


def group_task(name):
  return dataclasses.replace(small.task("ave_classes_1", num_classes=CLASSES), name=name)


@pytest.fixture(scope="module")
def batch():
  return small.batch("ave_classes_1", ROWS)


@pytest.fixture(scope="module")
def probe():
  return answers(small.method_of("linear_probe"), GROUPS, group_task, infer=True)


def test_heads_stand_side_by_side(probe, batch):
  scores = jax.device_get(probe.of(GROUPS[1])(batch))
  assert scores["scores"].shape == (ROWS, 4, CLASSES) and np.isneginf(scores["scores"][:, 3]).all(), "one more is to come"
  assert scores["place"].tolist() == [1] * ROWS
  for place, name in enumerate(GROUPS):
    head, found = probe.params["tasks"][name]["head"], 0
    for m in PAIR:
      seconds = batch[m].reshape(-1, *batch[m].shape[2:])
      pooled = np.asarray(jax.jit(PAIR[m].apply)({"params": probe.params["encoders"][m]}, seconds).pooled)
      unit = pooled / np.linalg.norm(pooled, axis=-1, keepdims=True) * pooled.shape[-1] ** 0.5
      found += unit.reshape(ROWS, small.SECONDS, -1).mean(1) @ head[m]["kernel"] + head[m]["bias"]
    np.testing.assert_allclose(scores["scores"][:, place], found, rtol=1e-3, atol=1e-4)


def test_class_texts_stand_side_by_side(batch):
  """Zero-shot: the texts of a task are its head."""
  draw = lambda i: {
    f"{m}_text": np.random.default_rng([i, j]).normal(size=(CLASSES, 8)).astype("f") for j, m in enumerate(PAIR)
  }
  texts = {name: draw(i) for i, name in enumerate(GROUPS)}
  method = small.method_of("zero_shot", MADE)
  shot = answers(method, GROUPS, group_task, infer=True, constants=texts.__getitem__)
  scores, unit = jax.device_get(shot.of(GROUPS[1])(batch)), lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  assert np.isneginf(scores["scores"][:, 3]).all() and ROUTED not in scores
  for place, name in enumerate(GROUPS):
    found = 0
    for m in PAIR:
      seconds, params = batch[m].reshape(-1, *batch[m].shape[2:]), shot.params["encoders"][m]
      pooled = np.asarray(jax.jit(PAIR[m].apply)({"params": params}, seconds).pooled)
      cosines = unit(pooled) @ unit(texts[name][f"{m}_text"]).T
      found += (np.exp(params["logit_scale"]) * cosines).reshape(ROWS, small.SECONDS, -1).mean(1)
    np.testing.assert_allclose(scores["scores"][:, place], found, rtol=1e-3, atol=1e-4)


def test_a_method_without_prompts_of_its_own_is_not_routed(probe, batch):
  assert not probe.routes(GROUPS[0]) and ROUTED not in probe.of(GROUPS[0])(batch)


def test_the_words_are_those_of_all_tasks(probe):
  assert probe.classes(GROUPS[2]) == tuple(f"{name} {i}" for name in GROUPS for i in range(CLASSES))


def looks_of(batch):
  """What `routing.vectors` finds of each clip."""
  params = small.encoder_params(MADE)
  seconds = {m: batch[m].reshape(-1, *batch[m].shape[2:]) for m in PAIR}
  return routing.vectors({m: jax.jit(PAIR[m].apply)({"params": params[m]}, x) for m, x in seconds.items()}, ROWS)


@pytest.fixture(scope="module")
def routed(batch):
  """PHP's deep prompts on three groups; every third clip looks like one of each."""
  looks = looks_of(batch)
  near = {name: np.resize(looks[i::3], (routing.NUM_CENTROIDS, looks.shape[1])) for i, name in enumerate(GROUPS)}
  method = small.php(shallow=(), mid=())
  make = lambda infer: answers(method, GROUPS, group_task, infer=infer, centroids=near)
  return make(True), make(False)


def test_every_clip_gets_the_prompts_and_the_head_of_the_task_it_looks_like(routed, batch):
  inferred, given = routed
  scores, name = inferred.of(GROUPS[1])(batch), GROUPS[1]
  assert scores[ROUTED].tolist() == [i % 3 == 1 for i in range(ROWS)]
  alone = {other: jax.device_get(given.of(other)(batch))["scores"] for other in GROUPS}
  for row in range(ROWS):
    chosen = row % 3
    found = scores["scores"][row]
    assert np.isneginf(np.delete(found, chosen, axis=0)).all(), "the head of that task alone answers"
    np.testing.assert_allclose(found[chosen], alone[GROUPS[chosen]][row, chosen], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(scores[f"{ORACLE}scores"], alone[name], rtol=1e-5, atol=1e-5)
  assert np.isneginf(alone[name][:, [0, 2, 3]]).all(), "a task that is given answers by its own head"


def test_tasks_with_answers_of_their_own_keep_their_head_under_the_prompts_that_were_found(batch):
  looks, names = looks_of(batch), ("ave", "avs")
  near = {name: np.resize(looks[i::2], (routing.NUM_CENTROIDS, looks.shape[1])) for i, name in enumerate(names)}
  inferred = answers(small.php(shallow=(), mid=()), names, small.task, infer=True, centroids=near)
  rows = {**batch, **small.labels("avs", ROWS)}
  scores = inferred.of("avs")(rows)
  assert scores[ROUTED].tolist() == [i % 2 == 1 for i in range(ROWS)]
  same, other = ([i for i in range(ROWS) if i % 2 == k] for k in (1, 0))
  np.testing.assert_allclose(scores["mask"][same], scores[f"{ORACLE}mask"][same], rtol=1e-5, atol=1e-5)
  assert np.abs(scores["mask"][other] - scores[f"{ORACLE}mask"][other]).max() > 1e-3


# -- the metric --------------------------------------------------------------------------------------------------


def test_the_metric_by_hand():
  inf = -np.inf
  scores = np.array([[[1, 2], [0, 3]], [[5, 0], [1, 2]], [[inf, inf], [2, 1]], [[1, 0], [inf, inf]]], float)
  label, place = np.array([1, 0, 1, 0]), np.array([1, 1, 1, 0])
  found = metric.evaluate(scores, label, place)
  assert found == {"accuracy": 2 / 4, "task_accuracy": 3 / 4, "accuracy_within_task": 2 / 4}
  lost = np.full((1, 2, 2), [[-inf, -inf], [0, 1]])
  assert metric.evaluate(lost, np.array([0]), np.array([0]))["accuracy_within_task"] == 0, "nobody answered"
  assert metric.evaluate(scores, label, place, mask=np.array([1, 0, 0, 1]))["accuracy"] == 1


def test_the_trivial_answer_is_one_class_for_all_tasks():
  """Class 2 of the second task, 3 of its 4 clips and of 9 in all, though the first task has 2 of its 3 in one class."""
  label, place = np.array([1, 2, 0, 2, 1, 2, 0, 1, 2]), np.array([0, 1, 2, 1, 0, 1, 1, 2, 0])
  own = [metric.trivial(label, place, place == at) for at in range(3)]
  assert {name for name, _ in own} == {"class 3 of task 2 for the clips of all tasks"}
  assert own[1][1] == {"accuracy": 3 / 4, "task_accuracy": 1, "accuracy_within_task": 3 / 4}
  assert own[0][1] == own[2][1] == {"accuracy": 0, "task_accuracy": 0, "accuracy_within_task": 0}
  mask = np.array([1, 0, 1, 0, 1, 1, 0, 1, 0])
  assert metric.trivial(label, place, place == 0, mask=mask)[1]["accuracy"] == 1, "two of the clips that are left"


# -- what LwF holds an earlier task to ----------------------------------------------------------------------------


def test_a_growing_label_set_distils_the_softened_classes_of_real_clips():
  task, rng = group_task("ave_classes_1"), np.random.default_rng(0)
  student, teacher = ({"logits": rng.normal(size=(3, CLASSES)).astype(np.float32)} for _ in range(2))
  mask = np.float32([1, 0, 1])
  share = lambda x: np.exp(x / 2) / np.exp(x / 2).sum(-1, keepdims=True)
  ours, theirs = share(student["logits"].astype(np.float64)), share(teacher["logits"].astype(np.float64))
  expected = (theirs * np.log(theirs / ours)).sum(-1)[mask > 0].mean()
  assert task.distils and float(task.distillation(student, teacher, 2.0, {"mask": mask})) == pytest.approx(expected, rel=1e-5)
  assert float(task.distillation(teacher, teacher, 2.0, {"mask": mask})) == pytest.approx(0, abs=1e-7)
