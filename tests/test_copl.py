"""CoPL: its prompts and losses against plain numpy, what the gate and the pairing let through, ablations, what it costs."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from command import tiny_toybox  # noqa: F401  fixture
from runs import logged, results
from test_parameter_counts import by_formula
from test_php_options import modules as staged_modules
from test_steps import Bench, silent

from configs import copl
from phpjax import compat, experiment, model, opening, partition, run, train
from phpjax.encoders import pretrained
from phpjax.encoders.base import Stream
from phpjax.methods import Backbone, make_method
from phpjax.methods import copl_modules as parts
from phpjax.methods.copl import PARTS

MADE = small.modules()
PAIR = {m: MADE[m] for m in ("visual", "audio")}
OTHER = {"visual": "audio", "audio": "visual"}
ROWS = 3
NO_MORE = {"msp": False, "mip": False, "bank": False}


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(actual, expected, tolerance=1e-5):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def made_of(**options):
  """The method of `:tiny` with these options."""
  return small.method_of("copl", PAIR, **options)


def shapes_of(method):
  return jax.eval_shape(lambda: method.init_parts(jax.random.key(0)))


def of_block(params, step=0):
  """What `CoPL.prompts` takes, of one block."""
  return {part: tree if part == "bank" else tree[f"step_{step}"] for part, tree in params.items()}


def tokens_of(seed=0):
  return {m: draw(ROWS, 5 + i, 16, seed=seed + i) for i, m in enumerate(PAIR)}


def prompts_of(method, params, tokens, pairing=None):
  return jax.jit(lambda p, x: method.prompts(p, x, pairing))(of_block(params), tokens)


# -- the design in plain numpy -----------------------------------------------------------------------------------


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def by_hand(params, tokens, coupled=True):
  """Row by row -> {modality: (modal-specific, instance, interaction)}, {modality: weights}."""
  block = of_block(params)
  low = {m: [x @ block["projections"][m]["down"] for x in rows] for m, rows in tokens.items()}
  weights = {}
  for m in tokens:
    keys = block["bank"][m]["keys"]
    cosines = [[q @ k / np.linalg.norm(q) / np.linalg.norm(k) for k in keys] for q in (x.mean(0) for x in low[m])]
    weights[m] = softmax(np.array(cosines) / 0.1)
  found = {}
  for m in tokens:
    specific, instance, interaction = [], [], []
    up, latents = block["projections"][m]["up"], block["mip"][m]["latents"]
    for i in range(ROWS):
      w = (weights["visual"][i] + weights["audio"][i]) / 2 if coupled else weights[m][i]
      instance.append(sum(w[j] * values for j, values in enumerate(block["bank"][m]["values"])) @ up)
      there = low[OTHER[m]][i]
      interaction.append((latents + softmax(latents @ there.T / np.sqrt(latents.shape[1])) @ there) @ up)
      specific.append(block["msp"][m])
    found[m] = [np.stack(x) for x in (specific, instance, interaction)]
  return found, weights


@pytest.mark.parametrize("coupled", [True, False])
def test_the_prompts_of_a_block_by_hand(coupled):
  method = made_of(coupling=coupled)
  params, tokens = small.fill(shapes_of(method)), tokens_of()
  prefixes, weights = prompts_of(method, params, tokens)
  expected, expected_weights = by_hand(params, tokens, coupled)
  for m in PAIR:
    close(weights[m], expected_weights[m])
    close(prefixes[m].key, np.concatenate(expected[m], axis=1), 1e-4)
    close(prefixes[m].value, prefixes[m].key, 0)
    assert (prefixes[m].at, prefixes[m].num_gated) == ("input", method.num_latents), "the interaction is last and gated"
    close(prefixes[m].gate, np.tanh(params["mip"]["step_0"][m]["gate"]))
  assert np.abs(expected_weights["visual"] - expected_weights["audio"]).max() > 0.1, "so that averaging them shows"


def test_computing_prompts_again_changes_no_number():
  params, streams = small.fill(shapes_of(made_of())), {m: Stream(jnp.asarray(x)) for m, x in tokens_of().items()}

  def prompts(method, params):
    context = method.observe({"parts": params, "pairing": None, "prefixes": {}, "routing": ()}, 0, streams)
    made, weights = method.prefix(context, 0), context["routing"][0]
    return sum(jnp.sin(made[m].key).sum() * made[m].gate + jnp.square(weights[m]).sum() for m in PAIR)

  found = [jax.jit(jax.value_and_grad(lambda p, r=r: prompts(made_of(remat=r), p)))(params) for r in (False, True)]
  for one, two in zip(*map(jax.tree.leaves, found), strict=True):
    close(one, two)
  assert all(np.abs(x).max() > 0 for part in PARTS[1:3] for x in jax.tree.leaves(found[0][1][part]["step_0"]))


def test_the_losses_by_hand_ignore_padding():
  method = made_of(entropy_weight=0.1)
  params = small.fill(shapes_of(method))
  weights = {m: softmax(2 * draw(2, 4, 4, seed=i)) for i, m in enumerate(PAIR)}  # two blocks, two clips of two seconds
  routing = tuple({m: weights[m][block] for m in PAIR} for block in range(2))
  context, batch = {"parts": params, "routing": routing}, {"mask": np.array([1, 0], np.float32)}
  losses = method.losses(None, context, {}, {}, batch)
  kl = lambda p, q: (p * np.log(p / q)).sum(-1)
  v, a = (weights[m][:, :2].astype(np.float64) for m in PAIR)
  assert losses["coupling"] == pytest.approx(0.1 * ((kl(v, a) + kl(a, v)) / 2).mean(), rel=1e-4)
  keys = [unit(params["bank"][m]["keys"]) for m in PAIR]
  off = sum((np.linalg.norm(k @ k.T - np.eye(len(k)), "fro") ** 2) for k in keys)
  assert losses["orthogonality"] == pytest.approx(0.01 * off, rel=1e-4)
  entropy = lambda w: np.mean([-(p * np.log(p)).sum() for p in w.mean(1)])
  assert losses["entropy"] == pytest.approx(0.1 * (2 * np.log(4) - entropy(v) - entropy(a)), rel=1e-4)
  assert set(made_of().losses(None, context, {}, {}, batch)) == {"coupling", "orthogonality"}, "entropy is an option"
  assert set(made_of(coupling=False).losses(None, context, {}, {}, batch)) == {"orthogonality"}
  bare = made_of(orthogonality_weight=0.0, coupling_weight=0.0)
  assert bare.losses(None, context, {}, {}, batch) == {}
  assert made_of(bank=False).losses(None, {**context, "routing": ({},)}, {}, {}, batch) == {}


def test_what_the_losses_are_for():
  ones = jnp.ones(3)
  spread, single = jnp.full((1, 3, 4), 0.25), jnp.asarray(np.eye(4)[[0, 0, 0]][None] * 0.9996 + 1e-4)
  assert parts.coupling(spread, spread, ones) == 0 < parts.coupling(spread, single, ones)
  close(parts.collapse(spread, ones), 0, 1e-6)
  close(parts.collapse(jnp.asarray(np.eye(4)[None]), jnp.ones(4)), 0, 1e-6)  # one slot each, all taken equally often
  assert parts.collapse(single, ones) > 1
  close(parts.orthogonality(3 * jnp.eye(4)), 0, 1e-6)
  close(parts.orthogonality(jnp.ones((4, 2))), 12, 1e-5)


# -- inside the encoders -----------------------------------------------------------------------------------------


class Setup:
  """A method of `:tiny` on the small encoders with AVS's parameters, nothing at zero."""

  def __init__(self, **options):
    self.method, self.task = made_of(**options), small.task("avs")
    self.params = small.params_of(self.method, {"avs": self.task}, PAIR)

  def gated(self, gate):
    """The same with all gates at a number."""
    prompts = dict(self.params["tasks"]["avs"]["prompts"])
    prompts["mip"] = jax.tree_util.tree_map_with_path(lambda p, x: x * 0 + gate if p[-1].key == "gate" else x, prompts["mip"])
    other = Setup.__new__(Setup)
    other.method, other.task = self.method, self.task
    other.params = {**self.params, "tasks": {"avs": {**self.params["tasks"]["avs"], "prompts": prompts}}}
    return other

  def tokens(self, batch, train=False):
    """{modality: last tokens}."""
    trainable, frozen = partition.split(self.params, "avs", self.method.uses(self.task))
    return {m: np.asarray(f.tokens) for m, f in features_of(self.method, self.task, train, trainable, frozen, batch).items()}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def features_of(method, task, train, trainable, frozen, batch):
  return model.forward(PAIR, method, task, trainable, frozen, {}, None, batch, rng=None, train=train)[0]


