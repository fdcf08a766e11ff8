"""The one forward pass: lock step, absent modalities, and a method that uses every hook."""

import dataclasses
import types
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from phpjax import model, partition
from phpjax.methods import Method
from phpjax.methods.prompts import Prefix

ROWS = 2


def frozen_of(made, seed=0):
  return {"encoders": small.encoder_params(made, seed), "shared": {}}


def batch_of(*modalities):
  """One clip row per encoder input: B clips of SECONDS seconds; text is not folded."""
  return {**small.inputs(ROWS), "text": small.text_ids(ROWS)} if not modalities else {m: batch_of()[m] for m in modalities}


NOTHING = {"shared": {}, "task": {"prompts": {}, "head": {}}}


def run(made, method, batch, frozen, *, trainable=NOTHING, past=None, train=False):
  """jit of forward -> (features, context)."""
  step = jax.jit(
    lambda trainable, frozen, past, batch: model.forward(
      made, method, None, trainable, frozen, {}, past, batch, rng=jax.random.key(0), train=train
    )[:2]
  )
  return step(trainable, frozen, past, batch)


def flat_inputs(batch, modality):
  x = batch[modality]
  return x if modality == "text" else x.reshape(-1, *x.shape[2:])


def close(actual, expected, tolerance=1e-5):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# -- lock step ---------------------------------------------------------------------------------------------------


def depths(**layers):
  return {m: types.SimpleNamespace(depth=n) for m, n in layers.items()}


def test_encoders_of_equal_depth_go_layer_by_layer():
  assert model.layer_map(depths(visual=3, audio=3)) == {"visual": (1, 2, 3), "audio": (1, 2, 3)}
  assert model.layer_map(depths(text=2)) == {"text": (1, 2)}


def test_a_deeper_encoder_takes_several_layers_per_step():
  assert model.layer_map(depths(visual=2, audio=4, text=6)) == {"visual": (1, 2), "audio": (2, 4), "text": (3, 6)}


def test_depths_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match="'audio': 3"):
    model.layer_map(depths(visual=2, audio=3))


@pytest.mark.parametrize("audio_depth", [3, 6])
def test_the_empty_method_equals_each_encoder_alone(audio_depth):
  made = small.modules(audio_depth=audio_depth)
  frozen, batch = frozen_of(made), batch_of()
  features, context = run(made, Method(small.backbone(made)), batch, frozen)
  alone = jax.jit(lambda p, b: {m: made[m].apply({"params": p[m]}, flat_inputs(b, m)) for m in made})(frozen["encoders"], batch)
  assert context == {} and set(features) == {"visual", "audio", "text"}
  for m in made:
    close(features[m].pooled, alone[m].pooled)
    close(features[m].tokens, alone[m].tokens)
  assert features["visual"].pooled.shape == (ROWS * small.SECONDS, 8) and features["text"].pooled.shape == (ROWS, 8)


def watched(made, frozen, batch):
  """(shapes of the features, every call of `adapt` as (site, step, modalities)); nothing is computed."""
  seen = []

  @dataclasses.dataclass(frozen=True)
  class Watcher(Method):
    def adapt(self, context, site, step, streams):
      seen.append((site, step, tuple(streams)))
      return streams

  run = lambda f, b: model.forward(made, Watcher(small.backbone(made)), None, NOTHING, f, {}, None, b, rng=None, train=False)[0]
  return jax.eval_shape(run, frozen, batch), seen


@pytest.mark.parametrize(
  ("present", "steps"),
  [(("visual",), 2), (("audio",), 2), (("visual", "audio"), 2), (("visual", "text"), 1), (("text",), 1)],
)
def test_one_tower_alone_keeps_its_step_numbers(present, steps):
  made = small.modules(visual_depth=4, audio_depth=2, text_depth=1)
  shapes, seen = watched(made, frozen_of(made), batch_of(*present))
  assert set(shapes) == set(present)
  assert [step for site, step, _ in seen if site == "mlp"] == list(range(steps))


@pytest.mark.parametrize("m", ["visual", "audio", "text"])
def test_a_tower_alone_runs_all_its_layers(m):
  made = small.modules(visual_depth=4, audio_depth=2, text_depth=1)
  frozen, batch = frozen_of(made), batch_of(m)
  features, _ = run(made, Method(small.backbone(made)), batch, frozen)
  alone = jax.jit(made[m].apply)({"params": frozen["encoders"][m]}, flat_inputs(batch, m))
  close(features[m].pooled, alone.pooled)


