"""Several processes at once, as a launcher would start them: each with one CPU device, joined over localhost."""

import os
import pathlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from command import ROOT, Done

TIMEOUT_S = 150


def free_port() -> int:
  """A port that nothing listens at."""
  with socket.socket() as s:
    s.bind(("", 0))
    return s.getsockname()[1]


def environment(devices: int = 1) -> dict[str, str]:
  """That of the tests, with so many devices to a process."""
  count = "--xla_force_host_platform_device_count"
  flags = re.sub(rf"{count}=\d+", f"{count}={devices}", os.environ["XLA_FLAGS"])
  return {**os.environ, "XLA_FLAGS": flags, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(ROOT)}


class Together:
  """Processes that run side by side; all are killed when the context ends, so that none outlives its test."""

  def __init__(self, folder: pathlib.Path, commands: Sequence[Sequence[str]], devices: int = 1):
    self.folder = folder
    folder.mkdir(parents=True, exist_ok=True)
    self.processes = []
    for number, command in enumerate(commands):
      with open(folder / f"out{number}", "w") as out, open(folder / f"err{number}", "w") as err:
        self.processes.append(
          subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment(devices), stdout=out, stderr=err)
        )

  def __enter__(self) -> "Together":
    return self

  def __exit__(self, *error: object) -> None:
    for process in self.processes:
      process.kill()
      process.wait()

  def said(self, number: int) -> Done:
    """What a process has written so far."""
    texts = ((self.folder / f"{stream}{number}").read_text() for stream in ("out", "err"))
    code = self.processes[number].poll()
    return Done(-1000 if code is None else code, *texts)

  def wait(self, timeout_s: float = TIMEOUT_S) -> list[Done]:
    """All of them, ended; one that hangs fails the test."""
    end = time.monotonic() + timeout_s
    for number, process in enumerate(self.processes):
      try:
        process.wait(max(end - time.monotonic(), 0.01))
      except subprocess.TimeoutExpired:
        texts = [f"{self.said(n).code}: {self.said(n).err[-1500:]}" for n in range(len(self.processes))]
        raise AssertionError(f"process {number} did not end within {timeout_s:g} s: {texts}") from None
    return [self.said(number) for number in range(len(self.processes))]

  def until(self, condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    """Waits for something to happen while the processes run."""
    end = time.monotonic() + timeout_s
    while not condition():
      assert time.monotonic() < end, f"it did not happen within {timeout_s:g} s: {self.said(0).err[-1500:]}"
      assert all(process.poll() is None for process in self.processes), [self.said(n) for n in range(len(self.processes))]
      time.sleep(0.02)


def joined(number: int, count: int, port: int) -> list[str]:
  """The flags of process `number` of `count`."""
  return [f"--coordinator_address=localhost:{port}", f"--num_processes={count}", f"--process_id={number}"]


def main(folder: pathlib.Path, *argv: str, count: int = 2) -> Together:
  """`python -m phpjax.main *argv` in so many processes; what they write goes to `folder`."""
  port = free_port()
  return Together(folder, [["-m", "phpjax.main", *argv, *joined(number, count, port)] for number in range(count)])
