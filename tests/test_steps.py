"""The training step: who moves, who does not, and that padding, NaN, devices and epochs change nothing else."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import small
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from phpjax import optimizer, partition, sharding
from phpjax.methods import METHODS, Method
from phpjax.steps import Live, Steps

MADE = small.modules()
RATES = {label: {"lr": 1e-2, "weight_decay": 0.1} for label in ("shared", "prompts", "head")}
OPT = optimizer.settings(ConfigDict({**RATES, "clip_norm": 1.0, "b1": 0.9, "b2": 0.999, "eps": 1e-8}))
SCALE = {"shared": 1.0, "task": 1.0}
SEED = 3  # of the parameters of the full PHP: with it no rectifier of the narrow adapters is dead
PADDED = np.array([1, 1, 0, 1], np.float32)


def mesh_of(devices):
  return Mesh(np.array(jax.devices()[:devices]).reshape(devices, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 2)


class Bench:
  """A method and its tasks on a mesh, with everything a step takes."""

  def __init__(self, method, names, devices=2, seed=0):
    self.method, self.mesh, self.tasks = method, mesh_of(devices), {name: small.task(name) for name in names}
    self.steps = Steps(MADE, method, OPT, self.mesh, compile_effort=0)
    params = small.params_of(method, self.tasks, MADE, seed)
    self.params = sharding.put_replicated(params, self.mesh)
    self.constants = {n: sharding.put_replicated(small.class_constants(n), self.mesh) for n in names}

  def live(self, name, params=None):
    """A fresh start on a task, in arrays of its own (a step takes them over)."""
    trainable, _ = partition.split(params or self.params, name, self.method.uses(self.tasks[name]))
    trainable = sharding.put_replicated(jax.device_get(trainable), self.mesh)
    of_task = {"head": jax.device_get(self.tasks[name].init_state()), "method": {}}
    shared = jax.device_get(self.method.init_state((params or self.params)["shared"]))
    state = sharding.put_replicated({"shared": shared, "task": of_task}, self.mesh)
    return Live(trainable, self.steps.init_optimizer(trainable), state)

  def rows(self, name, batch):
    return sharding.put_batch(batch, self.mesh, self.tasks[name].device_keys)

  def train(self, name, live, batch, *, scale=SCALE, seed=0, params=None):
    task, params = self.tasks[name], params or self.params
    _, frozen = partition.split(params, name, self.method.uses(task))
    inputs = (frozen, self.past(name, params), self.constants[name], self.rows(name, batch))
    return self.steps.train(task, live, *inputs, jax.random.key(seed), scale)

  def predict(self, name, live, batch):
    task = self.tasks[name]
    _, frozen = partition.split(self.params, name, self.method.uses(task))
    rows = {k: v for k, v in self.rows(name, batch).items() if not k.startswith("label")}
    return self.steps.predict(task, live.trainable, live.state, frozen, self.past(name), self.constants[name], rows)

  def past(self, name, params=None):
    return partition.stack_past(params or self.params, name, 4) if self.method.needs_past else None


@pytest.fixture(scope="module")
def php():
  """All three phases of PHP on AVE: the one expensive compile of this file."""
  return Bench(small.php(), ["ave"], seed=SEED)


@pytest.fixture(scope="module")
def cheap():
  """PHP's shallow and deep phase off and on: one deep layer, on a task that does not read the class texts, and AVE."""
  return Bench(small.php(shallow=(), mid=(), deep=(2,)), ["ave", "avs"])


def changed(before, after):
  """{path: whether any bit differs}."""
  before, after = small.flat(before), small.flat(after)
  assert set(before) == set(after)
  return {name: before[name].tobytes() != after[name].tobytes() for name in before}


# -- who moves ---------------------------------------------------------------------------------------------------


