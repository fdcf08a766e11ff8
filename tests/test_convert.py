"""phpjax.convert without torch: a Hugging Face folder goes in, what is damaged or foreign is refused in one line."""

import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy
import tokenizers
from flax import traverse_util

from phpjax import bench, convert
from phpjax.encoders import ENCODERS, formats, make_encoder, names, pretrained
from phpjax.encoders.tokenizer import Tokenizer, from_files
from phpjax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIZES = {"width": 16, "depth": 2, "num_heads": 2, "embed_dim": 16, "image_size": 28}
BEFORE = {  # the array that an operation turns into ours
  names.same: lambda x: x,
  names.linear: lambda x: x.T,
  names.conv: lambda x: np.moveaxis(x, (-1, -2), (0, 1)),
  names.flat: lambda x: x[None, None],
  names.rows: lambda x: x[None],
}


def source(folder, **changes):
  """A Hugging Face folder of a small DINOv2; changes: {tensor: array, or None to leave it out}. -> our parameters."""
  module = make_encoder("dinov2_s14", **SIZES)
  rng, ours, theirs = np.random.default_rng(0), {}, {"embeddings.mask_token": np.zeros((1, 16), np.float32)}
  shapes = traverse_util.flatten_dict(pretrained.shapes(module), sep="/")
  for mine, name, op in names.dinov2_hf(module):
    ours[mine] = rng.normal(size=shapes[mine].shape).astype(np.float32)
    theirs[name] = np.ascontiguousarray(BEFORE[op](ours[mine]))
  theirs = {name: array for name, array in {**theirs, **changes}.items() if array is not None}
  folder.mkdir()
  safetensors.numpy.save_file(theirs, folder / "model.safetensors")
  return ours


def run(tmp_path, **options):
  return convert.convert("dinov2_s14", tmp_path / "in", tmp_path / "out", **{**SIZES, **options})


def refused(tmp_path, *words, **options):
  """Says all of `words` in one line and writes nothing."""
  with pytest.raises(UserError) as caught:
    run(tmp_path, **options)
  assert all(word in str(caught.value) for word in words), str(caught.value)
  assert not (tmp_path / "out").exists()


def test_folder_goes_round(tmp_path):
  ours, notes = source(tmp_path / "in"), []
  made = run(tmp_path, note=notes.append)
  assert made["sizes"] == SIZES and made["source"]["format"] == "Hugging Face DINOv2"
  assert made["source"]["sha256"] == pretrained.sha256(tmp_path / "in" / "model.safetensors")
  assert notes == ["left out, masked training only: 1 tensors (embeddings.mask_token)"]
  opened = pretrained.load("dinov2_s14", str(tmp_path / "out"), modality="visual")
  flat = traverse_util.flatten_dict(opened.params, sep="/")
  assert flat.keys() == ours.keys() and made["parameters"] == sum(x.size for x in ours.values())
  for name, array in ours.items():
    np.testing.assert_array_equal(flat[name], array)


def test_another_image_size_resizes_positions(tmp_path):
  ours = source(tmp_path / "in")
  run(tmp_path)
  load = lambda size: pretrained.load("dinov2_s14", str(tmp_path / "out"), modality="visual", image_size=size).params
  table = load(56)["position_embedding"]
  assert table.shape == (17, 16)
  np.testing.assert_array_equal(table[0], ours["position_embedding"][0])
  # the first of four new places lies a quarter before the first of two old ones: 3 taps fall on it, 1 on the other
  near = 1 - np.polyval([-0.75, 3.75, -6, 3], 1.25)  # Keys' kernel with a = -0.75 at the one tap beyond
  mix = np.array([[near, 1 - near]])
  corner = np.einsum("ij,kl,jld->d", mix, mix, ours["position_embedding"][1:].reshape(2, 2, 16))
  np.testing.assert_allclose(table[1], corner, atol=1e-5)
  assert load(28)["position_embedding"].shape == (5, 16)


def test_bfloat16_sources(tmp_path):
  ours = source(tmp_path / "in")
  path = tmp_path / "in" / "model.safetensors"
  halves = {name: jnp.asarray(array, jnp.bfloat16) for name, array in safetensors.numpy.load_file(path).items()}
  safetensors.flax.save_file(halves, path)
  run(tmp_path)
  made = safetensors.numpy.load_file(tmp_path / "out" / "encoder.safetensors")
  for name, array in ours.items():
    np.testing.assert_array_equal(made[name], jnp.asarray(array, jnp.bfloat16).astype(jnp.float32))


def test_every_encoder_has_a_published_form():
  assert {module for module, _ in ENCODERS.values()} == formats.FORMATS.keys()


