"""The start-up barrier: all processes of a run meet here before JAX connects them, and learn who is missing or differs.

jax.distributed would wait for all of them too, but where one is missing it names nobody and aborts with a stack trace.
Process 0 listens at the coordinator's address, which jax.distributed takes over afterwards; each of the others sends one line
of JSON and gets one back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import time
from typing import Any

from phpjax.errors import UserError

LINE_BYTES = 1 << 20  # no longer line is read
PATIENCE_S = 5.0  # for one line of a process that has connected, and for a verdict on its way


@dataclasses.dataclass(frozen=True)
class Member:
  """A process of a run.

  Attributes:
    process: its number, from 0.
    host: where it runs.
    facts: {name: JSON value}, what must be equal on all of them.
  """

  process: int
  host: str
  facts: dict[str, Any]

  def __str__(self) -> str:
    return f"process {self.process} ({self.host})"


def meet(address: str, me: Member, num_processes: int, timeout_s: float) -> list[str]:
  """Waits until all processes are there -> the host of each.

  Args:
    address: HOST:PORT of process 0.
    me: this process.
    num_processes: how many there are in all.
    timeout_s: how long to wait for the last of them.

  Raises:
    UserError: on every process that is there: one is missing, two have the same number, or one has other facts.
  """
  host, port = split(address)
  if me.process:
    return _join(address, (host, port), me, timeout_s)
  found: dict[int, tuple[Member, socket.socket]] = {}
  try:
    with _listen(port) as server:
      verdict = _wait(server, found, me, num_processes, address, timeout_s)
      for _, connection in found.values():
        _answer(connection, verdict)
  finally:
    for _, connection in found.values():
      connection.close()
  return _open(verdict)


def split(address: str) -> tuple[str, int]:
  """ "HOST:PORT" -> (HOST, PORT); raises UserError."""
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
    raise UserError(f"coordinator_address={address!r} is not HOST:PORT, the address of process 0 and a port that is free there")
  return host.strip("[]"), int(port)


def _listen(port: int) -> socket.socket:
  """At all addresses of this host, as jax.distributed will."""
  try:
    if socket.has_dualstack_ipv6():
      return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))
  except OSError as error:
    raise UserError(f"process 0 cannot listen at port {port} ({error}): take another one for --coordinator_address") from error


def _wait(
  server: socket.socket,
  found: dict[int, tuple[Member, socket.socket]],
  me: Member,
  num_processes: int,
  address: str,
  timeout_s: float,
) -> dict[str, Any]:
  """Process 0: fills `found`, {process: (member, its connection)}, until all have come or the time is up -> the verdict."""
  end = time.monotonic() + timeout_s
  while len(found) < num_processes - 1 and (left := end - time.monotonic()) > 0:
    server.settimeout(min(left, 1.0))
    with contextlib.suppress(TimeoutError):
      connection, _ = server.accept()
      if (member := _read_member(connection)) is None:
        connection.close()
      elif member.process in found and not _is_closed(found[member.process][1]):
        connection.close()
        hosts = f"on {found[member.process][0].host} and on {member.host}"
        return {"error": f"two are process {member.process}, {hosts}: give each its own --process_id"}
      else:
        found[member.process] = member, connection
    for gone in [process for process, (_, connection) in found.items() if _is_closed(connection)]:
      found.pop(gone)[1].close()  # it ended while it waited; it may come again
  there = [me, *(found[process][0] for process in sorted(found))]
  if problems := [text for member in there if (text := difference(me, member))]:
    return {"error": problems[0]}
  if missing := sorted(set(range(num_processes)) - {member.process for member in there}):
    names = ", ".join(f"process {process}" for process in missing)
    return {
      "error": f"{names} of {num_processes} did not come to {address} within {timeout_s:g} s; there are "
      f"{', '.join(map(str, there))}: see what the missing ones say, or set --startup_timeout_s"
    }
  return {"hosts": [member.host for member in there]}


def difference(first: Member, other: Member) -> str:
  """One line on the facts in which `other` differs from `first`, "" if there are none."""
  keys = sorted(key for key in first.facts.keys() | other.facts if first.facts.get(key) != other.facts.get(key))
  if not keys:
    return ""
  shown = ", ".join(f"{key} ({other.facts.get(key)}, there {first.facts.get(key)})" for key in keys[:4])
  more = " ..." if len(keys) > 4 else ""
  return f"{other} differs from {first}: {shown}{more}; start all processes with the same code, config and flags"


def _join(address: str, where: tuple[str, int], me: Member, timeout_s: float) -> list[str]:
  """The other processes: tries until process 0 answers."""
  end, reason = time.monotonic() + timeout_s, "no answer"
  while (left := end - time.monotonic()) > 0:
    try:
      with socket.create_connection(where, timeout=min(left, PATIENCE_S)) as connection:
        connection.sendall(json.dumps(dataclasses.asdict(me)).encode() + b"\n")
        connection.settimeout(left + PATIENCE_S)  # it may be about to say who is missing
        if (verdict := _read_line(connection)) is not None:
          return _open(verdict)
    except OSError as error:  # not there yet
      reason = str(error)
    time.sleep(min(0.2, left))
  raise UserError(
    f"{me} found no process 0 at {address} within {timeout_s:g} s ({reason}): see what process 0 says, check "
    "--coordinator_address, or set --startup_timeout_s"
  )


def _open(verdict: dict[str, Any]) -> list[str]:
  if "error" in verdict:
    raise UserError(str(verdict["error"]))
  return [str(host) for host in verdict["hosts"]]


def _answer(connection: socket.socket, verdict: dict[str, Any]) -> None:
  """Sends the verdict and waits until the other side has closed: then the port is free at once."""
  with contextlib.suppress(OSError):  # one that ended just now; JAX will miss it too
    connection.settimeout(PATIENCE_S)
    connection.sendall(json.dumps(verdict).encode() + b"\n")
    connection.recv(1)


def _read_member(connection: socket.socket) -> Member | None:
  """What a process says about itself; None for a stranger."""
  connection.settimeout(PATIENCE_S)
  said = _read_line(connection)
  if said is None or not isinstance(said.get("process"), int) or not isinstance(said.get("facts"), dict):
    return None
  return Member(said["process"], str(said.get("host")), said["facts"])


def _read_line(connection: socket.socket) -> dict[str, Any] | None:
  """One line of JSON; None where there is none, or something else."""
  try:
    with connection.makefile("rb") as file:
      value = json.loads(file.readline(LINE_BYTES))
  except (OSError, ValueError, RecursionError):  # the last one from a line of many brackets
    return None
  return value if isinstance(value, dict) else None


def _is_closed(connection: socket.socket) -> bool:
  """Whether the other side has gone."""
  connection.setblocking(False)
  try:
    return connection.recv(1, socket.MSG_PEEK) == b""
  except BlockingIOError:
    return False
  except OSError:
    return True
