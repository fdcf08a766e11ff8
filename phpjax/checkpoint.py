"""Saves and reads the steps of a run through orbax: what learned, the optimizer, and how far the run is. Encoders are never
written.

A step directory holds the items `shared`, `state` (what changes without a gradient), `live` (the optimizer), `task_NAME`,
`meta` (JSON), and beside them a manifest of its files. Nothing is written twice: a step names those it cannot do without
(`needs`), which hold the finished tasks and the epoch that validation prefers so far. The newest few steps stay, and all that
they need.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from phpjax import files, manifest
from phpjax.errors import UserError, writing

Tree = dict[str, Any]
VERSION = 2
FOLDER = "checkpoints"
FIRST = 1  # the number of a run's first step


@dataclasses.dataclass
class _Rotation:
  """Which steps stay: the newest `keep` that are not known to be damaged, and what they need; orbax asks at every save."""

  keep: int
  needs: dict[int, set[int]]
  damaged: set[int] = dataclasses.field(default_factory=set)

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
    del context
    newest = [info.step for info in checkpoints if info.step not in self.damaged][-self.keep :]
    stay = set(newest).union(*(self.needs[step] for step in newest))
    return [info.step in stay for info in checkpoints]


class Checkpoints:
  """The checkpoints of one workdir, for the run that writes them."""

  def __init__(self, workdir: str | os.PathLike[str], *, keep: int = 2):
    self.folder = pathlib.Path(workdir).absolute() / FOLDER
    self._rotation = _Rotation(keep, {step: _needs(self.folder / str(step)) for step in steps_of(self.folder)})
    options = ocp.CheckpointManagerOptions(preservation_policy=self._rotation, cleanup_tmp_directories=True, create=True)
    with writing(self.folder):
      self._manager = ocp.CheckpointManager(self.folder, options=options)
    self._sealing: threading.Thread | None = None
    self._failed: Exception | None = None
    self._broken = False  # orbax cannot go on after a write that failed: its event loop is closed

  def save(self, step: int, items: dict[str, Any], meta: Tree) -> None:
    """Writes one step in the background; empty items are left out.

    Args:
      step: higher than every one before.
      items: {name: pytree of arrays}.
      meta: JSON types; `needs` are the steps that this one cannot do without.

    Raises:
      UserError: the disk is full or not writable, now or during the save before; what was saved before that stays.
    """
    self.wait()
    items = {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}
    saved = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    # Written while the run goes on and changes it: what counts is this moment.
    meta = json.loads(json.dumps({**meta, "version": VERSION, "items": sorted(items)}))
    self._rotation.needs[step] = set(meta["needs"])
    try:
      self._manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **saved))
    except Exception as error:  # orbax and tensorstore report a full disk as plain exceptions of many types
      self._broken = True
      raise self._cannot_write(error) from error
    self._sealing = threading.Thread(target=self._seal, args=(step,), name="seal", daemon=True)
    self._sealing.start()

  def _seal(self, step: int) -> None:
    """Until the step is on disk; then its manifest."""
    try:
      self._manager.wait_until_finished()
      if jax.process_index() == 0:
        manifest.write(self.folder / str(step))
        files.sync_folder(self.folder)
    except Exception as error:  # as in `save`; told by `wait`
      self._failed, self._broken = error, True

  def _cannot_write(self, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    reason = reason if len(reason) <= 200 else f"... {reason[-200:]}"  # tensorstore says the cause last
    return UserError(
      f"cannot write a checkpoint to {self.folder}: {reason}; earlier checkpoints are kept, "
      "free some space and run the same command again"
    )

  def wait(self) -> None:
    """Until everything is on disk; raises UserError when it cannot be written."""
    if self._sealing is not None:
      self._sealing.join()
      self._sealing = None
    if self._failed is not None:
      failed, self._failed = self._failed, None
      raise self._cannot_write(failed) from failed

  def check(self) -> None:
    """Raises UserError when the save before has failed by now; costs nothing."""
    if self._failed is not None:
      self.wait()

  def close(self) -> None:
    """Waits and closes; raises UserError as `wait`."""
    try:
      self.wait()
    finally:
      if not self._broken:
        self._manager.close()

  def steps(self) -> list[int]:
    """Committed steps, newest first."""
    return sorted(self._manager.all_steps(), reverse=True)

  def newest_good(self) -> tuple[int, Tree] | None:
    """`newest_good` of this folder; steps that are passed over go with the next save."""
    return newest_good(self.folder, self.steps(), on_damage=self._rotation.damaged.add)

  def restore(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
    """Restores items to the shapes, dtypes and shardings of `items`; empty ones and those that the step lacks are left out."""
    held = read_meta(self.folder / str(step))["items"]
    items = {name: tree for name, tree in items.items() if name in held and jax.tree.leaves(tree)}
    target = {name: ocp.args.StandardRestore(jax.tree.map(_abstract, tree)) for name, tree in items.items()}
    return dict(self._manager.restore(step, args=ocp.args.Composite(**target)).items()) if target else {}


def newest_good(
  folder: pathlib.Path, steps: Iterable[int], *, on_damage: Callable[[int], Any] = lambda step: None
) -> tuple[int, Tree] | None:
  """(step, its JSON) of the first of `steps` that is whole; a damaged one is named on stderr and passed over.

  Returns None when there is no step, or only the first one, before the end of which a run was killed: it begins again. Raises
  UserError when all are damaged, or one cannot be read for another reason.
  """
  steps, unfinished = list(steps), 0
  for step in steps:
    try:
      return step, open_meta(folder, step)
    except manifest.DamagedError as error:
      on_damage(step)
      unfinished += isinstance(error, manifest.UnfinishedError)
      print(f"warning: checkpoint {folder / str(step)} cannot be used ({error}); trying the one before", file=sys.stderr)
    except OSError as error:  # of the disk or the network; the step may be as good as new
      raise UserError(f"cannot read checkpoint {folder / str(step)}: {error}; run the same command again") from error
  if steps and not (steps == [FIRST] and unfinished):
    raise UserError(f"no checkpoint in {folder} can be read: start again with another --workdir")
  return None


def open_meta(folder: pathlib.Path, step: int) -> Tree:
  """The JSON of a step, after its files and, of the steps that it needs, those that it reads were compared with the manifests.

  Raises:
    UserError: a version that this code does not know.
    DamagedError: a file is missing or has changed.
  """
  if (folder / str(step) / "meta").is_dir() and not (folder / str(step) / manifest.FILE).is_file():
    read_meta(folder / str(step))  # the first version had no manifest, and is refused by its name
  manifest.verify(folder / str(step))
  meta = read_meta(folder / str(step))
  for number in meta["needs"]:
    manifest.verify(folder / str(number), but="live")
  return meta


def read_meta(step_folder: pathlib.Path) -> Tree:
  """The JSON of a step folder; raises UserError for a version this code does not know, DamagedError for what we never wrote."""
  path = step_folder / "meta" / "metadata"  # where orbax puts an item of JSON
  try:
    meta = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, RecursionError, FileNotFoundError) as error:
    raise manifest.DamagedError(f"{path} is damaged or missing") from error
  if not isinstance(meta, dict):
    raise manifest.DamagedError(f"{path} is damaged: it holds no object")
  if (found := meta.get("version")) != VERSION:
    raise UserError(
      f"{step_folder} is a checkpoint of version {found}, this phpjax reads version {VERSION}: "
      "open it with the phpjax that wrote it, or start again with another --workdir"
    )
  numbers = [*meta["needs"], *meta["learned"].values()]
  outside = [name for name in meta["items"] if pathlib.PurePath(name).name != name or name == ".."]
  if outside or not all(isinstance(number, int) for number in numbers):
    raise manifest.DamagedError(f"{path} is damaged: it names what is no item or no step")
  return meta


def steps_of(folder: pathlib.Path) -> list[int]:
  """The steps that were committed to a folder of checkpoints, newest first; nothing is touched."""
  found = folder.iterdir() if folder.is_dir() else ()
  return sorted((int(path.name) for path in found if path.name.isascii() and path.name.isdigit()), reverse=True)


def _needs(step_folder: pathlib.Path) -> set[int]:
  """The steps that a step needs; none if that cannot be read, which is found out and told when it is opened."""
  try:
    return set(read_meta(step_folder)["needs"])
  except (UserError, manifest.DamagedError, OSError):
    return set()


def load_numpy(step_folder: pathlib.Path, item: str) -> Any:
  """An item as numpy arrays, no structure known in advance, on any number of devices; see `open_meta` for its integrity."""
  tree = ocp.StandardCheckpointHandler().metadata(step_folder / item).tree
  empty = jax.tree.map(lambda m: np.empty(m.shape, m.dtype), tree)
  with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
    return checkpointer.restore(step_folder / item, args=ocp.args.StandardRestore(empty))


def _abstract(x: Any) -> Any:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x