def first_moments(live):
  """{path: Adam's first moment}: what the gradients left behind, for decay does not enter it."""
  labels, moments = partition.live_labels(live.trainable), {}
  flat_labels = dict(zip(small.flat(live.trainable), jax.tree.leaves(labels), strict=True))
  for label, state in live.opt_state.inner_states.items():
    names = [name for name, of in flat_labels.items() if of == label]
    vectors = [x for x in jax.tree.leaves(state) if x.ndim == 1]
    if not names:
      assert jax.tree.leaves(state) == [], f"nothing is kept for {label}, which has no leaf here"
      continue
    sizes = [small.flat(live.trainable)[name].size for name in names]
    assert [v.size for v in vectors] == [sum(sizes)] * 2
    parts = np.split(np.asarray(vectors[0]), np.cumsum(sizes)[:-1])
    moments.update(dict(zip(names, parts, strict=True)))
  assert len(moments) == len(flat_labels)
  return moments


def silent(live):
  """Leaves that no gradient has reached."""
  return [name for name, m in first_moments(live).items() if not np.abs(m).max() > 0]


def test_every_leaf_that_is_used_learns_and_the_encoders_do_not(php):
  before = jax.device_get({"live": php.live("ave").trainable, "encoders": php.params["encoders"]})
  live = php.live("ave")
  for seed in range(3):
    live, metrics = php.train("ave", live, small.batch("ave", 4, seed), seed=seed)
    assert metrics["finite"]
  small.assert_same_bits(before["encoders"], php.params["encoders"])
  still = [name for name, moved in changed(before["live"], live.trainable).items() if not moved]
  assert still == [], "decay alone moves every leaf that is trained"
  assert silent(live) == [], "every leaf that `uses` names gets a gradient"
  assert {"shared", "task"} == {name.split("/")[0] for name in first_moments(live)}


MAKE = {
  "php": small.php,
  "finetune": lambda: small.php(cls=METHODS["finetune"]),
  "linear_probe": lambda: Method(small.backbone(MADE)),
  **{name: functools.partial(small.method_of, name) for name in ("l2p", "dualprompt", "coda_prompt", "s_prompts")},
}


@pytest.mark.parametrize(
  ("method", "name"),
  [
    ("php", "avvp"),
    ("php", "avs"),
    pytest.param("php", "avqa", marks=pytest.mark.slow),
    ("linear_probe", "avs"),
    ("l2p", "ave"),
    pytest.param("dualprompt", "avqa", marks=pytest.mark.slow),
    ("coda_prompt", "avs"),
    pytest.param("s_prompts", "avvp", marks=pytest.mark.slow),
    *(pytest.param("finetune", name, marks=pytest.mark.slow) for name in ("avvp", "avqa")),
    *(pytest.param("l2p", name, marks=pytest.mark.slow) for name in ("avvp", "avs", "avqa")),
  ],
)
def test_gradients_are_where_they_should_be(method, name):
  """On every kind of task; and all that is not handed to the step stays as it was."""
  bench = Bench(MAKE[method](), [name], seed=SEED)
  before = jax.device_get(bench.params)
  live, metrics = bench.train(name, bench.live(name), small.batch(name, 4))
  assert metrics["finite"] and silent(live) == []
  after = partition.merge(bench.params, live.trainable, name)
  used = {f"shared/{key}" for key in bench.method.uses(bench.tasks[name])} | {f"tasks/{name}"}
  moved = {path for path, m in changed(before, after).items() if m}
  assert moved == {path for path in small.flat(after) if any(path.startswith(f"{part}/") or path == part for part in used)}


