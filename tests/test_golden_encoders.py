"""Encoders equal PHP's published network on golden inputs: same weights, same inputs, 1e-4.

PHPJAX_GOLDEN names another folder of such files (with a subfolder php or without); sizes and expectations come from the files.
"""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from phpjax.encoders import CLIPText, CLIPVision, audio_frontend, names
from phpjax.encoders.base import Block, Stream
from phpjax.encoders.htsat import HTSAT, PatchMerging, SwinBlock, shift_mask
from phpjax.methods.prompts import Prefix

HERE = pathlib.Path(__file__).resolve().parent
ROOT = pathlib.Path(os.environ.get("PHPJAX_GOLDEN", HERE / "golden"))
FOLDER = ROOT / "php" if (ROOT / "php").is_dir() else ROOT
TOLERANCE = 1e-4


def golden(name):
  """(config, arrays) of a file; what is only named by a seed is drawn again, as the files' own README says."""
  path = FOLDER / f"{name}.npz"
  assert path.is_file(), f"{path} is missing: PHPJAX_GOLDEN must name a folder with all of PHP's golden files"
  with np.load(path, allow_pickle=False) as file:
    config = json.loads(str(file["cfg"]))
    arrays = {key: file[key] for key in file.files if key != "cfg"}
  for key, drawn in config.get("gen", {}).items():
    normal = np.random.RandomState(drawn["seed"]).standard_normal(tuple(drawn["shape"]))
    arrays[key] = (normal * drawn["scale"] + drawn["mean"]).astype(np.float32)
  return config, arrays


def params(rules, arrays, prefix="w/"):
  """The parameter tree that conversion rules make of the file's weights."""
  return traverse_util.unflatten_dict({ours: op(arrays[prefix + theirs]) for ours, theirs, op in rules}, sep="/")


def close(actual, expected, tolerance=TOLERANCE):
  """Within `tolerance` of the largest expected number."""
  expected = np.asarray(expected)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


def squares(function, *inputs):
  """Gradients of the sum of squares, as the files hold them."""
  return jax.grad(lambda *x: jnp.sum(function(*x) ** 2), argnums=tuple(range(len(inputs))))(*inputs)


def test_clip_block_with_prefix():
  config, g = golden("clip_block_prompt")
  block = Block(config["d_model"], config["n_head"], 4 * config["d_model"], "quick_gelu")
  tree = {"params": params(names.block("", "", names.OPENAI_BLOCK), {k.replace("w/", "w/."): v for k, v in g.items()})[""]}
  x = g["in/x"].swapaxes(0, 1)  # stored sequence first
  prompts = jnp.asarray(g["in/prompt"].swapaxes(1, 2))

  def run(x, prompts):
    prefix = None if prompts is None else Prefix(prompts[0], prompts[1], at="normed")
    half = block.apply(tree, x, prefix, method="attention")
    return half - x, block.apply(tree, half, method="mlp")

  for given, suffix in ((None, "noprompt"), (prompts, "prompt")):
    mixed, out = run(x, given)
    close(mixed.swapaxes(0, 1), g[f"out/attention_{suffix}"])
    close(out.swapaxes(0, 1), g[f"out/block_{suffix}"])
  grad_x, grad_prompt = squares(lambda x, p: run(x, p)[1], jnp.asarray(x), prompts)
  close(grad_x.swapaxes(0, 1), g["g/in/x"])
  close(grad_prompt.swapaxes(1, 2), g["g/in/prompt"])


