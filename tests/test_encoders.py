"""Frozen encoders: attention with the three kinds of prefix, blocks and filter banks against plain numpy and linen."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import small
from flax import linen as nn

from configs import nano
from phpjax.encoders import ENCODERS, audio_frontend, make_encoder, pretrained
from phpjax.encoders.base import Block, Stream, activation
from phpjax.encoders.tokenizer import Tokenizer, word_tokenizer
from phpjax.methods.prompts import Prefix, broadcast_prefix, l2_normalise

B, L, P, D, H = 2, 5, 3, 8, 2
KINDS = ("input", "normed", "projected")


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(actual, expected, tolerance=1e-5):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# -- attention in plain numpy ------------------------------------------------------------------------------------


def numpy_norm(x, p, eps=1e-5):
  x = x.astype(np.float64)
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def numpy_dense(x, p):
  return x @ p["kernel"].astype(np.float64) + p["bias"]


def numpy_attention(x, p, key=None, value=None, mask=None):
  """One head and one query at a time; `key`, `value` [B, P, D] are ready to use; mask bool [B, L, L]."""
  rows, length = x.shape[:2]
  q, k, v = (numpy_dense(x, p[name]) for name in ("query", "key", "value"))
  extra = 0 if key is None else key.shape[1]
  if extra:
    k, v = np.concatenate([key, k], 1), np.concatenate([value, v], 1)
  out, wide = np.zeros(x.shape), D // H
  for b in range(rows):
    for h in range(H):
      part = slice(h * wide, (h + 1) * wide)
      for i in range(length):
        scores = np.array([q[b, i, part] @ k[b, j, part] / math.sqrt(wide) for j in range(extra + length)])
        if mask is not None:
          scores[extra:][~mask[b, i]] = -np.inf
        weights = np.exp(scores - scores.max())
        out[b, i, part] = weights / weights.sum() @ v[b, :, part]
  return numpy_dense(out, p["out"])


@pytest.fixture(scope="module")
def block():
  """(module, params) of a block whose norms are no identities."""
  module = Block(D, H, 12, "quick_gelu")
  shapes = jax.eval_shape(
    lambda: module.init(jax.random.key(0), jnp.zeros((1, 2, D)), method=lambda m, x: m.mlp(m.attention(x)))
  )
  return module, small.fill(shapes["params"], scale=0.5)


def numpy_block_attention(p, x, prefix, mask):
  """What the first half of a block must give with this prefix."""
  key = value = None
  if prefix is not None:
    key, value = np.asarray(prefix.key, np.float64), np.asarray(prefix.value, np.float64)
    if prefix.at == "input":
      key, value = numpy_norm(key, p["ln_1"]), numpy_norm(value, p["ln_1"])
    if prefix.at in ("input", "normed"):
      key, value = numpy_dense(key, p["attn"]["key"]), numpy_dense(value, p["attn"]["value"])
  return x + numpy_attention(numpy_norm(x, p["ln_1"]), p["attn"], key, value, mask)


def masks():
  keys = np.ones((B, L), bool)
  keys[0, 3:] = False
  return {
    "all": None,
    "keys": np.broadcast_to(keys[:, None], (B, L, L)),
    "causal": np.broadcast_to(np.tril(np.ones((L, L), bool)), (B, L, L)),
  }


@pytest.mark.parametrize("seen", ["all", "keys", "causal"])
@pytest.mark.parametrize("at", [None, *KINDS])
def test_attention_with_each_kind_of_prefix(block, at, seen):
  module, params = block
  x, mask = draw(B, L, D), masks()[seen]
  prefix = at and Prefix(draw(B, P, D, seed=1), draw(B, P, D, seed=2), at)
  run = jax.jit(lambda p, x, prefix, mask: module.apply({"params": p}, x, prefix, mask, method="attention"))
  got = run(params, x, prefix, None if mask is None else mask[:, None])
  close(got, numpy_block_attention(params, x, prefix, mask))


def test_the_kinds_of_prefix_differ_from_each_other_and_from_none(block):
  _, params = block
  x = draw(B, L, D)
  results = [numpy_block_attention(params, x, None, None)]
  results += [numpy_block_attention(params, x, Prefix(draw(B, P, D, seed=1), draw(B, P, D, seed=2), at), None) for at in KINDS]
  for i, one in enumerate(results):
    for other in results[:i]:
      assert np.abs(one - other).max() > 1e-2, "then a test with this tolerance tells them apart"


def test_every_query_sees_the_prefix_even_where_it_sees_no_token(block):
  module, params = block
  x, nothing = draw(B, L, D), np.zeros((B, 1, L, L), bool)
  prefix = Prefix(draw(B, 1, D, seed=1), draw(B, 1, D, seed=2), "projected")
  got = module.apply({"params": params}, x, prefix, nothing, method="attention")
  close(got, x + numpy_dense(np.broadcast_to(prefix.value, x.shape), params["attn"]["out"]))


def test_an_unknown_kind_of_prefix_raises(block):
  module, params = block
  with pytest.raises(ValueError, match="norm"):
    module.apply({"params": params}, draw(B, L, D), Prefix(draw(B, P, D), draw(B, P, D), "norm"), method="attention")


def test_a_shared_prompt_becomes_the_prefix_of_every_row():
  prompt = draw(2, P, D)
  prefix = broadcast_prefix(prompt, 4, "normed")
  assert prefix.key.shape == prefix.value.shape == (4, P, D) and prefix.at == "normed"
  close(prefix.key[3], prompt[0])
  close(prefix.value[0], prompt[1])


def test_unit_length_has_a_gradient_everywhere():
  x = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
  close(l2_normalise(x), [[0.6, 0.8], [0, 0]])
  assert np.isfinite(jax.grad(lambda x: l2_normalise(x).sum())(x)).all()


def test_a_block_equals_linen_s_own_parts(block):
  module, params = block
  x = draw(B, L, D)
  heads = {
    name: {"kernel": p["kernel"].reshape(D, H, D // H), "bias": p["bias"].reshape(H, D // H)}
    for name, p in params["attn"].items()
    if name != "out"
  }
  heads["out"] = {"kernel": params["attn"]["out"]["kernel"].reshape(H, D // H, D), "bias": params["attn"]["out"]["bias"]}
  norm = lambda name, x: nn.LayerNorm(epsilon=1e-5).apply({"params": params[name]}, x)
  expected = x + nn.MultiHeadDotProductAttention(H, qkv_features=D).apply({"params": heads}, norm("ln_1", x))
  got = module.apply({"params": params}, x, method="attention")
  close(got, expected)
  hidden = nn.Dense(12).apply({"params": params["fc_1"]}, norm("ln_2", expected))
  second = expected + nn.Dense(D).apply({"params": params["fc_2"]}, hidden / (1 + jnp.exp(-1.702 * hidden)))
  close(module.apply({"params": params}, got, method="mlp"), second)


def test_activations():
  x = np.linspace(-6, 6, 101).astype(np.float32)
  exact = [v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x.tolist()]
  np.testing.assert_allclose(activation("gelu", x), exact, rtol=1e-4, atol=1e-6)
  close(activation("quick_gelu", x), x / (1 + np.exp(-1.702 * x.astype(np.float64))))
  with pytest.raises(ValueError, match="relu"):
    activation("relu", x)


# -- whole encoders ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoders():
  made = small.modules()
  return {m: (module, small.encoder_params(made)[m]) for m, module in made.items()}


def example(modality, rows=2):
  if modality == "text":
    return small.text_ids(rows)
  rng = np.random.default_rng(0)
  if modality == "visual":
    return rng.integers(0, 256, (rows, small.IMAGE, small.IMAGE, 3), np.uint8)
  return rng.integers(-20_000, 20_000, (rows, small.RATE_HZ), np.int16)


@pytest.mark.parametrize("modality", ["visual", "audio", "text"])
def test_layer_by_layer_equals_the_whole(encoders, modality):
  module, params = encoders[modality]
  inputs = example(modality)
  whole = jax.jit(module.apply)({"params": params}, inputs)

  def layer_by_layer(params, inputs):
    bound = module.bind({"params": params})
    stream = bound.positions(bound.embed(inputs)) if modality == "text" else bound.stem(inputs)
    for layer in range(module.depth):
      stream = bound.mlp(layer, bound.attention(layer, bound.enter(layer, stream)))
    return bound.pool(stream)

  parts = jax.jit(layer_by_layer)(params, inputs)
  close(parts.pooled, whole.pooled)
  close(parts.tokens, whole.tokens)
  assert whole.pooled.shape == (2, module.embed_dim) and whole.tokens.shape[2] == module.width
  assert parts.num_special == {"visual": 1, "audio": 2, "text": 0}[modality]


@pytest.mark.parametrize("name", ENCODERS)
def test_the_stem_gives_the_number_of_tokens_that_is_promised(name):
  module = make_encoder(name)
  params = pretrained.shapes(module)
  inputs = pretrained.example_input(module)
  if module.modality == "text":
    inputs = jnp.zeros((1, module.context_length), jnp.int32)
  stream = jax.eval_shape(lambda p, x: module.apply({"params": p}, x, method="stem"), params, inputs)
  assert stream.tokens.shape == (1, module.num_tokens, module.layer_width(0))
  assert module.width % module.num_heads == 0 and len(module.bind({"params": params}).blocks) == module.depth


def test_clip_reads_the_class_token_behind_ln_pre(encoders):
  module, params = encoders["visual"]
  bound, pixels = module.bind({"params": params}), example("visual")
  stem = bound.stem(pixels)
  mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
  x = (pixels / 255 - mean) / std
  patches = x.reshape(2, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, -1) @ params["patch_embedding"][
    "kernel"
  ].reshape(-1, 16)
  expected = np.concatenate([np.broadcast_to(params["class_embedding"], (2, 1, 16)), patches], 1) + params["position_embedding"]
  close(stem.tokens, expected, 1e-4)
  close(bound.enter(0, stem).tokens, numpy_norm(np.asarray(stem.tokens), params["ln_pre"]), 1e-4)
  assert bound.enter(1, stem) is stem
  close(
    bound.pool(stem).pooled, numpy_norm(np.asarray(stem.tokens)[:, 0], params["ln_post"]) @ params["projection"]["kernel"], 1e-4
  )


def test_ast_lays_frequency_down_and_time_across(encoders):
  module, params = encoders["audio"]
  bound, wave = module.bind({"params": params}), example("audio")
  bank = np.asarray(audio_frontend.kaldi_fbank(wave / np.float32(32768), small.RATE_HZ, 48))
  picture = ((bank + 4.2677393) / (2 * 4.5689974)).transpose(0, 2, 1)  # [B, mels, frames]
  rows, columns = module.grid
  patches = [
    picture[:, 32 * i : 32 * i + 16, 32 * j : 32 * j + 16].reshape(2, -1) @ params["patch_embedding"]["kernel"].reshape(-1, 16)
    + params["patch_embedding"]["bias"]
    for i in range(rows)
    for j in range(columns)
  ]
  special = [np.broadcast_to(params[name], (2, 16)) for name in ("class_embedding", "distillation_embedding")]
  close(bound.stem(wave).tokens, np.stack([*special, *patches], 1) + params["position_embedding"], 1e-4)
  pooled = numpy_norm(np.asarray(bound.stem(wave).tokens)[:, :2], params["ln_post"]).mean(1) @ params["projection"]["kernel"]
  close(bound.pool(bound.stem(wave)).pooled, pooled, 1e-4)
  close(bound.stem(wave).tokens, bound.stem(wave / np.float32(32768)).tokens, 1e-6)


def test_text_is_causal_and_read_at_its_end(encoders):
  module, params = encoders["text"]
  run = jax.jit(lambda ids: module.apply({"params": params}, ids).pooled)
  ids = small.text_ids(4)
  ends = ids.argmax(-1)
  assert len(set(ends)) > 1 and ends.max() < ids.shape[1] - 1
  whole = np.asarray(run(ids))
  close(run(ids[:, : ends.max() + 1]), whole)  # cut right behind the longest text
  garbage = np.where(np.arange(ids.shape[1]) > ends[:, None], 7, ids)
  close(run(garbage), whole, 1e-6)
  changed = ids.copy()
  changed[:, 2] = changed[:, 2] % (small.WORDS - 4) + 2
  assert np.abs(run(changed) - whole).max(axis=1).min() > 1e-4, "what stands before the end counts"
  with pytest.raises(ValueError, match="13 tokens"):
    jax.eval_shape(run, np.zeros((1, 13), np.int32))


def test_masked_keys_are_not_read(encoders):
  module, params = encoders["visual"]
  bound, x = module.bind({"params": params}), draw(2, 5, 16)
  mask = np.array([[True] * 4 + [False]] * 2)
  masked = bound.attention(0, Stream(jnp.asarray(x), mask=jnp.asarray(mask))).tokens[:, :4]
  close(masked, bound.attention(0, Stream(jnp.asarray(x[:, :4]))).tokens)


# -- half precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", ["visual", "audio", "text"])
def test_half_precision_ends_at_the_pooled_features(encoders, modality):
  module, params = encoders[modality]
  half = pretrained.cast(params, jnp.bfloat16)
  kept = {name for name, x in small.flat(half).items() if x.dtype == np.float32}
  assert kept == {name for name in small.flat(params) if "ln_" in name or name == "logit_scale"}
  small.assert_same_bits(pretrained.cast(params, jnp.float32), params)
  features = jax.jit(module.clone(dtype=jnp.bfloat16).apply)({"params": half}, example(modality))
  assert features.pooled.dtype == jnp.float32 and features.tokens.dtype == jnp.bfloat16
  close(features.pooled, jax.jit(module.apply)({"params": params}, example(modality)).pooled, 0.05)


def test_norms_compute_in_float32_and_give_the_stream_s_precision(encoders):
  module, params = encoders["visual"]
  bound = module.clone(dtype=jnp.bfloat16).bind({"params": pretrained.cast(params, jnp.bfloat16)})
  stem = bound.stem(example("visual", rows=16))
  got, expected = bound.enter(0, stem).tokens, numpy_norm(np.asarray(stem.tokens, np.float32), params["ln_pre"])
  assert stem.tokens.dtype == got.dtype == jnp.bfloat16
  assert np.mean(np.asarray(got) == expected.astype(jnp.bfloat16)) > 0.99, "rounded once, at the end"


def test_patches_are_projected_to_float32_too(encoders):
  module, params = encoders["visual"]
  bound = module.clone(dtype=jnp.bfloat16).bind({"params": pretrained.cast(params, jnp.bfloat16)})
  assert bound.project(draw(2, 3, 16)).dtype == jnp.float32


# -- filter bank -------------------------------------------------------------------------------------------------


def numpy_fbank(wave, rate_hz, num_mels):
  """Kaldi's fbank of one clip, frame by frame and filter by filter in float64."""
  frame, hop = rate_hz * 25 // 1000, rate_hz // 100
  num_fft = 2 ** math.ceil(math.log2(frame))
  mel = lambda hz: 1127 * math.log(1 + hz / 700)
  low, high = mel(20), mel(rate_hz / 2)
  edges = [low + (high - low) * i / (num_mels + 1) for i in range(num_mels + 2)]
  rows = []
  for start in range(0, len(wave) - frame + 1, hop):
    x = wave[start : start + frame].astype(np.float64)
    x = x - x.mean()
    x = np.array([x[i] - 0.97 * x[max(i - 1, 0)] for i in range(frame)])
    x *= np.hanning(frame)
    power = np.abs(np.fft.fft(x, num_fft)[: num_fft // 2]) ** 2
    row = []
    for left, centre, right in zip(edges, edges[1:], edges[2:], strict=False):
      energy = 0.0
      for k in range(num_fft // 2):
        m = mel(k * rate_hz / num_fft)
        if left < m < right:
          energy += power[k] * ((m - left) / (centre - left) if m <= centre else (right - m) / (right - centre))
      row.append(math.log(max(energy, np.finfo(np.float32).eps)))
    rows.append(row)
  return np.array(rows)


@pytest.mark.parametrize(("rate_hz", "num_mels"), [(16_000, 128), (4000, 32)])
def test_the_filter_bank_is_kaldi_s(rate_hz, num_mels):
  rng, t = np.random.default_rng(0), np.arange(rate_hz // 10) / rate_hz
  tone = np.sin(2 * np.pi * 440 * t) * np.linspace(0, 0.5, len(t)) + 0.01
  waves = np.stack([tone, rng.normal(0, 0.1, len(t)), np.zeros(len(t))]).astype(np.float32)
  got = np.asarray(audio_frontend.kaldi_fbank(waves, rate_hz, num_mels))
  expected = np.stack([numpy_fbank(wave, rate_hz, num_mels) for wave in waves])
  assert got.dtype == np.float32 and got.shape == expected.shape
  assert got.shape[1] == audio_frontend.num_frames(len(t), rate_hz) == 8
  np.testing.assert_allclose(got, expected, atol=2e-2)  # float32 against float64 where a tone leaves a filter almost empty
  loud = expected > -8
  np.testing.assert_allclose(got[loud], expected[loud], atol=1e-3)


def test_one_second_at_16_khz_has_98_frames_and_integers_are_scaled():
  assert audio_frontend.num_frames(16_000, 16_000) == 98
  assert audio_frontend.to_float(np.array([-32768, 16384], np.int16)).tolist() == [-1, 0.5]
  assert audio_frontend.to_float(np.array([0.25], np.float32)).tolist() == [0.25]


# -- weights -----------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path):
  module = make_encoder("tiny_text")
  params = small.fill(pretrained.shapes(module))
  pretrained.write(tmp_path, "tiny_text", params, {"source": "a test"})
  word_tokenizer(("drum", "bell"), 256).save(str(tmp_path / "tokenizer.json"))
  return tmp_path, params


def load(folder, name="tiny_text", **options):
  return pretrained.load(name, str(folder), modality="text", **options)


def test_weights_come_back_as_written(stored):
  folder, params = stored
  opened = load(folder)
  small.assert_same_bits(opened.params, params)
  assert opened.metadata["source"] == "a test" and len(opened.sha256) == 64
  assert opened.tokenizer(["drum bell"], 40).tolist() == [[254, 2, 3, 255]]
  half = load(folder, dtype=jnp.bfloat16)
  small.assert_same_bits(half.params, pretrained.cast(opened.params, jnp.bfloat16))
  assert half.module.dtype == half.params["projection"]["kernel"].dtype == jnp.bfloat16


def test_loading_is_strict(stored):
  folder, _ = stored
  file = folder / pretrained.FILE
  tensors = safetensors.numpy.load_file(file)
  first = next(iter(tensors))
  for change, message in (
    ({k: v for k, v in tensors.items() if k != first}, "missing tensors"),
    ({**tensors, "extra": np.zeros(1, np.float32)}, "unknown tensors"),
    ({**tensors, first: np.zeros(7, np.float32)}, "shape"),
  ):
    safetensors.numpy.save_file(change, file)
    with pytest.raises(ValueError, match=message):
      load(folder)
  file.write_bytes(b"no tensors")
  with pytest.raises(ValueError, match="safetensors"):
    load(folder)


def test_missing_or_wrong_weights_say_what_to_do(stored, tmp_path):
  folder, _ = stored
  for weights in ("", str(tmp_path / "nowhere")):
    for name, command in (
      ("clip_text_b32", r"python -m phpjax\.convert --encoder=clip_text_b32"),
      ("nano_text", r"python -m phpjax\.pretrain .*weights=DIR/nano_text"),
      ("tiny_text", "weights=random"),
    ):
      with pytest.raises(ValueError, match=command):
        load(weights, name)
  assert pretrained.missing_weights("tiny_text", str(folder)) is None and pretrained.missing_weights("x", "random") is None
  record = json.loads((folder / "encoder.json").read_text())
  (folder / "encoder.json").write_text(json.dumps({**record, "name": "nano_text"}))
  with pytest.raises(ValueError, match="nano_text"):
    load(folder)
  with pytest.raises(ValueError, match="clip_vit_b32"):
    make_encoder("clip_vit_b33")


@pytest.mark.parametrize("name", ["nano_vit", "nano_ast", "nano_text"])
def test_shipped_weights_open(name):
  modality = {"nano_vit": "visual", "nano_ast": "audio", "nano_text": "text"}[name]
  opened = pretrained.load(name, "shipped", modality=modality)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(opened.params))
  assert opened.module.depth == 12
  assert opened.metadata["config"] == json.loads(nano.get_config().to_json()), "the shown command makes these weights"


def test_shipped_weights_are_small_together():
  assert sum(path.stat().st_size for path in pretrained.SHIPPED.rglob("*") if path.is_file()) < 8e6


def test_random_weights_are_a_function_of_the_seed():
  one, same, other = (pretrained.load("tiny_text", "random", modality="text", seed=s, depth=0) for s in (1, 1, 2))
  small.assert_same_bits(one.params, same.params)
  assert not np.array_equal(one.params["position_embedding"], other.params["position_embedding"])


def test_the_tokenizer_pads_and_refuses_what_does_not_fit(stored):
  tokenizer = Tokenizer(stored[0] / "tokenizer.json")
  ids = tokenizer(["Drum", "bell_drum xylophone"], 5)
  assert ids.dtype == np.int32 and ids.tolist() == [[254, 2, 255, 0, 0], [254, 3, 2, 1, 255]]
  with pytest.raises(ValueError, match="bell_drum"):
    tokenizer(["Drum", "bell_drum xylophone"], 4)
  with pytest.raises(ValueError, match="do not fit"):
    word_tokenizer(tuple(map(str, range(10))), 13)
  with pytest.raises(ValueError, match=r"tokenizer\.json"):
    Tokenizer(stored[0] / "none.json")
