"""Saves and restores a run through orbax: what learned, the optimizer, and how far the run is. Encoders are never written.

One step directory holds the items `shared`, `live` (optimizer and state), `task_NAME` for each task, and `meta` (JSON:
position in the run, results so far, a sha256 of every item's arrays, because a flipped byte would otherwise restore silently).
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from phpjax.errors import UserError

Tree = dict[str, Any]
VERSION = 1
FOLDER = "checkpoints"


class Checkpoints:
  """The checkpoints of one workdir."""

  def __init__(self, workdir: str | os.PathLike[str], *, keep: int = 2):
    folder = pathlib.Path(workdir).absolute() / FOLDER
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True, create=True)
    self.folder = folder
    self._manager = ocp.CheckpointManager(folder, options=options)

  def save(self, step: int, items: dict[str, Any], meta: Tree) -> None:
    """Writes one step in the background; empty items are left out.

    Raises UserError when the disk is full or not writable; what was saved before stays.
    """
    items = {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}
    meta = {**meta, "version": VERSION, "digests": {name: digest(tree) for name, tree in items.items()}}
    saved = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    try:
      self._manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **saved))
    except OSError as error:
      raise UserError(
        f"cannot write a checkpoint to {self.folder}: {error}; earlier checkpoints are kept, "
        "free some space and run the same command again"
      ) from error

  def wait(self) -> None:
    """Until everything is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and closes."""
    self._manager.wait_until_finished()
    self._manager.close()

  def steps(self) -> list[int]:
    """Committed steps, newest first."""
    return sorted(self._manager.all_steps(), reverse=True)

  def read_meta(self, step: int) -> Tree:
    """The JSON of a step."""
    return read_meta(self.folder / str(step))

  def restore(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
    """Restores items to the shapes, dtypes and shardings of `items`; raises ValueError when a digest differs."""
    items = {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}
    target = {name: ocp.args.StandardRestore(jax.tree.map(_abstract, tree)) for name, tree in items.items()}
    restored = self._manager.restore(step, args=ocp.args.Composite(**target))
    wanted = self.read_meta(step)["digests"]
    for name in items:
      if digest(restored[name]) != wanted[name]:
        raise ValueError(f"item {name} of step {step} is damaged: its sha256 differs from the one saved with it")
    return dict(restored.items())


def newest_good(checkpoints: Checkpoints, open_step: Any) -> Any:
  """Tries `open_step(step)` from the newest step down; a damaged step is named on stderr and passed over.

  Returns None when there is no checkpoint; raises UserError when all are damaged.
  """
  steps = checkpoints.steps()
  for step in steps:
    try:
      return open_step(step)
    except UserError:
      raise
    except Exception as error:  # orbax and tensorstore report damage as plain exceptions of many types
      reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
      print(
        f"warning: checkpoint {checkpoints.folder / str(step)} cannot be used ({reason}); trying the one before",
        file=sys.stderr,
      )
  if steps:
    raise UserError(f"no checkpoint in {checkpoints.folder} can be read: start again with another --workdir")
  return None


def read_meta(step_folder: pathlib.Path) -> Tree:
  """The JSON of a step folder; raises UserError for a version this code does not know."""
  meta = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(step_folder / "meta", args=ocp.args.JsonRestore())
  if meta.get("version") != VERSION:
    raise UserError(f"{step_folder} is a checkpoint of version {meta.get('version')}, this phpjax reads version {VERSION}")
  return meta


def load_numpy(step_folder: pathlib.Path, item: str) -> Any:
  """An item as numpy arrays, no structure known in advance, on any number of devices; raises ValueError when damaged."""
  tree = ocp.StandardCheckpointHandler().metadata(step_folder / item).tree
  empty = jax.tree.map(lambda m: np.empty(m.shape, m.dtype), tree)
  with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
    restored = checkpointer.restore(step_folder / item, args=ocp.args.StandardRestore(empty))
  if digest(restored) != read_meta(step_folder)["digests"][item]:
    raise ValueError(f"item {item} in {step_folder} is damaged: its sha256 differs from the one saved with it")
  return restored


def digest(tree: Any) -> str:
  """sha256 over paths, dtypes, shapes and bytes of all leaves."""
  h = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    array = np.ascontiguousarray(jax.device_get(leaf))
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    h.update(f"{name}|{array.dtype}|{array.shape}".encode())
    h.update(array.tobytes())
  return h.hexdigest()


def _abstract(x: Any) -> Any:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x