def test_clip_vision():
  config, g = golden("clip_vit_tiny")
  module = CLIPVision(
    width=config["width"],
    depth=config["layers"],
    num_heads=config["heads"],
    embed_dim=config["output_dim"],
    activation="quick_gelu",
    image_size=config["image"],
    patch_size=config["patch"],
  )
  weights = {k.replace("w/", "w/visual."): v for k, v in g.items()} | {"w/logit_scale": np.float32(0)}
  tree = {"params": params(names.clip_vision_openai(module), weights)}
  stream = module.apply(tree, g["in/image"].transpose(0, 2, 3, 1), method="embed_pixels")
  close(stream.tokens, g["out/embeddings_before_ln_pre"])
  for layer in range(config["layers"]):
    stream = module.apply(tree, layer, stream, method="enter")
    stream = module.apply(tree, layer, stream, method="attention")
    stream = module.apply(tree, layer, stream, method="mlp")
    close(stream.tokens.swapaxes(0, 1), g[f"out/block{layer}"])
  close(module.apply(tree, stream, method="pool").pooled, g["out/features"])


def test_text_tower_with_learned_context():
  config, g = golden("prompt_learner_text_tiny")
  module = CLIPText(
    width=config["width"],
    depth=config["layers"],
    num_heads=config["heads"],
    embed_dim=config["embed_dim"],
    activation="quick_gelu",
    vocabulary_size=8,  # the file holds embeddings, no table
    context_length=config["context"],
  )
  weights = {**g, "w/token_embedding.weight": np.zeros((8, config["width"]), np.float32)}
  tree = {"params": params(names.clip_text_openai(module), weights)}
  ids = g["in/tokenized_prompts"]
  table = dict(zip(g["b/unique_tokens"].tolist(), g["b/unique_embeddings"], strict=True))
  words = np.stack([[table[int(i)] for i in row] for row in ids])
  words[:, 1 : 1 + config["n_ctx"]] = g["w/pl.ctx"]
  close(words[:3], g["out/prompts_first3"])
  stream = Stream(jnp.asarray(words), end=jnp.asarray(ids.argmax(-1)))
  stream = module.apply(tree, stream, method="positions")
  features = module.apply(tree, module.apply(tree, stream, method="layers"), method="pool")
  close(features.pooled, g["out/text_features"])


