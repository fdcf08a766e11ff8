"""PHP's trainable modules, heads and losses equal the published ones on golden inputs, gradients included.

PHPJAX_GOLDEN names another folder of such files (with a subfolder php or without); sizes and expectations come from the files,
and a file that is missing is a failure. Outputs agree to 1e-4, gradients to 1e-3, relative to the largest expected number.
`pytest -s` prints the errors.
"""

import functools
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import php_names as names
import pytest
from flax import linen as nn
from flax import traverse_util
from golden_php_network import *  # noqa: F403  (the whole network's tests run from here)
from test_golden_encoders import golden

from phpjax.encoders import CLIPText
from phpjax.encoders import names as encoder_names
from phpjax.encoders.base import Stream
from phpjax.encoders.tokenizer import byte_pair_tokenizer
from phpjax.methods import PHP, php_modules
from phpjax.methods.php_modules import ClipAdapter, MiddlePrompts, PromptGenerator, ShallowAdapter
from phpjax.methods.prompts import l2_normalise, similarity
from phpjax.metrics import avs
from phpjax.tasks import Widths
from phpjax.tasks.event import AVE, AVVP
from phpjax.tasks.question import AVQA, QuestionHead
from phpjax.tasks.segmentation import AVS, SegmentationHead

OUTPUT, GRADIENT = 1e-4, 1e-3


@pytest.fixture(autouse=True)
def exact():
  """Full float32 products, as the files were made."""
  with jax.default_matmul_precision("highest"):
    yield


def under(arrays, *prefixes):
  """The arrays whose names start with a prefix, without it."""
  return {key.removeprefix(p): x for p in prefixes for key, x in arrays.items() if key.startswith(p)}


def sliced(config, key, x):
  """The part of a gradient that the file holds."""
  text = config.get("grad_slices", {}).get(key)
  return x if text is None else x[eval(text, {"__builtins__": {}, "slice": slice})]


