"""What the methods rely on in every encoder: layers one at a time, prefixes, sizes; HTS-AT's windows against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from phpjax.encoders import AST, BERT, HTSAT, CLIPVision, DINOv2, Whisper, pretrained, vit
from phpjax.encoders.base import Attention, attend
from phpjax.encoders.htsat import WindowAttention, from_windows, to_windows
from phpjax.methods.prompts import Prefix

NARROW = {"width": 16, "depth": 2, "num_heads": 2, "embed_dim": 8, "mlp_ratio": 2.0}
STAGES = {"width": 16, "depth": 3, "num_heads": 2, "embed_dim": 8, "mlp_ratio": 2.0, "depths": (2, 1), "heads": (2, 2)}
MODULES = {
  "clip": CLIPVision(**NARROW, image_size=16, patch_size=8),
  "dinov2": DINOv2(**NARROW, image_size=28),
  "ast": AST(**NARROW, num_mels=48, with_text=False),
  "whisper": Whisper(**NARROW, seconds=0.2),
  "bert": BERT(**NARROW, vocabulary_size=32, context_length=12),
  "clap text": BERT(**NARROW, vocabulary_size=32, context_length=12, pad_id=1, position_offset=2, pooling="clap"),
  "htsat": HTSAT(**STAGES, window=4, image_size=32, num_mels=8, repeats=1, seconds=0.1),
}


@pytest.fixture(scope="module")
def opened():
  """name -> (module, params, example)."""

  def make(module):
    example = pretrained.example_input(module)
    example = example + 3 if module.modality == "text" else example + jnp.arange(example.size).reshape(example.shape) % 200
    params = small.fill(pretrained.shapes(module))
    if "frontend" in params:
      params["frontend"]["var"] = 1 + np.abs(params["frontend"]["var"])
    return module, {"params": params}, example

  return {name: make(module) for name, module in MODULES.items()}


@pytest.mark.parametrize("name", MODULES)
def test_one_layer_at_a_time_is_the_whole(name, opened):
  module, params, example = opened[name]
  stream = module.apply(params, example, method="stem")
  assert stream.tokens.shape[1:] == (module.layer_tokens(0) if module.modality != "text" else 8, module.layer_width(0))
  for layer in range(module.depth):
    stream = module.apply(params, layer, stream, method="enter")
    if module.modality != "text":
      assert stream.tokens.shape[1:] == (module.layer_tokens(layer), module.layer_width(layer))
    stream = module.apply(params, layer, stream, method="attention")
    stream = module.apply(params, layer, stream, method="mlp")
  features = module.apply(params, stream, method="pool")
  whole = module.apply(params, example)
  np.testing.assert_allclose(features.pooled, whole.pooled, atol=1e-5)
  assert features.pooled.dtype == jnp.float32 and features.pooled.shape[0] == 1
  assert np.std(features.pooled) > 0


@pytest.mark.parametrize("kind", ["input", "normed", "projected"])
@pytest.mark.parametrize("name", MODULES)
def test_every_layer_takes_a_prefix(name, kind, opened):
  module, params, example = opened[name]
  layer = module.depth - 1
  stream = module.apply(params, example, method="stem")
  for before in range(layer):
    stream = module.apply(params, before, module.apply(params, before, stream, method="enter"), method="attention")
  stream = module.apply(params, layer, stream, method="enter")
  draw = lambda seed: jnp.asarray(np.random.default_rng(seed).normal(size=(1, 3, module.layer_width(layer))), jnp.float32)
  run = lambda key, value: module.apply(params, layer, stream, Prefix(key, value, at=kind), method="attention").tokens
  plain = module.apply(params, layer, stream, method="attention").tokens
  assert run(draw(0), draw(1)).shape == plain.shape
  assert np.abs(run(draw(0), draw(1)) - plain).max() > 1e-3
  gradient = jax.grad(lambda key: run(key, draw(1)).sum())(draw(0))
  assert np.abs(gradient).max() > 0
  order = jnp.array([2, 0, 1])  # keys and values move together
  np.testing.assert_allclose(run(draw(0)[:, order], draw(1)[:, order]), run(draw(0), draw(1)), atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_gated_keys_of_a_prefix_are_attended_apart(name, opened):
  """At gate 0 they might as well not be there, whatever the others do; open, the result is linear in the gate before `out`."""
  module, params, example = opened[name]
  stream = module.apply(params, 0, module.apply(params, example, method="stem"), method="enter")
  draw = lambda count, seed: jnp.asarray(
    np.random.default_rng(seed).normal(size=(1, count, module.layer_width(0))), jnp.float32
  )
  run = jax.jit(lambda prefix: module.apply(params, 0, stream, prefix, method="attention").tokens)
  plain, gated = draw(3, 0), draw(2, 1)
  both = jnp.concatenate([plain, gated], axis=1)
  without, closed = run(Prefix(plain, plain)), run(Prefix(both, both, "input", jnp.zeros(()), 2))
  np.testing.assert_allclose(closed, without, atol=1e-6)
  assert np.abs(run(Prefix(both, both)) - without).max() > 1e-3, "while without a gate they are read with the rest"
  np.testing.assert_allclose(run(Prefix(gated, gated, "input", jnp.zeros(()), 2)), run(None), atol=1e-6)
  slope = jax.grad(lambda gate: run(Prefix(both, both, "input", gate, 2)).std())(jnp.zeros(()))
  assert np.isfinite(slope) and abs(float(slope)) > 0, "a closed gate learns"


@pytest.mark.parametrize("windows", [False, True])
def test_gated_attention_in_plain_numpy(windows):
  side, heads, width, extra = 8, 2, 8, 3
  module = WindowAttention(width, heads, window=4, shift=2, resolution=side) if windows else Attention(width, heads)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, side * side, width)).astype(np.float32)
  params = small.fill(jax.eval_shape(lambda: module.init(jax.random.key(0), x, lambda y: y))["params"], scale=0.5)
  key, value = rng.normal(size=(2, 2, extra, width)).astype(np.float32)
  gate = lambda g: Prefix(jnp.asarray(key), jnp.asarray(value), "normed", jnp.asarray(g), 1)
  run = jax.jit(lambda prefix: module.apply({"params": params}, x, lambda y: y, prefix))
  dense = lambda y, name: y @ params[name]["kernel"] + params[name]["bias"]
  split = lambda y: y.reshape(*y.shape[:2], heads, -1)
  # one gated key: its softmax is 1, so every query gets its value
  apart = np.broadcast_to(dense(value, "value")[:, 2:], x.shape) @ params["out"]["kernel"]
  np.testing.assert_allclose(run(gate(0.7)) - run(gate(0.0)), 0.7 * apart, atol=1e-4)
  # three: a softmax among themselves
  query, keys, values = split(dense(x, "query")), split(dense(key, "key")), split(dense(value, "value"))
  scores = np.einsum("blhd,bphd->bhlp", query, keys) * (width // heads) ** -0.5
  weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
  apart = np.einsum("bhlp,bphd->blhd", weights, values).reshape(x.shape) @ params["out"]["kernel"]
  all_of_them = lambda g: Prefix(jnp.asarray(key), jnp.asarray(value), "normed", jnp.asarray(g), extra)
  np.testing.assert_allclose(run(all_of_them(-0.4)), run(None) - 0.4 * apart, atol=1e-4)


def test_padding_of_texts_changes_nothing(opened):
  for name in ("bert", "clap text"):
    module, params, _ = opened[name]
    ids = np.array([[5, 6, 7, 8]], np.int32)
    padded = np.pad(ids, ((0, 0), (0, 3)), constant_values=module.pad_id)
    short, long = (module.apply(params, x).pooled for x in (ids, padded))
    np.testing.assert_allclose(short, long, atol=1e-5)
    with pytest.raises(ValueError, match="does not fit"):
      module.apply(params, np.full((1, 13), 5, np.int32))


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("kind", ["normed", "projected"])
def test_window_attention_with_prefix_in_plain_numpy(shift, kind):
  side, window, heads, width, extra = 8, 4, 2, 8, 3
  module = WindowAttention(width, heads, window=window, shift=shift, resolution=side)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, side * side, width)).astype(np.float32)
  params = small.fill(jax.eval_shape(lambda: module.init(jax.random.key(0), x, lambda y: y))["params"], scale=0.5)
  key, value = rng.normal(size=(2, 2, extra, width)).astype(np.float32)
  ours = module.apply({"params": params}, x, lambda y: y, Prefix(jnp.asarray(key), jnp.asarray(value), at=kind))
  dense = lambda y, name: y @ params[name]["kernel"] + params[name]["bias"]
  if kind == "normed":
    key, value = dense(key, "key"), dense(value, "value")
  q, k, v = (dense(x, name).reshape(2, side, side, heads, -1) for name in ("query", "key", "value"))
  out = np.zeros((2, side, side, heads, width // heads))
  place = [(i, j) for i in range(side) for j in range(side)]
  rolled = {(i, j): ((i - shift) % side, (j - shift) % side) for i, j in place}
  strip = lambda i: 0 if i < side - window else (1 if i < side - shift else 2)
  region = {p: (strip(r[0]), strip(r[1])) if shift else (0, 0) for p, r in rolled.items()}
  for b in range(2):
    for h in range(heads):
      for p in place:
        near = [o for o in place if all(rolled[o][a] // window == rolled[p][a] // window for a in (0, 1))]
        scores = [q[b, *p, h] @ key[b, n].reshape(heads, -1)[h] / 2 for n in range(extra)]
        for o in near:
          row = [rolled[p][a] - rolled[o][a] + window - 1 for a in (0, 1)]
          bias = params["position_bias"][row[0] * (2 * window - 1) + row[1], h]
          scores.append(q[b, *p, h] @ k[b, *o, h] / 2 + bias - 100 * (region[o] != region[p]))
        weights = np.exp(scores - np.max(scores))
        values = [*(value[b, n].reshape(heads, -1)[h] for n in range(extra)), *(v[b, *o, h] for o in near)]
        out[b, *p, h] = (weights / weights.sum()) @ np.stack(values)
  np.testing.assert_allclose(ours, dense(out.reshape(2, -1, width), "out"), atol=1e-4)


def test_windows_go_back_and_forth():
  x = jnp.arange(2 * 64 * 3, dtype=jnp.float32).reshape(2, 64, 3)
  for shift in (0, 2):
    np.testing.assert_array_equal(from_windows(to_windows(x, 8, 4, shift), 8, 4, shift), x)


def test_ast_positions_of_a_shorter_clip_are_the_middle_of_the_table():
  module = AST(**NARROW, num_mels=48, with_text=False)
  rows, columns = module.grid
  table = np.arange(2 + rows * 20, dtype=np.float32)[:, None].repeat(16, axis=1)
  made = module.resize_positions(table)
  assert made.shape == (module.num_tokens, 16)
  first = 10 - columns // 2
  np.testing.assert_array_equal(made[2 : 2 + columns, 0], 2 + np.arange(first, first + columns))
  longer = module.resize_positions(np.ones((2 + rows * 4, 16), np.float32))
  np.testing.assert_allclose(longer, 1)
  with pytest.raises(ValueError, match="rows of patches"):
    module.resize_positions(np.ones((2 + rows * 4 + 1, 16), np.float32))


def test_whisper_has_no_positions_beyond_its_table():
  module = Whisper(**NARROW, seconds=2.0)
  assert module.resize_positions(np.zeros((1500, 16), np.float32)).shape == (100, 16)
  with pytest.raises(ValueError, match="50 positions"):
    module.resize_positions(np.zeros((50, 16), np.float32))


def test_htsat_refuses_clips_that_do_not_fit():
  module = HTSAT(**STAGES, window=4, image_size=32, num_mels=8, repeats=1, seconds=2.0)
  with pytest.raises(ValueError, match="shorten seconds or repeats"):
    pretrained.shapes(module)


def test_attention_has_the_gradient_of_the_plain_formula():
  draw = lambda seed, length: jnp.asarray(np.random.default_rng(seed).normal(size=(2, length, 3, 4)), jnp.float32)
  inputs = draw(0, 5), draw(1, 7), draw(2, 7)
  plain = lambda q, k, v, mask=None: jax.nn.dot_product_attention(q, k, v, mask=mask)
  value = lambda f: lambda *x: (f(*x) ** 3).sum()
  for mask in (None, jnp.asarray(np.random.default_rng(3).random((2, 1, 5, 7)) < 0.7).at[..., 0].set(True)):
    ours, theirs = (lambda *x, mask=mask: attend(*x, mask)), (lambda *x, mask=mask: plain(*x, mask))
    np.testing.assert_allclose(ours(*inputs), theirs(*inputs), atol=1e-6)
    for a, b in zip(*(jax.grad(value(f), (0, 1, 2))(*inputs) for f in (ours, theirs)), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5)
  half = [x.astype(jnp.bfloat16) for x in inputs]
  assert attend(*half, None).dtype == jnp.bfloat16
  np.testing.assert_allclose(attend(*half, None).astype(jnp.float32), plain(*inputs), atol=0.05)


def test_pictures_of_another_size_are_resized_on_the_device():
  module = MODULES["clip"]
  pixels = np.random.default_rng(0).integers(0, 256, (2, 24, 40, 3), np.uint8)
  params = module.init(jax.random.key(0), pixels)["params"]
  run = lambda x: module.apply({"params": params}, x).tokens
  np.testing.assert_array_equal(run(pixels), run(vit.resize_pixels(pixels, module.image_size)))