def apart(one, other):
  return {m: float(np.abs(one[m] - other[m]).max()) for m in one}


def test_a_closed_gate_leaves_the_modal_specific_network():
  batch, both, alone = small.inputs(2), Setup(bank=False), Setup(bank=False, mip=False)
  small.assert_same_bits(both.params["tasks"]["avs"]["prompts"]["msp"], alone.params["tasks"]["avs"]["prompts"]["msp"])
  expected, bare = alone.tokens(batch), Setup(**NO_MORE).tokens(batch)
  assert max(apart(both.gated(0.0).tokens(batch), expected).values()) < 1e-5
  assert min(apart(both.gated(0.5).tokens(batch), expected).values()) > 1e-3
  assert min(apart(expected, bare).values()) > 1e-3, "and those prompts are not nothing"
  fresh = jax.jit(both.method.init_parts)(jax.random.key(0))
  assert all(gate["gate"] == 0 for block in fresh["mip"].values() for gate in block.values()), "gates start closed"


@pytest.mark.parametrize(
  ("options", "moved"),
  [
    ({}, True),
    ({"mip": False}, True),
    ({"bank": False}, True),
    ({"mip": False, "coupling": False}, False),
    ({"mip": False, "bank": False}, False),
  ],
  ids=["all", "coupling", "mip", "no coupling", "msp"],
)
def test_shuffled_audio_changes_only_what_interacts(options, moved):
  setup, batch = Setup(**options), small.inputs(3)
  shuffled = Setup(**options, shuffle_audio=True)
  before, after = setup.tokens(batch), shuffled.tokens(batch)
  for m, distance in apart(before, after).items():
    assert (distance > 1e-4) == moved, m
    if not moved:
      np.testing.assert_array_equal(before[m], after[m])


