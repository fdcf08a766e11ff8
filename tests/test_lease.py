"""Two runs never write one workdir, and a run that was killed never keeps the next one out."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from command import ROOT, cli_server, tiny_toybox  # noqa: F401  fixtures

from phpjax import lease
from phpjax.errors import UserError

PROBE = ("--config=configs/linear_probe.py:tiny", "--config.tasks=('ave',)", "--config.num_epochs=2", "--config.data.toybox=")
ELSEWHERE = {"run": "x", "host": "far", "pid": 7, "machine": "far 1", "since": "2026-01-01 12:00:00 UTC", "beats": 1}

# Holds a workdir until its stdin is closed: `python -c HOLD FOLDER SETTINGS`, where SETTINGS is Python that changes the module.
HOLD = """
import pathlib, sys
from phpjax import errors, lease
exec(sys.argv[2])
try:
  with lease.held(pathlib.Path(sys.argv[1])) as held:
    print("held", flush=True)
    sys.stdin.read()
    held.confirm()
except errors.UserError as error:
  print(f"refused {error}", flush=True)
"""
NO_LOCKS = """
import errno, fcntl
def flock(*arguments):
  raise OSError(errno.ENOLCK, "no locks")
fcntl.flock = flock
"""
QUICK = "lease.BEAT_S, lease.STALE_S, lease.GRACE_S, lease.SETTLE_S = 0.1, 6.0, 0.2, 0.5\n"
PIPES = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)


@pytest.fixture
def quick(monkeypatch):
  """Seconds become tenths."""
  for name, value in {"BEAT_S": 0.1, "STALE_S": 2.0, "GRACE_S": 0.2, "SETTLE_S": 0.2}.items():
    monkeypatch.setattr(lease, name, value)


@pytest.fixture
def no_locks(monkeypatch):
  """A file system without locks."""

  def flock(*arguments):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(lease.fcntl, "flock", flock)


@contextlib.contextmanager
def holder(folder, settings=""):
  """A process that has asked for the workdir; gives (process, what it said first)."""
  command = [sys.executable, "-c", HOLD, str(folder), settings]
  process = subprocess.Popen(command, cwd=ROOT, text=True, **PIPES)
  try:
    yield process, process.stdout.readline().strip()
  finally:
    process.kill()
    process.communicate()


def refusal(folder):
  """The line with which a workdir is refused."""
  with pytest.raises(UserError) as error, lease.held(folder):
    pass
  assert not isinstance(error.value, lease.LeaseLost) and "\n" not in str(error.value)
  return str(error.value)


def wait_until(true):
  """Fails after a minute."""
  end = time.monotonic() + 60
  while not true():
    assert time.monotonic() < end
    time.sleep(0.02)


def beating(folder, ended):
  """Beats of a run on another host, a thread."""

  def beat():
    for count in range(1, 10_000):
      lease_of(folder, beats=count)
      if ended.wait(0.2):
        return

  thread = threading.Thread(target=beat)
  thread.start()
  return thread


def lease_of(folder, **changes):
  """Writes a lease of another host's run."""
  (folder / "lease.new").write_text(json.dumps({**ELSEWHERE, **changes}))
  os.replace(folder / "lease.new", folder / lease.LEASE)


# -- on one machine ----------------------------------------------------------------------------------------------


def test_the_second_is_refused_with_who_and_since_when_and_nothing_stays_behind(tmp_path, quick):
  folder = tmp_path / "deep" / "run"
  with lease.held(folder) as held:
    content = json.loads((folder / lease.LEASE).read_text())
    line = refusal(folder)
    for word in (str(folder), f"host {content['host']}", f"pid {os.getpid()}", f"since {content['since']}"):
      assert word in line
    held.confirm()
    (folder / "config.json").write_text("{}")
  assert [p.name for p in folder.iterdir()] == ["config.json"]
  with lease.held(folder):
    pass
  with lease.held(tmp_path / "other" / "run"):
    pass
  assert not (tmp_path / "other").exists(), "a run that wrote nothing leaves nothing"


def test_a_killed_run_keeps_nobody_out(tmp_path):
  """With the times as they are, and even while its lease is fresh."""
  with holder(tmp_path) as (process, said):
    assert said == "held" and (tmp_path / lease.LEASE).is_file()
    os.kill(process.pid, signal.SIGKILL)
    begun = time.monotonic()
    with lease.held(tmp_path) as held:
      assert time.monotonic() - begun < lease.STALE_S / 3
      held.confirm()
      assert json.loads((tmp_path / lease.LEASE).read_text())["pid"] == os.getpid()


