"""EWC and LwF: what they hold the shared parameters to, against plain numpy and against one gradient at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from command import tiny_toybox  # noqa: F401  fixture
from test_steps import PADDED, SEED, Bench

from phpjax import fisher, opening, partition, run, sharding
from phpjax.errors import UserError
from phpjax.methods import EWC, METHODS, LwF, Method
from phpjax.steps import Old
from phpjax.tasks.base import Task, Widths, masked_mean

MADE = small.modules()
BARE = {"shallow": (), "mid": (), "deep": (2,)}  # one layer of prompts: what is tested does not depend on how many


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def ewc(**options):
  return small.php(cls=EWC, **BARE, **options)


def squares_of(bench, name, batches):
  """(sum of squared gradients, number of clips) of `batches`, as a run adds them up."""
  live = bench.live(name)
  _, frozen = partition.split(bench.params, name, bench.method.uses(bench.tasks[name]))
  total = sharding.put_replicated(
    jax.tree.map(np.zeros_like, jax.device_get((live.trainable["shared"], np.float32(0)))), bench.mesh
  )
  for batch in batches:
    inputs = (live.trainable, live.state, frozen, None, bench.constants[name])
    total = bench.steps.add_squares(bench.tasks[name], total, *inputs, bench.rows(name, batch))
  return jax.device_get(total)


# -- EWC: the Fisher information ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Line(Task):
  """t = w x + noise of variance 1: `label` [B, D + 1] holds x and t."""

  kind = "line"
  device_keys = ("audio", "label", "mask")

  def init_state(self):
    return {}

  def predict(self, head, state, features, batch, *, rng, train):
    raise AssertionError("the method predicts")

  def loss(self, outputs, batch):
    return masked_mean(0.5 * (outputs["t"] - batch["label"][:, -1]) ** 2, batch["mask"])


@dataclasses.dataclass(frozen=True)
class OnLine(Method):
  """One shared weight vector that reads the labels' first columns, and one that nothing reads."""

  def init_shared(self, rng):
    return {"w": jnp.zeros(3), "unused": jnp.zeros(2)}

  def uses(self, task):
    return ("w",)

  def init_head(self, rng, task):
    return {}

  def predict(self, task, trainable, frozen, state, features, context, classes, batch, *, rng, train):
    return {"t": batch["label"][:, :-1] @ trainable["shared"]["w"]}, state


def test_fisher_information_of_a_linear_gaussian_model():
  """By hand: the gradient of a clip is r x, r = w x - t."""
  tasks = {"line": Line(Widths(1, 1, 1, 1), small.SECONDS, 1, "line", ())}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(small, "task", lambda name: tasks[name])
    patch.setattr(small, "class_constants", lambda name: {})
    bench = Bench(OnLine(small.backbone(MADE)), ["line"])
  rows = draw(8, 4, seed=1)
  mask = np.array([1, 1, 1, 1, 1, 0, 1, 0], np.float32)
  audio = small.inputs(8)["audio"]
  batches = [{"audio": audio[i : i + 4], "label": rows[i : i + 4], "mask": mask[i : i + 4]} for i in (0, 4)]
  squares, count = squares_of(bench, "line", batches)
  w, real = np.asarray(bench.params["shared"]["w"], np.float64), rows[mask > 0].astype(np.float64)
  residual = real[:, :-1] @ w - real[:, -1]
  assert count == 6 and set(squares) == {"w"} and np.abs(w).min() > 0
  np.testing.assert_allclose(squares["w"] / count, np.mean((residual[:, None] * real[:, :-1]) ** 2, axis=0), rtol=1e-5)


@pytest.fixture(scope="module")
def bench():
  return Bench(ewc(), ["ave", "avs"], seed=SEED)


