"""PHP's modules where they take a cheaper order of sums, and its small functions: equal to the plain form, never dearer.

`pytest -s` prints how many floating point operations both forms take at the sizes of the release.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import linen as nn

from phpjax.methods import php_modules
from phpjax.methods.php_modules import ClipAdapter, GeneratorBlock, MiddlePrompts, PromptGenerator, ShallowAdapter
from phpjax.tasks.question import Attention, QuestionHead
from phpjax.tasks.segmentation import PixelScore, SegmentationHead

FRAMES, WIDTH, HEADS, CODEBOOK = 10, 768, 12, 256  # of the release


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def shaped(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def close(actual, expected, tolerance=1e-5):
  """Within `tolerance` of the largest number, leaf by leaf."""
  bound = lambda x: tolerance * max(1e-3, np.abs(x).max())
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=bound(b)), actual, expected)


def filled(module, *inputs, scale=0.5, seed=0, **options):
  """Random parameters of a module; nothing at zero."""
  return small.fill(jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **options))["params"], seed, scale)


def towards(out):
  """A scalar of all outputs in which no two count alike."""
  return sum(jax.tree.leaves(jax.tree.map(lambda x: jnp.vdot(x, draw(*x.shape, seed=7)), out)))


def equal(fast, plain, *inputs, tolerance=1e-5):
  """Values and gradients towards all inputs agree."""

  def run(function):
    loss = lambda inputs: (lambda out: (towards(out), out))(function(*inputs))
    return lambda inputs: jax.value_and_grad(loss, has_aux=True)(inputs)

  ours, theirs = jax.jit(lambda inputs: (run(fast)(inputs), run(plain)(inputs)))(inputs)
  close(ours, theirs, tolerance)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(ours))


def flops(function, *shapes):
  return jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]


def saved(what, fast, plain, *shapes):
  """Share of the plain form's floating point operations that the fast one takes."""
  ours, theirs = flops(fast, *shapes), flops(plain, *shapes)
  print(f"{what}: {theirs / 1e9:.2f} -> {ours / 1e9:.2f} GFLOP, {theirs / ours:.1f} times fewer")
  return ours / theirs


# -- shallow phase -----------------------------------------------------------------------------------------------------


def tokens_first(x, token_map, channel_map):
  mixed = jnp.einsum("nkc,kl->nlc", x, token_map[0]) + token_map[1][:, None]
  return mixed @ channel_map[0] + channel_map[1]


@pytest.mark.parametrize(("num_in", "num_out", "width_in", "width_out"), [(5, 40, 24, 3), (40, 5, 3, 24), (6, 6, 6, 6)])
def test_maps_over_tokens_and_channels_commute(num_in, num_out, width_in, width_out):
  maps = (draw(num_in, num_out), draw(num_out, seed=1)), (draw(width_in, width_out, seed=2), draw(width_out, seed=3))
  equal(php_modules.map_tokens_and_channels, tokens_first, draw(2, num_in, width_in, seed=4), *maps)


def test_the_audio_adapter_maps_channels_first(monkeypatch):
  shapes = shaped(FRAMES, 50, WIDTH), (shaped(50, 4096), shaped(4096)), (shaped(WIDTH, 96), shaped(96))
  assert saved("audio adapter's reading", php_modules.map_tokens_and_channels, tokens_first, *shapes) < 0.06
  shapes = shaped(FRAMES, 4096, 96), (shaped(4096, 50), shaped(50)), (shaped(96, WIDTH), shaped(WIDTH))
  assert saved("visual adapter's reading", php_modules.map_tokens_and_channels, tokens_first, *shapes) == 1
  adapter, streams = ShallowAdapter(), (shaped(FRAMES, 4096, 96), shaped(FRAMES, 50, WIDTH))
  params = jax.eval_shape(adapter.init, jax.random.key(0), *streams)
  ours = flops(adapter.apply, params, *streams)
  monkeypatch.setattr(php_modules, "map_tokens_and_channels", tokens_first)
  theirs = flops(lambda *x: adapter.apply(*x), params, *streams)
  print(f"whole audio adapter: {theirs / 1e9:.2f} -> {ours / 1e9:.2f} GFLOP, {theirs / ours:.1f} times fewer")
  assert ours < 0.4 * theirs


