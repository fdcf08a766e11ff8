"""APER: prompts that learn on the first task alone, then discriminants on merged features; and runs whose later tasks take no
step."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from command import tiny_toybox  # noqa: F401  fixture
from runs import checkpoints, learned, logged, results
from test_frozen import reference_slda
from test_parameter_counts import built, by_formula, full
from test_pools import STAGED, setup

from phpjax import bench, bench_steps, checkpoint, checks, compat, experiment, model, opening, partition, predict, run, train
from phpjax.encoders.base import Stream
from phpjax.errors import UserError
from phpjax.methods import TrainingClips
from phpjax.steps import Steps

MADE = small.modules()
PAIR = {m: MADE[m] for m in ("visual", "audio")}
CLIPS, T, C = 4, small.SECONDS, 3
EVALUATION = {"rng": None, "train": False}


def close(actual, expected, tolerance=1e-4):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# -- prompts -------------------------------------------------------------------------------------------------------


def state_of(method, shared=None):
  """What `forward` reads: of all tasks, by default nothing seen."""
  return {"shared": shared or method.init_state({}), "task": {}}


def forward_of(method, task, state, made=PAIR):
  """jit of (params, batch) -> (features, context), evaluation mode."""

  def run(params, batch):
    trainable, frozen = partition.split(params, task.name, method.uses(task))
    return model.forward(made, method, task, trainable, frozen, state, None, batch, **EVALUATION)[:2]

  return jax.jit(run)


def test_prompts_are_to_all_others_what_tokens_are_that_each_layer_takes_anew():
  """VPT-Deep: the prompts stand among a layer's tokens, and what becomes of them is thrown away behind it."""
  method, params = setup("aper")
  task, batch = small.task("ave"), small.inputs(2)
  features, context = forward_of(method, task, state_of(method))(params, batch)
  bare, _ = forward_of(method.empty(), task, {})({**params, "shared": {m: {} for m in PAIR}}, batch)
  for m, encoder in PAIR.items():
    bound = encoder.bind({"params": params["encoders"][m]})
    stream = bound.stem(batch[m].reshape(-1, *batch[m].shape[2:]))
    rows, count = stream.tokens.shape[:2]
    for layer, prompt in enumerate(params["shared"][m].values()):
      tokens = jnp.concatenate([bound.enter(layer, stream).tokens, jnp.broadcast_to(prompt, (rows, *prompt.shape))], axis=1)
      stream = Stream(bound.mlp(layer, bound.attention(layer, Stream(tokens))).tokens[:, :count])
    close(features[m].pooled, bound.pool(stream).pooled)
    assert np.abs(features[m].pooled - bare[m].pooled).max() > 1e-2
    close(context["frozen"][m].pooled, bare[m].pooled, 1e-6)


def test_every_step_of_a_staged_encoder_has_prompts_of_its_own_width():
  method, params = setup("aper", {**MADE, **STAGED})
  assert [x.shape for x in params["shared"]["audio"].values()] == [(2, 8), (2, 16), (2, 32)]
  forward = forward_of(method, small.task("ave"), state_of(method), STAGED)
  features, context = forward(params, small.inputs(2))
  for step in range(3):
    for m, prefix in method.prefix(context, step).items():
      assert prefix.at == "input"
      for half in (prefix.key, prefix.value):
        close(half, np.broadcast_to(params["shared"][m][f"step_{step}"], half.shape), 0)
  assert method.prefix(context, 3) == {}
  for step in range(3):
    audio = {**params["shared"]["audio"], f"step_{step}": params["shared"]["audio"][f"step_{step}"][:, ::-1]}
    moved, _ = forward({**params, "shared": {**params["shared"], "audio": audio}}, small.inputs(2))
    assert np.abs(moved["audio"].pooled - features["audio"].pooled).max() > 1e-4
    close(moved["visual"].pooled, features["visual"].pooled, 0)


def test_the_head_of_the_first_task_and_all_prompts_get_a_gradient():
  method, params = setup("aper")
  task, batch = small.task("ave"), small.batch("ave", 2)
  state = {"shared": method.init_state({}), "task": {"head": method.init_head_state(task), "method": {}}}

  @jax.jit
  @jax.grad
  def gradient(trainable, frozen):
    inputs = (trainable, frozen, state, None, batch)
    features, context, _ = model.forward(PAIR, method, task, *inputs, rng=None, train=True)
    inputs = (task, trainable, frozen, state["task"]["head"], features, context, {}, batch)
    outputs, after = method.predict(*inputs, rng=None, train=True)
    assert after is state["task"]["head"]
    return task.loss(outputs, batch)

  grads = small.flat(gradient(*partition.split(params, "ave", method.uses(task))))
  assert len(grads) == 2 * 3 + 4 and [path for path, g in grads.items() if not np.abs(g).max() > 0] == []


