"""How the processes of a run stop at the same point, and end together when one of them fails.

Each has a thread that looks twice a second into JAX's key-value store for a message of the others. It costs a step nothing: no
collective, no call over the network. JAX's own agreement (multihost_utils.reached_preemption_sync_point) is not used: orbax
asks it at every save with a count of its own, and it settles on a count that one of the two callers never reaches.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

import jax

from phpjax import signals

LOOK_EVERY_S = 0.5
GRACE_S = 3.0  # for the others to hear of a failure, and for a process that fails by itself to say so itself
SETTLE_S = 60.0  # for all processes to answer a request to stop
EXIT_LOST = 1  # another process is gone
FOLDER = "phpjax/"
STOP, FAILED, COUNTS = f"{FOLDER}stop", f"{FOLDER}failed", f"{FOLDER}counts/"


class Agreement:
  """One process's side of it.

  Args:
    store: JAX's DistributedRuntimeClient.
    process: number of this process.
    name: of this process, for people.
  """

  def __init__(self, store: Any, process: int, name: str):
    self._store, self._process, self._name = store, process, name
    self._lock = threading.Lock()
    self._calls = 0
    self._stop_at: int | None = None  # the call of `should_stop` that says yes
    self._asked = ""
    self._finished = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="agreement", daemon=True)
    self._thread.start()

  def ask(self, why: str) -> None:
    """Asks all processes to stop; a signal handler may call it: the thread does the rest."""
    self._asked = why

  def should_stop(self) -> bool:
    """True from the same call on for all processes, after one has asked; all must call it equally often."""
    with self._lock:
      self._calls += 1
      return self._stop_at is not None and self._calls >= self._stop_at

  def fail(self, code: int, said: str) -> None:
    """Ends this process at once with an exit code, and the others with the same; does not return."""
    self._finished.set()
    try:
      self._store.key_value_set(FAILED, f"{code} {self._name} {said}")
    except jax.errors.JaxRuntimeError as error:  # another one has failed before, or the one that holds the store is gone
      print(f"note: the other processes were not told ({str(error).splitlines()[0][:100]})", file=sys.stderr)
    if self._process == 0:
      time.sleep(GRACE_S)  # it holds the store
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

  def listen(self) -> None:
    """Gives the thread the time to hear why another process has ended, and to end this one; returns if none has said."""
    time.sleep(2 * LOOK_EVERY_S + GRACE_S / 2)

  def close(self) -> None:
    """Ends the thread: one that is left inside JAX while Python shuts down aborts the process."""
    self._finished.set()
    self._thread.join(2 * LOOK_EVERY_S)
    if self._thread.is_alive():  # it waits for answers of processes that have finished
      jax.distributed.shutdown()
      self._thread.join(SETTLE_S)

  def _watch(self) -> None:
    told = False
    while not self._finished.wait(LOOK_EVERY_S):
      try:
        if self._asked and not told:
          told = True
          self._store.key_value_set(STOP, f"{self._asked} on {self._name}", allow_overwrite=True)
        said = dict(self._store.key_value_dir_get(FOLDER))
        if FAILED in said:
          self._follow(said[FAILED])
        if STOP in said and self._stop_at is None:
          self._settle(said[STOP])
      except jax.errors.JaxRuntimeError as error:
        if not self._finished.is_set():
          self._follow(f"{EXIT_LOST} another process is gone ({str(error).splitlines()[0][:100]}): run the same command again")
        return

  def _settle(self, why: str) -> None:
    """Holds this process at its next call until all have told how many they made; the one after the largest count stops."""
    with self._lock:
      self._store.key_value_set(f"{COUNTS}{self._process}", str(self._calls))
      self._store.wait_at_barrier(STOP, int(SETTLE_S * 1000))
      self._stop_at = max(int(count) for _, count in self._store.key_value_dir_get(COUNTS)) + 1
    if self._process == 0:
      print(f"{why}: saving after this step; the same command continues", file=sys.stderr, flush=True)

  def _follow(self, message: str) -> None:
    """Ends this process because another one has ended."""
    code, _, said = message.partition(" ")
    time.sleep(GRACE_S / 2)  # if this one failed too, it says so itself
    if not self._finished.is_set():
      print(f"error: {self._name} ends: {said}", file=sys.stderr, flush=True)
      signals.clean_up()
      os._exit(int(code))