def test_an_absent_modality_is_not_run():
  made = small.modules(text_depth=2)  # could not go in lock step with the others
  frozen = frozen_of(made)
  for m in ("audio", "text"):
    del frozen["encoders"][m]  # nor has it any weights
  shapes, seen = watched(made, frozen, batch_of("visual"))
  assert set(shapes) == {"visual"}
  steps = [(site, step) for step in range(3) for site in ("input", "attention", "mlp")]
  assert seen == [(*at, ("visual",)) for at in [("embed", 0), ("stem", 0), *steps]], "every site once, in order"


# -- a method that uses every hook -------------------------------------------------------------------------------

ORDER = ("embed", "stem", "input", "attention", "mlp")


@dataclasses.dataclass(frozen=True)
class Toy(Method):
  """Replaces a word, inserts a token, masks one, extends attention in three ways by what it has seen, adds query and past."""

  needs_query: ClassVar[bool] = True
  needs_past: ClassVar[bool] = True

  def start(self, task, trainable, frozen, state, past, streams, *, query, mask, rng, train):
    assert set(streams) == {"visual", "audio", "text"} and (rng is not None) and not train
    prompts = trainable["task"]["prompts"]
    old = jnp.einsum("n,nd->d", past["valid"], past["prompts"]["offset"])
    return {"prompts": prompts, "offset": prompts["offset"] + old, "query": query["visual"].pooled}

  def observe(self, context, step, streams):
    return {**context, "level": jnp.abs(streams["visual"].tokens).mean()}

  def prefix(self, context, step):
    kind = ("input", "normed", "projected")[step]
    rows = context["query"].shape[0]
    wide = jnp.broadcast_to(context["prompts"]["prefix"] * context["level"], (2, rows, 3, 16))
    return {"visual": Prefix(wide[0], wide[1], kind)}

  def adapt(self, context, site, step, streams):
    if site == "embed":
      word = context["trainable"]["task"]["prompts"]["word"]
      text = streams["text"]
      return {**streams, "text": text.replace(tokens=text.tokens.at[:, 1].set(word))}
    if site == "stem":
      token = jnp.broadcast_to(context["prompts"]["token"], (streams["visual"].tokens.shape[0], 1, 16))
      visual, audio = streams["visual"], streams["audio"]
      longer = jnp.concatenate([visual.tokens[:, :1], token, visual.tokens[:, 1:]], axis=1)
      padded = jnp.concatenate([audio.tokens, 100 * jnp.ones_like(audio.tokens[:, :1])], axis=1)
      mask = jnp.arange(padded.shape[1]) < padded.shape[1] - 1
      mask = jnp.broadcast_to(mask, padded.shape[:2])
      return {**streams, "visual": visual.replace(tokens=longer), "audio": audio.replace(tokens=padded, mask=mask)}
    if site == "input" and step == 1:
      visual = streams["visual"]
      return {**streams, "visual": visual.replace(tokens=visual.tokens + context["offset"] + context["query"].mean())}
    return streams


def toy_params():
  rng = np.random.default_rng(3)
  make = lambda: {
    k: rng.normal(size=s).astype(np.float32)
    for k, s in (("word", (16,)), ("token", (16,)), ("offset", (16,)), ("prefix", (2, 1, 3, 16)))
  }
  return {"tasks": {name: {"prompts": make(), "head": {}} for name in ("one", "two", "three")}}


def by_hand(made, params, prompts, offset, batch):
  """The toy on the visual and text towers, written out."""
  visual, text = made["visual"].bind({"params": params["visual"]}), made["text"].bind({"params": params["text"]})
  pixels = flat_inputs(batch, "visual")
  query = visual.pool(visual.layers(visual.stem(pixels))).pooled
  stream = visual.stem(pixels)
  token = jnp.broadcast_to(prompts["token"], (len(pixels), 1, 16))
  x = visual.ln_pre(jnp.concatenate([stream.tokens[:, :1], token, stream.tokens[:, 1:]], axis=1))
  key, value = (jnp.broadcast_to(p, (len(pixels), 3, 16)) for p in prompts["prefix"])
  for layer, kind in enumerate(("input", "normed", "projected")):
    x = x + offset + query.mean() if layer == 1 else x
    level = jnp.abs(x).mean()
    x = visual.blocks[layer].mlp(visual.blocks[layer].attention(x, Prefix(level * key, level * value, kind)))
  words = text.embed(batch["text"])
  words = words.replace(tokens=words.tokens.at[:, 1].set(prompts["word"]))
  return visual.pool(stream.replace(tokens=x)), text.pool(text.layers(text.positions(words)))


