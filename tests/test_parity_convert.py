"""The original checkpoints' own formats give the same weights as Hugging Face's, and pickles are read safely (marker `parity`).

OpenAI's, LAION's and the AST authors' files cannot be fetched by a test, so each is fabricated: the tensors of a small random
transformers model under the original's names.
"""

import os
import pickle
import re

import numpy as np
import pytest
import safetensors.numpy
from test_parity_encoders import CASES, TOKENIZER, build

from phpjax import convert
from phpjax.errors import UserError

pytestmark = pytest.mark.parity
BY_NAME = {case.encoder: case for case in CASES}


def weights(folder):
  return safetensors.numpy.load_file(folder / "encoder.safetensors")


def both_ways(encoder, tmp_path, original):
  """Converts a small model from its Hugging Face folder and from the file that `original(state, path)` writes."""
  case = BY_NAME[encoder]
  model = build(case.kind, case.tiny[0], tmp_path / "hf")
  del model
  state = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
  original(state, tmp_path / "original.pt")
  notes, made = [], []
  for source, out in (("hf", "a"), ("original.pt", "b")):
    made.append(
      convert.convert(encoder, tmp_path / source, tmp_path / out, tokenizer_source=TOKENIZER, note=notes.append, **case.tiny[1])
    )
  a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
  assert a.keys() == b.keys() and made[0]["parameters"] == made[1]["parameters"]
  for name in a.keys() - {"frontend/mel"}:  # transformers leaves the mel matrix to its feature extractor
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)
  return b, notes


def renamed(state, table):
  """Source names through a list of (pattern, replacement); the first that matches counts."""
  out = {}
  for name, array in state.items():
    pattern, replacement = next((p, r) for p, r in table if re.match(p, name))
    out[re.sub(pattern, replacement, name, count=1)] = array
  return out


def packed(state, parts, to):
  """Joins query, key and value: names with {} for q, k, v or their long names."""
  out = dict(state)
  for kind in ("weight", "bias"):
    for name in [n for n in state if n.endswith(f"{parts[0]}.{kind}")]:
      head = name.removesuffix(f"{parts[0]}.{kind}")
      out[head + to.format(kind)] = np.concatenate([out.pop(f"{head}{part}.{kind}") for part in parts])
  return out


def torch_of(state):
  import torch

  return {name: torch.from_numpy(np.asarray(array).copy()) for name, array in state.items()}