def close(what, actual, expected, tolerance=OUTPUT):
  """max |difference| / max |expected| is at most `tolerance`."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
  error = np.abs(actual - expected).max() / max(np.abs(expected).max(), np.finfo(np.float32).tiny)
  print(f"{what}: {error:.1e}")
  assert error <= tolerance, f"{what}: relative error {error:.2e}, allowed {tolerance:.0e}"


def check(name, config, arrays, run, mapping, weights, inputs, kind="g"):
  """Runs `run(tree, inputs) -> (outputs, more)` once, forwards and backwards, and returns what it gives.

  Compares all gradients of `kind` in a file, and L itself, with those of L = sum(outputs ** 2). The mapping of names is a part
  of what is differentiated, so gradients come under published names.
  """
  expected = under(arrays, f"{kind}/")
  assert {"loss"} < set(expected), f"{name} holds no gradients {kind}/"
  value = expected.pop("loss")

  def loss(weights, inputs):
    outputs, more = run(mapping(weights, ""), inputs)
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(outputs)), (outputs, more)

  def gradients(weights, inputs):
    made, by = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, inputs)
    by = {f"{group}/{key}": x for group, part in zip(("w", "in"), by, strict=True) for key, x in part.items()}
    return made, {key: sliced(config, key, by[key]) for key in expected}

  (made_value, made), by = jax.jit(gradients)(weights, inputs)
  close(f"{name} {kind}/loss", made_value, value)
  for key, gradient in expected.items():
    close(f"{name} {kind}/{key}", by[key], gradient, GRADIENT)
  return made


def params_of(module, *options):
  """Its initialisation, without the key "params"."""
  return lambda rng, *inputs: module.init(rng, *inputs, *options)["params"]


def same_shapes(mapping, weights, init, *inputs):
  """The mapped weights are all that the module asks for, and nothing else."""
  tree, made = jax.eval_shape(lambda: (mapping(weights, ""), init(jax.random.key(0), *inputs)))
  assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, made)


# -- shallow phase -----------------------------------------------------------------------------------------------------


ADAPTERS = ["visual_small", "audio_small", "visual_small_avs", "visual_real", "audio_real"]


@pytest.mark.parametrize("name", [f"adapter_{size}" for size in ADAPTERS])
def test_shallow_adapter(name):
  config, g = golden(name)
  options, weights = config["opt"], under(g, "w/")
  module = ShallowAdapter(
    config["num_tokens"],
    config["reduction_factor"],
    options["num_conv_group"],
    options["alpha"],
    options["beta"],
    options["gamma"],
    gated=bool(config["use_gate"]),
  )
  ours = lambda x: x[..., 0].swapaxes(1, 2)  # [N, C, L, 1] -> [N, L, C]
  inputs = {key: jnp.asarray(g[f"in/{key}"]) for key in ("x", "vis_token")}
  same_shapes(names.adapter, weights, params_of(module), *map(ours, inputs.values()))

  def run(tree, x):
    residual, seen = module.apply({"params": tree}, ours(x["x"]), ours(x["vis_token"]), capture_intermediates=True)
    return residual.swapaxes(1, 2)[..., None], seen["intermediates"]

  out, seen = check(name, config, g, run, names.adapter, weights, inputs)
  every = 64 if "output_slice" in config else 1
  close(f"{name} output", out[:, :, ::every], g["out/output"])
  if "out/output_mean_std" in g:
    close(f"{name} mean and deviation", [out.mean(), out.std(ddof=1)], g["out/output_mean_std"])
  spatial = nn.softmax(jnp.tanh(seen["spatial_gate"]["__call__"][0]), axis=1).swapaxes(1, 2)
  close(f"{name} spatial", spatial[:, :, ::every], g["out/spatial_att"])
  temporal = nn.sigmoid(seen["temporal_gate"]["__call__"][0]).reshape(-1, config["frame_num"], 1, 1)
  close(f"{name} temporal", temporal, g["out/temporal_att"])


# -- middle phase ------------------------------------------------------------------------------------------------------


def generator_sizes(config):
  return {"head_width": config["dim_head"], "mlp_width": config["mlp_dim"]}


def test_prompt_generator():
  config, g = golden("prompt_generator_small")
  module = PromptGenerator(config["num_prompts"], config["depth"], config["heads"], **generator_sizes(config))
  run = lambda tree, x: (module.apply({"params": tree}, x["x"], x["maben"]), None)
  weights, inputs = under(g, "w/"), {key: jnp.asarray(g[f"in/{key}"]) for key in ("x", "maben")}
  same_shapes(names.generator, weights, params_of(module), *inputs.values())
  out, _ = check("prompt_generator_small", config, g, run, names.generator, weights, inputs)
  close("prompt_generator_small", out, g["out/prompts"])


def test_weight_network():
  config, g = golden("weight_generator_small")
  key_of = lambda tree, x: nn.Dense(config["dim"]).apply({"params": tree["weight_key"]}, x[:, 0])
  weigh = lambda tree, x: php_modules.weigh(x["prompt_embed"], key_of(tree, x["input_embed"]), **tree["weight_query"])
  weights, inputs = under(g, "w/"), {key: jnp.asarray(g[f"in/{key}"]) for key in ("input_embed", "prompt_embed")}
  run = lambda tree, x: (weigh(tree, x), None)
  out, _ = check("weight_generator_small", config, g, run, names.weight_network, weights, inputs)
  close("weight_generator_small", out, g["out/prompts"])


@pytest.mark.parametrize("name", ["m2prompt_small", "m2prompt_real_visual", "m2prompt_real_audio"])
def test_middle_prompts(name):
  config, g = golden(name)
  weights, prompts = under(g, "w/"), g["out/batched_prompt"]
  sizes = (len(prompts), 2 * prompts.shape[3], len(g["w/maben"]), config["depth"], config["heads"])
  module = MiddlePrompts(*sizes, **generator_sizes(config))
  inputs = {key: jnp.asarray(g[f"in/{key}"]) for key in ("x_embed", "cls_features")}
  narrow = g["in/x_embed"].shape[-1] < config["dim"]
  pool = lambda x: php_modules.pool_cells(x, config["dim"]) if narrow else x
  same_shapes(names.middle, weights, params_of(module), pool(inputs["x_embed"]), inputs["cls_features"][:, 0])

  def run(tree, x):
    prefixes = module.apply({"params": tree}, pool(x["x_embed"]), x["cls_features"][:, 0])
    return jnp.stack([jnp.stack([p.key, p.value], axis=1) for p in prefixes]), None

  out, _ = check(name, config, g, run, names.middle, weights, inputs)
  close(name, out, prompts)
  assert narrow == ("out/pooled_x" in g)
  if narrow:
    close(f"{name} pooled", pool(inputs["x_embed"]), g["out/pooled_x"])


def test_audio_takes_middle_prompts_on_its_first_channels():
  _, g = golden("audio_padding_prompt")
  for case in ("A", "B"):
    y, prompt = g[f"in/{case}/y"], g[f"in/{case}/prompt"]
    out, first = np.asarray(php_modules.add_to_first_channels(y, jnp.asarray(prompt))), g[f"out/{case}/first_channels"]
    close(f"audio_padding_prompt {case}", out[..., : first.shape[-1]], first)
    rest = np.abs(out[..., first.shape[-1] :] - y[..., first.shape[-1] :]).sum()
    assert rest == g[f"out/{case}/checksum_rest"]
  close("audio_padding_prompt small", php_modules.add_to_first_channels(g["in/small/y"], g["in/small/prompt"]), g["out/small"])


# -- deep phase --------------------------------------------------------------------------------------------------------


def lay_out(prompt, chosen, frames):
  """prompt [layers, 2, pool, P, D] -> as released, [layers, N, 2, P, D]."""
  one = lambda p: jnp.stack(php_modules.lay_out_reshaped(p[:, chosen], frames, frames), axis=1)
  return jax.vmap(one)(prompt)


@pytest.mark.parametrize("case", ["even", "odd", "tie", "all_two", "single"])
def test_deep_prompts_as_released(case):
  _, g = golden("deep_prompt")
  tree, query = names.deep(under(g, "w/"), ""), g[f"in/{case}/x"].mean(axis=1)
  frames = len(query)
  close(
    f"deep_prompt {case} similarity", similarity(l2_normalise(query), l2_normalise(tree["keys"])), g[f"out/{case}/similarity"]
  )
  chosen = php_modules.select_by_key(jnp.asarray(query), tree["keys"], clips=1)
  assert chosen.dtype == jnp.int32
  np.testing.assert_array_equal(np.repeat(chosen, frames), g[f"out/{case}/idx"][:, 0])
  np.testing.assert_array_equal(lay_out(tree["prompt"], chosen[0], frames), g[f"out/{case}/batched_prompt"])
  intended = jnp.broadcast_to(tree["prompt"][:, None, :, chosen[0]], g[f"out/{case}/intended"].shape)
  np.testing.assert_array_equal(intended, g[f"out/{case}/intended"])


def test_deep_prompts_frame_by_frame_and_their_gradient():
  config, g = golden("deep_prompt")
  tree, query = names.deep(under(g, "w/"), ""), jnp.asarray(g["in/even/x"].mean(axis=1))
  chosen = php_modules.select_by_key(query, tree["keys"], clips=len(query))
  np.testing.assert_array_equal(chosen, g["out/even_not_batchwise/idx"][:, 0])
  rows, expected = tree["prompt"][:, :, chosen], g["out/even_not_batchwise/batched_prompt"]
  np.testing.assert_array_equal(rows.reshape(expected.shape), expected)  # each layer's [2, N, P, D], reshaped
  majority = php_modules.select_by_key(query, tree["keys"], clips=1)[0]
  run = lambda tree, _: (lay_out(tree["prompt"], majority, len(query)), None)
  check("deep_prompt", config, g, run, names.deep, under(g, "w/"), {})
  np.testing.assert_array_equal(lay_out(tree["prompt"], 1, len(query)), g["out/even_mask1/batched_prompt"])


# -- class texts and contrast ------------------------------------------------------------------------------------------


def test_clip_adapter():
  config, g = golden("clip_adapter")
  module, weights = ClipAdapter(config["reduction"]), under(g, "w/")

  def run(tree, x):
    mixed, seen = module.apply({"params": tree}, x["x"], capture_intermediates=True)
    return nn.relu(seen["intermediates"]["up"]["__call__"][0]), mixed

  adapted, mixed = check("clip_adapter", config, g, run, names.clip_adapter, weights, {"x": jnp.asarray(g["in/x"])})
  close("clip_adapter", adapted, g["out/adapter"])
  close("clip_adapter mixed", mixed, g["out/mixed_normalised"])


def test_gradients_go_back_to_published_names():
  _, g = golden("clip_adapter")
  weights, x = under(g, "w/"), jnp.asarray(g["in/x"])
  adapted = lambda tree: nn.relu(nn.relu(x @ tree["down"]["kernel"]) @ tree["up"]["kernel"])
  gradients = jax.grad(lambda tree: jnp.sum(adapted(tree) ** 2))(names.clip_adapter(weights, ""))
  there = {f"clip_adapter.{key}": w for key, w in weights.items()} | {"logit_scale": np.float32(1)}
  for key, gradient in names.published_gradients(names.clip_adapter, there, gradients, "clip_adapter.").items():
    close(f"clip_adapter g/{key}", gradient, g["g/w/" + key.removeprefix("clip_adapter.")], GRADIENT)


def test_contrast_of_clips():
  config, g = golden("av_contrastive")
  weights, scale = under(g, "w/"), np.exp(config["logit_scale"])
  fold = lambda x: x.reshape(config["B"], config["frames"], -1)

  def run(tree, x):
    logits = php_modules.contrast(fold(x["video"]), fold(x["audio"]), **tree, scale=scale)
    return {"audio_image": logits, "image_audio": logits.T}, None

  inputs = {key: jnp.asarray(g[f"in/{key}"]) for key in ("video", "audio")}
  out, _ = check("av_contrastive", config, g, run, names.contrastive, weights, inputs)
  for key, x in out.items():
    close(f"av_contrastive {key}", x, g[f"out/logits_{key}"])
    loss = optax.softmax_cross_entropy_with_integer_labels(x, jnp.arange(config["B"])).mean()
    close(f"av_contrastive loss {key}", loss, g[f"out/loss_{key}"])


def test_scores_against_class_texts_and_gradient_of_the_learned_context():
  config, g = golden("prompt_learner_text_tiny")
  scale = np.exp(golden("av_contrastive")[0]["logit_scale"])  # CLIP's, which this file leaves out
  sizes = {"width": config["width"], "depth": config["layers"], "num_heads": config["heads"], "embed_dim": config["embed_dim"]}
  module = CLIPText(**sizes, activation="quick_gelu", vocabulary_size=8, context_length=config["context"])
  ids = g["in/tokenized_prompts"]
  table = dict(zip(g["b/unique_tokens"].tolist(), g["b/unique_embeddings"], strict=True))
  words = jnp.asarray(np.stack([[table[int(i)] for i in row] for row in ids]))

  def mapping(weights, prefix):
    weights = {**weights, "token_embedding.weight": jnp.zeros((8, config["width"]))}  # the file has embeddings, no table
    rules = {ours: op(weights[theirs]) for ours, theirs, op in encoder_names.clip_text_openai(module)}
    return {"text": traverse_util.unflatten_dict(rules, sep="/"), "context": names.context(weights, f"{prefix}pl.")}

  def run(tree, x):
    stream = Stream(words.at[:, 1 : 1 + config["n_ctx"]].set(tree["context"]), end=jnp.asarray(ids.argmax(-1)))
    text = lambda m, s: m.pool(m.layers(m.positions(s))).pooled
    features = module.apply({"params": tree["text"]}, stream, method=text)
    return features, scale * similarity(l2_normalise(x["visual"]), l2_normalise(features))

  inputs = {"visual": jnp.asarray(g["in/visual"])}
  features, logits = check("prompt_learner_text_tiny", config, g, run, mapping, under(g, "w/"), inputs)
  close("prompt_learner_text_tiny features", features, g["out/text_features"])
  close("prompt_learner_text_tiny logits", logits, g["out/logits"])


def test_class_prompts_are_split_as_published():
  """The published ids of 'X X X X <class>.' against the words our CLIP tokenizer cuts the same texts into.

  Without CLIP's vocabulary: words of one id must have it everywhere, and no two words may share one.
  """
  config, g = golden("clip_tokens")
  one_word: dict[str, int] = {}
  for task in ("AVE", "LLP", "AVS"):
    for name, row in zip(config[task], g[f"out/{task}"], strict=True):
      words, ids = clip_words(f"x x x x {name.replace('_', ' ')}."), row[1 : row.argmax()].tolist()
      assert len(words) <= len(ids), f"{name}: {words} for {ids}"
      if len(words) == len(ids):
        for word, i in zip(words, ids, strict=True):
          assert one_word.setdefault(word, i) == i, f"{name}: {word} is {i} and {one_word[word]}"
  assert len(set(one_word.values())) == len(one_word) > 20


def clip_words(text):
  """What CLIP's tokenizer looks up, piece by piece; its own vocabulary is not needed for that."""
  with tempfile.TemporaryDirectory() as folder:
    vocabulary, merges = pathlib.Path(folder, "vocab.json"), pathlib.Path(folder, "merges.txt")
    vocabulary.write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1}))
    merges.write_text("#version: 0.2\n")
    made = byte_pair_tokenizer(vocabulary, merges)
  return [word for word, _ in made.pre_tokenizer.pre_tokenize_str(made.normalizer.normalize_str(text))]