def test_a_method_that_uses_every_hook():
  made, params = small.modules(), toy_params()
  method, frozen, batch = Toy(small.backbone(made)), frozen_of(made), batch_of()
  traces = []

  @jax.jit
  def step(trainable, past):
    traces.append(1)
    return model.forward(made, method, None, trainable, frozen, {}, past, batch, rng=jax.random.key(0), train=False)[0]

  for names in (("one",), ("one", "two"), ("one", "two", "three")):
    some = {"tasks": {name: params["tasks"][name] for name in names}}
    past = partition.stack_past(some, names[-1], 3)
    prompts = params["tasks"][names[-1]]["prompts"]
    features = step({"shared": {}, "task": params["tasks"][names[-1]]}, past)
    offset = sum(params["tasks"][name]["prompts"]["offset"] for name in names)
    visual, text = jax.jit(lambda prompts, offset: by_hand(made, frozen["encoders"], prompts, offset, batch))(prompts, offset)
    close(features["visual"].pooled, visual.pooled, 1e-4)
    close(features["visual"].tokens, visual.tokens, 1e-4)
    close(features["text"].pooled, text.pooled, 1e-4)
  assert len(traces) == 1, "another task in the past needs no new trace"
  alone = jax.jit(made["audio"].apply)({"params": frozen["encoders"]["audio"]}, flat_inputs(batch, "audio"))
  close(features["audio"].pooled, alone.pooled)  # the masked token was read by no one
  assert features["audio"].tokens.shape[1] == made["audio"].num_tokens + 1


def test_a_cached_query_is_taken_and_no_gradient_goes_through_it():
  made = small.modules()
  bare = {"visual": made["visual"]}
  frozen = {"encoders": {"visual": frozen_of(made)["encoders"]["visual"]}, "shared": {}}

  @dataclasses.dataclass(frozen=True)
  class Reader(Method):
    needs_query: ClassVar[bool] = True

    def start(self, task, trainable, frozen, state, past, streams, *, query, mask, rng, train):
      return {"query": query}

  def query(encoders, batch):
    return model.forward(
      bare,
      Reader(small.backbone(made)),
      None,
      NOTHING,
      {**frozen, "encoders": encoders},
      {},
      None,
      batch,
      rng=None,
      train=False,
    )[1]["query"]

  batch = batch_of("visual")
  assert query(frozen["encoders"], {**batch, "query": "cached"}) == "cached"
  total = lambda encoders: query(encoders, batch)["visual"].pooled.sum()
  gradient = jax.jit(jax.grad(total))(frozen["encoders"])
  assert all(not g.any() for g in jax.tree.leaves(gradient))


def test_new_statistics_of_a_method_come_back_as_state():
  made = {"visual": small.modules()["visual"]}
  frozen = {"encoders": {"visual": frozen_of(small.modules())["encoders"]["visual"]}, "shared": {}}

  @dataclasses.dataclass(frozen=True)
  class Counter(Method):
    def start(self, task, trainable, frozen, state, past, streams, *, query, mask, rng, train):
      return {"state": {**state, "shared": {"seen": state["shared"]["seen"] + streams["visual"].tokens.shape[0]}}}

  def state_after(method, state):
    return model.forward(made, method, None, NOTHING, frozen, state, None, batch_of("visual"), rng=None, train=True)[2]

  backbone, state = small.backbone(small.modules()), {"shared": {"seen": 5}, "task": {}}
  rows = len(flat_inputs(batch_of("visual"), "visual"))
  assert state_after(Counter(backbone), state) == {"shared": {"seen": 5 + rows}, "task": {}}
  assert state_after(Method(backbone), state) == state
