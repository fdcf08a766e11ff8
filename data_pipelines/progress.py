"""How far a long command is: a line on stderr now and then, or on a terminal a bar that is written over."""

import contextlib
import sys
import time

_BAR = 24
_CLEAR = "\r\033[K"


class Progress:
  """Shows clips done, the time spent and the time left; called with (done, total) as often as one likes.

  Says nothing of work that is over before the first line is due. A reader that went away is no error.
  """

  def __init__(self, title: str, every_s: float = 5.0) -> None:
    """`title` begins every line; `every_s`: seconds between lines where stderr is no terminal."""
    self._title, self._start = title, time.monotonic()
    self._last = self._start
    self._terminal = sys.stderr.isatty()
    self._every_s = 0.2 if self._terminal else every_s

  def __call__(self, done: int, total: int) -> None:
    now = time.monotonic()
    over, told = done >= total, self._last > self._start
    if not done or (now - self._last < self._every_s and not (over and told)):
      return
    self._last, spent_s = now, now - self._start
    left = duration(spent_s / done * (total - done))
    text = f"{self._title}: {done}/{total} clips, {duration(spent_s)}, about {left} left"
    full = _BAR * done // max(total, 1)
    self._write(f"{_CLEAR}[{'#' * full}{'-' * (_BAR - full)}] {text}" if self._terminal else text, over or not self._terminal)

  def clear(self) -> None:
    """Makes room for another line."""
    if self._terminal:
      self._write(_CLEAR, line=False)

  def finish(self, total: int) -> None:
    """Says how long all took."""
    self.clear()
    self._write(f"{self._title}: {total} clips in {duration(time.monotonic() - self._start)}", line=True)

  @staticmethod
  def _write(text: str, line: bool) -> None:
    with contextlib.suppress(BrokenPipeError):
      print(text, end="\n" if line else "", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
  """`45 s`, from 100 seconds on `0:02:05`."""
  whole = round(seconds)
  if whole < 100:
    return f"{whole} s"
  minutes, whole = divmod(whole, 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{whole:02d}"
