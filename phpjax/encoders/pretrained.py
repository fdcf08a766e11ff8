"""Opens a frozen encoder with its weights: `encoder.safetensors`, `encoder.json` and, for text, `tokenizer.json`.

Loading is strict in both directions and maps the file straight to the target dtype; nothing is initialised at random
unless the config says `weights="random"` (tests).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from phpjax.encoders import make_encoder
from phpjax.encoders.base import Encoder
from phpjax.encoders.tokenizer import Tokenizer

SHIPPED = pathlib.Path(__file__).parent / "nano"
FILE = "encoder.safetensors"


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A frozen encoder: the module, its parameters (a nested dict) and where they came from."""

  name: str
  module: Encoder
  params: dict[str, Any]
  sha256: str
  metadata: dict[str, Any]
  tokenizer: Tokenizer | None = None


def load(name: str, weights: str, *, modality: str, dtype: Any = jnp.float32, seed: int = 0, **sizes: Any) -> Pretrained:
  """Opens the encoder `name`.

  Args:
    name: a row of `ENCODERS`.
    weights: a folder written by phpjax.convert or phpjax.pretrain, "shipped" for the nano encoders that come with
      the package, or "random".
    modality: "visual", "audio" or "text"; says how to initialise "random".
    dtype: of the weights and of the arithmetic between them; what `stays_float32` names, the inside of layer norms and
      the pooled features are float32 always.
    seed: of "random".
    **sizes: replace sizes of the table, e.g. image_size.

  Raises:
    ValueError: unknown name, missing folder or file, or a tensor that is missing, extra or of another shape.
  """
  module = make_encoder(name, dtype=dtype, **sizes)
  if weights == "random":
    params = jax.jit(lambda: module.init(jax.random.key(seed), example_input(module, modality))["params"])()
    tokenizer = Tokenizer(SHIPPED / "nano_text" / "tokenizer.json") if modality == "text" else None
    return Pretrained(name, module, cast(params, dtype), f"random seed {seed}", {"source": "random"}, tokenizer)
  folder = SHIPPED / name if weights == "shipped" else pathlib.Path(weights).expanduser()
  missing = missing_weights(name, weights)
  if missing:
    raise ValueError(missing)
  params = read(folder / FILE, module, modality, dtype)
  metadata = json.loads((folder / "encoder.json").read_text()) if (folder / "encoder.json").is_file() else {}
  if metadata.get("name", name) != name:
    raise ValueError(f"{folder} holds the encoder {metadata['name']!r}, the config asks for {name!r}")
  tokenizer = Tokenizer(folder / "tokenizer.json") if modality == "text" else None
  return Pretrained(name, module, params, sha256(folder / FILE), metadata, tokenizer)


def missing_weights(name: str, weights: str) -> str | None:
  """One line that says which command makes the missing weights, or None when they are there."""
  if weights == "random":
    return None
  folder = SHIPPED / name if weights == "shipped" else pathlib.Path(weights).expanduser()
  if weights and (folder / FILE).is_file():
    return None
  where = f"in {folder}" if weights else "(the config's weights field is empty)"
  made = {
    "nano": f"`python -m phpjax.pretrain --config=configs/nano.py --out=DIR` and set encoders.<modality>.weights=DIR/{name}",
    "tiny": "encoders.<modality>.weights=random: the tiny encoders are for tests",
  }.get(
    name.split("_")[0],
    f"`python -m phpjax.convert --encoder={name} --source=FILE_OR_DIR --out=DIR` and set encoders.<modality>.weights=DIR",
  )
  return f"no weights for the encoder {name} {where}: make them with {made}"


def example_input(module: Encoder, modality: str) -> jax.Array:
  """A batch of one, for shape inference."""
  if modality == "visual":
    return jnp.zeros((1, module.image_size, module.image_size, 3), jnp.uint8)
  if modality == "audio":
    return jnp.zeros((1, round(module.seconds * module.sample_rate_hz)), jnp.int16)
  if modality == "text":
    return jnp.zeros((1, 8), jnp.int32)
  raise ValueError(f"unknown modality {modality!r}; known: visual, audio, text")


def shapes(module: Encoder, modality: str) -> dict[str, Any]:
  """The parameter tree of `module` as jax.ShapeDtypeStruct leaves; nothing is computed."""
  return jax.eval_shape(module.init, jax.random.key(0), example_input(module, modality))["params"]


def read(path: pathlib.Path, module: Encoder, modality: str, dtype: Any) -> dict[str, Any]:
  """Reads a safetensors file strictly into the nested parameter dict of `module`."""
  wanted = traverse_util.flatten_dict(shapes(module, modality), sep="/")
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      names = set(file.keys())
      if names != set(wanted):
        raise ValueError(
          f"{path}: missing tensors {sorted(set(wanted) - names)[:5]}, unknown tensors {sorted(names - set(wanted))[:5]}; "
          "was it converted for another encoder?"
        )
      flat, precise = {}, stays_float32(wanted)
      for name, target in wanted.items():
        array = file.get_tensor(name)
        if array.shape != target.shape:
          raise ValueError(f"{path}: {name} has shape {array.shape}, the encoder needs {target.shape}")
        flat[name] = jnp.asarray(array, jnp.float32 if name in precise else dtype)
  except safetensors.SafetensorError as error:
    raise ValueError(f"{path} is not a readable safetensors file ({error}): convert or download it again") from error
  return traverse_util.unflatten_dict(flat, sep="/")


def write(
  folder: str | pathlib.Path, name: str, params: dict[str, Any], metadata: dict[str, Any], dtype: Any = np.float32
) -> None:
  """Writes `encoder.safetensors` and `encoder.json` into `folder`."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  flat = traverse_util.flatten_dict(params, sep="/")
  safetensors.numpy.save_file({k: np.asarray(v, dtype) for k, v in sorted(flat.items())}, folder / FILE)
  count = int(sum(np.size(v) for v in flat.values()))
  (folder / "encoder.json").write_text(json.dumps({"name": name, "parameters": count, **metadata}, indent=1) + "\n")


def cast(params: dict[str, Any], dtype: Any) -> dict[str, Any]:
  """Leaves as `dtype`, but float32 for those that `stays_float32` names."""
  flat = traverse_util.flatten_dict(params, sep="/")
  precise = stays_float32(flat)
  flat = {name: x.astype(jnp.float32 if name in precise else dtype) for name, x in flat.items()}
  return traverse_util.unflatten_dict(flat, sep="/")


def stays_float32(flat: dict[str, Any]) -> set[str]:
  """Names of the leaves that are never kept in half precision: scalars (in bfloat16 a temperature of 100 would be 99) and
  the scales and biases of norms, which compute in float32 and return the dtype of the stream."""
  return {name for name, leaf in flat.items() if not leaf.shape or f"{name.rpartition('/')[0]}/scale" in flat}


def sha256(path: pathlib.Path) -> str:
  """Hex digest of a file."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