@pytest.mark.parametrize("name", ["ave", "avs"])
def test_fisher_information_of_the_network_is_that_of_one_gradient_after_another(bench, name):
  """Of the whole network; a padded clip adds nothing, and a batch is no mean gradient squared."""
  batch = {**small.batch(name, 4), "mask": PADDED}
  squares, count = squares_of(bench, name, [batch])
  task, live = bench.tasks[name], bench.live(name)
  _, frozen = partition.split(bench.params, name, bench.method.uses(task))

  @jax.jit
  def gradient(shared, clip):
    trainable = {**live.trainable, "shared": shared}
    inputs = (trainable, live.state, frozen, None, bench.constants[name])
    return jax.grad(
      lambda x: task.loss(bench.steps._run(task, {**trainable, "shared": x}, *inputs[1:], clip, rng=None, train=False)[0], clip)
    )(shared)

  expected = None
  for i in np.flatnonzero(PADDED):
    clip = {k: v[i : i + 1] for k, v in batch.items()}
    found = jax.tree.map(lambda g: np.asarray(g, np.float64) ** 2, gradient(live.trainable["shared"], clip))
    expected = found if expected is None else jax.tree.map(np.add, expected, found)
  assert count == 3
  for path, x in small.flat(expected).items():
    np.testing.assert_allclose(small.flat(squares)[path], x, rtol=1e-3, atol=1e-6 * x.max(), err_msg=path)
    assert (x.max() > 0) == (not path.startswith("contrastive")), f"{path}: of the task's own loss, which does not read that"
  assert ("context" in squares) == (name == "ave") and "context" in bench.params["shared"]


def test_fisher_information_is_the_same_on_one_device_and_on_two(bench):
  batches = [small.batch("avs", 4, seed=1), {**small.batch("avs", 4), "mask": PADDED}]
  alone = Bench(bench.method, ["avs"], devices=1)
  alone.params = sharding.put_replicated(jax.device_get(bench.params), alone.mesh)
  (one, n), (two, m) = squares_of(alone, "avs", batches), squares_of(bench, "avs", batches)
  assert n == m == 7
  for path, x in small.flat(one).items():
    np.testing.assert_allclose(small.flat(two)[path], x, rtol=1e-4, atol=1e-6 * x.max(), err_msg=path)


def test_a_run_takes_the_mean_over_its_clips_and_refuses_what_is_not_finite(toybox):
  config = small.config_of("ewc")
  config.tasks, config.data.root, config.eval_batch_size = ("avs",), str(toybox), 4
  config.method.shallow, config.method.mid = (), ()
  with opening.open_run(config, None) as opened:
    run.begin(opened, "avs")
    task, (trainable, frozen), state = opened.task("avs"), opened.parts("avs"), opened.state_of("avs")

    def loss(shared, clip):
      inputs = ({**trainable, "shared": shared}, state, frozen, None, {}, clip)
      return task.loss(opened.steps._run(task, *inputs, rng=None, train=False)[0], clip)

    gradient, found = jax.jit(jax.grad(loss)), []
    for batch in opened.batches("avs", "train", batch_size=2, shuffle=False):
      rows = {key: batch[key] for key in task.device_keys}
      clips = ({key: x[i : i + 1] for key, x in rows.items()} for i in np.flatnonzero(batch["mask"]))
      found += [small.flat(gradient(trainable["shared"], clip)) for clip in clips]
    squares = small.flat(fisher.squared_gradients(opened, "avs"))
    assert len(found) == len(opened.source("avs", "train")) > 1 and squares.keys() == found[0].keys()
    for path, x in squares.items():
      expected = np.mean([np.square(clip[path], dtype=np.float64) for clip in found], axis=0)
      np.testing.assert_allclose(x, expected, rtol=1e-3, atol=1e-6 * expected.max(), err_msg=path)
    opened.params["shared"] = {
      **opened.params["shared"],
      "prompts": jax.tree.map(lambda x: x * np.nan, trainable["shared"]["prompts"]),
    }
    with pytest.raises(UserError, match="task avs is learned, but the gradient"):
      fisher.squared_gradients(opened, "avs")


# -- EWC: the penalty --------------------------------------------------------------------------------------------

SHARED = {"a": {"kernel": np.zeros((3, 2), np.float32)}, "b": np.zeros(4, np.float32)}


def learned(method, tasks=3):
  """(state after the tasks, [(parameters at its end, its Fisher information)]); the second task does not use "b"."""
  state, ends = method.init_state(SHARED), []
  for k in range(tasks):
    end = {"a": {"kernel": draw(3, 2, seed=k)}, "b": draw(4, seed=10 + k)}
    fisher = {"a": {"kernel": draw(3, 2, seed=20 + k) ** 2}, "b": draw(4, seed=30 + k) ** 2}
    fisher["a"]["kernel"][0, 0] = 0  # a number that no task needs
    if k == 1:
      del fisher["b"]
    state = method.consolidate(state, end, fisher)
    ends.append((end, fisher))
  return state, ends


