"""Unprompted features on disk, so that runs on one machine, as those of a sweep, compute them once between them.

A file is named after all that its numbers depend on: encoders, their weights and sizes, what is read of the media, the clips
with the size and time of their files, the batch, and this package's and JAX's versions. It holds arrays only; one that is
damaged, of another shape, or not whole is made anew.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from phpjax import workdir

Tree = dict[str, Any]
IDS = "ids"


def path(run: Any, name: str, split: str, whole: bool) -> pathlib.Path | None:
  """Where the features of a split lie; None where they are not shared: several processes need not see one disk."""
  if not run.config.data.query_cache or jax.process_count() > 1:
    return None
  folder = pathlib.Path(run.config.data.query_cache).expanduser()
  data, config = run.datasets[name], workdir.plain(run.config)
  files = [file for record in data.records(split) for file in data.clip_files(record)]
  decides = (
    run.experiment.weights,
    config["encoders"],
    config["encoder_dtype"],
    {key: config["data"][key] for key in ("crop", "labelled_seconds_only", "toybox", "toybox_seed", "on_bad_clip")},
    config["eval_batch_size"],
    [record.id for record in data.records(split)],
    [(str(file), (found := file.stat()).st_size, found.st_mtime_ns) for file in files],
    jax.__version__,
    [str(device.device_kind) for device in run.mesh.devices.flat],
    _code(),
    whole,
  )
  digest = hashlib.sha256(repr(decides).encode()).hexdigest()[:24]
  return folder / f"{name}_{split}_{digest}.npz"


def _code() -> str:
  """Digest of the code that makes features: another checkout makes its own."""
  here = pathlib.Path(__file__).parent
  files = sorted([*(here / "encoders").glob("*.py"), here / "model.py", *(here.parent / "data_pipelines").glob("*.py")])
  return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def read(file: pathlib.Path, shapes: Tree) -> Tree:
  """{clip id: {modality: ...}} as `write` had it; nothing where there is no such file, or it is damaged.

  shapes: of one clip, [1 * T, ...] of each array.
  """
  leaves, structure = jax.tree.flatten(shapes)
  try:
    with np.load(file, allow_pickle=False) as found:
      ids, arrays = found[IDS].tolist(), [found[str(i)] for i in range(len(leaves))]
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    return {}
  arrays = [x.view(leaf.dtype) if x.dtype == _plain(leaf.dtype) else x for x, leaf in zip(arrays, leaves, strict=True)]
  expected = [((len(ids), *leaf.shape), leaf.dtype) for leaf in leaves]
  if [(x.shape, x.dtype) for x in arrays] != expected or "" not in ids:
    return {}
  return {key: structure.unflatten([x[row] for x in arrays]) for row, key in enumerate(ids)}


def write(file: pathlib.Path, held: Tree, note: Callable[[str], Any]) -> None:
  """Puts features where the next run finds them; a disk that does not take them costs that run its time, not this one."""
  columns = [np.stack(x) for x in zip(*(jax.tree.leaves(clip) for clip in held.values()), strict=True)]
  arrays = {str(i): x.view(_plain(x.dtype)) for i, x in enumerate(columns)}
  temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as out:
      np.savez(out, **{IDS: np.array(list(held))}, **arrays)
    os.replace(temporary, file)
  except OSError as error:
    note(f"data.query_cache: {file} is not written ({error.strerror or error}); the features are computed again next time")
  finally:
    if temporary.exists():
      temporary.unlink()


def _plain(dtype: Any) -> np.dtype:
  """What a file can hold: NumPy's own types, and bits for the others (bfloat16)."""
  dtype = np.dtype(dtype)
  return dtype if dtype.isbuiltin == 1 else np.dtype(f"u{dtype.itemsize}")
