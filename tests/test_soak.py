"""SIGKILL at random moments of real runs: whatever the moment, the same command ends with the numbers of a run that lived.

`PHPJAX_SOAK=100 pytest -m slow tests/test_soak.py -rP` kills a hundred times (PHPJAX_SOAK_SEED draws the moments); CI a few.
"""

import os
import pathlib
import random
import shutil
import signal
import time

import pytest
import small
from command import SMALL, Server, cli_server, finished_run, tiny_toybox  # noqa: F401  fixtures
from runs import comparable, learned

KILLS = int(os.environ.get("PHPJAX_SOAK", "6"))
FLAGS = (*SMALL, "--config.save_every_steps=1")


def lives(cli: Server, folder: pathlib.Path, toybox: pathlib.Path, draw: random.Random, longest_s: float) -> tuple[int, float]:
  """Runs until it is finished, killed at random moments on the way -> (how often it was, seconds of all its lives)."""
  killed, begun = 0, time.monotonic()
  while True:
    done = cli(*FLAGS, f"--config.data.root={toybox}", f"--workdir={folder}", kill_after_s=draw.uniform(0, longest_s))
    if done.code == 0:
      return killed, time.monotonic() - begun
    assert done.code == -signal.SIGKILL, done.err
    assert "Traceback" not in done.err
    killed += 1


@pytest.mark.slow
def test_whenever_a_run_is_killed_it_goes_on_to_the_same_numbers(cli, finished, toybox, tmp_path):
  draw, killed, runs, begun = random.Random(int(os.environ.get("PHPJAX_SOAK_SEED", "0"))), 0, 0, time.monotonic()
  done = cli(*FLAGS, f"--config.data.root={toybox}", f"--workdir={tmp_path / 'whole'}")
  assert done.code == 0, done.err
  longest_s = time.monotonic() - begun  # of a whole run; parts of it are shorter, and end alive more often
  while killed < KILLS:
    folder = tmp_path / f"run{runs}"
    more, lasted_s = lives(cli, folder, toybox, draw, longest_s)
    killed, runs = killed + more, runs + 1
    longest_s = longest_s if more else lasted_s  # a machine's pace changes: kills after its end would be none
    assert comparable(folder) == comparable(finished)
    small.assert_same_bits(learned(folder), learned(finished))
    shutil.rmtree(folder)
  print(f"{killed} kills in {runs} runs of {longest_s:.1f} s, {time.monotonic() - begun:.0f} s in all; every run ended alike")
