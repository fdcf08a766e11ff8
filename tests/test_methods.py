"""PHP and the baselines: identity at the start, ablations, and what each task reads."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from small import TASKS

from phpjax import model, partition
from phpjax.encoders import make_encoder, pretrained
from phpjax.encoders.base import Stream
from phpjax.methods import METHODS, FineTune, Sizes, make_method
from phpjax.methods.php_modules import ClipAdapter, GeneratorBlock, MiddlePrompts, PromptGenerator, ShallowAdapter
from phpjax.methods.prompts import l2_normalise

MADE = small.modules()
PAIR = {m: MADE[m] for m in ("visual", "audio")}
WIDTH, EMBED = 16, 8


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(actual, expected, tolerance=1e-5):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def shapes_of(init):
  return jax.eval_shape(lambda: init(jax.random.key(0)))


def features_of(method, task, params, batch):
  """jit of forward in evaluation mode -> features."""
  trainable, frozen = partition.split(params, task.name, method.uses(task))
  run = jax.jit(lambda t, f, b: model.forward(PAIR, method, task, t, f, {}, None, b, rng=None, train=False)[0])
  return run(trainable, frozen, batch)


def encoders_alone(params, batch):
  run = jax.jit(lambda p, b: {m: PAIR[m].apply({"params": p[m]}, b[m].reshape(-1, *b[m].shape[2:])) for m in PAIR})
  return run(params["encoders"], batch)


# -- the three phases --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shallow():
  """(method, task, params as they are initialised): the adapters of one layer, nothing else."""
  method, task = small.php(shallow=(1,), mid=(), deep=()), small.task("ave")
  params = small.params_of(method, {"ave": task}, MADE)
  return method, task, {**params, "shared": jax.jit(method.init_shared)(jax.random.key(0))}


def test_fresh_adapters_leave_the_encoders_features_as_they_are(shallow):
  method, task, params = shallow
  batch = small.inputs(2)
  fresh, alone = features_of(method, task, params, batch), encoders_alone(params, batch)
  for m in PAIR:
    close(fresh[m].pooled, alone[m].pooled, 1e-6)
    close(fresh[m].tokens, alone[m].tokens, 1e-6)
  # and it is the gate alone that holds them back
  opened = jax.tree_util.tree_map_with_path(lambda path, x: x + 0.5 if path[-1].key == "gate" else x, params["shared"])
  other = features_of(method, task, {**params, "shared": opened}, batch)
  assert all(np.abs(other[m].pooled - alone[m].pooled).max() > 1e-3 for m in PAIR)


def test_an_absent_partner_makes_the_adapter_the_identity(shallow):
  method, _, params = shallow
  context, tokens = {"adapters": params["shared"]["adapters"]}, {m: PAIR[m].num_tokens for m in PAIR}
  alone = {"visual": Stream(jnp.ones((2, tokens["visual"], WIDTH)))}
  assert all(method.adapt(context, site, 1, alone) is alone for site in ("embed", "stem", "input", "attention", "mlp"))
  both = {**alone, "audio": Stream(jnp.ones((2, tokens["audio"], WIDTH)))}
  assert method.adapt(context, "attention", 0, both) is both, "no adapter in this layer"
  assert jax.eval_shape(lambda s: method.adapt(context, "attention", 1, s), both)["audio"].tokens.shape == (
    2,
    tokens["audio"],
    WIDTH,
  )


def test_both_modalities_read_the_pair_as_it_was():
  method = small.php(shallow=(0,), mid=(), deep=())
  adapters = small.fill(shapes_of(method.init_shared))["adapters"]
  streams = {m: Stream(draw(2, PAIR[m].num_tokens, WIDTH, seed=i)) for i, m in enumerate(PAIR)}
  out = jax.jit(lambda a, s: method.adapt({"adapters": a}, "mlp", 0, s))(adapters, streams)
  for m, other in (("visual", "audio"), ("audio", "visual")):
    residual = method.adapter(m).apply({"params": adapters["step_0_mlp"][m]}, streams[m].tokens, streams[other].tokens)
    close(out[m].tokens, streams[m].tokens + residual, 1e-4)
    assert np.abs(residual).max() > 1e-2


PHASES = ("shallow", "mid", "deep")


@pytest.mark.parametrize("off", [c for n in range(4) for c in itertools.combinations(PHASES, n)], ids="-".join)
def test_every_ablation_builds_and_traces(off):
  method = small.php(**dict.fromkeys(off, ()))
  task = small.task("ave")
  params = small.params_of(method, {"ave": task}, MADE)
  assert ("adapters" in params["shared"]) == ("shallow" not in off) == ("adapters" in method.uses(task))
  assert set(params["tasks"]["ave"]["prompts"]) == {"mid", "deep"} - set(off)
  trainable, frozen = partition.split(params, "ave", method.uses(task))
  context = {}

  def run(trainable, frozen, batch):
    features, made, _ = model.forward(PAIR, method, task, trainable, frozen, {}, None, batch, rng=None, train=False)
    context.update(made)
    return features

  features = jax.eval_shape(run, trainable, frozen, small.inputs(2))
  assert features["visual"].tokens.shape == (4, PAIR["visual"].num_tokens, WIDTH)
  assert set(context["prefixes"]) == {{"mid": 1, "deep": 2}[p] for p in ("mid", "deep") if p not in off}


def test_php_without_any_phase_equals_the_encoders():
  method, task = small.php(shallow=(), mid=(), deep=()), small.task("avs")
  params, batch = small.params_of(method, {"avs": task}, MADE), small.inputs(2)
  bare, alone = features_of(method, task, params, batch), encoders_alone(params, batch)
  for m in PAIR:
    close(bare[m].tokens, alone[m].tokens, 1e-6)


@pytest.fixture(scope="module")
def whole():
  """(method, task, params, batch, features) of all three phases, nothing at zero."""
  method, task = small.php(), small.task("avs")
  params, batch = small.params_of(method, {"avs": task, "avqa": small.task("avqa")}, MADE), small.inputs(2)
  return method, task, params, batch, features_of(method, task, params, batch)


@pytest.mark.parametrize("part", ["adapters", "mid", "deep visual", "deep audio", "context"])
def test_every_phase_reaches_the_features(whole, part):
  method, task, params, batch, before = whole
  move = lambda tree: jax.tree.map(lambda x: x + draw(*x.shape, seed=9), tree)
  prompts, shared = dict(params["tasks"]["avs"]["prompts"]), dict(params["shared"])
  if part in shared:
    shared[part] = move(shared[part])
  elif part == "mid":
    prompts["mid"] = move(prompts["mid"])
  else:
    m = part.split()[1]
    prompts["deep"] = {**prompts["deep"], m: move(prompts["deep"][m])}
  tasks = {**params["tasks"], "avs": {**params["tasks"]["avs"], "prompts": prompts}}
  after = features_of(method, task, {**params, "shared": shared, "tasks": tasks}, batch)
  moved = {m: float(np.abs(after[m].tokens - before[m].tokens).max()) > 1e-4 for m in PAIR}
  reach = {"deep visual": {"visual"}, "deep audio": {"audio"}, "context": set()}.get(part, {"visual", "audio"})
  assert moved == {m: m in reach for m in PAIR}, "the last layer's prompts are independent between modalities"


def test_prompts_are_keys_and_values_behind_the_norm(whole):
  method, _, params, _, _ = whole
  streams = {m: Stream(draw(4, PAIR[m].num_tokens, WIDTH)) for m in PAIR}
  trainable, frozen = partition.split(params, "avs", method.uses(small.task("avs")))
  options = {"query": None, "mask": None, "rng": None, "train": False}
  context = method.start(small.task("avs"), trainable, frozen, {}, None, streams, **options)
  assert method.prefix(context, 0) == {} and set(method.prefix(context, 1)) == set(method.prefix(context, 2)) == set(PAIR)
  deep = method.prefix(context, 2)["audio"]
  assert deep.at == "normed" and deep.key.shape == deep.value.shape == (4, method.deep_length, WIDTH)
  close(deep.key[3], params["tasks"]["avs"]["prompts"]["deep"]["audio"]["step_2"][0])
  close(deep.value[0], params["tasks"]["avs"]["prompts"]["deep"]["audio"]["step_2"][1])
  mid = method.prefix(context, 1)
  assert mid["visual"].at == "normed" and mid["visual"].key.shape == (4, method.num_mid_prompts // 2, WIDTH)
  assert np.abs(mid["visual"].key[0] - mid["visual"].key[1]).max() > 1e-6, "generated from the input"
  assert np.abs(mid["visual"].key - mid["audio"].key).max() > 1e-6


# -- modules -----------------------------------------------------------------------------------------------------


def test_one_token_of_the_last_block_equals_the_whole_block():
  block, x = GeneratorBlock(2), draw(3, 5, WIDTH)
  params = small.fill(jax.eval_shape(lambda: block.init(jax.random.key(0), x, 5))["params"])
  run = lambda n: jax.jit(lambda p, x: block.apply({"params": p}, x, n))(params, x)
  close(run(1), run(5)[:, :1])
  assert run(1).shape == (3, 1, WIDTH)


def test_the_generator_reads_one_token_and_mixes_the_codebook():
  generator, x, codebook = PromptGenerator(4, 2, 2), draw(3, 5, WIDTH), draw(6, WIDTH, seed=1)
  params = small.fill(jax.eval_shape(lambda: generator.init(jax.random.key(0), x, codebook))["params"])
  prompts = jax.jit(generator.apply)({"params": params}, x, codebook)
  y = jnp.concatenate([x, jnp.broadcast_to(codebook, (3, 6, WIDTH))], 1)
  for layer in range(2):  # all tokens through both blocks
    y = jax.jit(lambda p, y: GeneratorBlock(2).apply({"params": p}, y, 11))(params[f"block_{layer}"], y)
  logits = (y[:, 0] @ params["mixture"]["kernel"] + params["mixture"]["bias"]).reshape(3, 4, 6)
  share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  close(prompts, share @ codebook, 1e-4)


def test_the_clip_adapter_by_hand():
  x = draw(5, EMBED)
  params = small.fill(jax.eval_shape(lambda: ClipAdapter().init(jax.random.key(0), x))["params"], scale=0.5)
  h = np.maximum(np.maximum(x @ params["down"]["kernel"], 0) @ params["up"]["kernel"], 0)
  expected = 0.2 * h + 0.8 * x
  close(ClipAdapter().apply({"params": params}, x), expected / np.linalg.norm(expected, axis=-1, keepdims=True))


def test_the_shallow_adapter_by_hand():
  adapter, x, other = ShallowAdapter(num_latents=3, reduction=4), draw(2, 5, WIDTH), draw(2, 4, WIDTH, seed=1)
  p = small.fill(jax.eval_shape(lambda: adapter.init(jax.random.key(0), x, other))["params"])
  softmax = lambda z: np.exp(z - z.max(-1, keepdims=True)) / np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)
  sigmoid, relu = lambda z: 1 / (1 + np.exp(-z)), lambda z: np.maximum(z, 0)
  dense = lambda name, z: z @ p[name]["kernel"] + p[name]["bias"]
  norm = lambda name, z: (
    (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5) * p[name]["scale"] + p[name]["bias"]
  )

  def grouped(name, z):
    halves = np.split(z, 2, axis=-1)
    return np.concatenate([half @ p[name]["kernel"][g] for g, half in enumerate(halves)], -1)

  there = np.einsum("nkc,kl->nlc", other, p["token_map"]["kernel"]) + p["token_map"]["bias"][:, None]
  there = dense("channel_map", there)
  latents = p["latents"] + softmax(p["latents"] @ there.swapaxes(1, 2)) @ there
  y = x + p["gate_av"] * (softmax(x @ latents.swapaxes(1, 2)) @ latents)
  summary = there.mean(1, keepdims=True)
  mixed = relu(dense("audio_1", summary)) * relu(dense("visual_1", y))
  channel = sigmoid(dense("channel_gate", relu(dense("bottleneck", mixed.mean(1, keepdims=True)))))
  spatial = sigmoid(dense("spatial_gate", relu(dense("visual_2", y * (channel + 1))) * relu(dense("audio_2", summary))))
  temporal = sigmoid(dense("temporal_gate", summary))
  y = y * (0.2 * channel + 0.05 * spatial + 0.01 * temporal + 1 - 0.2)
  y = norm("ln_post", grouped("up", relu(grouped("down", norm("ln_before", y)))))
  close(jax.jit(adapter.apply)({"params": p}, x, other), y * p["gate"], 1e-4)


# -- fine-tuning -------------------------------------------------------------------------------------------------


def test_finetune_has_the_same_modules_and_no_part_of_a_task():
  php, finetune = small.php(), small.php(cls=FineTune)
  for name in TASKS:
    assert set(finetune.uses(small.task(name))) == {*php.uses(small.task(name)), "prompts"}
  params = small.params_of(finetune, {"avs": small.task("avs")}, MADE)
  trainable, frozen = partition.split(params, "avs", finetune.uses(small.task("avs")))
  assert set(trainable["shared"]) == {"adapters", "prompts"} and trainable["task"]["prompts"] == {}
  run = lambda t, f, b: model.forward(PAIR, finetune, small.task("avs"), t, f, {}, None, b, rng=None, train=False)[0]
  assert jax.eval_shape(run, trainable, frozen, small.inputs(2))["audio"].pooled.shape == (4, EMBED)


# -- rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("task_name", TASKS)
def test_what_a_method_uses_exists_and_every_leaf_has_a_label(name, task_name):
  method, task = small.method_of(name), small.task(task_name)
  params = {
    "encoders": {},
    "shared": shapes_of(method.init_shared),
    "tasks": {
      task_name: {
        "prompts": shapes_of(lambda rng: method.init_task(rng, task, None)),
        "head": shapes_of(lambda rng: method.init_head(rng, task)),
      }
    },
  }
  trainable, _ = partition.split(params, task_name, method.uses(task))
  labels = jax.tree.leaves(partition.labels(params, task_name, method.uses(task)))
  assert labels.count("frozen") == len(jax.tree.leaves(params)) - len(jax.tree.leaves(trainable))
  assert hash(method) == hash(dataclasses.replace(method)) and method == dataclasses.replace(method)


def test_warm_start_copies_the_task_before():
  task, rng = small.task("ave"), jax.random.key(0)
  previous = small.prompts_of(small.php(), task)
  started = small.php().init_task(rng, task, previous)
  small.assert_same_bits(started, previous)
  assert all(a is not b for a, b in zip(jax.tree.leaves(started), jax.tree.leaves(previous), strict=True)), (
    "donation must not reach it"
  )
  bare = {"shallow": (), "mid": ()}
  fresh = small.php(**bare, warm_start=False).init_task(rng, task, {"deep": previous["deep"]})
  assert not np.array_equal(fresh["deep"]["visual"]["step_2"], previous["deep"]["visual"]["step_2"])
  audio = fresh["deep"]["audio"]["step_2"]
  assert np.abs(audio).max() <= 1 and np.unique(audio).size > 100 - 40


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"deep": (3,)}, "layer 3, the encoders have 3"),
    ({"shallow": (-1,)}, "layer -1"),
    ({"mid": (0, 1), "deep": (1, 2)}, "more than one prompt of mid and deep in layer 1"),
    ({"deep": (2, 2)}, "in layer 2"),
    ({"num_mid_prompts": 5}, "even"),
    ({"audio_logit_scale": "log"}, "audio_logit_scale"),
  ],
)
def test_options_that_cannot_work_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    small.php(**options)


def test_backbones_that_cannot_work_are_refused():
  backbone = small.backbone(MADE)
  with pytest.raises(ValueError, match="text"):
    make_method("php", dataclasses.replace(backbone, text=None), shallow=(), mid=(), deep=())
  wide = dataclasses.replace(backbone, audio=dataclasses.replace(backbone.audio, layer_widths=(32, 32, 32)))
  with pytest.raises(ValueError, match="equal widths"):
    make_method("php", wide, shallow=(0,), mid=(1,), deep=(2,))
  make_method("php", wide, shallow=(0,), mid=[], deep=[2])


@pytest.mark.parametrize("name", ["php", "finetune"])
@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"audio": {"embed_dim": 12}}, "compares audio features of size 12 with class texts of size 8"),
    ({"visual": {"layer_widths": (16, 16, 32)}}, "visual encoder whose layers differ"),
    ({"audio": {"layer_widths": (4, 8, 16), "layer_tokens": (48, 16, 4)}}, "3 cells of 4 channels as audio tokens of width 16"),
    ({"audio": {"layer_widths": (4, 8, 16), "layer_tokens": (64, 9, 4)}}, "64 numbers of prompts over 9 audio tokens"),
  ],
)
def test_encoders_that_php_cannot_run_on_are_refused(name, change, words):
  backbone = small.backbone(MADE)
  other = {m: dataclasses.replace(getattr(backbone, m), **sizes) for m, sizes in change.items()}
  with pytest.raises(ValueError, match=words):
    make_method(name, dataclasses.replace(backbone, **other), shallow=(0,), mid=(1,), deep=(2,), num_mid_prompts=4)


def test_sizes_of_published_encoders():
  sizes = {
    name: Sizes.of(make_encoder(name)) for name in ("clip_vit_b32", "ast_base", "htsat_tiny", "whisper_tiny", "bert_base")
  }
  assert [name for name, s in sizes.items() if not s.uniform] == ["htsat_tiny"]
  assert [name for name, s in sizes.items() if not s.joint] == ["ast_base", "whisper_tiny", "bert_base"]


@pytest.mark.parametrize("shallower", ["visual", "audio"])
def test_phases_fit_the_shallower_encoder(shallower):
  depths = {**dict.fromkeys(("visual_depth", "audio_depth"), 4), f"{shallower}_depth": 2}
  made = small.modules(**depths)
  small.php(made, deep=())
  with pytest.raises(ValueError, match="layer 2, the encoders have 2"):
    small.php(made)


def test_unknown_methods_and_options_are_refused():
  backbone = small.backbone(MADE)
  with pytest.raises(ValueError, match="linear_probe"):
    make_method("prompt", backbone)
  with pytest.raises(ValueError, match="did you mean 'deep_length'"):
    make_method("php", backbone, deep_lenght=3)


# -- event tasks -------------------------------------------------------------------------------------------------


def test_events_are_scored_against_class_texts():
  method, task = small.php(shallow=(), mid=(), deep=()), small.task("ave")
  params, constants = small.params_of(method, {"ave": task}, MADE), small.class_constants("ave")
  trainable, frozen = partition.split(params, "ave", method.uses(task))
  classes = jax.jit(lambda t, f, c: method.class_features(MADE, t, f, c))(trainable, frozen, constants)
  text, shared = MADE["text"].bind({"params": params["encoders"]["text"]}), params["shared"]
  ids = constants["class_ids"]
  words = np.array(params["encoders"]["text"]["token_embedding"]["embedding"][ids])
  words[:, 1:5] = shared["context"]  # behind the start token
  stream = text.positions(Stream(jnp.asarray(words), end=jnp.asarray(ids.argmax(-1))))
  encoded = jax.jit(
    lambda s: MADE["text"].apply({"params": params["encoders"]["text"]}, s, method=lambda m, s: m.pool(m.layers(s)))
  )(stream)
  close(classes["visual"], ClipAdapter().apply({"params": shared["clip_adapter_text"]}, encoded.pooled), 1e-4)
  close(classes["audio"], l2_normalise(constants["audio_text"]))
  close(np.linalg.norm(classes["visual"], axis=-1), np.ones(3))
  features = encoders_alone(params, small.inputs(2))
  outputs, state = method.predict(task, trainable, frozen, {}, features, {}, classes, {}, rng=None, train=False)
  seen = ClipAdapter().apply({"params": shared["clip_adapter"]}, features["visual"].pooled)
  scale = {m: np.exp(params["encoders"][m]["logit_scale"]) for m in PAIR}
  close(outputs["visual"], (2 * scale["visual"] * seen @ classes["visual"].T).reshape(2, small.SECONDS, 3), 1e-4)
  close(
    outputs["audio"],
    (2 * scale["audio"] * l2_normalise(features["audio"].pooled) @ classes["audio"].T).reshape(2, small.SECONDS, 3),
    1e-4,
  )
  assert state == {}
  assert method.class_features(MADE, trainable, frozen, {}) == {}, "tasks without class texts pay nothing"


def test_half_precision_weights_do_not_round_the_event_scores():
  method, task = small.php(shallow=(), mid=(), deep=()), small.task("ave")
  params, constants = small.params_of(method, {"ave": task}, MADE), small.class_constants("ave")
  for m in PAIR:
    params["encoders"][m]["logit_scale"] = np.float32(np.log(100))
  params["encoders"] = pretrained.cast(params["encoders"], jnp.bfloat16)
  made = {m: module.clone(dtype=jnp.bfloat16) for m, module in MADE.items()}
  trainable, frozen = partition.split(params, "ave", method.uses(task))
  batch = small.inputs(2)

  @jax.jit
  def run(trainable, frozen, batch):
    pair = {m: made[m] for m in PAIR}
    features, context, _ = model.forward(pair, method, task, trainable, frozen, {}, None, batch, rng=None, train=False)
    classes = method.class_features(made, trainable, frozen, constants)
    outputs, _ = method.predict(task, trainable, frozen, {}, features, context, classes, batch, rng=None, train=False)
    return features, context, classes, outputs

  features, context, classes, outputs = run(trainable, frozen, batch)
  assert {x.dtype for x in jax.tree.leaves((classes, outputs))} == {jnp.dtype(jnp.float32)}
  assert context["logit_scale"] == pytest.approx(100, rel=1e-5)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  seen = ClipAdapter().apply({"params": params["shared"]["clip_adapter"]}, np.asarray(features["visual"].pooled, np.float32))
  for m, x in (("visual", seen), ("audio", features["audio"].pooled)):
    expected = 200 * unit(np.asarray(x, np.float64)) @ unit(np.asarray(classes[m], np.float64)).T
    np.testing.assert_allclose(outputs[m].reshape(expected.shape), expected, atol=1e-3)  # in bfloat16 off by up to 0.5


def test_the_contrastive_loss_by_hand_ignores_padding():
  method, task, rows = small.php(), small.task("ave"), 4
  mask = np.array([1, 1, 0, 1], np.float32)
  features = {m: Stream(None) for m in PAIR}
  pooled = {m: draw(rows * small.SECONDS, EMBED, seed=i) for i, m in enumerate(PAIR)}
  features = {m: type("F", (), {"pooled": pooled[m]}) for m in PAIR}
  head = {"kernel": draw(EMBED, EMBED, seed=5), "bias": draw(EMBED, seed=6)}
  context = {"contrastive": head, "logit_scale": 3.0}
  losses = method.losses(task, context, features, {}, {"mask": mask})
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  clip = {m: pooled[m].astype(np.float64).reshape(rows, small.SECONDS, EMBED) for m in PAIR}
  heard, seen = unit((clip["audio"] @ head["kernel"] + head["bias"]).mean(1)), unit(clip["visual"].mean(1))
  real = [0, 1, 3]
  logits = 3.0 * heard[real] @ seen[real].T
  entropy = lambda z: np.mean([np.log(np.exp(z[i]).sum()) - z[i, i] for i in range(3)])
  assert losses["audio_to_visual"] == pytest.approx(2 * entropy(logits), rel=1e-4)
  assert losses["visual_to_audio"] == pytest.approx(1.5 * entropy(logits.T), rel=1e-4)
  assert method.losses(small.task("avs"), context, features, {}, {"mask": mask}) == {}
  assert (method.task_weight(task), method.task_weight(small.task("avqa"))) == (5, 1)


def test_middle_prompts_share_their_codebook_and_weight_network():
  shapes = shapes_of(lambda rng: small.php(mid=(0, 1)).init_task(rng, None, None)["mid"])
  assert set(shapes) == {"codebook", "weight_key", "weight_query", "generator_0", "generator_1"}
  prefixes = jax.eval_shape(
    lambda p, x, c: MiddlePrompts(2, 4, 6, 1, 2).apply({"params": p}, x, c), shapes, draw(3, 5, WIDTH), draw(WIDTH)
  )
  assert [p.key.shape for p in prefixes] == [(3, 2, WIDTH)] * 2