def test_shuffling_is_for_tests_only_and_spares_padding():
  setup, shuffled, batch = Setup(), Setup(shuffle_audio=True), small.inputs(3)
  np.testing.assert_array_equal(setup.tokens(batch, train=True)["visual"], shuffled.tokens(batch, train=True)["visual"])
  batch["mask"] = np.array([1, 0, 1], np.float32)
  garbage = {k: v.copy() for k, v in batch.items()}
  garbage["visual"][1], garbage["audio"][1] = 7, 7
  one, two = shuffled.tokens(batch), shuffled.tokens(garbage)
  for m in PAIR:  # rows of clips 0 and 2
    np.testing.assert_array_equal(one[m][[0, 1, 4, 5]], two[m][[0, 1, 4, 5]])


def test_each_clip_is_paired_with_the_next_real_one():
  next_real = lambda *mask: np.asarray(parts.next_real(np.array(mask, np.float32))).tolist()
  assert next_real(1, 1, 1) == [1, 2, 0] and next_real(1, 0, 1, 1, 0) == [2, 1, 3, 0, 4]
  assert next_real(0, 1, 0) == [0, 1, 2] and next_real(0, 0) == [0, 1]
  method, rows = made_of(shuffle_audio=True), 3 * small.SECONDS
  streams = {m: Stream(jnp.zeros((rows, 5, 16))) for m in PAIR}
  trees = ({"shared": {}, "task": {"prompts": {}}}, {"shared": {}}, {}, None, streams)
  context = method.start(small.task("avs"), *trees, query=None, mask=None, rng=None, train=False)
  assert context["pairing"]["visual"].tolist() == [2, 3, 4, 5, 0, 1], "seconds stay in step"
  assert context["pairing"]["audio"].tolist() == [4, 5, 0, 1, 2, 3], "and the pairs are the same from both sides"


