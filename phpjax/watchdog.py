"""Ends a run in which nothing gets done any more, after it has said where every thread stands.

A run that hangs (a file server that does not answer, a collective that waits for a dead host, a deadlock) keeps its machines
and tells nobody. The watchdog exits with EXIT_HANGS, which a scheduler takes for a reason to start the same command again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pathlib
import platform
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

EXIT_HANGS = 75  # EX_TEMPFAIL of sysexits.h: try again
EXIT_STUCK = 1  # of faulthandler, see `Watchdog`
POLL_S = 10.0
LAST_WORDS_S = 30.0
STDERR = 2  # the descriptor: locks of Python's own file may be held by a thread that hangs

Item = TypeVar("Item")


@contextlib.contextmanager
def watching(minutes: float, folder: pathlib.Path | None) -> Iterator[Watchdog]:
  """A watchdog at work, but for 0 minutes or without a folder (a dry run): then its beats do nothing."""
  dog = Watchdog(60 * minutes if folder is not None else 0, folder)
  dog.start()
  try:
    yield dog
  finally:
    dog.close()


def beating(items: Iterator[Item], beat: Callable[[], None]) -> Iterator[Item]:
  """The same items, with a beat for each that comes."""
  for item in items:
    beat()
    yield item


class Watchdog:
  """Waits for beats; see the module. Time for which the whole process was suspended does not count.

  A thread of Python cannot run while another one hangs in foreign code without giving up the interpreter. A timer of
  faulthandler, which needs no interpreter, then writes the stacks to stderr after twice the time and exits with EXIT_STUCK. (To
  that timer suspended time is time: a run that was suspended for longer ends there, as one that was killed.)

  Args:
    limit_s: seconds without a beat; 0 watches nothing.
    folder: where the file with the stacks goes.
  """

  def __init__(self, limit_s: float, folder: pathlib.Path | None):
    self.limit_s, self.folder = limit_s, folder
    self._last = time.monotonic()
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

  def beat(self) -> None:
    """Something was done: a step, a batch of an evaluation, a clip. Cheap enough for every one of them."""
    self._last = time.monotonic()

  def start(self) -> None:
    """Begins to watch."""
    if self.limit_s > 0:
      self._thread.start()

  def close(self) -> None:
    """Ends the watch; may be called twice."""
    self._ended.set()
    if self._thread.is_alive():
      self._thread.join()
      faulthandler.cancel_dump_traceback_later()

  def _watch(self) -> None:
    poll = min(POLL_S, self.limit_s / 10)
    looked = time.monotonic()
    while True:
      faulthandler.dump_traceback_later(2 * self.limit_s, exit=True, file=STDERR)
      if self._ended.wait(poll):
        return
      slept, looked = time.monotonic() - looked, time.monotonic()
      if slept > 3 * poll + 1:
        self._last += slept  # suspended, with all other threads
      if looked - self._last > self.limit_s:
        self._end()

  def _end(self) -> None:
    """Writes the stacks of all threads to a file and to stderr, says so, and ends the process without any cleaning up."""
    faulthandler.dump_traceback_later(LAST_WORDS_S, exit=True, file=STDERR)  # the disk itself may be what hangs
    path = self.folder / f"stacks-{platform.node()}-{os.getpid()}.txt"
    try:
      with open(path, "w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
      where = f"are above and in {path}"
    except OSError as error:
      where = f"are above ({path} cannot be written: {error})"
    faulthandler.dump_traceback(STDERR, all_threads=True)
    line = (
      f"error: no step, no batch of an evaluation and no clip was finished for {self.limit_s / 60:g} minutes "
      f"(watchdog_minutes); the stacks of all threads {where}; the same command continues at the newest checkpoint\n"
    )
    os.write(STDERR, line.encode())
    os._exit(EXIT_HANGS)
