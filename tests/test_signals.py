"""A signal while a command has nothing to save ends it within moments: with 42, one line, and nothing left behind."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from command import ROOT, SMALL, cli_server, finished_run, tiny_toybox  # noqa: F401  fixtures
from runs import checkpoints, comparable, learned
from small import assert_same_bits

LINE = "{}: there is nothing new to save; the same command continues"

# Says "ready" and then does SLOW for minutes: `python -c ENDED SLOW`.
ENDED = """
import hashlib, multiprocessing, os, sys, time
from phpjax import signals
print(os.getpid(), flush=True)
with signals.at_end(lambda: print("cleaned", flush=True)), signals.at_end(lambda: print("first", flush=True)):
  with signals.ending(lambda name: os._exit(42)):
    print("ready", flush=True)
    exec(sys.argv[1])
"""
SLOW = {
  "waits": "time.sleep(100)",
  "is in foreign code that no signal interrupts": "hashlib.pbkdf2_hmac('sha256', b'x', b'y', 2**31 - 1)",
  "swallows exceptions": "while True:\n  try:\n    time.sleep(0.01)\n  except BaseException:\n    pass",
  "has children": "p = multiprocessing.get_context('fork').Process(target=time.sleep, args=(100,)); p.start(); p.join()",
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("slow", SLOW)
def test_it_ends_wherever_it_is(slow, number):
  pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
  process = subprocess.Popen([sys.executable, "-c", ENDED, SLOW[slow]], cwd=ROOT, text=True, **pipes)
  try:
    while process.stdout.readline().strip() != "ready":
      pass
    time.sleep(0.5)
    begun = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)  # a child that lives on would keep the pipes open
  finally:
    process.kill()
  assert process.returncode == 42 and time.monotonic() - begun < 5, err
  assert err.splitlines() == [LINE.format(number.name)] and out.splitlines() == ["first", "cleaned"]


@pytest.mark.parametrize("slow", ["waits", "swallows exceptions"])
def test_it_ends_where_nobody_reads_what_it_says(slow):
  """Ctrl-C in `... 2>&1 | tee log` stops tee too."""
  read, write = os.pipe()
  process = subprocess.Popen(
    [sys.executable, "-c", ENDED, SLOW[slow]], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=write
  )
  os.close(write)
  try:
    while process.stdout.readline().strip() != "ready":
      pass
    os.close(read)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
  finally:
    process.kill()
  assert process.returncode == 42 and out.splitlines() == ["first", "cleaned"]


FORKED = """
import os, signal, time
from phpjax import signals
with signals.ending(lambda name: os._exit(42)):
  if (child := os.fork()) == 0:
    time.sleep(100)
  time.sleep(0.5)
  os.kill(child, signal.SIGTERM)
  assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
  time.sleep(0.5)
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and signal.set_wakeup_fd(-1) == -1
"""


def test_a_signal_to_a_child_is_not_ours_and_afterwards_all_is_as_it_was():
  done = subprocess.run([sys.executable, "-c", FORKED], cwd=ROOT, text=True, capture_output=True, timeout=60)
  assert done.returncode == 0 and not done.stderr, done.stderr


# -- the commands ------------------------------------------------------------------------------------------------

# Sends the signal when a function is called: "module", "function", the number of the call.
AT = """
import importlib, os, signal
module = importlib.import_module("phpjax.{}")
real, calls = module.{}, []
def call(*args, **options):
  calls.append(1)
  if len(calls) == {}:
    os.kill(os.getpid(), signal.SIGTERM)
  return real(*args, **options)
module.{} = call
"""


def at(module: str, function: str, count: int = 1) -> str:
  return AT.format(module, function, count, function)


def stopped(done, *, line: str = LINE.format("SIGTERM")) -> None:
  """Asserts that a command was ended, and says no more."""
  assert done.code == 42 and "Traceback" not in done.err, done.err
  assert [said for said in done.err.splitlines() if "resource_tracker" not in said and "warnings.warn" not in said][-1] == line


COMPOSING = """
import os, signal
from data_pipelines.toybox import compose
real = compose._write
def write(root, seed, sizes, workers, progress):
  def told(done, total):
    progress(done, total)
    if done == 3:
      os.kill(os.getpid(), signal.SIGTERM)
  return real(root, seed, sizes, 2, told)
compose._write = write
"""


@pytest.mark.slow
def test_while_the_toybox_is_composed(cli, tmp_path):
  done = cli(*SMALL, f"--config.data.root={tmp_path / 'data'}", f"--workdir={tmp_path / 'run'}", before=COMPOSING)
  stopped(done)
  assert not [p for p in tmp_path.rglob("*") if p.is_file()], "no lease, and no half of a toybox"
  assert not [p for p in tmp_path.iterdir() if p.name != "run"]


@pytest.mark.parametrize(
  "moment",
  [
    ("experiment", "build"),
    pytest.param(("optimizer", "settings"), marks=pytest.mark.slow),
    pytest.param(("resume", "add_task"), marks=pytest.mark.slow),
    pytest.param(("resume", "_fill"), marks=pytest.mark.slow),
    ("results", "draw"),
    pytest.param(("figures", "save", 2), marks=pytest.mark.slow),
  ],
  ids=lambda moment: moment[1],
)
def test_while_a_run_opens_or_draws_and_the_same_command_continues(cli, toybox, finished, tmp_path, moment):
  folder = tmp_path / "run"
  shutil.copytree(finished, folder)
  (folder / "results.json").unlink()
  before = [p.name for p in checkpoints(folder)]
  command = (*SMALL, f"--config.data.root={toybox}", f"--workdir={folder}")
  stopped(cli(*command, before=at(*moment)))
  assert not [p for p in folder.iterdir() if p.name.startswith(("run.", "results"))]
  assert [p.name for p in checkpoints(folder)] == before
  done = cli(*command)
  assert done.code == 0, done.err
  assert comparable(folder) == comparable(finished)
  assert_same_bits(learned(folder), learned(finished))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["evaluate", "dry_run"])
def test_in_the_modes_that_learn_nothing(cli, toybox, finished, tmp_path, mode):
  folder = tmp_path / "run"
  shutil.copytree(finished, folder)
  command = (*SMALL, f"--config.data.root={toybox}", f"--workdir={folder}", f"--mode={mode}")
  moment = {"evaluate": ("results", "statement", 2), "dry_run": ("results", "planned_bytes")}[mode]
  stopped(cli(*command, before=at(*moment)))
  assert {p.name for p in folder.iterdir()} == {p.name for p in finished.iterdir()}


@pytest.mark.slow
def test_while_labels_are_decoded_for_the_trivial_predictor_what_was_learned_is_saved(cli, toybox, finished, tmp_path):
  """The second evaluation of AVS: its training labels are masks, and they are decoded one batch after the other."""
  folder = tmp_path / "run"
  command = (*SMALL, f"--config.data.root={toybox}", f"--workdir={folder}")
  done = cli(*command, before=DECODING)
  stopped(done, line="SIGTERM: saving after this step; the same command continues")
  assert "2 batches" in done.out, "of many"
  done = cli(*command)
  assert done.code == 0 and "continuing at task 2/2" in done.err, done.err
  assert comparable(folder) == comparable(finished)
  assert_same_bits(learned(folder), learned(finished))


DECODING = """
import os, signal
from phpjax import results
real, count = results.read, [0]
def read(run, source, title):
  for batch in real(run, source, title):
    count[0] += 1
    print(count[0], "batches", flush=True)
    if count[0] == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    yield batch
results.read = read
"""