def test_missing_extra_and_misshaped_tensors(tmp_path):
  cases = {
    "missing": ({"layernorm.weight": None}, ("lacks", "layernorm.weight")),
    "extra": ({"encoder.layer.0.surprise": np.zeros(3, np.float32)}, ("encoder.layer.0.surprise", "another architecture")),
    "shape": ({"layernorm.weight": np.zeros(5, np.float32)}, ("(5,)", "(16,)", "another size")),
    "nan": ({"layernorm.weight": np.full(16, np.nan, np.float32)}, ("not finite",)),
  }
  for name, (changes, words) in cases.items():
    (tmp_path / name).mkdir()
    source(tmp_path / name / "in", **changes)
    refused(tmp_path / name, *words)


def test_foreign_truncated_and_absent_files(tmp_path):
  refused(tmp_path, "does not exist")
  (tmp_path / "in").mkdir()
  refused(tmp_path, "no model.safetensors")
  safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, tmp_path / "in" / "model.safetensors")
  refused(tmp_path, "holds no Hugging Face DINOv2", "its tensors are a")
  (tmp_path / "whole").mkdir()
  source(tmp_path / "whole" / "in")
  data = (tmp_path / "whole" / "in" / "model.safetensors").read_bytes()
  (tmp_path / "in" / "model.safetensors").write_bytes(data[: len(data) // 2])
  refused(tmp_path, "not a readable safetensors file")
  (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
  refused(tmp_path, "lacks model-2.safetensors")


def test_unknown_sizes_are_named(tmp_path):
  source(tmp_path / "in")
  refused(tmp_path, "depht", depht=3)


def test_old_output_stays_until_the_new_one_is_whole(tmp_path):
  source(tmp_path / "in")
  run(tmp_path)
  before = (tmp_path / "out" / "encoder.safetensors").read_bytes()
  (tmp_path / "in" / "model.safetensors").write_bytes(b"nothing")
  with pytest.raises(UserError):
    run(tmp_path)
  assert (tmp_path / "out" / "encoder.safetensors").read_bytes() == before
  assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ([], ("--encoder", "--source", "--out", "must be given")),
    (["--encoder=clip", "--source=x", "--out=y"], ("unknown --encoder=clip", "clip_vit_b32")),
    (["--encoder=nano_vit", "--source=x", "--out=y"], ("x does not exist",)),
  ],
)
def test_command_line(arguments, words):
  words_of_command = [sys.executable, "-m", "phpjax.convert", *arguments]
  done = subprocess.run(words_of_command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
  assert done.returncode == 2
  assert all(word in done.stderr for word in words) and done.stderr.count("\n") == 1


# -- tokenizers --------------------------------------------------------------------------------------------------


def test_clip_and_roberta_vocabularies(tmp_path):
  letters = sorted(set("abcdefghijklmnopqrstuvwxyz"))
  for name, end, extra in (
    ("clip", "</w>", ["<|startoftext|>", "<|endoftext|>"]),
    ("roberta", "", ["<s>", "<pad>", "</s>", "<unk>"]),
  ):
    folder = tmp_path / name
    folder.mkdir()
    joined = [f"do{end}" if end else "do", f"g{end}" if end else "Ġ"]
    words = extra[1:] if name == "roberta" else []
    table = {w: i for i, w in enumerate([*letters, *(f"{x}</w>" for x in letters if end), *joined, *words, *extra]) if w}
    (folder / "vocab.json").write_text(json.dumps(table))
    (folder / "merges.txt").write_text(f"#version: 0.2\nd o{end}\n")
    made = from_files(folder)
    encoded = made.encode("Do do" if name == "clip" else "do")
    tokens = encoded.tokens
    assert tokens[0] == extra[0] and tokens[-1] == ("<|endoftext|>" if name == "clip" else "</s>")
    assert f"do{end}" in tokens
    made.save(str(folder / "tokenizer.json"))
    assert Tokenizer(folder / "tokenizer.json")(["do"], 77).shape[1] == len(made.encode("do").ids)
    (folder / "tokenizer.json").unlink()
    (folder / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"no merges\.txt"):
      from_files(folder)


def test_tokenizer_pads_with_the_encoders_own_id(tmp_path):
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 5, "b": 6, "[UNK]": 7}, unk_token="[UNK]"))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.enable_padding(length=9)
  tokenizer.enable_truncation(1)
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  ids = Tokenizer(tmp_path / "tokenizer.json", pad_id=1)(["a b", "b"], 8)
  np.testing.assert_array_equal(ids, [[5, 6], [6, 1]])
  (tmp_path / "tokenizer.json").write_text("{")
  with pytest.raises(ValueError, match="not a readable tokenizer"):
    Tokenizer(tmp_path / "tokenizer.json")


def test_bench_measures_an_encoder():
  row = bench.measure("tiny_ast", batch_size=2, repeats=1)
  assert tuple(row) == bench.COLUMNS and row["encoder"] == "tiny_ast"
  assert float(row["GFLOP"]) >= 0 and float(row["examples/s"]) > 0 and row["parameters"].endswith(" M")