# -- middle phase ------------------------------------------------------------------------------------------------------


def plain_block(p, x, num_heads):
  """A pre-norm block over all tokens, step by step."""
  norm = lambda name, y: nn.LayerNorm(epsilon=1e-5).apply({"params": p[name]}, y)
  dense = lambda name, y: y @ p[name]["kernel"] + p[name].get("bias", 0)
  split = lambda y: y.reshape(*y.shape[:2], num_heads, -1)
  h = norm("ln_1", x)
  mixed = jax.nn.dot_product_attention(*(split(dense(name, h)) for name in ("query", "key", "value")))
  x = x + dense("out", mixed.reshape(*x.shape[:2], -1))
  return x + dense("fc_2", php_modules.gelu(dense("fc_1", norm("ln_2", x))))


def plain_generator(p, tokens, codebook, num_heads, num_prompts, last=None):
  """All tokens through all blocks; `last` is an optional shortcut for the last block."""
  depth = sum(name.startswith("block") for name in p)
  x = jnp.concatenate([tokens, jnp.broadcast_to(codebook, (len(tokens), *codebook.shape))], axis=1)
  for layer in range(depth):
    block = last if last and layer == depth - 1 else plain_block
    x = block(p[f"block_{layer}"], x, num_heads)
  logits = x[:, 0] @ p["mixture"]["kernel"] + p["mixture"]["bias"]
  return nn.softmax(logits.reshape(-1, num_prompts, len(codebook))) @ codebook


@pytest.mark.parametrize(("depth", "sizes"), [(1, {}), (2, {"head_width": 12, "mlp_width": 10}), (3, {})])
def test_the_generator_equals_all_tokens_through_all_blocks(depth, sizes):
  module, tokens, codebook = PromptGenerator(4, depth, 2, **sizes), draw(3, 5, 16), draw(6, 16, seed=1)
  params = filled(module, tokens, codebook, scale=0.3)
  fast = lambda p, x, c: module.apply({"params": p}, x, c)
  plain = functools.partial(plain_generator, num_heads=2, num_prompts=4)
  equal(fast, plain, params, tokens, codebook, tolerance=2e-5)


@pytest.mark.parametrize("num_queries", [1, 5, 7, 11])
def test_a_block_with_shared_tokens_equals_one_with_all_of_them(num_queries):
  module, x, shared = GeneratorBlock(4), draw(3, 5, 16), draw(6, 16, seed=1)
  params = filled(module, x, 5)
  together = lambda p, x, s: plain_block(p, php_modules.behind(x, s), 4)[:, :num_queries]
  apply = lambda p, *x: module.apply({"params": p}, *x)
  forms = lambda p, x, s: (apply(p, x, num_queries, s), apply(p, php_modules.behind(x, s), num_queries))
  equal(forms, lambda p, x, s: (together(p, x, s), together(p, x, s)), params, x, shared)


@pytest.mark.parametrize("scale", [2, 100])
def test_two_parts_of_a_softmax_join_however_large_the_scores(scale):
  """At the larger scale every softmax picks one key, and either part may hold it."""
  shared, own = [draw(6, 2, 8, seed=i) for i in range(3)], [draw(3, 4, 2, 8, seed=i) for i in (3, 4)]

  def plain(query, key, value, own_key, own_value):
    query = jnp.broadcast_to(query, (3, *query.shape))
    return jax.nn.dot_product_attention(query, php_modules.behind(own_key, key), php_modules.behind(own_value, value))

  equal(php_modules.attend_shared, plain, scale * shared[0], *shared[1:], *own, tolerance=1e-5 if scale < 10 else 1e-3)


def test_the_generator_does_no_work_twice():
  module, codebook = PromptGenerator(32, 3, HEADS), shaped(CODEBOOK, WIDTH)
  fast = lambda p, x, c: module.apply({"params": p}, x, c)
  plain = functools.partial(plain_generator, num_heads=HEADS, num_prompts=32)
  one_query = functools.partial(plain, last=keys_and_values_for_one)
  for modality, length in (("visual", 50), ("audio", 32)):
    tokens = shaped(FRAMES, length, WIDTH)
    params = jax.eval_shape(module.init, jax.random.key(0), tokens, codebook)["params"]
    assert saved(f"generator, {modality}", fast, plain, params, tokens, codebook) < 0.55
    # what was done before: the last block with one query, but with everybody's keys and values
    assert saved(f"generator, {modality}, one query", fast, one_query, params, tokens, codebook) < 0.75