def test_the_rates_of_the_schedule_reach_their_own_parts(php):
  before = jax.device_get(php.live("ave").trainable)
  batch = small.batch("ave", 4)
  still, _ = php.train("ave", php.live("ave"), batch, scale={"shared": 0.0, "task": 1.0})
  moved = changed(before, still.trainable)
  assert all(m == name.startswith("task/") for name, m in moved.items())
  small_step, _ = php.train("ave", php.live("ave"), batch, scale={"shared": 1.0, "task": 0.5})
  whole_step, _ = php.train("ave", php.live("ave"), batch, scale={"shared": 1.0, "task": 1.0})
  for name, x in small.flat(small_step.trainable["task"]).items():
    start = small.flat(before["task"])[name]
    np.testing.assert_allclose(2 * (x - start), small.flat(whole_step.trainable["task"])[name] - start, rtol=1e-2, atol=1e-6)
  small.assert_same_bits(small_step.trainable["shared"], whole_step.trainable["shared"])


def test_what_a_task_does_not_use_and_other_tasks_stay_bit_equal(cheap):
  """AVS after AVE: the parts behind the class texts are shared but not read, so decay must not eat them."""
  live, _ = cheap.train("ave", cheap.live("ave"), small.batch("ave", 4))
  params = partition.merge(cheap.params, live.trainable, "ave")
  before = jax.device_get(params)
  live = cheap.live("avs", params)
  for seed in range(2):
    live, _ = cheap.train("avs", live, small.batch("avs", 4, seed), params=params)
  after = partition.merge(params, live.trainable, "avs")
  moved = {name for name, m in changed(before, after).items() if m}
  assert moved == {name for name in small.flat(after) if name.startswith("tasks/avs/")}
  assert cheap.method.uses(cheap.tasks["avs"]) == () and {"context", "contrastive"} <= set(after["shared"])


@pytest.mark.parametrize("method", ["l2p", "dualprompt", "coda_prompt", "s_prompts"])
def test_a_learned_task_keeps_its_own_prompts_while_another_learns(method):
  """Bit for bit; L2P owns none: the pool that all tasks share moves, and old answers with it."""
  bench = Bench(small.method_of(method), ["ave", "avs"])
  batch, before = small.batch("ave", 4), jax.device_get(bench.params)
  answer = bench.predict("ave", bench.live("ave"), batch)
  live, metrics = bench.train("avs", bench.live("avs"), small.batch("avs", 4))
  assert metrics["finite"]
  bench.params = partition.merge(bench.params, live.trainable, "avs")
  moved = {name for name, m in changed(before, bench.params).items() if m}
  small.assert_same_bits(before["tasks"]["ave"], bench.params["tasks"]["ave"])
  shared = {name for name in moved if name.startswith("shared/")}
  assert bool(shared) == (method in ("l2p", "dualprompt")) and shared == {n for n in moved if not n.startswith("tasks/avs/")}
  again = bench.predict("ave", bench.live("ave"), batch)
  same = all(np.array_equal(again[key], x) for key, x in answer.items())
  assert same == (method == "s_prompts"), "CODA reads the new components, as its paper does; DualPrompt's G-Prompts moved"


def test_one_program_serves_coda_however_many_tasks_are_past():
  bench = Bench(small.method_of("coda_prompt"), ["ave"])
  for later in (None, "avs"):
    if later:
      bench.params["tasks"][later] = bench.params["tasks"]["ave"]
    bench.train("ave", bench.live("ave"), small.batch("ave", 4))
  assert bench.steps.traces == {("train", "event"): 1} and bench.steps.train._cache_size() == 1


# -- what must not matter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_says_so(php, value):
  live, _ = php.train("ave", php.live("ave"), small.batch("ave", 4))
  before = jax.device_get(live)
  broken = partition.merge(php.params, jax.device_get(live.trainable), "ave")
  encoders = jax.tree.map(lambda x: x, broken["encoders"])
  encoders["visual"]["class_embedding"] = encoders["visual"]["class_embedding"].at[0].set(value)
  after, metrics = php.train("ave", live, small.batch("ave", 4), params={**broken, "encoders": encoders})
  assert not metrics["finite"] and not np.isfinite(metrics["loss"])
  small.assert_same_bits(before, after)
  again, metrics = php.train("ave", after, small.batch("ave", 4))
  assert metrics["finite"] and any(changed(before.trainable, again.trainable).values()), "and the run can go on"