# -- heads and losses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["avqa_handler_small", "avqa_handler_real"])
def test_question_head(name):
  config, g = golden(name)
  seconds, weights = config["frames_per_sample"], under(g, "w/")
  mapping = lambda weights, prefix: names.avqa_head(weights, prefix, config["heads"])
  module = QuestionHead(config["vocab"], config["answers"], config["dim"], num_heads=config["heads"])
  fold = lambda x: x.reshape(-1, seconds, *x.shape[1:])

  def run(tree, x):
    question = g[f"in/B{len(x['visual']) // seconds}/question"][:, None]
    inputs = (fold(x["visual"]), fold(x["audio"]), question, False)
    logits, seen = module.apply({"params": tree}, *inputs, capture_intermediates=True)
    return logits[:, 0], seen["intermediates"]["question"]["__call__"][0]

  batches = {b: {m: jnp.asarray(g[f"in/{b}/{m}"]) for m in ("visual", "audio")} for b in ("B2", "B1")}
  question = g["in/B1/question"][:, None]
  same_shapes(mapping, weights, params_of(module, False), *map(fold, batches["B1"].values()), question)
  made = {"B2": check(name, config, g, run, mapping, weights, batches["B2"])}
  made["B1"] = jax.jit(lambda w, x: run(mapping(w, ""), x))(weights, batches["B1"])
  for batch, (logits, question) in made.items():
    close(f"{name} {batch}", logits, g[f"out/{batch}/answer_logits"])
    close(f"{name} {batch} question", question, g[f"out/{batch}/question_feature"])