def keys_and_values_for_one(p, x, num_heads):
  """A block whose first token alone asks, with keys and values of all."""
  norm = lambda name, y: nn.LayerNorm(epsilon=1e-5).apply({"params": p[name]}, y)
  dense = lambda name, y: y @ p[name]["kernel"] + p[name].get("bias", 0)
  split = lambda y: y.reshape(*y.shape[:2], num_heads, -1)
  h = norm("ln_1", x)
  mixed = jax.nn.dot_product_attention(split(dense("query", h[:, :1])), split(dense("key", h)), split(dense("value", h)))
  x = x[:, :1] + dense("out", mixed.reshape(len(x), 1, -1))
  return x + dense("fc_2", php_modules.gelu(dense("fc_1", norm("ln_2", x))))


@pytest.mark.parametrize("keys", [(), (3,)])
def test_prompts_are_weighed_by_one_key(keys):
  def plain(prompts, key, kernel, bias):
    score = jnp.einsum("npd,...d->np" if key.ndim == 1 else "npd,nd->np", prompts @ kernel + bias, key)
    return prompts * nn.sigmoid(score / key.shape[-1] ** 0.5)[..., None]

  equal(php_modules.weigh, plain, draw(3, 4, 8), draw(*keys, 8, seed=1), draw(8, 8, seed=2), draw(8, seed=3))
  shapes = shaped(FRAMES, 32, WIDTH), shaped(WIDTH), shaped(WIDTH, WIDTH), shaped(WIDTH)
  if not keys:
    plain_one = lambda x, key, kernel, bias: x * nn.sigmoid((x @ kernel + bias) @ key / WIDTH**0.5)[..., None]
    assert saved("weight network", php_modules.weigh, plain_one, *shapes) < 0.02


def test_pooled_cells():
  x = draw(2, 64, 6)
  pool = lambda y: nn.max_pool(y, (2, 2), (2, 2))
  cells = pool(pool(x.reshape(2, 8, 8, 6))).reshape(2, 4, 6)  # row by row
  np.testing.assert_array_equal(php_modules.pool_cells(x, 12), cells.reshape(2, 2, 12))
  assert jax.eval_shape(lambda y: php_modules.pool_cells(y, 768), shaped(2, 4096, 96)).shape == (2, 32, 768)
  for length, width, words in (
    (60, 6, "60 tokens are not a square"),
    (36, 6, "multiple of 4"),
    (64, 7, "whole tokens of width 7"),
  ):
    with pytest.raises(ValueError, match=words):
      php_modules.pool_cells(draw(2, length, 6), width)


def test_prompts_on_the_first_channels():
  tokens, prompt = draw(2, 16, 6), draw(2, 2, 4, 8, seed=1)
  out = np.array(tokens)
  out[:, :, :4] += np.asarray(prompt).reshape(2, 16, 4)
  equal(php_modules.add_to_first_channels, lambda t, p: t.at[:, :, :4].add(p.reshape(2, 16, 4)), tokens, prompt)
  np.testing.assert_allclose(php_modules.add_to_first_channels(tokens, prompt), out, rtol=1e-6)
  with pytest.raises(ValueError, match="a prompt of 2 x 4 x 8 does not spread over 16 tokens of 3 channels"):
    php_modules.add_to_first_channels(tokens[..., :3], prompt)
  with pytest.raises(ValueError, match="15 tokens"):
    php_modules.add_to_first_channels(tokens[:, :15], prompt)


# -- deep phase --------------------------------------------------------------------------------------------------------


def pointing_at(*indices):
  """Queries whose nearest of three keys is known, and the keys."""
  keys = draw(3, 8)
  return jnp.stack([2.5 * keys[i] for i in indices]) + 0.01 * draw(len(indices), 8, seed=1), keys


