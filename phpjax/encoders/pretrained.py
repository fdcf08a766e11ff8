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
from phpjax.encoders.tokenizer import FILE as TOKENIZER
from phpjax.encoders.tokenizer import Tokenizer

SHIPPED = pathlib.Path(__file__).parent / "nano"
FILE = "encoder.safetensors"
POSITIONS = "position_embedding"  # the one tensor whose rows may differ from the encoder's: another image size or clip length


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A frozen encoder: the module, its parameters (a nested dict) and where they came from."""

  name: str
  module: Encoder
  params: dict[str, Any]
  sha256: str
  metadata: dict[str, Any]
  tokenizer: Tokenizer | None = None


def load(
  name: str, weights: str, *, modality: str, dtype: Any = jnp.float32, seed: int = 0, sharding: Any = None, **sizes: Any
) -> Pretrained:
  """Opens the encoder `name`.

  Args:
    name: a row of `ENCODERS`.
    weights: a folder written by phpjax.convert or phpjax.pretrain, "shipped" for the nano encoders that come with
      the package, or "random".
    modality: "visual", "audio" or "text": what the encoder is wanted for.
    dtype: of the weights and of the arithmetic between them; what `stays_float32` names, the inside of layer norms and
      the pooled features are float32 always.
    seed: of "random".
    sharding: where the weights go, straight from the file; the default device without it.
    **sizes: replace sizes of the table, e.g. image_size.

  Raises:
    ValueError: unknown name, an encoder of another modality, missing folder or file, or a tensor that is missing, extra or
      of another shape.
  """
  if missing := missing_weights(name, weights):
    raise ValueError(missing)
  module = module_of(name, weights, dtype=dtype, **sizes)
  if module.modality != modality:
    raise ValueError(f"{name} is an encoder for {module.modality}, not for {modality}")
  if weights == "random":
    params = cast(jax.jit(lambda: module.init(jax.random.key(seed), example_input(module))["params"])(), dtype)
    params = params if sharding is None else jax.tree.map(lambda leaf: _place(np.asarray(leaf), sharding), params)
    tokenizer = Tokenizer(SHIPPED / "nano_text" / TOKENIZER) if modality == "text" else None
    return Pretrained(name, module, params, identity(name, weights, seed), {"source": "random"}, tokenizer)
  folder = folder_of(name, weights)
  params = read(folder / FILE, module, dtype, sharding)
  tokenizer = Tokenizer(folder / TOKENIZER, getattr(module, "pad_id", 0)) if modality == "text" else None
  return Pretrained(name, module, params, identity(name, weights), metadata_of(folder), tokenizer)


def identity(name: str, weights: str, seed: int = 0) -> str:
  """The digest of an encoder's file, or what stands for it."""
  return f"random seed {seed}" if weights == "random" else sha256(folder_of(name, weights) / FILE)


def folder_of(name: str, weights: str) -> pathlib.Path:
  """Where the files of an encoder lie."""
  return SHIPPED / name if weights == "shipped" else pathlib.Path(weights).expanduser()


def module_of(name: str, weights: str, **options: Any) -> Encoder:
  """The encoder with the sizes that were converted, as far as `options` do not replace them; raises ValueError."""
  metadata = {} if weights == "random" else metadata_of(folder_of(name, weights))
  if metadata.get("name", name) != name:
    raise ValueError(f"{weights} holds the encoder {metadata['name']!r}, the config asks for {name!r}")
  return make_encoder(name, **{**metadata.get("sizes", {}), **options})


def metadata_of(folder: pathlib.Path) -> dict[str, Any]:
  """What encoder.json says, {} without one; lists become tuples, as modules want them. Raises ValueError."""
  path = folder / "encoder.json"
  if not path.is_file():
    return {}
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in found.get("sizes", {}).items()}
  except (ValueError, AttributeError, RecursionError) as error:
    raise ValueError(f"{path} is not readable JSON of an encoder ({error}): convert again") from error
  return {**found, "sizes": tuples}


def missing_weights(name: str, weights: str) -> str | None:
  """One line that says which command makes the missing weights, or None when they are there."""
  if weights == "random":
    return None
  folder = folder_of(name, weights)
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


def example_input(module: Encoder) -> jax.Array:
  """A batch of one, for shape inference."""
  if module.modality == "visual":
    return jnp.zeros((1, module.image_size, module.image_size, 3), jnp.uint8)
  if module.modality == "audio":
    return jnp.zeros((1, round(module.seconds * module.sample_rate_hz)), jnp.int16)
  return jnp.zeros((1, 8), jnp.int32)


def flat_shapes(module: Encoder) -> dict[str, Any]:
  """`shapes` with one name per leaf, as it stands in encoder.safetensors."""
  return traverse_util.flatten_dict(shapes(module), sep="/")


def shapes(module: Encoder) -> dict[str, Any]:
  """The parameter tree of `module` as jax.ShapeDtypeStruct leaves; nothing is computed."""
  return jax.eval_shape(module.init, jax.random.key(0), example_input(module))["params"]


def read(path: pathlib.Path, module: Encoder, dtype: Any, sharding: Any = None) -> dict[str, Any]:
  """Reads a safetensors file strictly into the nested parameter dict of `module`; the file is mapped, one tensor at a time."""
  wanted = traverse_util.flatten_dict(shapes(module), sep="/")
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
        if name == POSITIONS and array.shape != target.shape:
          array = module.resize_positions(array)
        if array.shape != target.shape:
          raise ValueError(f"{path}: {name} has shape {array.shape}, the encoder needs {target.shape}")
        array = np.asarray(array, jnp.float32 if name in precise else dtype)
        flat[name] = jnp.asarray(array) if sharding is None else _place(array, sharding)
  except safetensors.SafetensorError as error:
    raise ValueError(f"{path} is not a readable safetensors file ({error}): convert or download it again") from error
  return traverse_util.unflatten_dict(flat, sep="/")


def _place(array: np.ndarray, sharding: Any) -> jax.Array:
  """Onto all devices of a sharding, those of other processes too, which pass the same array."""
  return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def write(
  folder: str | pathlib.Path, name: str, params: dict[str, Any], metadata: dict[str, Any], dtype: Any = np.float32
) -> None:
  """Writes `encoder.safetensors` and `encoder.json` into `folder`."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  flat = traverse_util.flatten_dict(params, sep="/")
  # order: the library writes an array's memory as it lies, a transposed one would come back scrambled
  safetensors.numpy.save_file({k: np.asarray(v, dtype, order="C") for k, v in sorted(flat.items())}, folder / FILE)
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


def sha256(*paths: pathlib.Path) -> str:
  """Hex digest of the files' bytes, one after another."""
  digest = hashlib.sha256()
  for path in paths:
    with open(path, "rb") as file:
      while block := file.read(1 << 22):
        digest.update(block)
  return digest.hexdigest()
