"""The mesh, and where arrays lie on it: batches split over all devices, everything else replicated."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from phpjax.errors import UserError

AXES = ("data", "fsdp")


def make_mesh(shape: tuple[int, int]) -> Mesh:
  """A mesh (data, fsdp) over all devices; one entry may be -1. Raises UserError when the devices do not fit.

  The axes are of type Auto: the compiler places what is not named here, as pjit did.
  """
  devices, known = jax.device_count(), math.prod(n for n in shape if n != -1)
  if list(shape).count(-1) > 1 or len(shape) != len(AXES) or any(n < 1 and n != -1 for n in shape):
    raise UserError(f"mesh={tuple(shape)}: give {AXES} sizes, at most one of them -1")
  resolved = tuple(devices // known if n == -1 else n for n in shape)
  if math.prod(resolved) != devices:
    raise UserError(
      f"mesh={tuple(shape)} does not fit {devices} devices: set --config.mesh='(-1, 1)' or sizes whose product is {devices}"
    )
  types = (AxisType.Auto,) * len(AXES)
  mesh = jax.make_mesh(resolved, AXES, axis_types=types)
  owners = [device.process_index for device in mesh.devices.flat]
  if owners == sorted(owners):
    return mesh
  # An order for fast neighbours mixes the processes; a process's rows must lie side by side to be those of the loader.
  ordered = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
  return Mesh(np.array(ordered).reshape(resolved), AXES, axis_types=types)


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
  """The leading axis is split over all devices."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def check_batch_size(batch_size: int, devices: int, field: str = "batch_size") -> str | None:
  """One line when the devices do not divide the batch, else None."""
  if batch_size > 0 and batch_size % devices == 0:
    return None
  lower, upper = batch_size // devices * devices, (batch_size // devices + 1) * devices
  choice = f"{lower} or {upper}" if lower > 0 else f"{upper}"
  return f"{field}={batch_size} does not divide over {devices} devices: set --config.{field}={choice}"


def put_batch(batch: dict[str, Any], mesh: Mesh, keys: tuple[str, ...]) -> dict[str, Any]:
  """This process's rows -> global arrays, split over the devices; other keys stay on the host.

  Beside `keys` go "query" and "features", trees of arrays, where the batch holds them (phpjax/queries.py).
  """
  put = functools.partial(jax.make_array_from_process_local_data, over_batch(mesh))
  return {k: jax.tree.map(put, batch[k]) for k in (*keys, *(k for k in ("query", "features") if k in batch))}


def put_ahead(
  batches: Iterator[dict[str, Any]], mesh: Mesh, keys: tuple[str, ...]
) -> Iterator[tuple[dict[str, Any], dict[str, jax.Array], float]]:
  """(batch, its rows on the devices, seconds waited for it on the host) of all batches in their order.

  Each is on its way to the devices before the one in front of it is handed out, so that a step need not wait for the copy. An
  error of `batches` comes behind the batches before it.
  """

  def fetch() -> tuple[dict[str, Any], dict[str, jax.Array], float] | None:
    asked = time.monotonic()
    batch = next(batches, None)
    waited_s = time.monotonic() - asked
    return None if batch is None else (batch, put_batch(batch, mesh, keys), waited_s)

  held, error = fetch(), None
  while held is not None:
    try:
      following = fetch()
    except Exception as raised:
      following, error = None, raised
    yield held
    held = following
  if error is not None:
    raise error


def put_replicated(tree: Any, mesh: Mesh) -> Any:
  """A pytree onto every device of the mesh (on several processes: every process passes the same values)."""
  where = replicated(mesh)
  if where.is_fully_addressable:
    return jax.device_put(tree, where)

  def put(leaf: Any) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
      return jax.device_put(leaf, where)
    host = np.asarray(leaf)  # device_put would compare the values of all processes first, a collective for each leaf
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

  return jax.tree.map(put, tree)


def local_rows(tree: Any, mesh: Mesh) -> Any:
  """Arrays split over the batch -> this process's rows of them, still on its devices."""
  if over_batch(mesh).is_fully_addressable:
    return tree
  return multihost_utils.global_array_to_host_local_array(tree, mesh, PartitionSpec(AXES))


def all_rows(tree: Any, mesh: Mesh) -> Any:
  """Arrays split over the batch -> all rows on every process: on the host where there are several."""
  return tree if over_batch(mesh).is_fully_addressable else multihost_utils.process_allgather(tree, tiled=True)
