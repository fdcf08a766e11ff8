"""The runs of a sweep as processes of their own: so many at a time, continued when they stopped, named when they failed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from phpjax import workdir
from phpjax.errors import UserError
from phpjax.progress import duration

LOG = "log.txt"
AGAIN = (42, 75)  # exit codes of phpjax.main that ask for the same command again: stopped by a signal, nothing moved
EXIT_FAILED, EXIT_STOPPED = 2, 42
POLL_S = 0.1
TELL_EVERY_S = 60.0
TAIL_BYTES = 8192
LEFT = re.compile(r"all tasks (?:(\d+):)?(\d+):(\d\d)")  # what phpjax/progress.py says while a run trains
DONE, FAILED, RUNNING, WAITING = "done", "failed", "running", "waiting"


@dataclasses.dataclass
class Job:
  """One run: what it is, its workdir, the arguments of its command, and how far it is.

  Attributes:
    name: of its config, with the variant; runs of the same name are taken to last equally long.
    order, seed: as on the command line.
    folder: its workdir; the log of all its attempts is LOG there.
    arguments: of `python -m phpjax.main`.
    state: WAITING, RUNNING, DONE or FAILED.
    reason: why it failed.
    attempts: processes so far.
    started: on the pool's clock, of the current attempt.
  """

  name: str
  order: str
  seed: int
  folder: pathlib.Path
  arguments: tuple[str, ...]
  state: str = WAITING
  reason: str = ""
  attempts: int = 0
  started: float = 0.0

  def __str__(self) -> str:
    return f"{self.name} {self.order} seed {self.seed}"


def seconds_of(folder: pathlib.Path) -> float | None:
  """How long the finished run in a workdir took; None if there is none, or it does not say."""
  try:
    seconds = workdir.read_json(folder / workdir.RESULTS).get("seconds")
  except UserError:
    return None
  return float(seconds) if isinstance(seconds, int | float) and 0 <= seconds < 1e9 else None


def tail(path: pathlib.Path) -> list[str]:
  """The last lines of a log that say something."""
  try:
    with open(path, "rb") as file:
      file.seek(max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
      text = file.read().decode(errors="replace")
  except OSError:
    return []
  return [line.strip() for line in text.splitlines() if line.strip()]


def left_said(path: pathlib.Path) -> float | None:
  """Seconds that a run said last it would need; None if it has not said so yet."""
  for line in reversed(tail(path)):
    if match := LEFT.search(line):
      hours, minutes, seconds = (int(part or 0) for part in match.groups())
      return 3600 * hours + 60 * minutes + seconds
  return None


class Pool:
  """Runs jobs, so many at a time.

  Attributes:
    jobs: in the order in which they start.
    slots: processes at a time.
    retries: how often a job that exited with one of AGAIN is run again.
    command: what the arguments of a job are appended to.
    say: takes a line about what happens.
    environment: of the processes.
  """

  def __init__(
    self,
    jobs: Sequence[Job],
    command: Sequence[str],
    *,
    slots: int = 1,
    retries: int = 3,
    say: Callable[[str], Any],
    tell_every_s: float = TELL_EVERY_S,
  ):
    self.jobs, self.command, self.slots, self.retries, self.say = list(jobs), list(command), slots, retries, say
    self.tell_every_s = tell_every_s
    self.asked = 0  # signals so far
    self._passed_on = 0
    self._running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}  # by slot

  def run(self) -> int:
    """Until all are done, failed or stopped -> 0, EXIT_FAILED or EXIT_STOPPED."""
    told = time.monotonic()
    try:
      with self._signals():
        while self._running or (not self.asked and any(job.state == WAITING for job in self.jobs)):
          self._start()
          time.sleep(POLL_S)
          self._pass_on()
          self._collect()
          if self._running and time.monotonic() - told >= self.tell_every_s:
            told = time.monotonic()
            self.say(f"{self._counts()}; running: {', '.join(str(job) for job, _ in self._running.values())}")
    finally:  # nothing is left behind, whatever went wrong
      for _, process in self._running.values():
        process.terminate()
        process.wait()
    if self.asked and any(job.state != DONE for job in self.jobs):
      return EXIT_STOPPED
    return EXIT_FAILED if any(job.state == FAILED for job in self.jobs) else 0

  # -- processes ---------------------------------------------------------------------------------------------------

  def _start(self) -> None:
    """Fills the free slots."""
    for slot in range(self.slots):
      job = next((job for job in self.jobs if job.state == WAITING), None)
      if slot in self._running or job is None or self.asked:
        continue
      job.attempts += 1
      job.started = time.monotonic()
      try:
        self._running[slot] = (job, self._process(job, slot))
      except OSError as error:
        self._fail(job, f"it cannot be started: {error}")
        continue
      job.state = RUNNING
      again = f", attempt {job.attempts}" if job.attempts > 1 else ""
      self.say(f"started {job}{again}: see {job.folder / LOG}")

  def _process(self, job: Job, slot: int) -> subprocess.Popen[bytes]:
    """Its own session: a signal of the terminal reaches it once, from here, and not twice."""
    job.folder.mkdir(parents=True, exist_ok=True)
    cpus = share_of_cpus(slot, self.slots)
    threads = {name: str(len(cpus)) for name in ("NPROC", "OMP_NUM_THREADS")} if cpus else {}
    command = [*self.command, *job.arguments]
    with open(job.folder / LOG, "ab") as log:
      log.write(f"$ {' '.join(command)}\n".encode())
      log.flush()
      environment = {**threads, **os.environ}
      options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
      process = subprocess.Popen(command, env=environment, **options)
    if cpus:
      with contextlib.suppress(ProcessLookupError):  # it has ended already
        os.sched_setaffinity(process.pid, cpus)  # before it has made its threads, which inherit it
    return process

  def _collect(self) -> None:
    """Takes note of the processes that have ended."""
    for slot, (job, process) in list(self._running.items()):
      if (code := process.poll()) is None:
        continue
      del self._running[slot]
      took = duration(time.monotonic() - job.started)
      if code == 0:
        job.state = DONE
        self.say(f"done {job} in {took}; {self._counts()}")
      elif self.asked:
        job.state = WAITING
        self.say(f"stopped {job}: the same command continues")
      elif code in AGAIN and job.attempts <= self.retries:
        job.state = WAITING
        self.say(f"{job} stopped with exit code {code} after {took} and is run again")
      else:
        self._fail(job, self._reason(job, code))

  def _reason(self, job: Job, code: int) -> str:
    """The exit code in words, and the last line of the log."""
    told = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    times = f", {job.attempts} times" if job.attempts > 1 else ""
    lines = [line for line in tail(job.folder / LOG) if not line.startswith("$ ")]
    return f"{told}{times}: {lines[-1][:500] if lines else 'its log is empty'}"

  def _fail(self, job: Job, reason: str) -> None:
    job.state, job.reason = FAILED, reason
    self.say(f"failed {job}: {reason}; {self._counts()}")

  # -- signals -----------------------------------------------------------------------------------------------------

  @contextlib.contextmanager
  def _signals(self) -> Iterator[None]:
    """SIGTERM, SIGINT and, unless nohup ignores it, SIGHUP ask all runs to save and stop; a second one stops them at once."""

    def ask(signum: int, frame: Any) -> None:
      del signum, frame
      self.asked += 1

    wanted = [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else [])]
    try:
      old = {each: signal.signal(each, ask) for each in wanted}
    except ValueError:  # not the main thread: signals stay with their owner
      old = {}
    try:
      yield
    finally:
      for each, handler in old.items():
        signal.signal(each, handler)

  def _pass_on(self) -> None:
    """Sends SIGTERM to all runs for the first signal that came, SIGKILL for others: what they have saved stays."""
    while self._passed_on < self.asked:
      self._passed_on += 1
      for _, process in self._running.values():
        process.terminate() if self._passed_on == 1 else process.kill()
      if self._running and self._passed_on == 1:
        self.say(f"stopping: {len(self._running)} runs save first; a second signal stops them at once")

  # -- time --------------------------------------------------------------------------------------------------------

  def _counts(self) -> str:
    """How many are done, and how long the rest may take."""
    done, failed = (sum(job.state == state for job in self.jobs) for state in (DONE, FAILED))
    text = f"{done} of {len(self.jobs)} done" + (f", {failed} failed" if failed else "")
    return text if done + failed == len(self.jobs) else f"{text}, time left: {in_words(*time_left(self.jobs, self.slots))}"


def share_of_cpus(slot: int, slots: int) -> set[int]:
  """The CPUs of one of several processes at a time; nothing where there is one, or where the system cannot tell."""
  if slots < 2 or not hasattr(os, "sched_getaffinity"):
    return set()
  cpus = sorted(os.sched_getaffinity(0))
  first, last = slot * len(cpus) // slots, (slot + 1) * len(cpus) // slots
  return set(cpus[first:last]) or {cpus[slot % len(cpus)]}


def time_left(jobs: Sequence[Job], slots: int) -> tuple[float, list[str]]:
  """(seconds that the jobs still take, names of those of which it is not known).

  A run takes as long as finished ones of its name do; before there is one, as long as a run at work says.
  """
  now = time.monotonic()
  expected: dict[str, float | None] = {}
  for name in {job.name for job in jobs}:
    known = [found for job in jobs if job.name == name and (found := seconds_of(job.folder)) is not None]
    said = [now - job.started + left for job, left in _at_work(jobs) if job.name == name and left is not None]
    expected[name] = statistics.fmean(known or said) if known or said else None
  left, longest, unknown = 0.0, 0.0, []
  for job in (job for job in jobs if job.state in (WAITING, RUNNING)):
    whole, said = expected[job.name], left_said(job.folder / LOG) if job.state == RUNNING else None
    if whole is None:
      unknown.append(job.name)
      continue
    passed = now - job.started if job.state == RUNNING else 0.0
    mine = said if said is not None else max(whole - passed, 0.0)
    left, longest = left + mine, max(longest, mine)
  return max(left / slots, longest), list(dict.fromkeys(unknown))


def _at_work(jobs: Sequence[Job]) -> list[tuple[Job, float | None]]:
  """The running jobs and what they say is left."""
  return [(job, left_said(job.folder / LOG)) for job in jobs if job.state == RUNNING]


def in_words(seconds: float, unknown: Sequence[str]) -> str:
  """About how long, and for which configs nobody knows yet."""
  known = f"about {seconds / 3600:.2f} hours" if seconds >= 60 else f"about {seconds:.0f} s"
  if not unknown:
    return known
  until = lambda what: f"unknown until a run of {what} has finished"
  return f"{known}, without {', '.join(unknown)} ({until('it')})" if seconds else until(" and ".join(unknown))
