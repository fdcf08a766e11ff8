"""Joint training: one step is the sum of the tasks' own steps, and its batches are theirs, each as often as it takes."""

import itertools

import jax
import numpy as np
import pytest
import small
from command import tiny_toybox  # noqa: F401  fixture
from test_steps import PADDED, SCALE, Bench, first_moments

from phpjax import opening, optimizer, partition, run, sharding
from phpjax.methods import METHODS
from phpjax.steps import Live, Steps
from phpjax.tasks import Together

MADE = small.modules()
NAMES = ("avvp", "avs")
B1 = 0.9


@pytest.fixture(scope="module")
def bench():
  """Two kinds of tasks, each with a head; nothing is clipped, so that Adam's first moment is the gradient times 1 - b1."""
  made = Bench(small.php(cls=METHODS["joint"], shallow=(), mid=(), deep=(2,)), list(NAMES), seed=3)
  groups = tuple((label, optimizer.Group(1e-3, 0.0)) for label in ("shared", "prompts", "head"))
  made.steps = Steps(MADE, made.method, optimizer.Settings(groups, 1e9, B1, 0.999, 1e-8), made.mesh, compile_effort=0)
  return made


def gradient(live):
  return {path: moment / (1 - B1) for path, moment in first_moments(live).items()}


def alone(bench, name, batch, rng):
  """A step on one task -> (gradient, losses, new state)."""
  task = bench.tasks[name]
  _, frozen = partition.split(bench.params, name, bench.method.uses(task))
  inputs = (frozen, None, bench.constants[name], bench.rows(name, batch), rng, SCALE)
  live, metrics = bench.steps.train(task, bench.live(name), *inputs)
  return gradient(live), jax.device_get(metrics["losses"]), jax.device_get(live.state)


@pytest.mark.slow
def test_a_step_adds_up_the_tasks_and_leaves_every_head_its_own(bench):
  together, key = Together(tuple(bench.tasks.values())), jax.random.key(0)
  batches = {name: {**small.batch(name, 4, seed=i), "id": ["x"] * 4} for i, name in enumerate(NAMES)}
  batches["avs"]["mask"] = PADDED
  own = {name: alone(bench, name, batches[name], jax.random.fold_in(key, i)) for i, name in enumerate(NAMES)}
  start = {name: bench.live(name) for name in NAMES}
  shared = start["avvp"].trainable["shared"]
  assert set(shared) > set(start["avs"].trainable["shared"]) == {"prompts"}
  trainable = together.join({"shared": shared}, {n: s.trainable["task"] for n, s in start.items()})
  state = together.join({"shared": {}}, {n: s.state["task"] for n, s in start.items()})
  frozen = {"encoders": bench.params["encoders"], "shared": {}}
  rows = sharding.put_batch(together.join_batches(batches), bench.mesh, together.device_keys)
  live = Live(trainable, bench.steps.init_optimizer(trainable), state)
  live, metrics = bench.steps.train(together, live, frozen, None, bench.constants, rows, key, SCALE)
  losses = {f"{name}/{what}": float(x) for name, (_, found, _) in own.items() for what, x in found.items()}
  assert metrics["finite"] and {k: float(x) for k, x in metrics["losses"].items()} == pytest.approx(losses, rel=1e-5)
  expected = {}
  for name, (grads, _, _) in own.items():
    for path, value in grads.items():
      if path.startswith("shared/"):
        expected[path] = expected.get(path, 0) + value
      else:
        _, part, leaf = path.split("/", 2)
        expected[f"task/{part}/{name}/{leaf}"] = value
  found = gradient(live)
  assert found.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_allclose(found[path], value, rtol=1e-3, atol=1e-5 * np.abs(value).max(), err_msg=path)
  several = [path for path in expected if path.startswith("shared/prompts")]
  assert all(np.abs(expected[path] - own["avvp"][0][path]).max() > 0 for path in several), "both tasks add to these"
  for name in NAMES:
    after = together.apart(live.state)[name]
    for path, x in small.flat(own[name][2]["task"]).items():
      np.testing.assert_allclose(small.flat(after)[path], x, rtol=1e-5, atol=1e-6, err_msg=f"{name}/{path}")