def test_keys_are_chosen_by_most_frames_of_a_group():
  select = jax.jit(php_modules.select_by_key, static_argnums=2)
  query, keys = pointing_at(0, 2, 2, 1, 1, 1, 0, 1)
  assert select(query, keys, 1).tolist() == [1]
  assert select(query, keys, 2).tolist() == [2, 1]
  assert select(query, keys, 8).tolist() == [0, 2, 2, 1, 1, 1, 0, 1]
  mask = jnp.array([1, 1, 1, 1, 0, 0, 1, 0.0])
  assert select(query, keys, 1, mask).tolist() == [0], "two votes each for 0 and 2: the smallest"
  assert select(query, keys, 2, mask).tolist() == [2, 0]
  assert select(query, keys, 2, 0 * mask).tolist() == [0, 0], "nobody votes"
  assert select(query, 7 * keys, 2).tolist() == [2, 1], "the length of a key does not count"
  assert select(query, keys, 2).dtype == jnp.int32
  with pytest.raises(ValueError, match="8 frames do not make 3 groups"):
    php_modules.select_by_key(query, keys, 3)


@pytest.mark.parametrize("real", [1, 2, 5, 6])
def test_the_released_layout_with_any_number_of_real_frames(real):
  prompt = draw(2, 4, 8)
  expected = np.stack([prompt] * real, axis=1).reshape(real, 2, 4, 8)
  for count in (real, 9):  # alone, and in front of padding
    key, value = jax.jit(php_modules.lay_out_reshaped, static_argnums=2)(prompt, real, count)
    assert key.shape == value.shape == (count, 4, 8)
    np.testing.assert_array_equal(np.stack([key, value], axis=1)[:real], expected)
  assert np.isfinite(php_modules.lay_out_reshaped(prompt, 0, 3)).all()


# -- heads -------------------------------------------------------------------------------------------------------------


