"""A process in which nothing gets done any more says where every thread stands, and ends so that it is started again."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from command import ROOT, cli_server, tiny_toybox  # noqa: F401  fixtures

from configs import linear_probe
from phpjax import opening, progress, watchdog

HANG = """
import time
from phpjax import opening, run
def a_file_server_that_does_not_answer(self, name, split):
  time.sleep(100)
  raise SystemExit("nobody ended it")
run.Run._source = a_file_server_that_does_not_answer
"""
# `python -c WATCH FOLDER LIMIT_S CODE`: CODE runs under a watchdog `dog`.
WATCH = """
import ctypes, pathlib, sys, threading, time
from phpjax import watchdog
with watchdog.watching(float(sys.argv[2]) / 60, pathlib.Path(sys.argv[1])) as dog:
  exec(sys.argv[3])
print("ended")
"""


def watched(folder, limit_s, code):
  command = [sys.executable, "-c", WATCH, str(folder), str(limit_s), code]
  return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_run_that_hangs_ends_with_its_stacks_and_goes_on_when_it_is_started_again(cli, toybox, tmp_path):
  folder = tmp_path / "run"
  command = ("--config=configs/linear_probe.py:tiny", "--config.tasks=('ave',)", "--config.data.toybox=")
  command = (*command, f"--config.data.root={toybox}", f"--workdir={folder}")
  done = cli(*command, "--config.watchdog_minutes=0.2", before=HANG)
  assert done.code == watchdog.EXIT_HANGS, (done.code, done.err)
  line, (stacks,) = done.err.splitlines()[-1], folder.glob("stacks-*.txt")
  assert line.startswith("error: ") and str(stacks) in line and "0.2 minutes (watchdog_minutes)" in line
  for text in (stacks.read_text(), done.err):
    assert "a_file_server_that_does_not_answer" in text and "in _watch" in text, "all threads"
  done = cli(*command)  # at once: the lease of a run that ended like this keeps nobody out
  assert done.code == 0, done.err
  assert json.loads((folder / "results.json").read_text())["steps"] == 2


@pytest.mark.parametrize(
  "code", ["threading.Event().wait()", "lock = threading.Lock(); lock.acquire(); lock.acquire()"], ids=["waits", "deadlock"]
)
def test_a_hang_ends_in_time(tmp_path, code):
  process = watched(tmp_path, 1, code)
  out, err = process.communicate(timeout=60)
  assert process.returncode == watchdog.EXIT_HANGS and out == "", err
  assert len(list(tmp_path.iterdir())) == 1


def test_a_hang_in_foreign_code_that_keeps_the_interpreter_ends_too(tmp_path):
  process = watched(tmp_path, 1, "ctypes.PyDLL(None).sleep(100)")
  _, err = process.communicate(timeout=60)
  assert process.returncode == watchdog.EXIT_STUCK and "<module>" in err, err


def test_a_disk_that_fails_too_is_said(tmp_path):
  process = watched(tmp_path / "nowhere", 1, "threading.Event().wait()")
  _, err = process.communicate(timeout=60)
  assert process.returncode == watchdog.EXIT_HANGS and "cannot be written" in err.splitlines()[-1] and "in wait" in err


@pytest.mark.slow
@pytest.mark.parametrize(
  ("limit_s", "code"),
  [
    (3, "for _ in range(90):\n    dog.beat()\n    time.sleep(0.05)"),
    (3, "for _ in watchdog.beating(iter(range(90)), dog.beat):\n    time.sleep(0.05)"),
    (0, "time.sleep(1)"),
  ],
  ids=["beats", "items", "off"],
)
def test_who_beats_lives_and_0_is_never(tmp_path, limit_s, code):
  process = watched(tmp_path, limit_s, code)
  assert process.communicate(timeout=60) == ("ended\n", "") and process.returncode == 0
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_time_in_which_the_whole_process_was_suspended_does_not_count(tmp_path):
  process = watched(tmp_path, 4, "print('begun', flush=True); time.sleep(1.5)")
  assert process.stdout.readline() == "begun\n"
  os.kill(process.pid, signal.SIGSTOP)
  time.sleep(5)
  os.kill(process.pid, signal.SIGCONT)
  assert process.communicate(timeout=60) == ("ended\n", "") and process.returncode == 0


def test_all_that_is_told_is_a_beat_in_every_process(capsys):
  for primary in (True, False):
    beats = []
    display = progress.Progress(primary=primary, on_progress=lambda: beats.append(1))  # noqa: B023
    display.start(10)
    told = [
      lambda: display.task("ave", 0, 1, 10),  # noqa: B023
      lambda: display.step(0, 1, 1, 0.5, 2.0),  # noqa: B023
      lambda: display.evaluation("ave test", 1, 2),  # noqa: B023
      lambda: display.note("a line"),  # noqa: B023
    ]
    for count, tell in enumerate(told, start=1):
      tell()
      assert len(beats) == count


def test_a_batch_that_is_read_is_a_beat(toybox):
  """Also where nothing is told of it, as at the end of a task."""
  config = linear_probe.get_config("tiny")
  config.tasks, config.data.root = ("ave",), str(toybox)
  with opening.open_run(config, None) as opened:
    beats = []
    opened.progress.beat = lambda: beats.append(1)
    batches = opened.batches("ave", "train", batch_size=2, shuffle=False)
    for count in (1, 2):
      next(batches)
      assert len(beats) == count


def test_a_dry_run_is_not_watched():
  with watchdog.watching(1e-3, None) as dog:
    time.sleep(0.2)
    dog.beat()