def openai(state, path):
  """A TorchScript archive with OpenAI's names."""
  import torch

  block = [
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
  ]
  state = packed(state, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attn.in_proj_{}")
  names = {
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
  }
  made = {"input_resolution": np.array(32), "context_length": np.array(16), "vocab_size": np.array(64)}
  for name, array in state.items():
    if "projection" in name:
      array = array.T
    new = names.get(name, name)
    new = new.replace("vision_model.encoder.layers", "visual.transformer.resblocks")
    new = new.replace("text_model.encoder.layers", "transformer.resblocks")
    new = new.replace("vision_model.pre_layrnorm", "visual.ln_pre").replace("vision_model.post_layernorm", "visual.ln_post")
    new = new.replace("text_model.final_layer_norm", "ln_final")
    for pattern, replacement in block:
      new = re.sub(pattern, replacement, new)
    made[new] = array

  class Node(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
      return x

  root = Node()
  for name, tensor in torch_of(made).items():
    *path_of, leaf = name.split(".")
    node = root
    for step in path_of:
      if step not in dict(node.named_children()):
        node.add_module(step, Node())
      node = getattr(node, step)
    node.register_buffer(leaf, tensor)
  torch.jit.script(root).save(str(path))


@pytest.mark.parametrize("encoder", ["clip_vit_b32", "clip_text_b32"])
def test_openai_torchscript(encoder, tmp_path):
  _, notes = both_ways(encoder, tmp_path, openai)
  assert any("TorchScript" in note for note in notes)


def test_ast_by_its_authors(tmp_path):
  def original(state, path):
    import torch

    parts = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
    made = packed({k.removeprefix("audio_spectrogram_transformer."): v for k, v in state.items()}, parts, "attn.qkv.{}")
    table = [
      (r"embeddings\.cls_token", "v.cls_token"),
      (r"embeddings\.distillation_token", "v.dist_token"),
      (r"embeddings\.position_embeddings", "v.pos_embed"),
      (r"embeddings\.patch_embeddings\.projection", "v.patch_embed.proj"),
      (r"encoder\.layer\.(\d+)\.attn\.qkv", r"v.blocks.\1.attn.qkv"),
      (r"encoder\.layer\.(\d+)\.attention\.output\.dense", r"v.blocks.\1.attn.proj"),
      (r"encoder\.layer\.(\d+)\.layernorm_before", r"v.blocks.\1.norm1"),
      (r"encoder\.layer\.(\d+)\.layernorm_after", r"v.blocks.\1.norm2"),
      (r"encoder\.layer\.(\d+)\.intermediate\.dense", r"v.blocks.\1.mlp.fc1"),
      (r"encoder\.layer\.(\d+)\.output\.dense", r"v.blocks.\1.mlp.fc2"),
      (r"layernorm", "v.norm"),
    ]
    made = renamed(made, table) | {"mlp_head.1.weight": np.zeros((527, 32), np.float32)}
    torch.save({f"module.{name}": tensor for name, tensor in torch_of(made).items()}, path)

  both_ways("ast_base", tmp_path, original)


def laion(state, path):
  """A training checkpoint of LAION's CLAP: wrapped names, numpy scalars beside the weights."""
  import torch

  state = {k: v for k, v in state.items() if "relative_position_index" not in k}
  audio = {k: v for k, v in state.items() if k.startswith("audio_model")}
  audio = packed(audio, tuple(f"attention.self.{p}" for p in ("query", "key", "value")), "attn.qkv.{}")
  table = [
    (r"audio_model\.audio_encoder\.batch_norm", "audio_branch.bn0"),
    (r"audio_model\.audio_encoder\.(layers.*)attention\.self\.relative_position_bias_table", r"audio_branch.\1attn.TABLE"),
    (r"audio_model\.audio_encoder\.(layers.*)attention\.output\.dense", r"audio_branch.\1attn.proj"),
    (r"audio_model\.audio_encoder\.(layers.*)layernorm_before", r"audio_branch.\1norm1"),
    (r"audio_model\.audio_encoder\.(layers.*)layernorm_after", r"audio_branch.\1norm2"),
    (r"audio_model\.audio_encoder\.(layers.*)intermediate\.dense", r"audio_branch.\1mlp.fc1"),
    (r"audio_model\.audio_encoder\.(layers.*)output\.dense", r"audio_branch.\1mlp.fc2"),
    (r"audio_model\.audio_encoder\.", "audio_branch."),
  ]
  made = {k.replace("TABLE", "relative_position_bias_table"): v for k, v in renamed(audio, table).items()}
  for name, array in state.items():
    if name.startswith("text_model"):
      made[name.replace("text_model", "text_branch")] = array
    elif "projection" in name:
      made[name.replace("linear1", "0").replace("linear2", "2")] = array
    elif name.startswith("logit_scale"):
      made[name] = array
  bins, mels = 513, 16
  made |= {
    "audio_branch.logmel_extractor.melW": np.random.default_rng(0).random((bins, mels), np.float32),
    "audio_branch.spectrogram_extractor.stft.conv_real.weight": np.zeros((bins, 1, 8), np.float32),
    "audio_branch.patch_embed.mel_conv2d.weight": np.zeros((4, 1, 4, 4), np.float32),
    "audio_branch.tscam_conv.weight": np.zeros((5, 5), np.float32),
    "audio_transform.sequential.0.weight": np.zeros((4, 4), np.float32),
    "text_branch.embeddings.position_ids": np.zeros((1, 4), np.int64),
  }
  made.pop("text_branch.embeddings.token_type_ids", None)
  state = {f"module.{name}": tensor for name, tensor in torch_of(made).items()}
  torch.save({"epoch": np.float64(3), "name": "clap", "scores": np.zeros(2, np.float32).dtype, "state_dict": state}, path)


@pytest.mark.parametrize("encoder", ["htsat_tiny", "roberta_base"])
def test_laion_checkpoint(encoder, tmp_path):
  converted, notes = both_ways(encoder, tmp_path, laion)
  if encoder == "htsat_tiny":
    expected = np.random.default_rng(0).random((513, 16), np.float32)
    np.testing.assert_array_equal(converted["frontend/mel"], expected)  # the checkpoint's own mel matrix
    assert any("fusion branch" in note for note in notes)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
  class Evil:
    def __reduce__(self):
      return os.mkdir, (str(tmp_path / "ran"),)

  path = tmp_path / "evil.pt"
  path.write_bytes(pickle.dumps({"state_dict": Evil()}))
  with pytest.raises(UserError, match="cannot be read safely"):
    convert.convert("ast_base", path, tmp_path / "out")
  assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_a_truncated_pickle_is_refused(tmp_path):
  import torch

  torch.save({"v.dist_token": torch.zeros(1000)}, tmp_path / "a.pth")
  data = (tmp_path / "a.pth").read_bytes()
  (tmp_path / "a.pth").write_bytes(data[: len(data) // 2])
  with pytest.raises(UserError, match=r"a\.pth cannot be read safely"):
    convert.convert("ast_base", tmp_path / "a.pth", tmp_path / "out")


def test_a_file_without_names_is_refused(tmp_path):
  import torch

  torch.save(torch.zeros(3), tmp_path / "a.pt")
  with pytest.raises(UserError, match="holds a Tensor and no named tensors"):
    convert.convert("ast_base", tmp_path / "a.pt", tmp_path / "out")