def test_the_penalty_is_the_sum_over_the_tasks_before():
  method = ewc(ewc_weight=7.0)
  state, ends = learned(method)
  now = {"a": {"kernel": draw(3, 2, seed=50)}, "b": draw(4, seed=51)}
  a = sum(np.sum(f["a"]["kernel"] * (now["a"]["kernel"] - e["a"]["kernel"]).astype(np.float64) ** 2) for e, f in ends)
  b = sum(np.sum(f["b"] * (now["b"] - e["b"]).astype(np.float64) ** 2) for e, f in ends if "b" in f)
  assert a > 1 and b > 1
  for live, expected in ((now, a + b), ({"b": now["b"]}, b)):  # of a task that uses "b" alone
    assert method.strain(state, live) == pytest.approx(expected, rel=1e-5)
    context, batch = {"strain": method.strain(state, live)}, {}
    losses = method.losses(small.task("avs"), context, {}, {}, batch)
    assert losses == {"ewc": pytest.approx(3.5 * expected, rel=1e-5)}
  gradient = jax.grad(method.strain, argnums=1)(state, now)["b"]
  np.testing.assert_allclose(gradient, sum(2 * f["b"] * (now["b"] - e["b"]) for e, f in ends if "b" in f), rtol=1e-4, atol=1e-5)
  assert jax.tree.structure(state) == jax.tree.structure(method.init_state(SHARED)), "checkpoints of all tasks are alike"
  assert {x.dtype for x in jax.tree.leaves(jax.device_get(state))} == {np.dtype("float32")}


def test_the_online_penalty_decays_and_holds_on_to_the_last_task():
  method = ewc(ewc_online=True, ewc_decay=0.5)
  state, ends = learned(method)
  fisher = np.zeros(4)
  for _, f in ends:
    fisher = 0.5 * fisher + f.get("b", 0)
  now = draw(4, seed=51)
  expected = 0.5 * np.sum(fisher * (now - ends[-1][0]["b"]) ** 2)
  assert method.strain(state, {"b": now}) == pytest.approx(expected, rel=1e-5)


def test_two_lines_meet_where_the_closed_form_says():
  """Task A's minimum, then B's loss with A's parabola: (X'X / n + weight F) w = X't / n + weight F w_A."""
  method, x, targets = ewc(ewc_weight=3.0), draw(20, 4, seed=3).astype(np.float64), draw(2, 20, seed=4).astype(np.float64)
  start = np.linalg.lstsq(x[:10], targets[0][:10], rcond=None)[0]
  fisher = np.mean(((x[:10] @ start - targets[0][:10])[:, None] * x[:10]) ** 2, axis=0)
  state = method.consolidate(
    method.init_state({"b": SHARED["b"]}), {"b": start.astype(np.float32)}, {"b": fisher.astype(np.float32)}
  )
  x, t = x[10:], targets[1][10:]
  meets = np.linalg.solve(x.T @ x / 10 + 3 * np.diag(fisher), x.T @ t / 10 + 3 * fisher * start)
  loss = lambda w: (
    0.5 * jnp.mean((x @ w - t) ** 2)
    + method.losses(small.task("avs"), {"strain": method.strain(state, {"b": w})}, {}, {}, {})["ewc"]
  )
  np.testing.assert_allclose(jax.grad(loss)(meets.astype(np.float32)), 0, atol=1e-5)
  assert np.abs(jax.grad(loss)(start.astype(np.float32))).max() > 1e-2


def test_the_penalty_reaches_the_step(bench):
  """Nothing before the first task has ended; then the parameters are drawn back to where it ended."""
  batch, heavy = small.batch("avs", 4), Bench(ewc(ewc_weight=1e4), ["avs"])
  heavy.params = bench.params
  live = heavy.live("avs")
  _, metrics = heavy.train("avs", live, batch)
  assert metrics["losses"]["ewc"] == 0 and metrics["losses"].keys() == {"task", "ewc"}
  live, shared = heavy.live("avs"), jax.device_get(heavy.params["shared"])
  end = jax.tree.map(lambda x: x + 0.1, shared)
  state = heavy.method.consolidate(live.state["shared"], end, jax.tree.map(np.ones_like, shared))
  live = live.replace(state=sharding.put_replicated({**jax.device_get(live.state), "shared": state}, heavy.mesh))
  after, metrics = heavy.train("avs", live, batch)
  count = partition.count(shared["prompts"])
  assert metrics["losses"]["ewc"] == pytest.approx(0.5e4 * count * 0.01, rel=1e-4), "of what this task trains alone"
  moved = jax.tree.map(lambda x, y: np.asarray(x) - y, after.trainable["shared"], {"prompts": shared["prompts"]})
  assert all((x > 0).all() for x in jax.tree.leaves(moved))
  small.assert_same_bits(after.state["shared"], state)


