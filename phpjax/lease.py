"""One run at a time on a workdir: a lock of this machine, and beside it a lease with a heartbeat that other hosts can see.

Two files in the workdir, both gone when the run ends. `run.lock` is locked by `flock`: the kernel frees it when the run ends,
however it ends, so that a killed run never keeps the next one out. Not every shared file system shows locks to other hosts, and
some have none: `run.lease.json` says who runs, and its holder writes it anew every BEAT_S seconds.

Whether a holder on another host is alive is seen by watching: a beat within the next STALE_S seconds says that it is, and no
clock is compared with that of another host. How long the last beat is past already is measured by the file system's own clock,
on which the file of the lease and a file touched now are both stamped.

  lock free, lease of this machine     its run is dead: taken at once
  lock held, lease of this machine     refused
  lease of another host (or no locks)  refused at its next beat; taken when it is STALE_S seconds old

A run that was suspended so long that another one took its lease finds that out at its own next beat, and before a checkpoint.
A lease that is gone (someone cleaned the folder) is written anew, unless another run may have come and gone since.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from phpjax import signals
from phpjax.errors import UserError

LOCK, LEASE = "run.lock", "run.lease.json"
BEAT_S = 5.0
STALE_S = 60.0
GRACE_S = 2.0  # a killed process may hold its lock while it is being taken apart
RETRY_S = 5.0  # a read that fails may be a file server's hiccup
SETTLE_S = 1.0  # two that take a stale lease at the same time: after it both see whose it is
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class LeaseLost(UserError):
  """Another run has taken the workdir: nothing may be written into it any more."""


@contextlib.contextmanager
def held(folder: pathlib.Path | None) -> Iterator[Lease | None]:
  """A lease on a workdir, which is made if it is missing, and goes again if it stays empty; None without a folder.

  Raises UserError when another run holds it, or when the folder cannot be written to.
  """
  if folder is None:
    yield None
    return
  made = [path for path in (folder, *folder.parents) if not path.exists()]
  lease = Lease(folder)
  with signals.at_end(lease.release):
    try:
      folder.mkdir(parents=True, exist_ok=True)
      lease.acquire()
    except OSError as error:
      lease.close()
      raise UserError(f"cannot write to --workdir={folder}: {error}") from error
    try:
      yield lease
    finally:
      lease.release()
      for path in made:  # a run that was refused leaves nothing
        if path.is_dir() and not any(path.iterdir()):
          path.rmdir()


class Lease:
  """The lock and the lease of one workdir; see the module.

  Attributes:
    lost: another run has taken it.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder, self.lost = folder, False
    self._lock, self._lease = folder / LOCK, folder / LEASE
    self._descriptor: int | None = None
    self._beats, self._renewed = 0, 0.0
    self._me = {"run": uuid.uuid4().hex, "host": platform.node(), "pid": os.getpid(), "machine": machine(), "since": now_utc()}
    self._ended, self._thread, self._looking = threading.Event(), None, threading.Lock()

  def acquire(self) -> None:
    """Takes the workdir, after a wait where another host's run may be alive; raises UserError when it is."""
    try:
      while not self._take_lease(self._take_lock()):
        pass  # it changed while it was looked at
    except UserError:
      self.close()
      raise
    self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
    self._thread.start()

  def check(self) -> None:
    """Raises LeaseLost when the last beat found another run's lease; costs nothing."""
    if self.lost:
      raise LeaseLost(
        f"--workdir={self.folder} was taken over{_by(self._read()[1])}, because this run gave no sign of life for "
        f"{STALE_S:g} s (suspended?) or {LEASE} was removed; it stops here and writes nothing more"
      )

  def confirm(self) -> None:
    """Reads the lease and raises LeaseLost when it is another run's by now: before anything is written that others read.

    Raises UserError when it cannot be read for RETRY_S seconds.
    """
    give_up = time.monotonic() + RETRY_S
    while True:
      try:
        self.lost = self.lost or not self._keep_mine()
        return self.check()
      except OSError as error:
        if time.monotonic() >= give_up:
          raise UserError(
            f"cannot read {self._lease} ({error}), so nothing more is saved: run the same command again"
          ) from error
      time.sleep(0.2)

  def release(self) -> None:
    """Ends the heartbeat and removes both files, unless they are another run's by now; any thread may call it, at any time."""
    self._ended.set()
    if self._thread is not None and self._thread.is_alive():
      self._thread.join()
    try:
      if self._is_mine():
        self._lease.unlink(missing_ok=True)
        if self._descriptor is None or _is_file(self._descriptor, self._lock):
          self._lock.unlink(missing_ok=True)  # still locked: who opened it before looks again, see `_take_lock`
    except OSError as error:
      _tell(f"warning: cannot remove {self._lease} ({error}); the next run of another host waits {STALE_S:g} s for it")
    self.close()

  def close(self) -> None:
    """Gives the lock back."""
    if self._descriptor is not None:
      os.close(self._descriptor)
    self._descriptor = None

  # -- the lock of this machine --------------------------------------------------------------------------------

  def _take_lock(self) -> bool | None:
    """True: locked; False: another process holds it; None: this file system has no locks. Leaves the file there."""
    give_up = time.monotonic() + GRACE_S
    while True:
      self.close()
      self._descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
      try:
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        if time.monotonic() >= give_up:
          self.close()
          return False
        time.sleep(0.05)
        continue
      except OSError as error:
        self.close()
        if error.errno in NO_LOCKS:
          return None
        raise
      if _is_file(self._descriptor, self._lock):  # else its holder has just removed it: a lock that nobody else will see
        return True

  # -- the lease that others see -------------------------------------------------------------------------------

  def _take_lease(self, locked: bool | None) -> bool:
    """One attempt; False: it has just changed, look again. Raises UserError when its holder is alive.

    locked: what `_take_lock` says.
    """
    seen, holder = self._read()
    if seen is None:
      if locked is False:
        raise self._refused({})  # between its lock and its lease, or a reader of the file
      return self._create()
    ours = holder.get("machine") == self._me["machine"]
    if ours and locked is False:
      raise self._refused(holder)
    if ours and locked:
      self._write()
      return True
    if not self._ended_unseen(seen, holder):
      return False
    self._write()
    time.sleep(SETTLE_S)
    if not self._is_mine():
      raise self._refused(self._read()[1])
    _tell(f"--workdir={self.folder}: taken over, after {STALE_S:g} s without a sign of life{_of(holder)}")
    return True

  def _ended_unseen(self, seen: bytes, holder: dict[str, Any]) -> bool:
    """Waits until the lease is STALE_S old: True; False when it is removed before; raises UserError when it is renewed."""
    left = STALE_S - self._age()
    if left > 0:
      _tell(f"--workdir={self.folder} was held{_of(holder)}; taking it in {left:.0f} s unless that run gives a sign of life")
    until = time.monotonic() + min(left, STALE_S)
    while time.monotonic() < until:
      time.sleep(min(0.2, BEAT_S))
      self._lock.touch()
      found, by = self._read()
      if found is None:
        return False
      if found != seen:
        raise self._refused(by)
    return True

  def _age(self) -> float:
    """Seconds since the lease was written, by the file system's own clock; at least 0."""
    try:
      self._lock.touch()
      return max(self._lock.stat().st_mtime - self._lease.stat().st_mtime, 0.0)
    except FileNotFoundError:  # released in this moment
      return 0.0

  def _create(self) -> bool:
    """Writes a lease where there is none; False when another run was faster."""
    try:
      descriptor = os.open(self._lease, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
      return False
    with os.fdopen(descriptor, "wb") as file:
      file.write(self._content())
    self._renewed = _clock()
    return True

  def _write(self) -> None:
    """The lease, in one piece."""
    temporary = self._lease.with_name(f"{LEASE}.{self._me['run']}.tmp")
    try:
      temporary.write_bytes(self._content())
      os.replace(temporary, self._lease)
    finally:
      temporary.unlink(missing_ok=True)
    self._renewed = _clock()

  def _content(self) -> bytes:
    self._beats += 1
    return (json.dumps({**self._me, "beats": self._beats, "last_beat": now_utc()}, indent=1) + "\n").encode()

  def _read(self) -> tuple[bytes | None, dict[str, Any]]:
    """(the bytes of the lease, None without one; what they say, {} when they say nothing)."""
    try:
      found = self._lease.read_bytes()
      content = json.loads(found)
    except FileNotFoundError:
      return None, {}
    except ValueError:  # half written, or no lease of ours: whoever it belongs to is judged by whether it changes
      return found, {}
    return found, content if isinstance(content, dict) else {}

  def _is_mine(self) -> bool:
    return self._read()[1].get("run") == self._me["run"]

  def _keep_mine(self) -> bool:
    """Whether the lease is this run's; one that is gone is written anew. Raises OSError when it cannot be read."""
    with self._looking:
      seen, holder = self._read()
      if seen is None:
        return self._write_anew()
    if not holder:
      raise OSError(errno.EIO, "it says nothing")
    return holder.get("run") == self._me["run"]

  def _write_anew(self) -> bool:
    """Takes the place of our own lease, which is gone; False when another run has it, or may have had it.

    The lock comes first: it may be gone with the lease, and whoever locks a new one takes ours for that of a dead run.
    """
    if self._ended.is_set() or _clock() - self._renewed > STALE_S:
      return False
    locked = self._descriptor is not None and _is_file(self._descriptor, self._lock)
    if (not locked and self._take_lock() is False) or not self._create():
      return False
    _tell(f"warning: {self._lease} was gone and is written anew: leave it there while the run is at work")
    return True

  def _keep(self) -> None:
    """The heartbeat, a thread."""
    warned = False
    while not self._ended.wait(BEAT_S) and not self.lost:
      try:
        if not self._keep_mine():
          self.lost = True
        elif not self._ended.is_set():
          self._write()
        warned = False
      except OSError as error:  # a full disk, a server that is away: the run may live through it
        if not warned:
          _tell(f"warning: cannot renew {self._lease} ({error}); other hosts may take this workdir in {STALE_S:g} s")
        warned = True

  def _refused(self, holder: dict[str, Any]) -> UserError:
    return UserError(
      f"--workdir={self.folder} is in use by another run{_by(holder, ': ')}; wait for it, stop it, or take another --workdir"
    )


def machine() -> str:
  """This host since it was started, within which a lock is always seen; the host's name where it does not say more."""
  boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
  return f"{platform.node()} {boot.read_text().strip() if boot.is_file() else ''}".strip()


def _clock() -> float:
  """Seconds, those included in which the machine slept."""
  return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def now_utc() -> str:
  """For people to read; no decision rests on it."""
  return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _by(holder: dict[str, Any], before: str = " by ") -> str:
  """Who holds a lease, in words; empty when that is not known."""
  if not holder:
    return ""
  return f"{before}host {holder.get('host', '?')}, pid {holder.get('pid', '?')}, since {holder.get('since', '?')}"


def _of(holder: dict[str, Any]) -> str:
  return _by(holder, " by ") or " by an unknown run"


def _is_file(descriptor: int, path: pathlib.Path) -> bool:
  """Whether a path still leads to the open file."""
  try:
    there = path.stat()
  except FileNotFoundError:
    return False
  return os.path.samestat(os.fstat(descriptor), there)


def _tell(line: str) -> None:
  print(line, file=sys.stderr, flush=True)
