"""Several processes as one run: how they find each other, agree to stop, share rows, and end together when one of them fails.

Every process runs the same program on its own rows of every batch. With one process all of this does nothing.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import clusters  # what jax.distributed.initialize asks too; nothing public tells whether it would find anything
from jax._src import distributed as jax_distributed  # its key-value store, as orbax uses it
from jax.experimental import multihost_utils

from phpjax import rendezvous
from phpjax.agreement import Agreement
from phpjax.errors import UserError

Tree = dict[str, Any]
EXIT_FAILED = 1
_agreement: Agreement | None = None  # one for the process, as JAX's connection is


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a process stands among all processes of a run.

  Attributes:
    address: HOST:PORT of process 0, JAX's coordinator.
    num_processes: in all.
    process: number of this one, from 0.
  """

  address: str
  num_processes: int
  process: int


# -- start -----------------------------------------------------------------------------------------------------


def find(address: str | None, num_processes: int | None, process: int | None, timeout_s: float) -> Place | None:
  """This process's place: from flags, JAX_COORDINATOR_ADDRESS, and what JAX knows of SLURM, Cloud TPU, GKE and Open MPI.

  None for a run of one process. A flag wins over what is detected; `timeout_s` is for asking the cluster.

  Raises:
    UserError: something is missing or does not fit.
  """
  address = address or os.environ.get("JAX_COORDINATOR_ADDRESS")
  if num_processes == 1:
    return None
  if None in (address, num_processes, process):
    try:
      detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
      address, num_processes, process, _ = detect(address, num_processes, process, None, None, int(timeout_s))
    except Exception as error:  # JAX asks metadata servers and Kubernetes, which fail in ways of their own
      raise UserError(
        f"this looks like a cluster, and JAX cannot read it ({type(error).__name__}: {error}): set --coordinator_address, "
        "--num_processes and --process_id, or --num_processes=1 to run alone"
      ) from error
  values = {"coordinator_address": address, "num_processes": num_processes, "process_id": process}
  missing = [f"--{name}" for name, value in values.items() if value is None]
  if len(missing) == len(values) or num_processes == 1:
    return None
  if missing:
    raise UserError(f"several processes need {', '.join(missing)} too, or --num_processes=1 to run alone")
  if not 0 <= process < num_processes:
    raise UserError(f"--process_id={process} is outside 0..{num_processes - 1}, the numbers of --num_processes={num_processes}")
  rendezvous.split(address)
  return Place(address, num_processes, process)


def start(place: Place, facts: Mapping[str, Any], timeout_s: float) -> None:
  """Waits for the other processes, checks that they run the same, and joins their devices; before anything touches a device.

  Args:
    place: of this process.
    facts: {name: JSON value}, what must be equal on all processes.
    timeout_s: how long to wait for the last one.

  Raises:
    UserError: on every process, naming who is missing or differs.
  """
  facts = {"--num_processes": place.num_processes, **facts}
  me = rendezvous.Member(place.process, socket.gethostname(), facts)
  rendezvous.meet(place.address, me, place.num_processes, timeout_s)
  jax.config.update("jax_enable_preemption_service", False)  # SIGTERM stays ours: see agreement.py
  jax.distributed.initialize(place.address, place.num_processes, place.process)
  global _agreement
  _agreement = Agreement(jax_distributed.global_state.client, place.process, name())


def check_equal(facts: Mapping[str, Any]) -> None:
  """Raises UserError, on every process, when one has found something else than process 0; `facts` as in `start`."""
  if jax.process_count() == 1:
    return
  blobs = gather_bytes(json.dumps([socket.gethostname(), facts]).encode())
  first, *others = (rendezvous.Member(process, *json.loads(blob)) for process, blob in enumerate(blobs))
  for other in others:
    if text := rendezvous.difference(first, other):
      raise UserError(text)


def is_primary() -> bool:
  """Whether this process is the one that writes files and tables."""
  return jax.process_index() == 0


def name() -> str:
  """This process, for people."""
  return f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"