@pytest.mark.parametrize("name", ["avs_handler_small", "avs_handler_real"])
def test_segmentation_head(name):
  config, g = golden(name)
  weights = {**under(g, "w/"), **under(g, "b/")}
  channels = tuple(len(g[f"w/visual_decoder.up_blocks.{i}.conv.0.weight"]) for i in range(len(config["up_scales"])))
  module = SegmentationHead(channels, config["dim"], config["context_dim"], config["heads"], num_special=1)
  inputs = {key: jnp.asarray(g[f"in/{key}"]) for key in ("visual_seq", "audio")}
  arguments = lambda x: (x["visual_seq"].swapaxes(0, 1), x["audio"], jnp.ones(config["N"]))

  def run(tree, x, train):
    variables = {"params": tree[0], "batch_stats": tree[1]}
    out = module.apply(variables, *arguments(x), train, mutable=["batch_stats"] if train else False)
    return (out[0] if train else out)[:, None], None

  def init(rng, x):
    made = module.init(rng, *arguments(x), False)
    return made["params"], made["batch_stats"]

  same_shapes(names.avs_head, weights, init, inputs)
  modes = [mode for mode in ("eval", "train") if f"out/{mode}/mask_logits" in g]
  assert "eval" in modes
  for mode in modes:
    step = functools.partial(run, train=mode == "train")
    if f"g_{mode}/loss" in g:
      out, _ = check(name, config, g, step, names.avs_head, weights, inputs, kind=f"g_{mode}")
    else:
      out, _ = jax.jit(lambda w, x, step=step: step(names.avs_head(w, ""), x))(weights, inputs)
    close(f"{name} {mode}", out, g[f"out/{mode}/mask_logits"])