def with_key_bias(p, question, tokens, num_heads):
  """flax's attention, whose keys have a bias."""
  bias = draw(*p["query"]["bias"].shape, seed=11)
  shape = (num_heads, question.shape[-1] // num_heads, question.shape[-1])
  p = {**p, "key": {**p["key"], "bias": bias}, "out": {**p["out"], "kernel": p["out"]["kernel"].reshape(shape)}}
  return nn.MultiHeadDotProductAttention(num_heads).apply({"params": p}, question, tokens)


def test_listening_equals_attention_with_keys_and_values():
  module, question, tokens = Attention(4, 0.1), draw(2, 3, 16), draw(2, 30, 16, seed=1)
  params = filled(module, question, tokens, False)
  plain = functools.partial(with_key_bias, num_heads=4)
  equal(lambda p, q, x: module.apply({"params": p}, q, x, False), plain, params, question, tokens)
  shapes = shaped(2, 1, WIDTH), shaped(2, 640, WIDTH)
  params = jax.eval_shape(lambda *x: module.init(jax.random.key(0), *x, False), *shapes)["params"]
  assert saved("question listens", lambda p, q, x: module.apply({"params": p}, q, x, False), plain, params, *shapes) < 0.02


def test_dropout_of_weights_follows_train_and_reaches_the_values_bias():
  module, question, tokens = Attention(4, 0.3), draw(2, 3, 16), draw(2, 30, 16, seed=1)
  params = filled(module, question, tokens, False)
  run = lambda train, seed=0: module.apply(
    {"params": params}, question, tokens, train, rngs={"dropout": jax.random.key(seed)}, capture_intermediates=True
  )
  out, seen = run(True)
  weights = seen["intermediates"]["Dropout_0"]["__call__"][0]
  assert np.mean(np.asarray(weights) == 0) == pytest.approx(0.3, abs=0.1)
  value = jnp.einsum("blk,khd->blhd", tokens, params["value"]["kernel"]) + params["value"]["bias"]
  heard = jnp.einsum("bqhl,blhd->bqhd", weights, value).reshape(2, 3, 16)
  close(out, heard @ params["out"]["kernel"] + params["out"]["bias"])
  assert (run(True)[0] == out).all() and (run(True, 1)[0] != out).any()
  assert (run(False)[0] == run(False, 1)[0]).all() and (run(False)[0] != out).any()


def test_the_score_of_a_pixel_is_a_product_of_two():
  module, x, heard = PixelScore(), draw(2, 3, 3, 8), draw(2, 8, seed=1)
  params = filled(module, x, heard)

  def plain(p, x, heard):
    weight = jnp.einsum("nhwe,ne->nhw", x, heard)
    return ((x * weight[..., None]) @ p["kernel"] + p["bias"])[..., 0]

  equal(lambda p, x, h: module.apply({"params": p}, x, h), plain, params, x, heard)


def segmentation():
  """(head, variables with statistics that fit nothing, inputs)."""
  head, inputs = SegmentationHead((6, 5), 16, 8, 4, num_special=1), (draw(4, 10, 16), draw(4, 7, 16, seed=1))
  params = filled(head, *inputs, jnp.ones(4), False)
  shapes = jax.eval_shape(lambda: head.init(jax.random.key(0), *inputs, jnp.ones(4), False))["batch_stats"]
  return head, params, jax.tree.map(lambda x: draw(*x.shape, seed=3) ** 2 + 0.5, shapes), inputs


def test_in_training_mode_the_decoder_reads_the_statistics_of_its_rows_alone():
  head, params, state, (visual, audio) = segmentation()

  def apply(state, rows, train):
    inputs = visual[:rows], audio[:rows], jnp.ones(rows), train
    return head.apply({"params": params, "batch_stats": state}, *inputs, mutable=["batch_stats"])[0]

  every = lambda state: (apply(state, 4, True), apply(state, 2, True), apply(state, 4, False), apply(state, 2, False))
  (four, two, four_test, two_test), other = jax.jit(lambda s, z: (every(s), every(z)))(
    state, jax.tree.map(lambda x: x + 2, state)
  )
  close((four, two), other[:2])
  assert np.abs(four_test - other[2]).max() > 1e-3
  assert np.abs(four[:2] - two).max() > 1e-3, "other rows, other statistics"
  close(four_test[:2], two_test)


# -- no parameter is dead ----------------------------------------------------------------------------------------------


def dead(function, params, wide=True):
  """Names of leaves whose gradient is nothing but rounding; in float64 if `wide`, for some of the others are small."""
  with jax.enable_x64(wide):
    params = jax.tree.map(lambda x: x.astype(np.float64 if wide else np.float32), params)
    gradients = jax.jit(jax.grad(lambda p: towards(function(p))))(params)
  size = {name: np.abs(g).max() for name, g in small.flat(gradients).items()}
  return [name for name, g in size.items() if g < (1e-7 if wide else 1e-5) * max(size.values())]


def modules():
  x, other = draw(2, 6, 16), draw(2, 4, 8, seed=1)
  yield "adapter", ShallowAdapter(3, 4), (x, other)
  yield "adapter without a gate", ShallowAdapter(3, 4, gated=False), (x, other)
  yield "adapter, channels first", ShallowAdapter(3, 2), (draw(2, 40, 16), draw(2, 3, 48, seed=1))
  for depth in (1, 3):
    yield f"generators of depth {depth}", MiddlePrompts(2, 4, 6, depth, 2), (x, draw(16, seed=2))
  yield "CLIP adapter", ClipAdapter(), (x,)
  visual, audio = draw(2, 3, 5, 16), draw(2, 3, 4, 16, seed=1)
  question = np.random.default_rng(0).integers(0, 5, (2, 2, 40), np.int32)
  yield "question head", QuestionHead(5, 3, 16), (visual, audio, question, False)


@pytest.mark.parametrize("made", modules(), ids=lambda made: made[0])
def test_no_parameter_is_dead(made):
  _, module, inputs = made
  wide = not isinstance(module, QuestionHead)  # flax's LSTM begins in float32
  assert dead(lambda p: module.apply({"params": p}, *inputs), filled(module, *inputs), wide) == []


@pytest.mark.parametrize("train", [True, False])
def test_no_parameter_of_the_decoder_is_dead(train):
  head, params, state, (visual, audio) = segmentation()
  run = lambda p: head.apply(
    {"params": p, "batch_stats": state}, visual, audio, jnp.ones(4), train, mutable=["batch_stats"] if train else False
  )
  assert dead(lambda p: run(p)[0] if train else run(p), params) == []


def test_a_dead_parameter_is_found():
  question, tokens = draw(2, 3, 16), draw(2, 30, 16, seed=1)
  module = nn.MultiHeadDotProductAttention(4)
  assert dead(lambda p: module.apply({"params": p}, question, tokens), filled(module, question, tokens)) == ["key/bias"]