# -- discriminants -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[True, False], ids=["merged", "alone"])
def two_tasks(request):
  """(method, tasks, params, state after both, {task: batch}, raw rows [N, D] as the docstring has them, labels, tasks)."""
  method, params = setup("aper", merge=request.param)
  tasks = {name: dataclasses.replace(small.task("ave"), name=name) for name in ("first", "later")}
  head = params["tasks"]["ave"]["head"]
  params["tasks"] = {"first": {"prompts": {}, "head": head}, "later": {"prompts": {}, "head": {}}}
  batches = {name: small.batch("ave", 3 * CLIPS, seed=i) for i, name in enumerate(tasks)}
  state, rows = {"shared": method.init_state({}), "tasks": {}}, []
  for name, task in tasks.items():
    state["tasks"][name] = {"head": method.init_head_state(task), "method": {}}
    before, asked = state, {}

    def features(prompted, name=name, task=task, state=state, asked=asked):
      of = method if prompted else method.empty()
      asked[prompted], _ = forward_of(of, task, state_of(method, state["shared"]))(params, batches[name])
      yield asked[prompted], batches[name]

    _, state = method.end_task(params, state, task, TrainingClips(features, squared_gradients=None))
    for old in [old for old in before["tasks"] if old != name]:
      small.assert_same_bits(before["tasks"][old], state["tasks"][old])
    assert set(asked) == ({True, False} if method.merge else {True})
    parts = [f(asked[True][m]) for m in PAIR for f in (lambda x: x.pooled, lambda x: x.tokens[:, x.num_special :].mean(1))]
    rows.append(np.concatenate([*parts, *(asked[False][m].pooled for m in PAIR if method.merge)], axis=1))
  labels = np.concatenate([batches[name]["label"].reshape(-1) + C * i for i, name in enumerate(tasks)])
  return method, tasks, params, state, batches, np.concatenate(rows), labels, np.repeat([0, 1], len(labels) // 2)


def test_classes_are_told_apart_by_linear_discriminants_on_merged_features(two_tasks):
  method, tasks, params, state, batches, rows, labels, of_task = two_tasks
  assert rows.shape[1] == method.width == (2 * (8 + 16) + 2 * 8 if method.merge else 2 * (8 + 16)), (
    "query: only pooled features"
  )
  for i, (name, task) in enumerate(tasks.items()):
    own = {"shared": state["shared"], "task": state["tasks"][name]}
    features, context = forward_of(method, task, own)(params, batches[name])
    trainable, frozen = partition.split(params, name, method.uses(task))
    inputs = (task, trainable, frozen, own["task"]["head"], features, context, {}, batches[name])
    outputs, after = method.predict(*inputs, **EVALUATION)
    assert after is own["task"]["head"]
    expected = reference_slda(rows, labels, of_task, range(C * i, C * i + C), 1)[of_task == i]
    close(np.asarray(task.scores(outputs)["scores"]).reshape(-1, C), expected, 2e-3)


@pytest.mark.parametrize("seen", [0.0, 5.0])
def test_the_head_answers_until_there_are_statistics_and_in_training(seen):
  method, params = setup("aper")
  task, batch = small.task("ave"), small.batch("ave", 2)
  shared = {**method.init_state({}), "count": jnp.asarray(seen)}
  own = {"means": jnp.ones((C, method.width)), "counts": jnp.arange(C) * 1.0}
  features, context = forward_of(method, task, state_of(method, shared))(params, batch)
  trainable, frozen = partition.split(params, "ave", method.uses(task))

  def answer(head, train):
    of = {**trainable, "task": {"prompts": {}, "head": head}}
    return method.predict(task, of, frozen, own, features, context, {}, batch, rng=None, train=train)[0]

  head = trainable["task"]["head"]
  by_head = task.predict(head, {}, features, batch, **EVALUATION)[0]
  small.assert_same_bits(answer(head, True), by_head)
  small.assert_same_bits(answer(head, False), answer({}, False) if seen else by_head)
  assert not np.allclose(answer({}, False)["visual"], by_head["visual"])


# -- options, sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"length": 0}, "method aper length=0 must be 1 or more"),
    ({"shrinkage": 0.0}, "shrinkage=0.0 must be above 0"),
    ({"modalities": ("text",)}, "names some of visual, audio"),
  ],
)
def test_options_that_cannot_work_are_refused(options, words):
  with pytest.raises(ValueError, match=words):
    small.method_of("aper", **options)


def test_frozen_features_are_asked_for_only_where_they_are_merged():
  assert small.method_of("aper").needs_query and not small.method_of("aper", merge=False).needs_query


@pytest.mark.parametrize("variant", ["full", "toybox", "tiny", "tux21"])
def test_every_size_fits_its_encoders(variant):
  method = full("aper", variant)
  assert built(method) == by_formula("aper", method)
  assert method.length == (2 if variant == "tiny" else 10)


# -- runs ----------------------------------------------------------------------------------------------------------


def config_of(toybox, variant="tiny+ave_classes"):
  c = small.config_of("aper", variant)
  c.num_epochs, c.eval_batch_size, c.data.root = 2, 2, str(toybox)
  return c


