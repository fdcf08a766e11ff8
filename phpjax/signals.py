"""What SIGTERM and SIGINT do to a command while it has nothing to save: it ends within moments, wherever it is.

Python calls signal handlers between two steps of its main thread, which may compile or read for minutes. So the handler only
holds that thread still, and another one, which a signal wakes at once (signal.set_wakeup_fd), puts things in order and ends the
process. While a run learns, its own handler takes the place of this one: see `train.stop_on_signal`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

GRACE_S = 5.0  # for the functions of `at_end`: a file server may be what hangs
BOTH = (signal.SIGTERM, signal.SIGINT)
STDERR = 2  # the descriptor: locks of Python's own file may be held by the thread that stands still

_at_end: list[Callable[[], Any]] = []
_caught = threading.Event()


class Stopped(Exception):
  """A signal asked to stop; everything is saved."""


@contextlib.contextmanager
def at_end(function: Callable[[], Any]) -> Iterator[None]:
  """`function` is called when a signal ends the process inside the context, and only then."""
  _at_end.append(function)
  try:
    yield
  finally:
    _at_end.remove(function)


@contextlib.contextmanager
def ending(end: Callable[[str], Any]) -> Iterator[None]:
  """A signal ends the process: `end` gets its name, and must not return. Nothing changes outside of the main thread."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  read, write = os.pipe()
  os.set_blocking(write, False)
  thread = threading.Thread(target=_wait, args=(read, end), name="signals", daemon=True)
  thread.start()
  old_write = signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # first and last: who is held is sure to be ended
  old = {number: signal.signal(number, _hold) for number in BOTH}
  try:
    yield
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(old_write)
    os.close(write)  # ends the thread
    thread.join()
    os.close(read)


def _hold(number: int, frame: Any) -> None:
  """The handler: the main thread does nothing more; a second signal finds the default."""
  del number, frame
  _caught.set()
  for each in BOTH:
    signal.signal(each, signal.SIG_DFL)
  threading.Event().wait()


def _wait(read: int, end: Callable[[str], Any]) -> None:
  """The thread: every byte is a signal that Python has a handler for."""
  while number := os.read(read, 1):
    if number[0] in BOTH and (_caught.is_set() or signal.getsignal(number[0]) is _hold):
      name = signal.Signals(number[0]).name
      with contextlib.suppress(OSError):  # who reads it may have been stopped by the same signal: `... 2>&1 | tee log`
        os.write(STDERR, f"{name}: there is nothing new to save; the same command continues\n".encode())
      clean_up()
      end(name)


def clean_up() -> None:
  """Before a process is ended from another thread than its first: ends its children and calls the functions of `at_end`."""
  children = multiprocessing.active_children()
  for child in children:  # after us they would wait for work for ever
    child.kill()

  def call() -> None:
    for child in children:
      child.join()  # else it may still write where the functions tidy up
    for function in reversed(_at_end):
      with contextlib.suppress(OSError):  # one that fails must not keep the others from their work
        function()

  thread = threading.Thread(target=call, name="clean up", daemon=True)
  thread.start()
  thread.join(GRACE_S)


def _in_child() -> None:
  """A process that is forked inside `ending` is no part of it."""
  if any(signal.getsignal(number) is _hold for number in BOTH):
    signal.set_wakeup_fd(-1)
    for number in BOTH:
      signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_in_child)