@pytest.mark.parametrize("m", PAIR)
def test_without_its_partner_a_modality_neither_interacts_nor_couples(m):
  method = made_of()
  params, tokens = small.fill(shapes_of(method)), tokens_of()
  prefixes, weights = prompts_of(method, params, {m: tokens[m]})
  (specific, instance, _), own = by_hand(params, tokens, coupled=False)[0][m], by_hand(params, tokens)[1][m]
  assert set(prefixes) == set(weights) == {m} and prefixes[m].num_gated == 0 and prefixes[m].gate is None
  close(weights[m], own)
  close(prefixes[m].key, np.concatenate([specific, instance], axis=1), 1e-4)
  context = {"parts": params, "routing": (weights,)}
  assert set(method.losses(None, context, {}, {}, {"mask": np.ones(ROWS, np.float32)})) == {"orthogonality"}
  only_mip = {part: params[part] for part in ("projections", "mip")}
  assert prompts_of(made_of(msp=False, bank=False), only_mip, {m: tokens[m]})[0] == {}
  setup = Setup()
  batch = small.inputs(2)
  batch.pop(OTHER[m])
  trainable, frozen = partition.split(setup.params, "avs", ())
  run = lambda t, b: model.forward(PAIR, setup.method, setup.task, t, frozen, {}, None, b, rng=None, train=True)[0]
  assert set(jax.eval_shape(run, trainable, batch)) == {m}


ABLATIONS = ("only_msp", "only_mip", "no_bank", "no_coupling", "slots_8", "length_4", "first_1", "last_2", "rank_2", "shared")


@pytest.mark.parametrize("word", ABLATIONS)
@pytest.mark.parametrize("audio", ["ast", "htsat"])
def test_every_ablation_traces_on_both_kinds_of_audio_encoder(word, audio):
  made = {m: module for m, module in (staged_modules() if audio == "htsat" else MADE).items() if m != "text"}
  config = compat.resolve(copl.get_config(f"tiny+{word}"))
  method, task = experiment.method_of(config, made), small.task("ave")
  params = jax.eval_shape(lambda: method.init_parts(jax.random.key(0)))
  assert (word == "shared") == ("bank" in method.uses(task))
  shared = {part: tree for part, tree in params.items() if part in method.uses(task)}
  own = {part: tree for part, tree in params.items() if part not in shared}
  trainable = {"shared": shared, "task": {"prompts": own, "head": {}}}
  frozen = {"encoders": {m: pretrained.shapes(module) for m, module in made.items()}, "shared": {}}
  seen = {}

  def run(trainable, frozen, batch):
    features, context, _ = model.forward(made, method, task, trainable, frozen, {}, None, batch, rng=None, train=True)
    seen.update(context)
    return features, method.losses(task, context, features, {}, batch)

  features, losses = jax.eval_shape(run, trainable, frozen, small.inputs(2))
  assert features["audio"].tokens.shape[0] == 4
  both = {"coupling", "orthogonality"}
  without = {"only_msp": both, "only_mip": both, "no_bank": both, "no_coupling": {"coupling"}}
  assert set(losses) == both - without.get(word, set())
  if word != "only_msp":
    assert len(seen["routing"]) == len(method.blocks)
  prompts = {"msp": "msp" in params and method.msp_length, "mip": "mip" in params and 4, "bank": "bank" in params and 4}
  if 2 in method.blocks:
    shape = seen["prefixes"]["audio"].key.shape
    assert shape == (4, sum(prompts.values()), made["audio"].layer_width(2)), "of the last block"
  else:
    assert seen["prefixes"] == {}, "no prompts behind the blocks"


def test_the_last_step_of_a_deeper_encoder_has_its_own_width():
  sizes = small.backbone(PAIR)
  audio = dataclasses.replace(sizes.audio, layer_widths=(4, 4, 8, 8, 16, 16), layer_tokens=(64, 64, 16, 16, 4, 4))
  method = make_method("copl", dataclasses.replace(sizes, audio=audio), blocks=(0, 1, 2))
  assert [method.width("audio", step) for step in range(3)] == [4, 8, 16] and method.width("visual", 2) == 16