@pytest.mark.parametrize(("options", "words"), [({"ewc_weight": -1.0}, "ewc_weight"), ({"ewc_decay": 0.0}, "ewc_decay")])
def test_options_of_ewc_that_cannot_work_are_refused(options, words):
  with pytest.raises(ValueError, match=words):
    ewc(**options)


@pytest.mark.parametrize("name", ["ewc", "lwf"])
def test_they_have_the_parameters_of_finetuning(name):
  shapes = lambda cls: jax.eval_shape(lambda: small.php(cls=cls).init_shared(jax.random.key(0)))
  assert jax.tree.map(lambda x: x.shape, shapes(METHODS[name])) == jax.tree.map(lambda x: x.shape, shapes(METHODS["finetune"]))


# -- LwF: the loss -----------------------------------------------------------------------------------------------


def divergence(student, teacher, temperature):
  """Softmax over the last axis, float64."""
  log = lambda x: x / temperature - np.log(np.exp(x / temperature).sum(-1, keepdims=True))
  ours, theirs = log(student.astype(np.float64)), log(teacher.astype(np.float64))
  return (np.exp(theirs) * (theirs - ours)).sum(-1)


def binary(student, teacher, temperature):
  """Each number a log-odds: a softmax over it and zero."""
  pair = lambda x: np.stack([x, np.zeros_like(x)], axis=-1)
  return divergence(pair(student), pair(teacher), temperature)