def test_padding_rows_change_neither_loss_nor_step(php):
  batch = {**small.batch("ave", 4), "mask": PADDED}
  garbage = small.batch("ave", 4, seed=99)
  garbage["label"] = (batch["label"] + 1) % 3
  other = {k: np.where((PADDED > 0).reshape(-1, *[1] * (v.ndim - 1)), v, garbage[k]).astype(v.dtype) for k, v in batch.items()}
  other["mask"] = PADDED
  assert not np.array_equal(other["visual"][2], batch["visual"][2]) and not np.array_equal(other["label"][2], batch["label"][2])
  one, first = php.train("ave", php.live("ave"), batch)
  two, second = php.train("ave", php.live("ave"), other)
  for name in ("loss", "grad_norm"):
    np.testing.assert_allclose(first[name], second[name], rtol=1e-5)
  assert set(first["losses"]) == {"task", "audio_to_visual", "visual_to_audio"}
  for name, x in small.flat(one.opt_state).items():
    np.testing.assert_allclose(small.flat(two.opt_state)[name], x, rtol=1e-3, atol=1e-5, err_msg=name)
  _, third = php.train("ave", php.live("ave"), {**batch, "mask": np.ones(4, np.float32)})
  assert abs(float(third["loss"]) - float(first["loss"])) > 1e-4, "while a real row does matter"


@pytest.mark.parametrize("name", ["ave", "avs"])
def test_one_device_and_two_agree(cheap, name):
  batch = {**small.batch(name, 4), "mask": PADDED}
  alone = Bench(cheap.method, [name], devices=1)
  alone.params = sharding.put_replicated(jax.device_get(cheap.params), alone.mesh)
  one, first = alone.train(name, alone.live(name), batch)
  two, second = cheap.train(name, cheap.live(name), batch)
  assert len(jax.tree.leaves(two.trainable)[0].sharding.device_set) == 2
  for key in ("loss", "grad_norm"):
    np.testing.assert_allclose(first[key], second[key], rtol=1e-5)
  moments = lambda live: small.flat({"opt": live.opt_state, "state": live.state})
  for path, x in moments(one).items():
    np.testing.assert_allclose(moments(two)[path], x, rtol=1e-3, atol=1e-5, err_msg=path)
  if name == "avs":
    assert any(changed(cheap.live(name).state, two.state).values()), "batch statistics are those of the whole batch"


# -- compiles ----------------------------------------------------------------------------------------------------


def test_one_trace_over_epochs_steps_and_evaluations(cheap):
  bench = Bench(cheap.method, ["ave"])
  live = bench.live("ave")
  for epoch in range(2):
    scale = optimizer.lr_scale(epoch, 2, 0.1, 0.5)
    for seed in range(2):
      live, _ = bench.train("ave", live, small.batch("ave", 4, seed), scale=scale, seed=seed)
    bench.predict("ave", live, small.batch("ave", 4))
  live = bench.live("ave", partition.merge(bench.params, live.trainable, "ave"))  # as after a restart
  bench.train("ave", live, small.batch("ave", 4), scale=scale)
  assert bench.steps.traces == {("train", "event"): 1, ("predict", "event"): 1}
  assert bench.steps.train._cache_size() == 1, "nor did a placement of arrays compile it again"


def test_tasks_of_equal_shapes_share_a_trace():
  bench = Bench(Method(small.backbone(MADE)), ["ave"])
  bench.tasks["later"] = dataclasses.replace(small.task("ave"), name="later", classes=("x", "y", "z"))
  bench.constants["later"] = bench.constants["ave"]
  bench.params["tasks"]["later"] = bench.params["tasks"]["ave"]
  for name in ("ave", "later"):
    bench.train(name, bench.live(name), small.batch("ave", 4))
  assert bench.steps.traces == {("train", "event"): 1}