def test_log_mel_and_folding_into_a_picture():
  config, g = golden("logmel_frontend")
  num_fft, hop, rate = config["n_fft"], config["hop"], config["sr"]
  for name, hz in (("melW", rate), ("melW_48k", 48_000)):
    bank = audio_frontend.slaney_mel_bank(config["n_mels"], num_fft, hz, config["fmin"], config["fmax"])
    np.testing.assert_allclose(bank, g[f"const/{name}"], atol=1e-7)
  wave = g["in/1s/wave"][None]
  close(audio_frontend.power_spectrogram(wave, num_fft, hop)[0], g["out/1s/power_spectrogram"])
  for case in ("1s", "10s", "noise"):
    wave = np.atleast_2d(g[f"in/{case}/wave"])
    log_mel = audio_frontend.log_mel(wave, g["const/melW"], num_fft, hop)
    expected = g[f"out/{case}/logmel"].reshape(log_mel.shape)
    # decibels of a float32 Fourier transform: exact but for bins that lie 80 and more below the loudest of the clip
    power, wanted = (10 ** (np.asarray(x, np.float64) / 10) for x in (log_mel, expected))
    np.testing.assert_allclose(power, wanted, rtol=TOLERANCE, atol=1e-10 * wanted.max())
  module = HTSAT(width=768, depth=12, num_heads=32, embed_dim=512)
  frontend = {"scale": g["bn0/weight"], "bias": g["bn0/bias"], "mean": g["bn0/running_mean"], "var": g["bn0/running_var"]}
  tree = {"params": {"frontend": {"mel": g["const/melW"], **frontend}, "logit_scale": np.float32(0)}}
  picture = lambda m, wave, repeats: m.fold(m.frontend(m.frontend.log_mel(jnp.tile(wave, (1, repeats)))))
  one = g["in/1s/wave"][None]
  for case, wave, repeats in (("1s", one, 1), ("10s", g["in/10s/wave"][None], 1), ("rep1s", one, 10), ("avs5s", one, 5)):
    made = module.apply(tree, wave, repeats, method=picture)[0]
    expected = g[f"out/{case}/image"]
    difference = np.abs(made[:, :: made.shape[1] // expected.shape[1]] - expected)
    assert np.mean(difference < 1e-3) > 0.97, case
    assert difference.max() < 2e-2, case  # the quiet bins again


@pytest.mark.parametrize("name", ["swin_block_noshift", "swin_block_shift", "swin_block_8x8"])
def test_swin_block(name):
  config, g = golden(name)
  side = config["resolution"][0]
  block = SwinBlock(
    config["dim"],
    config["heads"],
    int(config["dim"] * config["mlp_ratio"]),
    min(config["window"], side),
    config["shift"],
    side,
    "gelu",
    config["ln_eps"],
    jnp.float32,
  )
  rules = [*names.block("x", "x", names.TIMM_BLOCK)]
  rules.append(("x/attn/position_bias", "x.attn.relative_position_bias_table", names.same))
  tree = {"params": params(rules, {k.replace("w/", "w/x."): v for k, v in g.items()})["x"]}
  close(block.apply(tree, g["in/x"]), g["out/x"])
  if config["shift"]:
    np.testing.assert_array_equal(shift_mask(side, config["window"], config["shift"]), g["b/attn_mask"])
  tree_gradient, x_gradient = squares(lambda p, x: block.apply({"params": p}, x), tree["params"], jnp.asarray(g["in/x"]))
  close(x_gradient, g["g/in/x"])
  close(tree_gradient["attn"]["position_bias"], g["g/w/attn.relative_position_bias_table"])


def test_patch_merging():
  config, g = golden("patch_merging")
  module = PatchMerging(config["resolution"][0], 1e-5, jnp.float32)
  tree = {
    "norm": {"scale": g["w/norm.weight"], "bias": g["w/norm.bias"]},
    "reduction": {"kernel": g["w/reduction.weight"].T},
  }
  close(module.apply({"params": tree}, g["in/x"]), g["out/x"])
  close(squares(lambda x: module.apply({"params": tree}, x), jnp.asarray(g["in/x"]))[0], g["g/in/x"])


def test_whole_htsat():
  config, g = golden("htsat_tiny")
  stages = len(config["depths"])
  module = HTSAT(
    width=config["embed_dim"] << (stages - 1),
    depth=sum(config["depths"]),
    num_heads=config["heads"][-1],
    embed_dim=4,
    depths=tuple(config["depths"]),
    heads=tuple(config["heads"]),
    window=config["window"],
    image_size=config["spec_size"],
    num_mels=config["mel_bins"],
    repeats=1,
  )
  rules = [*names.batch_norm("bn0"), *names.swin(module, "", names.TIMM_BLOCK, "attn.relative_position_bias_table")]
  weights = {**g, **{k.replace("b/", "w/"): v for k, v in g.items() if k.startswith("b/")}}
  tree = params(rules, weights)
  frontend = {**tree["frontend"], "mel": g["const/melW"]}
  tree = {"params": {**tree, "frontend": frontend, "logit_scale": np.float32(0)}}
  stream = module.apply(tree, g["in/wave"], method="stem")
  close(stream.tokens, g["out/patch_embed"], 3e-4)  # quiet bins carry the noise of a float32 Fourier transform
  stream = module.apply(tree, g["out/image"][:, 0], method="embed_picture")
  close(stream.tokens, g["out/patch_embed"])
  for layer in range(module.depth):
    stream = module.apply(tree, layer, stream, method="enter")
    stream = module.apply(tree, layer, stream, method="attention")
    stage, index = module.stage(layer)
    if index == config["depths"][stage] - 1:  # the file reads stages behind their merging
      merge = lambda m, s, stage=stage: m.merges[stage](s.tokens) if stage < stages - 1 else s.tokens
      close(module.apply(tree, stream, method=merge), g[f"out/stage{stage}"])
  close(module.apply(tree, stream, method=lambda m, s: m.ln_post(s.tokens).mean(1)), g["out/embedding"])