def test_growing_labels_are_told_apart_among_all_tasks():
  """Each class against those of both tasks, by the heads of both on the features of the clip."""
  names = ("ave_classes_1", "ave_classes_2")
  bench = Bench(small.php(cls=METHODS["joint"], shallow=(), mid=(), deep=(2,)), list(names), seed=3)
  batches = {name: {**small.batch(name, 4, seed=i), "id": ["x"] * 4} for i, name in enumerate(names)}
  batches[names[1]]["mask"] = PADDED
  together, start = Together(tuple(bench.tasks.values())), {name: bench.live(name) for name in names}
  heads = {n: {"head": jax.device_get(s.trainable["task"]["head"]), "state": {}, "constants": {}} for n, s in start.items()}
  stacked, expected = jax.tree.map(lambda *x: np.stack(x), *heads.values()), {}
  for place, name in enumerate(names):
    task, rows = bench.tasks[name], bench.rows(name, batches[name])
    _, frozen = partition.split(bench.params, name, bench.method.uses(task))
    inputs = (start[name].trainable, start[name].state, frozen, None, {}, rows)
    scores = np.asarray(bench.steps.predict_growing(task, stacked, np.ones(2, bool), *inputs)["scores"], np.float64)
    flat = scores.reshape(4, -1)
    entropy = np.log(np.exp(flat).sum(1)) - flat[np.arange(4), place * task.num_classes + batches[name]["label"]]
    expected[f"{name}/task"] = (entropy * batches[name]["mask"]).sum() / batches[name]["mask"].sum()
  shared = start[names[0]].trainable["shared"]
  trainable = together.join({"shared": shared}, {n: s.trainable["task"] for n, s in start.items()})
  state = together.join({"shared": {}}, {n: s.state["task"] for n, s in start.items()})
  rows = sharding.put_batch(together.join_batches(batches), bench.mesh, together.device_keys)
  live = Live(trainable, bench.steps.init_optimizer(trainable), state)
  _, metrics = bench.steps.train(together, live, frozen, None, bench.constants, rows, jax.random.key(0), SCALE)
  losses = {name: float(loss) for name, loss in metrics["losses"].items()}
  assert losses == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def opened(toybox):
  config = small.config_of("joint")
  config.tasks, config.data.root, config.data.questions_per_clip = (
    ("ave", "avs", "avqa"),
    str(toybox),
    1,
  )  # five questions on each clip: more rows of AVQA
  config.epoch_factor.avs = 3
  with opening.open_run(config, None) as made:
    yield made


def epoch_of(opened, epoch, start=0):
  """The ids of the batches of an epoch, [steps][tasks][rows]."""
  found = opened.batches("joint", "train", batch_size=2, shuffle=True, epoch=epoch, start=start)
  return [list(zip(*(row.split(" ") for row in batch["id"]), strict=True)) for batch in found]


def test_batches_of_shorter_tasks_start_over_and_a_run_goes_on_anywhere(opened):
  """Against the loader's own epochs, one by one."""
  total = {name: opened.num_batches(name) for name in opened.names}
  steps = [batch for epoch in range(3) for batch in epoch_of(opened, epoch)]
  assert min(total.values()) < max(total.values()) == opened.num_batches("joint") == len(steps) / 3
  for i, name in enumerate(opened.names):
    epochs = (opened.batches(name, "train", batch_size=2, shuffle=True, epoch=epoch) for epoch in itertools.count())
    own = itertools.islice(itertools.chain.from_iterable(epochs), len(steps))
    assert [batch[i] for batch in steps] == [tuple(batch["id"]) for batch in own], name
  assert epoch_of(opened, 2, start=2) == epoch_of(opened, 2)[2:], "also where an epoch of a task ends within one of the run"


def test_what_a_run_plans_is_that_of_all_tasks(opened):
  names = list(opened.names)
  assert (
    opened.stages == ["joint"] and [opened.stage(i) for i in range(3)] == ["joint"] * 3 and opened.members("joint") == names
  )
  assert opened.seconds("joint") == sum(opened.seconds(name) for name in names)
  assert {opened.num_epochs(name) for name in ("joint", *names)} == {3}, "of the task that has most"
  assert opened.selection_split("joint") is None, "AVE, of one epoch, would have none by itself"
  run.begin(opened, "joint")
  before = jax.device_get(opened.live)
  opened.absorb()
  trainable, _ = opened.parts("joint")
  small.assert_same_bits(before.trainable, trainable)
  small.assert_same_bits(before.state, opened.state_of("joint"))
  assert set(opened.params["tasks"]) == set(opened.state["tasks"]) == set(names)
