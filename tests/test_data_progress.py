"""The progress of long data commands: lines on stderr, a bar on a terminal."""

import io
import sys

import pytest

from data_pipelines import progress


class Terminal(io.StringIO):
  def isatty(self) -> bool:
    return True


class Clock:
  """Time that passes when told to."""

  def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
    self.now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch) -> Clock:
  return Clock(monkeypatch)


def test_a_line_every_few_seconds_and_the_last_one(clock, capsys):
  show = progress.Progress("prepare", every_s=10)
  for done in range(1, 26):
    clock.now += 1
    show(done, 25)
  assert capsys.readouterr().err.splitlines() == [
    "prepare: 10/25 clips, 10 s, about 15 s left",
    "prepare: 20/25 clips, 20 s, about 5 s left",
    "prepare: 25/25 clips, 25 s, about 0 s left",
  ]
  clock.now = 125
  show.finish(25)
  assert capsys.readouterr().err == "prepare: 25 clips in 0:02:05\n"


def test_short_work_says_nothing(clock, capsys):
  show = progress.Progress("toybox", every_s=3)
  for done in range(4):
    clock.now += 0.5
    show(done, 3)
  assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal_makes_room_for_other_lines(clock, monkeypatch):
  monkeypatch.setattr(sys, "stderr", terminal := Terminal())
  show = progress.Progress("check ave")
  clock.now = 600
  show(12, 24)
  assert terminal.getvalue() == f"\r\033[K[{12 * '#'}{12 * '-'}] check ave: 12/24 clips, 0:10:00, about 0:10:00 left"
  terminal.truncate(0)
  show.clear()
  assert terminal.getvalue().endswith("\r\033[K")


def test_a_reader_that_went_away_is_no_error(clock, monkeypatch):
  def gone(*text: object, **options: object) -> None:
    raise BrokenPipeError

  monkeypatch.setattr(progress, "print", gone, raising=False)
  show = progress.Progress("check ave", every_s=0)
  clock.now = 1
  show(1, 2)
  assert show._last == 1