KINDS = {
  "ave": (small.task("ave"), ("visual", "audio"), (4, 2, 3), lambda *x: divergence(*x).mean(1)),
  "avvp": (small.task("avvp"), ("visual", "audio"), (4, 2, 3), lambda *x: binary(*x).sum(-1).mean(1)),
  "released": (small.task("avvp", protocol="released"), ("visual", "audio"), (4, 2, 3), lambda *x: divergence(*x).mean(1)),
  "avs": (small.task("avs"), ("mask",), (4, 2, 8, 8), lambda *x: binary(*x).mean((1, 2, 3))),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_against_numpy(kind, temperature):
  task, keys, shape, by_hand = KINDS[kind]
  student, teacher = ({key: 3 * draw(*shape, seed=seed + i) for i, key in enumerate(keys)} for seed in (0, 10))
  expected = sum(by_hand(student[key], teacher[key], temperature) for key in keys)[PADDED > 0].mean()
  distil = lambda s, t: task.distillation(s, t, temperature, {"mask": PADDED})
  assert expected > 0.05 and distil(student, teacher) == pytest.approx(expected, rel=1e-4)
  assert task.distils and distil(teacher, teacher) == 0
  gradient = jax.grad(distil)(teacher, teacher)
  assert max(np.abs(x).max() for x in jax.tree.leaves(gradient)) < 1e-6, "the teacher is where it is least"


def test_questions_are_not_distilled():
  assert not small.task("avqa").distils
  tasks = {name: small.task(name) for name in ("ave", "avqa", "avs")}
  (note,) = small.php(cls=LwF).notes(tasks)
  assert note.startswith("lwf keeps nothing of avqa: ")
  assert not list(small.php(cls=LwF).notes({name: tasks[name] for name in ("ave", "avs", "avqa")})), "nothing comes after it"


# -- LwF: the step -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught():
  """AVS behind AVE and AVVP, on clips of one second less than theirs, with a teacher that is the parameters of now."""
  bench = Bench(small.php(cls=LwF, **BARE), ["ave", "avvp", "avs"], seed=SEED)
  longer = {name: dataclasses.replace(bench.tasks[name], seconds=small.SECONDS + 1) for name in ("ave", "avvp")}
  parts = lambda name: (bench.params["tasks"][name]["head"], {}, bench.constants[name])
  return bench, tuple(Old(*parts(name), task) for name, task in longer.items())


def step(bench, old, teacher, batch, live=None):
  """One step on AVS -> (live, metrics)."""
  live = live or bench.live("avs")
  state = {**jax.device_get(live.state), "shared": {"teacher": teacher}}
  live = live.replace(state=sharding.put_replicated(state, bench.mesh))
  _, frozen = partition.split(bench.params, "avs", bench.method.uses(bench.tasks["avs"]))
  inputs = ({**frozen, "old": old}, None, bench.constants["avs"], bench.rows("avs", batch), jax.random.key(0))
  return bench.steps.train(bench.tasks["avs"], live, *inputs, {"shared": 1.0, "task": 1.0})


def moved(shared):
  return jax.tree.map(lambda x: x + 3 * draw(*x.shape, seed=7), shared)


def test_a_teacher_that_says_the_same_costs_nothing_and_is_not_changed(taught):
  bench, old = taught
  shared = jax.device_get(bench.params["shared"])
  live, metrics = step(bench, old, shared, small.batch("avs", 4))
  assert metrics["losses"].keys() == {"task", "distillation"} and abs(metrics["losses"]["distillation"]) < 1e-7
  live, metrics = step(bench, old, shared, small.batch("avs", 4), live)
  assert metrics["losses"]["distillation"] > 1e-6, "the student has moved"
  small.assert_same_bits(live.state["shared"]["teacher"], shared)
  assert bench.steps.traces["train", "segmentation"] == 1


def test_the_old_heads_are_held_to_what_they_said(taught):
  """Both passes and the loss one by one, by the step that evaluates."""
  bench, old = taught
  shared, batch = jax.device_get(bench.params["shared"]), {**small.batch("avs", 4), "mask": PADDED}
  teacher = moved(shared)
  # what AVS does not train is the same for both: as at the end of the task before
  teacher = {**shared, "prompts": teacher["prompts"]}
  _, metrics = step(bench, old, teacher, batch)
  expected = 0
  for one in old:
    task, answers = dataclasses.replace(one.task, seconds=small.SECONDS), []
    for params in (shared, teacher):
      trainable, frozen = partition.split({**bench.params, "shared": params}, task.name, bench.method.uses(task))
      rows = {k: batch[k] for k in ("visual", "audio", "mask")}
      state = {"shared": {}, "task": {"head": {}, "method": {}}}
      run = lambda t, f, rows, task=task, state=state, c=one.constants: bench.steps._run(
        task, t, state, f, None, c, rows, rng=None, train=False
      )[0]
      answers.append(jax.device_get(jax.jit(run)(trainable, frozen, rows)))
    by_hand = KINDS[task.name][3]
    expected += sum(by_hand(answers[0][m], answers[1][m], 2.0) for m in ("visual", "audio"))[PADDED > 0].mean()
  assert expected > 1e-2 and metrics["losses"]["distillation"] == pytest.approx(expected, rel=1e-3)
  assert float(metrics["loss"]) == pytest.approx(float(sum(metrics["losses"].values())), rel=1e-6)


def test_the_teacher_pulls(taught):
  """Far heavier than the task's own loss, it decides where the student goes; the heads stay."""
  bench, old = taught
  heavy = Bench(dataclasses.replace(bench.method, lwf_weight=1e3), ["avs"])
  heavy.params, heavy.constants["avs"] = bench.params, bench.constants["avs"]
  shared, batch = jax.device_get(bench.params["shared"]), small.batch("avs", 4)
  teacher = {**shared, "prompts": moved(shared["prompts"])}
  first, live = None, None
  for _ in range(8):
    live, metrics = step(heavy, old, teacher, batch, live)
    first = first or float(metrics["losses"]["distillation"])
  assert metrics["losses"]["distillation"] < 0.9 * first


def test_the_teacher_is_a_copy_of_what_was_learned(taught):
  bench, _ = taught
  params, state = bench.method.end_task(bench.params, {"shared": {"teacher": None}, "tasks": {}}, bench.tasks["ave"], None)
  small.assert_same_bits(state["shared"]["teacher"], params["shared"])
  assert params is bench.params
  for kept, learned_now in zip(*map(jax.tree.leaves, (state["shared"]["teacher"], params["shared"])), strict=True):
    assert not np.shares_memory(kept, np.asarray(learned_now)), "the next steps take the buffers of both"


@pytest.mark.parametrize("options", [{"lwf_weight": -1.0}, {"lwf_temperature": 0.0}])
def test_options_of_lwf_that_cannot_work_are_refused(options):
  with pytest.raises(ValueError, match=next(iter(options))):
    small.php(cls=LwF, **options)