def test_a_suspended_run_still_holds_its_workdir(tmp_path, quick):
  with holder(tmp_path, QUICK) as (process, said):
    assert said == "held"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.5 * lease.STALE_S)
    assert f"pid {process.pid}" in refusal(tmp_path)


@pytest.mark.parametrize("settings", [QUICK, QUICK + NO_LOCKS], ids=["locks", "no_locks"])
@pytest.mark.parametrize("there", ["nothing", "stale"])
def test_of_several_that_start_together_one_gets_it(tmp_path, settings, there):
  if there == "stale":
    lease_of(tmp_path)
    os.utime(tmp_path / lease.LEASE, (1e9, 1e9))
  with contextlib.ExitStack() as stack:
    command = [sys.executable, "-c", HOLD, str(tmp_path), settings]
    processes = [subprocess.Popen(command, cwd=ROOT, text=True, **PIPES) for _ in range(5)]
    for process in processes:
      stack.callback(process.communicate)
      stack.callback(process.kill)
    said = [process.stdout.readline().split(" ")[0].strip() for process in processes]
    assert sorted(said) == ["held", *["refused"] * 4]
    winner = processes[said.index("held")]
    assert json.loads((tmp_path / lease.LEASE).read_text())["pid"] == winner.pid
    assert winner.communicate("")[0] == "", "it holds it to its end"
  assert not (tmp_path / lease.LEASE).exists()


def test_a_lock_file_that_its_holder_removes_in_this_moment_locks_nothing(tmp_path, quick, monkeypatch):
  """The new one is locked instead, or the next run would lock that."""
  real, removed = lease.fcntl.flock, []

  def flock(descriptor, how):
    if not removed:
      removed.append((tmp_path / lease.LOCK).unlink())
    real(descriptor, how)

  monkeypatch.setattr(lease.fcntl, "flock", flock)
  with lease.held(tmp_path):
    assert f"pid {os.getpid()}" in refusal(tmp_path)


# -- between hosts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_run_on_another_host_is_seen_by_its_beats(tmp_path, monkeypatch, request, locks, when):
  """With the times as they are: at the next beat; also one that takes the workdir in the moment in which it seemed free."""
  if not locks:
    request.getfixturevalue("no_locks")
  if when == "meanwhile":
    read, free = lease.Lease._read, [(None, {})]
    monkeypatch.setattr(lease.Lease, "_read", lambda self: free.pop() if free else read(self))
  lease_of(tmp_path)
  thread = beating(tmp_path, ended := threading.Event())
  begun = time.monotonic()
  try:
    line = refusal(tmp_path)
    assert "host far, pid 7, since 2026-01-01 12:00:00 UTC" in line
    assert time.monotonic() - begun < lease.STALE_S / 3
  finally:
    ended.set()
    thread.join()
  assert json.loads((tmp_path / lease.LEASE).read_text())["host"] == "far", "who is refused changes nothing"


def test_a_run_on_another_host_that_is_gone_is_followed_after_a_wait(tmp_path, quick, capsys):
  lease_of(tmp_path)
  begun = time.monotonic()
  with lease.held(tmp_path) as held:
    assert time.monotonic() - begun >= 0.8 * lease.STALE_S
    held.confirm()
  waiting, taken = capsys.readouterr().err.splitlines()
  assert "unless that run gives a sign of life" in waiting and "taken over" in taken
  assert all("host far, pid 7" in line and str(tmp_path) in line for line in (waiting, taken))


def test_an_old_lease_is_taken_without_a_wait_whatever_the_clocks_of_the_hosts_say(tmp_path, monkeypatch, capsys):
  """Its age is that of its file on the file system's clock; times are as they are."""
  lease_of(tmp_path, last_beat="9999-01-01 00:00:00 UTC")
  old = (tmp_path / lease.LEASE).stat().st_mtime - lease.STALE_S - 5
  os.utime(tmp_path / lease.LEASE, (old, old))
  monkeypatch.setattr(time, "time", lambda: 0.0)
  begun = time.monotonic()
  with lease.held(tmp_path):
    assert time.monotonic() - begun < lease.STALE_S / 3
  [line] = capsys.readouterr().err.splitlines()
  assert "taken over" in line


def test_of_two_that_take_an_old_lease_the_later_one_has_it(tmp_path, monkeypatch):
  monkeypatch.setattr(lease, "SETTLE_S", 2.0)
  lease_of(tmp_path)
  os.utime(tmp_path / lease.LEASE, (1e9, 1e9))
  threading.Timer(0.5, lambda: lease_of(tmp_path, run="y", host="farther")).start()
  assert "host farther, pid 7" in refusal(tmp_path)
  assert json.loads((tmp_path / lease.LEASE).read_text())["run"] == "y"