# -- what learns -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench():
  """CoPL on two event tasks of equal shapes (one compile), nothing at zero: open gates."""
  made = Bench(made_of(entropy_weight=0.1), ["ave"])
  made.tasks["later"] = dataclasses.replace(made.tasks["ave"], name="later")
  made.constants["later"] = made.constants["ave"]
  made.params["tasks"]["later"] = jax.tree.map(lambda x: x + 0.01, made.params["tasks"]["ave"])
  return made


def test_a_gradient_reaches_every_leaf_once_the_gates_are_open(bench):
  live, metrics = bench.train("ave", bench.live("ave"), small.batch("ave", 4))
  assert metrics["finite"] and silent(live) == []
  assert set(metrics["losses"]) == {"task", "coupling", "orthogonality", "entropy"}


def test_a_later_task_leaves_what_an_earlier_one_learned_as_it_is(bench):
  live, _ = bench.train("ave", bench.live("ave"), small.batch("ave", 4))
  params = partition.merge(bench.params, live.trainable, "ave")
  before = jax.device_get(params)
  live, _ = bench.train("later", bench.live("later", params), small.batch("ave", 4), params=params)
  after = jax.device_get(partition.merge(params, live.trainable, "later"))
  for part in ("encoders", "shared"):
    small.assert_same_bits(before[part], after[part])
  small.assert_same_bits(before["tasks"]["ave"], after["tasks"]["ave"])
  assert bench.steps.traces["train", "event"] == 1
  moved = zip(jax.tree.leaves(before["tasks"]["later"]), jax.tree.leaves(after["tasks"]["later"]), strict=True)
  assert all(not np.array_equal(x, y) for x, y in moved)


@pytest.mark.parametrize("shared", [(), ("bank",), PARTS])
def test_what_is_shared_is_not_of_the_task(shared):
  method, task = made_of(shared=shared), small.task("ave")
  whole = jax.eval_shape(lambda: method.init_shared(jax.random.key(0)))
  own = jax.eval_shape(lambda: method.init_task(jax.random.key(0), task, None))
  assert tuple(part for part in PARTS if part in whole) == tuple(shared) == method.uses(task)
  assert set(whole) | set(own) == set(PARTS) and not set(whole) & set(own)
  some = made_of(shared=PARTS, bank=False, mip=False)
  assert some.uses(task) == ("msp",) == tuple(jax.eval_shape(lambda: some.init_shared(jax.random.key(0))))
  assert made_of(shared=PARTS, blocks=()).uses(task) == ()


# -- sizes -------------------------------------------------------------------------------------------------------


def test_about_one_percent_of_clip_and_htsat_learns():
  config = compat.resolve(copl.get_config())
  made = experiment.modules_of(config)
  assert {m: config.encoders[m].name for m in made} == {"visual": "clip_vit_b32", "audio": "htsat_tiny"}
  method = experiment.method_of(config, made)
  found = {part: partition.count(tree) for part, tree in shapes_of(method).items()}
  gates = 2 * 12
  assert found == {"msp": 109_056, "projections": 872_448, "mip": 3_072 + gates, "bank": 5_120}
  learned, frozen = sum(found.values()), sum(partition.count(pretrained.shapes(module)) for module in made.values())
  assert learned == 989_720 and learned / (learned + frozen) == pytest.approx(0.0085, abs=5e-5)


def test_prompts_start_as_they_should():
  method = make_method("copl", small.backbone(PAIR), blocks=(0, 2), msp_length=64, rank=64, num_slots=32)
  fresh = jax.jit(method.init_parts)(jax.random.key(0))
  prompts = np.asarray(fresh["msp"]["step_2"]["audio"])
  bound = (6 / (16 + 16)) ** 0.5
  assert 0.98 * bound < np.abs(prompts).max() <= bound and prompts.std() == pytest.approx(bound / 3**0.5, rel=0.1)
  assert not np.array_equal(prompts, fresh["msp"]["step_2"]["visual"])
  deviation = {
    "down": (fresh["projections"]["step_0"]["visual"]["down"], 16**-0.5),
    "up": (fresh["projections"]["step_0"]["visual"]["up"], 64**-0.5),
    "latents": (fresh["mip"]["step_0"]["audio"]["latents"], 0.02),
    "keys": (fresh["bank"]["audio"]["keys"], 64**-0.5),
    "values": (fresh["bank"]["audio"]["values"], 64**-0.5),
  }
  for name, (x, expected) in deviation.items():
    assert np.std(x) == pytest.approx(expected, rel=0.15), name