def test_only_the_first_task_of_a_run_takes_steps(toybox):
  c = config_of(toybox)
  assert [experiment.num_epochs(c, name) for name in c.tasks] == [2, 0]
  assert checks.problems(compat.resolve(c)) == []
  c.tasks = c.tasks[::-1]
  assert [experiment.num_epochs(c, name) for name in c.tasks] == [2, 0], "whichever it is"
  c.method.name = "l2p"
  assert [experiment.num_epochs(c, name) for name in c.tasks] == [2, 2]


@pytest.fixture(scope="module")
def done(toybox, tmp_path_factory):
  """(workdir, titles of the matrices that were told, how often what was traced) of a run of two groups of classes."""
  folder, titles, made = tmp_path_factory.mktemp("aper") / "run", [], []

  class Watched(Steps):
    def __init__(self, *args, **options):
      super().__init__(*args, **options)
      made.append(self)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train.results, "draw", lambda *args: None)
    patch.setattr(opening.Progress, "matrix", lambda self, *args, title: titles.append(title))
    patch.setattr(opening, "Steps", Watched)
    train.train_and_evaluate(config_of(toybox), folder)
  return folder, titles, dict(made[0].traces)


def test_two_groups_of_classes_end_to_end(done, toybox):
  folder, titles, traces = done
  final = results(folder)
  assert final["steps"] == 2 and [line["task"] for line in logged(folder)] == ["ave_classes_1"] * 2, "two epochs of one step"
  assert "routing" not in final and "oracle" not in final, "one set of prompts, the heads of all tasks side by side"
  assert np.isfinite([x for row in final["matrix"] for x in row if x is not None]).all()
  counts = final["parameters"]
  assert counts["shared"] == 2 * 3 * 2 * 32 and counts["per_task"] == {"ave_classes_1": 2 * (16 + 1) * 7, "ave_classes_2": 0}
  how = final["data"]["model_selection"]
  assert how["ave_classes_1"]["split"] == "val" and len(how["ave_classes_1"]["scores"]) == how["ave_classes_1"]["epochs"] == 2
  assert how["ave_classes_2"] == {"split": None, "epoch": 0, "epochs": 0, "scores": []}
  said = "model: epoch chosen on val (ave_classes_1); no epoch is trained, there is none to choose (ave_classes_2)"
  assert any(title.endswith(said) for title in titles)
  assert traces["train", "classes"] == 1 and traces["predict", "classes"] == 2, "with the head and without it"
  clip = sorted((toybox / "AVE").glob("*.mp4"))[0]
  answer = predict.load(folder).predict("ave_classes_1", video=clip).to_dict()
  assert np.isfinite([x for x in jax.tree.leaves(answer) if isinstance(x, float)]).all()


def test_after_the_first_task_no_prompt_and_nothing_of_that_task_changes(done, toybox):
  folder, *_ = done
  [path] = (
    path for path in checkpoints(folder) if checkpoint.read_meta(path)["items"] == ["shared", "state", "task_ave_classes_1"]
  )
  first, last = predict.open_step(path.parent, int(path.name))[1], learned(folder)
  for name in ("shared", "task_ave_classes_1"):
    small.assert_same_bits(small.flat({name: first[name]}), {k: x for k, x in last.items() if k.split("/")[0] == name})
  assert first["state"]["count"] < last["state/count"]
  small.assert_same_bits(first["state"]["mean"], last["state/mean"])
  assert not any(path.startswith("task_ave_classes_2/head") for path in last)
  with opening.open_run(config_of(toybox), None) as opened:
    begun = small.flat({"shared": opened.params["shared"]})
  assert all(np.abs(x - last[path]).max() > 0 for path, x in begun.items()), "on the first task they do"


def test_a_dry_run_plans_the_step_of_the_first_task_alone(toybox):
  with opening.open_run(config_of(toybox), None) as opened:
    shown = train.results.dry_run(opened, run.begin).splitlines()
  first, later = (line.split() for line in shown if line.startswith("  ave_classes_") and "%" in line)
  assert first[2:4] == ["384", "238"] and later[2:] == ["0", "0", "0.00%", "0.00%"]
  assert "(largest: ave_classes_1)" in shown[-1]


def test_there_is_a_step_to_measure_on_the_first_task_alone(toybox, monkeypatch):
  c, asked = config_of(toybox), []
  with pytest.raises(UserError, match="method aper takes no training step on ave_classes_2"):
    bench.measure_steps(c, [], {"only": "ave_classes_2"})
  failed = types.SimpleNamespace(returncode=0, stdout='["1", "2", "3", "4", "5"]\n', stderr="")
  monkeypatch.setattr(bench_steps.subprocess, "run", lambda command, **how: asked.append(command[3]) or failed)
  assert [row["task"] for row in bench_steps.table(c, [], 1)] == ["ave_classes_1"] and set(asked) == {"--only=ave_classes_1"}