def test_a_lease_stamped_in_the_future_is_watched_no_longer_than_any(tmp_path, quick):
  lease_of(tmp_path)
  os.utime(tmp_path / lease.LEASE, (time.time() + 30,) * 2)
  begun = time.monotonic()
  with lease.held(tmp_path):
    assert lease.STALE_S <= time.monotonic() - begun < lease.STALE_S + 20


def test_a_run_that_ends_while_it_is_watched_is_followed_at_once(tmp_path, monkeypatch):
  monkeypatch.setattr(lease, "SETTLE_S", 0)
  lease_of(tmp_path)
  threading.Timer(0.5, (tmp_path / lease.LEASE).unlink).start()
  begun = time.monotonic()
  with lease.held(tmp_path):
    assert time.monotonic() - begun < lease.STALE_S / 3


@pytest.mark.parametrize("content", ["", "{", "[1]", '"text"', "null", "\x00\xff"])
def test_a_lease_that_cannot_be_read_is_judged_by_whether_it_changes(tmp_path, quick, content):
  (tmp_path / lease.LEASE).write_text(content, encoding="latin-1")
  with lease.held(tmp_path) as held:
    held.confirm()


def test_without_locks_the_beats_alone_keep_others_out_and_a_killed_run_does_not_for_long(tmp_path, quick, no_locks):
  with holder(tmp_path, QUICK + NO_LOCKS) as (process, said):
    assert said == "held" and f"pid {process.pid}" in refusal(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    with lease.held(tmp_path) as held:
      held.confirm()
  assert not list(tmp_path.iterdir())


# -- a run that lost it ------------------------------------------------------------------------------------------


def test_who_was_suspended_and_followed_stops_and_leaves_the_other_alone(tmp_path, quick):
  """On hosts that do not see each other's locks."""
  with holder(tmp_path, QUICK + NO_LOCKS) as (process, said):
    assert said == "held"
    os.kill(process.pid, signal.SIGSTOP)
    with lease.held(tmp_path) as held:
      os.kill(process.pid, signal.SIGCONT)
      told, _ = process.communicate("")  # it confirms at its end, as before a checkpoint
      assert told.startswith("refused") and "taken over by host" in told and f"pid {os.getpid()}" in told, told
      held.confirm()
      assert json.loads((tmp_path / lease.LEASE).read_text())["pid"] == os.getpid()


def test_the_heartbeat_finds_it_lost(tmp_path, quick):
  with lease.held(tmp_path) as held:
    held.check()
    lease_of(tmp_path)
    wait_until(lambda: held.lost)
    for ask in (held.check, held.confirm):
      with pytest.raises(lease.LeaseLost, match="taken over by host far, pid 7"):
        ask()
  assert (tmp_path / lease.LEASE).exists(), "what belongs to another run stays"


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("gone", [(lease.LEASE,), (lease.LEASE, lease.LOCK)], ids=["lease", "both"])
@pytest.mark.parametrize("by", ["the heartbeat", "a save"])
def test_one_that_is_gone_is_written_anew_and_keeps_others_out(tmp_path, quick, request, monkeypatch, capsys, by, gone, locks):
  """Someone has cleaned the folder."""
  if not locks:
    request.getfixturevalue("no_locks")
  if by == "a save":
    monkeypatch.setattr(lease, "BEAT_S", 1.5)
  with lease.held(tmp_path) as held:
    for name in gone:
      (tmp_path / name).unlink()
    if by == "a save":
      held.confirm()
    wait_until((tmp_path / lease.LEASE).exists)
    held.confirm()
    assert f"pid {os.getpid()}" in refusal(tmp_path)
  assert not list(tmp_path.iterdir())
  [line] = capsys.readouterr().err.splitlines()[:1]
  assert line.startswith(f"warning: {tmp_path / lease.LEASE} was gone and is written anew")


def test_one_that_is_gone_is_lost_where_another_run_holds_the_lock(tmp_path, quick):
  """Of this machine, which found the folder cleaned, and is about to write its own."""
  with lease.held(tmp_path) as held:
    for name in (lease.LEASE, lease.LOCK):
      (tmp_path / name).unlink()
    with open(tmp_path / lease.LOCK, "w") as other:
      lease.fcntl.flock(other, lease.fcntl.LOCK_EX)
      with pytest.raises(lease.LeaseLost, match="taken over, because"):
        held.confirm()
  assert not (tmp_path / lease.LEASE).exists()


def test_one_that_is_gone_after_a_long_silence_is_lost(tmp_path, monkeypatch):
  """Another host's run may have taken it, gone on from our checkpoint, and ended."""
  now = [0.0]
  monkeypatch.setattr(lease, "_clock", lambda: now[0])
  with lease.held(tmp_path) as held:
    now[0] = lease.STALE_S + 1
    (tmp_path / lease.LEASE).unlink()
    with pytest.raises(lease.LeaseLost, match="no sign of life"):
      held.confirm()
  assert not (tmp_path / lease.LEASE).exists()


@pytest.mark.parametrize("lasts_s", [0.5, 600])
def test_a_read_that_fails_is_tried_again_before_a_save_is_given_up(tmp_path, monkeypatch, lasts_s):
  monkeypatch.setattr(lease, "RETRY_S", 1.5)
  with lease.held(tmp_path) as held:
    read, until = lease.Lease._read, time.monotonic() + lasts_s

    def failing(self):
      if time.monotonic() < until:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
      return read(self)

    with monkeypatch.context() as patched:
      patched.setattr(lease.Lease, "_read", failing)
      if lasts_s < lease.RETRY_S:
        held.confirm()
      else:
        with pytest.raises(UserError, match=r"cannot read .*Input/output error.*run the same command again") as error:
          held.confirm()
        assert not isinstance(error.value, lease.LeaseLost)
    held.confirm()


def test_it_is_renewed_and_a_disk_that_fails_is_told_once_and_survived(tmp_path, quick, monkeypatch, capsys):
  with lease.held(tmp_path) as held:
    beats = lambda: json.loads((tmp_path / lease.LEASE).read_text())["beats"]
    wait_until(lambda: beats() > 2)
    asked = []

    def full(source, target):
      asked.append(target)
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
      patched.setattr(os, "replace", full)
      wait_until(lambda: len(asked) > 2)
    last = beats()
    wait_until(lambda: beats() > last)
    held.confirm()
  [line] = capsys.readouterr().err.splitlines()
  assert line.startswith("warning:") and "No space left" in line and str(tmp_path / lease.LEASE) in line


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  for folder in (tmp_path / "file", tmp_path / "file" / "run"):
    assert "cannot write to --workdir=" in refusal(folder)


# -- the commands ------------------------------------------------------------------------------------------------


def files(folder):
  return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if not p.name.startswith("run.")}