# -- its own setting: one task alone -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ave", "avvp", "avs", "avqa"])
def test_it_learns_each_task_alone_and_says_what_share_that_takes(name, toybox, tmp_path, monkeypatch):
  config = copl.get_config("tiny")
  config.tasks, config.data.root = (name,), str(toybox)
  monkeypatch.setattr(train.results, "draw", lambda *args: None)
  final = train.train_and_evaluate(config, tmp_path)
  assert final == results(tmp_path) and final["tasks"] == [name]
  [[score]] = final["matrix"]
  scores = [x for row in final["per_task"] for x in row["scores"].values()]
  assert 0 <= score <= 1 and scores and np.isfinite([*scores, *(line["loss"] for line in logged(tmp_path))]).all()
  counts, method = final["parameters"], experiment.method_of(compat.resolve(config), experiment.modules_of(config))
  learned = sum(by_formula("copl", method)[1].values())
  assert counts["trainable_fraction_without_heads"] == learned / (learned + counts["frozen"]) and counts["shared"] == 0
  with opening.open_run(config, None) as opened:
    monkeypatch.setattr(train.results, "planned_bytes", lambda compiled: 0)
    monkeypatch.setattr(opened, "lower_train", lambda stage: types.SimpleNamespace(compile=lambda: None))
    shown = train.results.dry_run(opened, run.begin).splitlines()
  [row] = [line.split() for line in shown if line.startswith(f"  {name} ") and "%" in line]
  assert row[-1] == f"{counts['trainable_fraction_without_heads']:.2%}"


# -- rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"blocks": (0, 3)}, "layer 3, the encoders have 3"),
    ({"blocks": (-1,)}, "layer -1"),
    ({"blocks": (1, 1)}, "layer 1 more than once"),
    ({"rank": 0}, "rank=0 must be 1 or more"),
    ({"num_slots": 0}, "num_slots"),
    ({"temperature": 0.0}, "temperature"),
    ({"entropy_weight": -1.0}, "entropy_weight=-1.0 must not be negative"),
    ({"shared": ("heads",)}, "shares heads, which is not one of msp, projections, mip, bank"),
  ],
)
def test_options_that_cannot_work_are_refused(options, message):
  with pytest.raises(ValueError, match=message) as error:
    made_of(**options)
  assert "\n" not in str(error.value)


def test_it_needs_both_towers_and_no_text():
  with pytest.raises(ValueError, match="copl needs encoders for audio"):
    make_method("copl", Backbone(visual=small.backbone(PAIR).visual))
  assert all("text" not in copl.get_config(v).encoders for v in ("full", "toybox", "tiny", "full+clip_b16"))


def test_variants_of_the_config():
  base = copl.get_config("toybox").method
  changed = lambda words: {k: v for k, v in copl.get_config(f"toybox+{words}").method.items() if v != base[k]}
  assert changed("only_msp") == {"mip": False, "bank": False} and changed("only_mip") == {"msp": False, "bank": False}
  assert changed("last_4") == {"blocks": (8, 9, 10, 11)} and changed("first_2") == {"blocks": (0, 1)}
  assert changed("slots_32+rank_16+length_2") == {"num_slots": 32, "rank": 16, "msp_length": 2}
  assert changed("shuffled_audio") == {"shuffle_audio": True} and changed("no_coupling") == {"coupling": False}
  assert copl.get_config("toybox+reversed+no_bank").tasks[-1] == "ave"
  for wrong in ("toybox+slots_0", "toybox+slots_", "toybox+no_deep", "released"):
    with pytest.raises(ValueError, match=r"unknown variant .*only_msp.*slots_N"):
      copl.get_config(wrong)
