"""L2P, DualPrompt, CODA-Prompt and S-Prompts against plain numpy, and what their prompts do to the encoders."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from configs import base
from phpjax import compat, experiment, model, partition
from phpjax.encoders import HTSAT, pretrained
from phpjax.encoders.base import Stream
from phpjax.methods import Backbone, coda_prompt, dualprompt, l2p, make_method, prompts

NAMES = ("l2p", "dualprompt", "coda_prompt", "s_prompts")
MADE = small.modules()
PAIR = {m: MADE[m] for m in ("visual", "audio")}
STAGES = {"width": 32, "depth": 3, "num_heads": 4, "embed_dim": 8, "depths": (1, 1, 1), "heads": (1, 2, 4), "mlp_ratio": 2.0}
STAGED = {
  **PAIR,
  "audio": HTSAT(
    **STAGES, window=4, image_size=64, num_mels=8, num_fft=256, hop=64, repeats=1, sample_rate_hz=small.RATE_HZ,
    mel_rate_hz=small.RATE_HZ, low_hz=20.0, high_hz=1900.0,
  ),
}  # fmt: skip
CLIPS, ROWS, WIDTH, EMBED = 3, 3 * small.SECONDS, 16, 8
MASK = np.array([1, 0, 1], np.float32)
REAL = np.repeat(MASK, small.SECONDS) > 0


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(actual, expected, tolerance=1e-5):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def cosines(x, y):
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  return np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in y] for a in x])


def queries(seed=0, rows=ROWS):
  """{modality: what has the pooled features of every second}."""
  return {m: type("Query", (), {"pooled": jnp.asarray(draw(rows, EMBED, seed=seed + i))}) for i, m in enumerate(PAIR)}


def streams_of(made=None, rows=ROWS):
  return {m: Stream(jnp.asarray(draw(rows, e.layer_tokens(0), e.layer_width(0)))) for m, e in (made or PAIR).items()}


def started(method, params, query, past=None, task="ave", streams=None):
  trainable, frozen = partition.split(params, task, method.uses(small.task(task)))
  options = {"query": query, "mask": MASK, "rng": None, "train": True}
  return method.start(small.task(task), trainable, frozen, {}, past, streams or streams_of(), **options)


def setup(name, made=MADE, tasks=("ave",), seed=0, **options):
  """(method, params of these tasks)."""
  method = small.method_of(name, made, **options)
  params = small.params_of(method, {n: small.task(n) for n in tasks}, made, seed)
  if "frontend" in (audio := params["encoders"]["audio"]):  # numbers of either sign are no mel matrix and no variance
    audio["frontend"] = {k: np.abs(x) + 50 * (k == "var") for k, x in audio["frontend"].items()}
  return method, params


def features_of(method, params, batch, made=PAIR, task="ave", past=None):
  trainable, frozen = partition.split(params, task, method.uses(small.task(task)))
  of_task = small.task(task)
  run = jax.jit(lambda t, f, p, b: model.forward(made, method, of_task, t, f, {}, p, b, rng=None, train=False)[0])
  return run(trainable, frozen, past, batch)


# -- L2P -----------------------------------------------------------------------------------------------------------


def test_every_second_takes_the_prompts_nearest_to_its_own_query():
  method, params = setup("l2p", pool_size=5, top_k=3)
  query = queries()
  context = started(method, params, query)
  for m in PAIR:
    pool = params["shared"][m]
    scores = cosines(query[m].pooled, pool["keys"])
    for row in range(ROWS):
      nearest = sorted(range(5), key=lambda i, row=row, scores=scores: -scores[row, i])[:3]
      close(context["inputs"][m][row], np.concatenate([pool["prompts"][i] for i in nearest]))
  chosen = {tuple(np.sort(np.asarray(l2p.select(query["visual"].pooled, params["shared"]["visual"]["keys"], 3)[0]), -1)[row])
            for row in range(ROWS)}  # fmt: skip
  assert len(chosen) > 1, "there is no majority"


def test_of_equal_keys_the_first_is_taken():
  keys = np.stack([draw(EMBED), draw(EMBED, seed=1), draw(EMBED)])
  chosen, distance = l2p.select(draw(EMBED)[None], keys, 2)
  assert chosen.tolist() == [[0, 2]]
  close(distance, [[0, 0]])


def test_the_pull_is_a_mean_over_real_seconds_of_the_chosen_distances():
  method, params = setup("l2p", pool_size=5, top_k=3, pull_weight=0.7)
  query = queries()
  losses = method.losses(small.task("ave"), started(method, params, query), {}, {}, {"mask": MASK})
  expected = 0.0
  for m in PAIR:
    scores = np.sort(cosines(query[m].pooled, params["shared"][m]["keys"]), axis=1)[:, -3:]
    expected += np.mean([(1 - scores[row]).sum() for row in np.flatnonzero(REAL)])
  assert set(losses) == {"pull"} and losses["pull"] == pytest.approx(0.7 * expected, rel=1e-5)


def test_only_the_chosen_keys_and_prompts_of_l2p_get_a_gradient():
  method, params = setup("l2p", pool_size=6, top_k=2)
  query = queries(rows=1)
  streams = streams_of(rows=1)

  def loss(shared):
    context = started(method, {**params, "shared": shared}, query, streams=streams)
    pull = method.losses(small.task("ave"), context, {}, {}, {})["pull"]
    return pull + sum((x**2).sum() for x in context["inputs"].values())

  grads = jax.grad(loss)(params["shared"])
  for m in PAIR:
    nearest = set(np.argsort(-cosines(query[m].pooled, params["shared"][m]["keys"])[0])[:2])
    for part in ("keys", "prompts"):
      moved = {i for i in range(6) if np.abs(grads[m][part][i]).max() > 0}
      assert moved == nearest


# -- DualPrompt ----------------------------------------------------------------------------------------------------


def test_task_match_is_the_cosine_of_query_and_key():
  query, keys = draw(4, EMBED), draw(3, EMBED, seed=1)
  close(dualprompt.task_match(query, keys), cosines(query, keys))
  assert dualprompt.task_match(jnp.asarray(query, jnp.bfloat16), jnp.asarray(keys, jnp.bfloat16)).dtype == jnp.float32
  close(dualprompt.task_match(query, np.zeros((1, EMBED), np.float32)), np.zeros((4, 1)))


def test_the_matching_loss_by_hand_ignores_padding():
  method, params = setup("dualprompt", match_weight=2.0)
  query = queries()
  losses = method.losses(small.task("ave"), started(method, params, query), {}, {}, {"mask": MASK})
  own = params["tasks"]["ave"]["prompts"]
  expected = sum(np.mean(1 - cosines(query[m].pooled, own[m]["key"][None])[REAL, 0]) for m in PAIR)
  assert set(losses) == {"match"} and losses["match"] == pytest.approx(2 * expected, rel=1e-5)


def attention_by_hand(block, x, key, value, heads, eps=1e-5):
  """x [B, L, D], prefix [P, D] twice -> x + attention with the prefix behind the projections."""
  dense = lambda name, z: z @ block["attn"][name]["kernel"] + block["attn"][name]["bias"]
  normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
  normed = normed * block["ln_1"]["scale"] + block["ln_1"]["bias"]
  batch = lambda p: np.broadcast_to(p, (len(x), *p.shape))
  q, k, v = dense("query", normed), dense("key", normed), dense("value", normed)
  k, v = np.concatenate([batch(key), k], 1), np.concatenate([batch(value), v], 1)
  split = lambda z: z.reshape(*z.shape[:2], heads, -1)
  scores = np.einsum("blhd,bshd->bhls", split(q), split(k)) / np.sqrt(x.shape[-1] // heads)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  mixed = np.einsum("bhls,bshd->blhd", weights / weights.sum(-1, keepdims=True), split(v))
  return x + dense("out", mixed.reshape(x.shape))


@pytest.mark.parametrize("part", ["general", "expert"])
def test_prompts_of_dualprompt_reach_attention_unprojected(part):
  steps = {"general": (), "expert": (), part: (2,)}
  method, params = setup("dualprompt", **steps)
  batch = small.inputs(CLIPS)
  features = features_of(method, params, batch)
  for m, encoder in PAIR.items():
    weights = params["encoders"][m]
    own = params["shared"][m] if part == "general" else params["tasks"]["ave"]["prompts"][m]["prompts"]
    bound = encoder.bind({"params": weights})
    stream = bound.stem(batch[m].reshape(-1, *batch[m].shape[2:]))
    for layer in range(2):
      stream = bound.mlp(layer, bound.attention(layer, bound.enter(layer, stream)))
    x = np.asarray(stream.tokens, np.float64)
    mixed = attention_by_hand(weights["blocks_2"], x, *own["step_2"], heads=2)
    expected = bound.mlp(2, Stream(jnp.asarray(mixed, jnp.float32)))
    close(features[m].tokens, expected.tokens, 1e-4)


def test_dualprompt_begins_a_task_where_the_last_one_ended_but_for_its_key():
  method, params = setup("dualprompt")
  previous = params["tasks"]["ave"]["prompts"]
  after = method.init_task(jax.random.key(1), small.task("avs"), previous)
  fresh = dataclasses.replace(method, warm_start=False).init_task(jax.random.key(1), small.task("avs"), previous)
  for m in PAIR:
    small.assert_same_bits(after[m]["prompts"], previous[m]["prompts"])
    assert not np.array_equal(fresh[m]["prompts"]["step_1"], previous[m]["prompts"]["step_1"])
    assert not np.array_equal(after[m]["key"], previous[m]["key"])


# -- CODA-Prompt ---------------------------------------------------------------------------------------------------


def stacked(trees, num_tasks):
  """`past` as the trainer stacks it."""
  params = {"tasks": {str(i): {"prompts": tree} for i, tree in enumerate(trees)}}
  return partition.stack_past({"tasks": {"own": {"prompts": trees[0]}, **params["tasks"]}}, "own", num_tasks)


def test_codas_attention_by_hand():
  query, keys, attention = draw(4, EMBED), draw(5, EMBED, seed=1), draw(5, EMBED, seed=2)
  expected = np.array([[cosines([q * a], [k])[0, 0] for a, k in zip(attention, keys, strict=True)] for q in query])
  close(coda_prompt.attend(query, keys, attention), expected)
  close(coda_prompt.attend(1e4 * query, 1e-3 * keys, 1e3 * attention), expected, 1e-4)
  nothing = np.zeros_like(keys)
  grads = jax.grad(lambda k, a: coda_prompt.attend(query, k, a).sum(), argnums=(0, 1))(nothing, nothing)
  assert not np.any(coda_prompt.attend(query, nothing, nothing)) and all(np.isfinite(g).all() for g in grads)


def test_a_prompt_of_coda_sums_the_components_of_all_tasks_that_exist():
  method, params = setup("coda_prompt", tasks=("ave", "avs", "avqa"))
  of = {name: tree["prompts"] for name, tree in params["tasks"].items()}
  past = stacked([of["avs"], of["avqa"]], 4)
  past["prompts"] = jax.tree.map(lambda x: x.at[2:].set(7.0), past["prompts"])  # padding that must not be read
  query = queries()
  context = started(method, params, query, past)
  assert set(context["prefixes"]) == {f"step_{step}" for step in method.steps}
  for m, step in itertools.product(PAIR, method.steps):
    total = np.zeros((ROWS, method.length, WIDTH))
    for tree in of.values():
      parts = tree[m][f"step_{step}"]
      for p, k, a in zip(parts["prompts"], parts["keys"], parts["attention"], strict=True):
        total += cosines(query[m].pooled * a, k[None])[:, :, None] * p
    prefix = method.prefix(context, step)[m]
    assert prefix.at == "projected"
    close(prefix.key, total[:, : method.length // 2], 1e-4)
    close(prefix.value, total[:, method.length // 2 :], 1e-4)
  assert method.prefix(context, 1) == {}


def test_codas_penalty_by_hand_over_own_and_past_components():
  method, params = setup("coda_prompt", tasks=("ave", "avs"), orthogonality_weight=0.3)
  own, other = (params["tasks"][name]["prompts"] for name in ("ave", "avs"))
  past = stacked([other], 3)
  past["prompts"] = jax.tree.map(lambda x: x.at[1:].set(7.0), past["prompts"])
  losses = method.losses(small.task("ave"), started(method, params, queries(), past), {}, {}, {"mask": MASK})
  expected = 0.0
  for path, mine in jax.tree_util.tree_leaves_with_path(own):
    rows = np.concatenate([mine, small.flat(other)[jax.tree_util.keystr(path, simple=True, separator="/")]]).astype(np.float64)
    rows = rows.reshape(len(rows), -1)
    expected += np.mean((rows @ rows.T - np.eye(len(rows))) ** 2)
  assert set(losses) == {"orthogonality"} and losses["orthogonality"] == pytest.approx(0.3 * expected, rel=1e-4)
  alone = method.losses(small.task("ave"), started(method, params, queries()), {}, {}, {})["orthogonality"]
  padded = method.losses(small.task("ave"), started(method, params, queries(), {**past, "valid": np.zeros(3, np.float32)}),
                         {}, {}, {})["orthogonality"]  # fmt: skip
  assert alone == pytest.approx(float(padded), rel=1e-5) and abs(float(alone) - float(losses["orthogonality"])) > 1e-4


def test_the_order_of_tasks_does_not_matter_to_coda():
  """A task that is asked later reads the components of later tasks too, whoever holds them."""
  method, params = setup("coda_prompt", tasks=("ave", "avs", "avqa"))
  batch, of = small.inputs(CLIPS), {name: tree["prompts"] for name, tree in params["tasks"].items()}
  run = lambda past, task: features_of(method, params, batch, task=task, past=past)
  first, swapped = (run(stacked([of[n] for n in names], 4), "ave") for names in (("avs", "avqa"), ("avqa", "avs")))
  as_past = run(stacked([of["ave"], of["avs"]], 4), "avqa")
  alone = run(None, "ave")
  for m in PAIR:
    close(first[m].tokens, swapped[m].tokens)
    close(first[m].tokens, as_past[m].tokens)
    assert np.abs(alone[m].tokens - first[m].tokens).max() > 1e-3


def test_past_components_get_no_gradient():
  method, params = setup("coda_prompt", tasks=("ave", "avs"))
  past = stacked([params["tasks"]["avs"]["prompts"]], 3)

  def loss(own, prompts):
    tasks = {**params["tasks"], "ave": {**params["tasks"]["ave"], "prompts": own}}
    context = started(method, {**params, "tasks": tasks}, queries(), {**past, "prompts": prompts})
    losses = method.losses(small.task("ave"), context, {}, {}, {})
    prefixes = [prefix for step in context["prefixes"].values() for prefix in step.values()]
    return losses["orthogonality"] + sum((p.key**2 + p.value**2).sum() for p in prefixes)

  mine, theirs = jax.grad(loss, argnums=(0, 1))(params["tasks"]["ave"]["prompts"], past["prompts"])
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(mine)) and not any(np.any(g) for g in jax.tree.leaves(theirs))


def test_new_components_are_orthogonal_to_one_another_and_to_those_of_the_task_before():
  made = small.modules()
  method = small.method_of("coda_prompt", made, components_per_task=3)
  previous = small.prompts_of(method, small.task("ave"))
  tree = method.init_task(jax.random.key(0), small.task("avs"), previous)
  first = method.init_task(jax.random.key(0), small.task("ave"), None)
  for name, rows in small.flat(tree).items():
    flat = lambda x: x.reshape(3, -1)
    close(flat(rows) @ flat(rows).T, np.eye(3), 1e-4)
    close(flat(small.flat(first)[name]) @ flat(small.flat(first)[name]).T, np.eye(3), 1e-4)
    close(flat(rows) @ flat(small.flat(previous)[name]).T, np.zeros((3, 3)), 1e-4)
  crowded = coda_prompt.orthonormal(jax.random.key(0), (5, EMBED), draw(5, EMBED))
  close(crowded @ crowded.T, np.eye(5), 1e-4)
  assert np.linalg.matrix_rank(coda_prompt.orthonormal(jax.random.key(0), (10, EMBED), None)) == EMBED


# -- tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["l2p", "s_prompts"])
def test_tokens_stand_behind_the_real_ones_and_leave_no_trace_in_the_shapes(name):
  method, params = setup(name)
  batch = small.inputs(CLIPS)
  bare = features_of(method.empty(), params | {"shared": {}}, batch)
  prompted = features_of(method, params, batch)
  context = started(method, params, bare)
  for m, encoder in PAIR.items():
    assert jax.tree.map(jnp.shape, prompted[m]) == jax.tree.map(jnp.shape, bare[m])
    bound = encoder.bind({"params": params["encoders"][m]})
    tokens = bound.stem(batch[m].reshape(-1, *batch[m].shape[2:])).tokens
    after = bound.layers(Stream(jnp.concatenate([tokens, context["inputs"][m]], axis=1)))
    expected = bound.pool(Stream(after.tokens[:, : tokens.shape[1]]))
    close(prompted[m].pooled, expected.pooled, 1e-4)
    close(prompted[m].tokens, expected.tokens, 1e-4)
    assert np.abs(prompted[m].pooled - bare[m].pooled).max() > 1e-3


def test_a_mask_of_tokens_grows_and_shrinks_with_them():
  stream = Stream(jnp.zeros((2, 3, 4)), mask=jnp.array([[True, True, False], [True, False, False]]))
  longer = prompts.append_tokens(stream, jnp.ones((2, 2, 4)))
  assert longer.mask.tolist() == [[True, True, False, True, True], [True, False, False, True, True]]
  small.assert_same_bits(prompts.drop_tokens(longer, 2), stream)


@pytest.mark.parametrize("name", NAMES)
def test_staged_encoders_take_keys_and_values_instead_of_tokens(name):
  method, params = setup(name, {**MADE, **STAGED}, **({"steps": (0, 1, 2)} if name == "coda_prompt" else {}))
  batch = small.inputs(CLIPS)
  bare = features_of(method.empty(), params | {"shared": {}}, batch, STAGED)
  prompted = features_of(method, params, batch, STAGED)
  assert jax.tree.map(jnp.shape, prompted) == jax.tree.map(jnp.shape, bare)
  assert all(np.abs(prompted[m].pooled - bare[m].pooled).max() > 1e-4 for m in PAIR)
  context = started(method, params, bare, streams=streams_of(STAGED))
  first = method.prefix(context, 0)
  if name in ("l2p", "s_prompts"):
    assert set(first) == {"audio"} and first["audio"].at == "input" and method.prefix(context, 1) == {}
    close(first["audio"].key, context["inputs"]["audio"])
    close(first["audio"].value, context["inputs"]["audio"])
  else:
    widths = [method.prefix(context, step)["audio"].key.shape[-1] for step in range(3) if method.prefix(context, step)]
    assert widths == [8, 16, 32]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alone", ["visual", "audio"])
def test_one_modality_alone_is_prompted_as_beside_the_other(name, alone):
  method, params = setup(name)
  batch = small.inputs(CLIPS)
  both = features_of(method, params, batch)
  one = features_of(method, params, {alone: batch[alone], "mask": batch["mask"]})
  assert set(one) == {alone}
  close(one[alone].tokens, both[alone].tokens, 1e-4)


# -- precision, options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_encoders_leave_losses_and_parameters_in_float32(name):
  method, params = setup(name)
  query = queries()
  half = {m: Stream(s.tokens.astype(jnp.bfloat16)) for m, s in streams_of().items()}
  losses = [method.losses(small.task("ave"), started(method, params, query, streams=s), {}, {}, {"mask": MASK})
            for s in (half, streams_of())]  # fmt: skip
  small.assert_same_bits(*losses)
  params["encoders"] = pretrained.cast(params["encoders"], jnp.bfloat16)
  made = {m: module.clone(dtype=jnp.bfloat16) for m, module in PAIR.items()}
  features = features_of(method, params, small.inputs(2), made)
  for m in PAIR:
    assert features[m].tokens.dtype == jnp.bfloat16 and np.isfinite(features[m].pooled).all()


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    (
      "dualprompt",
      {"expert": (2, 3, 4)},
      "dualprompt has a prompt in step 4, the encoders have 3 layers: set general",
    ),
    ("dualprompt", {"general": (-1,)}, "step -1"),
    ("dualprompt", {"general": (0, 1), "expert": (1,)}, "more than one prompt in step 1"),
    ("dualprompt", {"expert_length": 0}, "expert_length=0 must be 1 or more"),
    ("coda_prompt", {"steps": (0, 1, 2, 3)}, "coda_prompt has a prompt in step 3"),
    ("coda_prompt", {"steps": (1, 1)}, "more than one prompt in step 1"),
    ("coda_prompt", {"length": 3}, "length=3 must be even"),
    ("coda_prompt", {"steps": ()}, "has no steps"),
    ("coda_prompt", {"components_per_task": 0}, "components_per_task=0"),
    ("l2p", {"top_k": 5}, r"l2p takes top_k=5 of pool_size=4 prompts"),
    ("l2p", {"length": 0}, "length=0 must be 1 or more"),
    ("s_prompts", {"length": 0}, "s_prompts length=0 must be 1 or more"),
  ],
)
def test_options_that_cannot_work_are_refused_in_one_line(name, options, message):
  with pytest.raises(ValueError, match=message) as raised:
    small.method_of(name, **options)
  assert "\n" not in str(raised.value)


@pytest.mark.parametrize("size", base.SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_every_size_fits_its_encoders(name, size):
  config = compat.resolve(small.config_of(name, size))
  method = experiment.method_of(config, experiment.modules_of(config))
  given = {k: v for k, v in config.method.items() if k not in ("name", "compat")}
  assert given.keys() == {f.name for f in dataclasses.fields(method)} - {"backbone", "remat"}
  if name == "coda_prompt":
    room = min(getattr(method.backbone, m).embed_dim for m in PAIR)
    assert method.components_per_task * len(config.tasks) <= room, "all tasks' keys can be orthogonal"


@pytest.mark.parametrize("name", NAMES)
def test_without_pictures_and_sound_there_is_nothing_to_prompt(name):
  with pytest.raises(ValueError, match="needs an encoder of pictures or of sound"):
    make_method(name, Backbone(text=small.backbone(MADE).text))


@pytest.mark.parametrize("name", ["dualprompt", "coda_prompt"])
def test_a_shallower_text_encoder_is_refused_where_steps_would_be_other_layers(name):
  method, params = setup(name, small.modules(text_depth=1))
  with pytest.raises(ValueError, match="text encoder of 1 layers is shallower"):
    started(method, params, queries(), streams={**streams_of(), "text": Stream(jnp.zeros((ROWS, 4, WIDTH)))})
