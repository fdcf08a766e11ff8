"""Adam per label against plain numpy; nothing at all for frozen leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from small import assert_same_bits, flat

from configs import base
from phpjax import optimizer, partition

RATES = {"shared": (1e-2, 0.1), "prompts": (3e-2, 0.0), "head": (5e-2, 0.02)}
CLIP, B1, B2, EPS = 0.7, 0.9, 0.99, 1e-8


def config():
  groups = {label: {"lr": lr, "weight_decay": decay} for label, (lr, decay) in RATES.items()}
  return ConfigDict({**groups, "clip_norm": CLIP, "b1": B1, "b2": B2, "eps": EPS})


def whole_tree(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {
    "encoders": {"visual": {"w": draw(3, 3)}},
    "shared": {"adapters": {"a": draw(4), "b": draw(2, 2)}, "context": draw(3)},
    "tasks": {name: {"prompts": {"p": draw(2, 3)}, "head": {"k": draw(3), "b": draw(1)}} for name in ("ave", "avs")},
  }


def numpy_adam(leaves, gradients, lr, decay):
  """Adam with decoupled decay over several steps; all leaves of one label share the clipping norm."""
  p = np.concatenate([x.ravel() for x in leaves]).astype(np.float64)
  m, v = np.zeros_like(p), np.zeros_like(p)
  for t, step in enumerate(gradients, start=1):
    g = np.concatenate([x.ravel() for x in step]).astype(np.float64)
    g = g * min(1.0, CLIP / np.linalg.norm(g))
    m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
    p = p - lr * (m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + EPS) + decay * p)
  return p


def run(tx, params, gradients):
  state = tx.init(params)
  for g in gradients:
    updates, state = tx.update(g, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


@pytest.fixture(scope="module")
def trained():
  params = whole_tree()
  # one step below the clipping norm, two above it
  gradients = [jax.tree.map(lambda x, s=scale: s * x, whole_tree(seed)) for seed, scale in ((1, 0.05), (2, 1.0), (3, 3.0))]
  tx = optimizer.make_masked(optimizer.settings(config()), "avs", ("adapters",))
  after, state = run(tx, params, gradients)
  return params, gradients, after, state


@pytest.mark.parametrize("label", ["shared", "prompts", "head"])
def test_each_label_has_its_own_rate_decay_and_clip(trained, label):
  params, gradients, after, _ = trained
  pick = {
    "shared": lambda t: jax.tree.leaves(t["shared"]["adapters"]),
    "prompts": lambda t: jax.tree.leaves(t["tasks"]["avs"]["prompts"]),
    "head": lambda t: jax.tree.leaves(t["tasks"]["avs"]["head"]),
  }[label]
  expected = numpy_adam(pick(params), [pick(g) for g in gradients], *RATES[label])
  got = np.concatenate([np.ravel(x) for x in pick(after)])
  np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


def test_frozen_leaves_have_no_update_and_no_state(trained):
  params, _, after, state = trained
  frozen = lambda t: {"e": t["encoders"], "c": t["shared"]["context"], "t": t["tasks"]["ave"]}
  assert_same_bits(frozen(params), frozen(after))
  live = partition.count([params["shared"]["adapters"], params["tasks"]["avs"]])
  moments = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
  assert sum(x.size for x in moments) == 2 * live, "two moments per live scalar, none for a frozen one"
  assert sum(x.size for x in jax.tree.leaves(state)) == 2 * live + 3, "and one counter per label"


def test_the_mask_over_the_whole_tree_equals_the_live_subtree(trained):
  params, gradients, after, _ = trained
  live = lambda t: partition.split(t, "avs", ("adapters",))[0]
  alone, _ = run(optimizer.make(optimizer.settings(config())), live(params), [live(g) for g in gradients])
  for name, x in flat(live(after)).items():
    np.testing.assert_allclose(flat(alone)[name], x, rtol=1e-6, atol=1e-7, err_msg=name)


def test_labels_without_leaves_are_allowed():
  tx = optimizer.make(optimizer.settings(config()))
  params = {"shared": {}, "task": {"prompts": {}, "head": {"k": np.ones(3, np.float32)}}}
  after, state = run(tx, params, [params, params])
  assert jax.tree.structure(after) == jax.tree.structure(params)
  np.testing.assert_allclose(
    after["task"]["head"]["k"], numpy_adam([np.ones(3)], [[np.ones(3)]] * 2, *RATES["head"]), rtol=1e-5
  )
  assert partition.count(state) == 2 * 3 + 1
  empty = {"shared": {}, "task": {"prompts": {}, "head": {}}}
  assert jax.tree.leaves(run(tx, empty, [empty])) == []


def test_equal_settings_give_the_same_object():
  assert optimizer.make(optimizer.settings(config())) is optimizer.make(optimizer.settings(config()))
  other = config()
  other.head.lr = 1.0
  assert optimizer.make(optimizer.settings(other)) is not optimizer.make(optimizer.settings(config()))


def test_settings_read_the_config_as_it_is():
  read = optimizer.settings(base.base().opt)
  assert dict(read.groups)["head"] == optimizer.Group(3e-4, 1e-5) and read.clip_norm == 0.5
  assert hash(read) == hash(optimizer.settings(base.base().opt))


def test_the_rate_falls_as_a_cosine():
  scales = [optimizer.lr_scale(epoch, 10, 0.01, 0.1) for epoch in range(11)]
  tasks = np.array([s["task"] for s in scales])
  np.testing.assert_allclose(tasks, 0.01 + 0.99 * (1 + np.cos(np.pi * np.arange(11) / 10)) / 2, rtol=1e-12)
  assert tasks[0] == 1 and tasks[-1] == pytest.approx(0.01) and (np.diff(tasks) < 0).all()
  np.testing.assert_allclose([s["shared"] for s in scales], 0.1 * tasks)