@pytest.mark.parametrize(("beat_s", "logged"), [pytest.param(600, 2, marks=pytest.mark.slow), (0.05, 1)])
def test_a_run_whose_workdir_is_taken_writes_no_checkpoint_and_stops_at_the_first_beat(cli, toybox, tmp_path, beat_s, logged):
  """Taken after its first step, of two in the epoch."""
  folder = tmp_path / "run"
  before = TAKE.format(folder=str(folder), content=json.dumps(ELSEWHERE), beat_s=beat_s)
  done = cli(*PROBE, f"--config.data.root={toybox}", f"--workdir={folder}", before=before)
  assert done.code == 2 and "Traceback" not in done.err, done.err
  assert done.err.splitlines()[-1].startswith("error: ") and "taken over by host far, pid 7" in done.err.splitlines()[-1]
  assert not [p for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]
  assert len((folder / "metrics.jsonl").read_text().splitlines()) == logged
  assert json.loads((folder / lease.LEASE).read_text()) == ELSEWHERE


@pytest.mark.slow
def test_train_and_evaluate_refuse_a_workdir_in_use(cli, toybox, tmp_path):
  folder = tmp_path / "run"
  command = (*PROBE, f"--config.data.root={toybox}", f"--workdir={folder}")
  done = cli(*command)
  assert done.code == 0 and not [p for p in folder.iterdir() if p.name.startswith("run.")], done.err
  with lease.held(folder):
    before = files(folder)
    for more in ((), ("--mode=evaluate",)):
      refused = cli(*command, *more)
      [line] = refused.err.splitlines()
      assert refused.code == 2 and line.startswith(f"error: --workdir={folder} is in use by another run: host")
      assert f"pid {os.getpid()}" in line
    assert files(folder) == before
    assert cli(*command, "--mode=dry_run").code == 0, "it writes nothing"
  assert cli(*command, "--mode=evaluate").code == 0


TAKE = """
import pathlib, time
from phpjax import lease, logs
lease.BEAT_S = {beat_s}
write = logs.MetricsLog.step
def step(self, number, **fields):
  write(self, number, **fields)
  (pathlib.Path({folder!r}) / "run.lease.json").write_text({content!r})
  time.sleep(1)
logs.MetricsLog.step = step
"""
