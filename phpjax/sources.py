"""Tensors of a published checkpoint, by name and read one at a time; nothing in a file is ever executed.

safetensors needs no torch. `.pt` files do (extra `convert`): TorchScript archives open through `torch.jit.load` on the CPU, all
others with `weights_only=True`, where numpy's scalar and dtype are the only safe globals beside torch's own.
"""

from __future__ import annotations

import functools
import json
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors

from phpjax.errors import UserError

Tensors = dict[str, Callable[[], np.ndarray]]
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
INDEX = "model.safetensors.index.json"


def open_source(path: pathlib.Path, note: Callable[[str], None]) -> tuple[Tensors, list[pathlib.Path]]:
  """File or Hugging Face folder -> ({name: reads it}, the files it stands in); raises UserError."""
  files = weight_files(path)
  tensors: Tensors = {}
  for file in files:
    tensors.update(_safetensors(file) if file.suffix == ".safetensors" else _pickle(file, note))
  return tensors, files


def weight_files(path: pathlib.Path) -> list[pathlib.Path]:
  """The files of a source that hold tensors; raises UserError."""
  if path.is_file():
    if path.suffix not in (".safetensors", *PICKLES):
      raise UserError(f"--source={path} is neither .safetensors nor {', '.join(PICKLES)}: give the weight file or its folder")
    return [path]
  if not path.is_dir():
    raise UserError(f"--source={path} does not exist: give a weight file or a Hugging Face folder")
  if (path / INDEX).is_file():
    names = _named(path / INDEX)
    if missing := [name for name in names if not (path / name).is_file()]:
      raise UserError(f"--source={path} lacks {', '.join(missing[:3])}, which {INDEX} names: download them")
    return [path / name for name in names]
  for name in ("model.safetensors", "pytorch_model.bin"):
    if (path / name).is_file():
      return [path / name]
  raise UserError(f"--source={path} holds no model.safetensors and no pytorch_model.bin: give the weight file itself")


def _named(index: pathlib.Path) -> list[str]:
  """The weight files that an index names, all of them beside it; raises UserError."""
  try:
    found = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise UserError(f"{index} is not readable JSON with a weight_map of file names ({error}): download it again") from error
  for name in found:
    if not isinstance(name, str) or pathlib.PurePath(name).name != name or not name.endswith((".safetensors", *PICKLES)):
      raise UserError(f"{index} names {name!r:.80}, which is no weight file beside it: download it again")
  return sorted(found)


def _safetensors(path: pathlib.Path) -> Tensors:
  try:
    # numpy has no bfloat16 of its own, jax's arrays do
    file, bfloats = (safetensors.safe_open(path, framework=name) for name in ("numpy", "flax"))
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(f"{path} is not a readable safetensors file ({error}): download it again") from error

  def read(name: str) -> np.ndarray:
    if file.get_slice(name).get_dtype() == "BF16":
      return np.asarray(bfloats.get_tensor(name), np.float32)
    return file.get_tensor(name)

  return {name: functools.partial(read, name) for name in file.keys()}  # noqa: SIM118 (no dict)


def _pickle(path: pathlib.Path, note: Callable[[str], None]) -> Tensors:
  try:
    import torch
  except ImportError as error:
    raise UserError(f"{path} needs torch to be read: pip install 'phpjax[convert]', or take a safetensors file") from error
  try:
    if _is_torchscript(path):
      note(f"{path.name} is a TorchScript archive: opened with torch.jit.load, only its tensors are read")
      state = torch.jit.load(str(path), map_location="cpu").state_dict()
    else:
      with torch.serialization.safe_globals(_numpy_globals()):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
  except Exception as error:  # torch raises anything from EOFError to UnpicklingError
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    raise UserError(f"{path} cannot be read safely ({reason[:200]}): download it again, or save it as safetensors") from error
  if not isinstance(state, dict):
    raise UserError(f"{path} holds a {type(state).__name__} and no named tensors: give the file of a state dict")
  state = next((state[key] for key in ("state_dict", "model") if isinstance(state.get(key), dict)), state)
  tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
  return {name: lambda x=x: (x.float() if x.dtype == torch.bfloat16 else x).detach().numpy() for name, x in tensors.items()}


def _is_torchscript(path: pathlib.Path) -> bool:
  if not zipfile.is_zipfile(path):
    return False
  with zipfile.ZipFile(path) as archive:
    return any("/code/" in name or name.endswith("/constants.pkl") for name in archive.namelist())


def _numpy_globals() -> list[Any]:
  """numpy's scalar and dtype, under the names of numpy 1 and 2, and the dtype classes that the latter becomes."""
  scalar = np._core.multiarray.scalar
  kinds = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32")]
  return [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), np.dtype, *kinds]