WIDTHS = Widths(8, 8, 8, 4)


def loss_and_gradient(name, task, g, key, outputs_of, batch):
  """Compares a task's loss and its gradient towards what the file calls in/<key>."""
  value, gradient = jax.value_and_grad(lambda x: task.loss(outputs_of(x), batch))(jnp.asarray(g[f"in/{key}"]))
  close(f"losses {key}", value, g[f"out/{name}"])
  close(f"losses g/{key}", gradient, g[f"g/{key}"], GRADIENT)


def test_loss_of_segmentation_and_its_score():
  _, g = golden("losses")
  pred, first = g["in/avs/pred"], g["in/avs/first_gt"]
  clips, seconds = len(first), len(pred) // len(first)
  label = np.zeros((clips, seconds, *pred.shape[2:]), np.float32)
  label[:, 0] = first[:, 0, 0]
  label_mask = np.zeros((clips, seconds), np.float32)
  label_mask[:, 0] = 1
  task = AVS(WIDTHS, seconds, 2, name="avs", classes=())
  batch = {"label": label, "label_mask": label_mask, "mask": np.ones(clips, np.float32)}
  loss_and_gradient("avs/loss", task, g, "avs/pred", lambda x: {"mask": x.reshape(label.shape)}, batch)
  stats = avs.statistics(g["in/iou/pred"][:, None], g["in/iou/target"][:, None])
  close("losses iou", stats["iou"].mean(), g["out/iou/mask_iou"])