def banner(mesh: Mapping[str, int], batches: Mapping[str, int], versions: Mapping[str, Any]) -> str:
  """One line: where this process is and what it holds of the devices and of every batch.

  Args:
    mesh: {axis: devices}.
    batches: {field: rows of a batch over all processes}.
    versions: {package: version}.
  """
  shape = ", ".join(f"{axis} {size}" for axis, size in mesh.items())
  rows = ", ".join(f"{field} {size} ({size // jax.process_count()} here)" for field, size in batches.items())
  return (
    f"{name()}: {jax.local_device_count()} of {jax.device_count()} {jax.default_backend()} devices, mesh {shape}; {rows}; "
    + ", ".join(f"{package} {version}" for package, version in versions.items())
  )


# -- stop and end ----------------------------------------------------------------------------------------------


def stop_agreed() -> bool:
  """True from the same call on for all processes, after one of them was asked to stop; all must call it equally often."""
  return _agreement is not None and _agreement.should_stop()


def ask_to_stop(why: str) -> None:
  """Asks all processes to stop; a signal handler may call it."""
  _agreement.ask(why)


def end_together(command: Callable[[], int], good: Sequence[int]) -> int:
  """Runs a command -> its exit code; where that is not one of `good`, the other processes are told and end too.

  They would wait for this one in the middle of a step, and this one for them at its end.
  """
  try:
    code, said = command(), "has stopped, see its message"
  except Exception as error:
    if _agreement is None:
      raise
    lost = isinstance(error, jax.errors.JaxRuntimeError)  # a collective fails when another process ends
    if lost:
      _agreement.listen()
    traceback.print_exc()
    if lost:
      print(f"error: {name()}: if another process has ended, run the same command again on all of them", file=sys.stderr)
    code, said = EXIT_FAILED, f"has failed ({type(error).__name__})"
  if _agreement is not None:
    _agreement.close() if code in good else _agreement.fail(code, said)
  return code


def end_now(code: int, said: str) -> None:
  """Ends this process from any of its threads, without any cleaning up, and the others with it; does not return.

  Args:
    code: the exit code of all of them.
    said: what the others tell of this one, a predicate.
  """
  if _agreement is not None:
    _agreement.fail(code, said)
  os._exit(code)


def wait_for_all() -> None:
  """Until every process has come to this call."""
  if jax.process_count() > 1:
    gather_bytes(b"")


# -- share -----------------------------------------------------------------------------------------------------


def gather(parts: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
  """The rows of all processes, in the order that one process would have: bit for bit, of any dtype but object.

  Args:
    parts: of every batch, {key: [n, ...]} of this process's rows; n may differ between keys, batches and processes, the number
      of batches and the keys may not.

  Returns:
    The same of every batch, process 0's rows first: every process gets the same.
  """
  if jax.process_count() == 1:
    return list(parts)
  theirs = [_unpack(blob) for blob in gather_bytes(_pack(parts))]
  return [
    {key: np.concatenate([packed[key][batch] for packed in theirs]) for key in parts[batch]} for batch in range(len(parts))
  ]


def gather_bytes(blob: bytes) -> list[bytes]:
  """What every process passes, on every process, in their order."""
  sizes = multihost_utils.process_allgather(np.int32(len(blob))).tolist()
  padded = np.zeros(1 << max(sizes).bit_length(), np.uint8)  # a power of two: few programs to compile
  padded[: len(blob)] = np.frombuffer(blob, np.uint8)
  return [row[:size].tobytes() for row, size in zip(multihost_utils.process_allgather(padded), sizes, strict=True)]


def _pack(parts: Sequence[Mapping[str, np.ndarray]]) -> bytes:
  arrays: dict[str, np.ndarray] = {}
  for key in parts[0] if parts else ():
    arrays[f"rows/{key}"] = np.concatenate([part[key] for part in parts])
    arrays[f"sizes/{key}"] = np.array([len(part[key]) for part in parts])
  file = io.BytesIO()
  np.savez(file, allow_pickle=False, **arrays)
  return file.getvalue()


def _unpack(blob: bytes) -> dict[str, list[np.ndarray]]:
  """-> {key: the rows of each batch}."""
  with np.load(io.BytesIO(blob), allow_pickle=False) as arrays:
    keys = [key.removeprefix("rows/") for key in arrays if key.startswith("rows/")]
    return {key: np.split(arrays[f"rows/{key}"], np.cumsum(arrays[f"sizes/{key}"])[:-1]) for key in keys}
