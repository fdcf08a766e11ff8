"""Adam per label against plain numpy, with both decays and both clips; nothing at all for frozen leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from small import assert_same_bits, flat

from configs import base
from phpjax import compat, optimizer, partition

RATES = {"shared": (1e-2, 0.1), "prompts": (3e-2, 0.0), "head": (5e-2, 0.02)}
CLIP, B1, B2, EPS = 0.7, 0.9, 0.99, 1e-8
PICK = {
  "shared": lambda t: jax.tree.leaves(t["shared"]["adapters"]),
  "prompts": lambda t: jax.tree.leaves(t["tasks"]["avs"]["prompts"]),
  "head": lambda t: jax.tree.leaves(t["tasks"]["avs"]["head"]),
}


def config(**options):
  groups = {label: {"lr": lr, "weight_decay": decay} for label, (lr, decay) in RATES.items()}
  return ConfigDict({**groups, "clip_norm": CLIP, "b1": B1, "b2": B2, "eps": EPS, **options})


def whole_tree(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {
    "encoders": {"visual": {"w": draw(3, 3)}},
    "shared": {"adapters": {"a": draw(4), "b": draw(2, 2)}, "context": draw(3)},
    "tasks": {name: {"prompts": {"p": draw(2, 3)}, "head": {"k": draw(3), "b": draw(1)}} for name in ("ave", "avs")},
  }


def join(leaves):
  return np.concatenate([x.ravel() for x in leaves]).astype(np.float64)


def numpy_adam(leaves, gradients, lr, decay, *, l2=False, factors=None):
  """Adam over several steps. By default decoupled decay, all leaves of one label sharing the clipping norm; `l2`: decay is part
  of the gradient behind clipping, as in torch.optim.Adam; `factors`: what clipping by another norm multiplies each step by."""
  p = join(leaves)
  m, v = np.zeros_like(p), np.zeros_like(p)
  for t, step in enumerate(gradients, start=1):
    g = join(step)
    g = g * (min(1.0, CLIP / np.linalg.norm(g)) if factors is None else factors[t - 1])
    g = g + decay * p if l2 else g
    m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
    p = p - lr * (m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + EPS) + (0 if l2 else decay * p))
  return p


def clip_grad_norm(gradients):
  """torch.nn.utils.clip_grad_norm_ over all that learns -> its factor at each step."""
  norms = [np.linalg.norm(join([x for pick in PICK.values() for x in pick(g)])) for g in gradients]
  return [min(1.0, CLIP / (norm + 1e-6)) for norm in norms]


def run(tx, params, gradients):
  state = tx.init(params)
  for g in gradients:
    updates, state = tx.update(g, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def draw_gradients():
  """Three steps, the first one below the clipping norm, the others above it."""
  return [jax.tree.map(lambda x, s=scale: s * x, whole_tree(seed)) for seed, scale in ((1, 0.02), (2, 1.0), (3, 3.0))]


@pytest.fixture(scope="module")
def trained():
  params, gradients = whole_tree(), draw_gradients()
  tx = optimizer.make_masked(optimizer.settings(config()), "avs", ("adapters",))
  after, state = run(tx, params, gradients)
  return params, gradients, after, state


@pytest.mark.parametrize("label", ["shared", "prompts", "head"])
def test_each_label_has_its_own_rate_decay_and_clip(trained, label):
  params, gradients, after, _ = trained
  expected = numpy_adam(PICK[label](params), [PICK[label](g) for g in gradients], *RATES[label])
  np.testing.assert_allclose(join(PICK[label](after)), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("clip", ["label", "global"])
@pytest.mark.parametrize("decay", ["decoupled", "l2"])
def test_decay_and_clip_of_the_release(decay, clip):
  params, gradients = whole_tree(), draw_gradients()
  tx = optimizer.make_masked(optimizer.settings(config(decay=decay, clip=clip)), "avs", ("adapters",))
  after, state = run(tx, params, gradients)
  factors = clip_grad_norm(gradients)
  assert factors[0] == 1 > max(factors[1:])
  found, plain = {}, {}
  for label, pick in PICK.items():
    how = {"l2": decay == "l2", "factors": factors if clip == "global" else None}
    expected = numpy_adam(pick(params), [pick(g) for g in gradients], *RATES[label], **how)
    np.testing.assert_allclose(join(pick(after)), expected, rtol=2e-5, atol=2e-6, err_msg=label)
    found[label], plain[label] = expected, numpy_adam(pick(params), [pick(g) for g in gradients], *RATES[label])
  if (decay, clip) != ("decoupled", "label"):
    assert max(np.abs(found[label] - plain[label]).max() for label in PICK) > 1e-4, "the switch does something"
  frozen = lambda t: {"e": t["encoders"], "c": t["shared"]["context"], "t": t["tasks"]["ave"]}
  assert_same_bits(frozen(params), frozen(after))
  live = partition.count([params["shared"]["adapters"], params["tasks"]["avs"]])
  assert sum(x.size for x in jax.tree.leaves(state)) == 2 * live + 3
  split = lambda t: partition.split(t, "avs", ("adapters",))[0]
  alone, _ = run(
    optimizer.make(optimizer.settings(config(decay=decay, clip=clip))), split(params), [split(g) for g in gradients]
  )
  for name, x in flat(split(after)).items():
    np.testing.assert_allclose(flat(alone)[name], x, rtol=1e-6, atol=1e-7, err_msg=name)


def test_l2_decay_moves_what_has_no_gradient_by_its_rate():
  """Quirk 7: the unselected rows of the pool; decoupled decay would move them a thousandth of that."""
  params = {"shared": {}, "task": {"prompts": {"pool": np.float32([0.5, -0.2])}, "head": {}}}
  changed = config(decay="l2", clip="global")
  changed.prompts.weight_decay = 1e-5
  after, _ = run(optimizer.make(optimizer.settings(changed)), params, [jax.tree.map(np.zeros_like, params)])
  moved = after["task"]["prompts"]["pool"] - params["task"]["prompts"]["pool"]
  np.testing.assert_allclose(moved, -RATES["prompts"][0] * np.sign([0.5, -0.2]), rtol=0.01)


def test_one_norm_over_nothing_is_allowed():
  empty = {"shared": {}, "task": {"prompts": {}, "head": {}}}
  assert jax.tree.leaves(run(optimizer.make(optimizer.settings(config(clip="global"))), empty, [empty])) == []


@pytest.mark.parametrize("options", [{"decay": "L2"}, {"clip": "none"}, {"decay": None}])
def test_an_unknown_decay_or_clip_is_refused(options):
  [(field, value)] = options.items()
  with pytest.raises(ValueError, match=f"opt.{field}={value!r}"):
    optimizer.settings(config(**options))


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
  opt = compat.resolve(base.base()).opt
  read = optimizer.settings(opt)
  assert dict(read.groups)["head"] == optimizer.Group(opt.head.lr, 1e-5) and read.clip_norm == 0.5
  assert (read.decay, read.clip) == ("decoupled", "label")
  assert hash(read) == hash(optimizer.settings(compat.resolve(base.base()).opt))


def test_the_rate_falls_as_a_cosine():
  scales = [optimizer.lr_scale(epoch, 10, 0.01, 0.1) for epoch in range(11)]
  tasks = np.array([s["task"] for s in scales])
  np.testing.assert_allclose(tasks, 0.01 + 0.99 * (1 + np.cos(np.pi * np.arange(11) / 10)) / 2, rtol=1e-12)
  assert tasks[0] == 1 and tasks[-1] == pytest.approx(0.01) and (np.diff(tasks) < 0).all()
  np.testing.assert_allclose([s["shared"] for s in scales], 0.1 * tasks)