def test_loss_of_answers():
  _, g = golden("losses")
  logits = g["in/avqa/logits"]
  task = AVQA(WIDTHS, 10, logits.shape[-1], name="avqa", classes=())
  ones = np.ones((len(logits), 1), np.float32)
  batch = {"label": g["in/avqa/answer"][:, None].astype(np.int32), "question_mask": ones, "mask": ones[:, 0]}
  loss_and_gradient("avqa/loss", task, g, "avqa/logits", lambda x: {"answer": x[:, None]}, batch)


@pytest.mark.parametrize("name", ["ave", "llp"])
def test_loss_of_events(name):
  _, g = golden("losses")
  event, label = g[f"in/{name}/event"], g[f"in/{name}/labels"]
  seconds = len(event) // len(label)
  options = {"protocol": "released"} if name == "llp" else {}
  task = (AVVP if name == "llp" else AVE)(WIDTHS, seconds, event.shape[-1], name=name, classes=(), **options)
  batch = {"label": label.argmax(-1) if name == "ave" else label, "mask": np.ones(len(label), np.float32)}
  split = lambda x: {m: 0.5 * x.reshape(len(label), seconds, -1) for m in ("visual", "audio")}
  entropy, gradient = jax.value_and_grad(lambda x: task.loss(split(x), batch))(jnp.asarray(event))
  close(f"losses {name}", entropy, g[f"out/{name}/ce"])
  whole = f"out/{name}/loss" in g  # with the contrast between clips, whose rows and columns are their own targets
  close(f"losses g/{name}", (PHP.class_weight if whole else 1) * gradient, g[f"g/{name}/event"], GRADIENT)
  if not whole:
    return
  target, total = jnp.arange(len(label)), PHP.class_weight * entropy
  for key, weight in (("audio_image", PHP.audio_to_visual_weight), ("image_audio", PHP.visual_to_audio_weight)):
    mean = lambda x, weight=weight: weight * optax.softmax_cross_entropy_with_integer_labels(x, target).mean()
    value, gradient = jax.value_and_grad(mean)(jnp.asarray(g[f"in/{name}/logits_{key}"]))
    close(f"losses g/{name} {key}", gradient, g[f"g/{name}/logits_{key}"], GRADIENT)
    total += value
  close(f"losses {name} whole", total, g[f"out/{name}/loss"])
