"""`python -m phpjax.main` many times for one import of jax: a server process that forks a child for each command."""

import dataclasses
import fcntl
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
TIMEOUT_S = 300
# One layer of deep prompts on two tasks, two epochs of two steps each: the cheapest run that has all kinds of parameters.
SMALL = (
  "--config=configs/php_avqa.py:tiny",
  "--config.tasks=('ave','avs')",
  "--config.method.shallow=()",
  "--config.method.mid=()",
  "--config.num_epochs=2",
)

# Runs in the server. `stop_at` sends SIGTERM to the child itself once that step is logged, so that the moment does not
# depend on the machine; `traces` names a file for what was traced and compiled; `before` is Python that the child runs first;
# after `kill_after_s` the child gets SIGKILL.
SERVER = """
import json, os, signal, sys, time, traceback
from phpjax import logs, main, opening
from phpjax.steps import Steps

def child(job):
  for number, path in ((1, job["out"]), (2, job["err"])):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
  sys.argv = ["phpjax.main", *job["argv"]]
  made, write = [], logs.MetricsLog.step
  class Watched(Steps):
    def __init__(self, *args, **options):
      super().__init__(*args, **options)
      made.append(self)
  opening.Steps = Watched
  def step(self, number, **fields):
    write(self, number, **fields)
    if number == job.get("stop_at"):
      os.kill(os.getpid(), signal.SIGTERM)
  logs.MetricsLog.step = step
  exec(job.get("before", ""), {})
  code = 1
  try:
    code = main.run_cli()
  except SystemExit as leaving:
    code = leaving.code or 0
  except BaseException:
    traceback.print_exc()
  if "traces" in job:
    [steps] = made
    seen = {"traces": {"/".join(k): n for k, n in steps.traces.items()}, "compiles": steps.train._cache_size()}
    open(job["traces"], "w").write(json.dumps(seen))
  sys.stdout.flush(), sys.stderr.flush()
  os._exit(code)

def ended(pid, seconds):
  until = time.monotonic() + seconds
  while time.monotonic() < until:
    if (found := os.waitpid(pid, os.WNOHANG))[0]:
      return found[1]
    time.sleep(0.002)
  os.kill(pid, signal.SIGKILL)
  return os.waitpid(pid, 0)[1]

for line in sys.stdin:
  job = json.loads(line)
  pid = os.fork()
  if pid == 0:
    child(job)
  status = ended(pid, job["kill_after_s"]) if "kill_after_s" in job else os.waitpid(pid, 0)[1]
  os.write(3, f"{os.waitstatus_to_exitcode(status)}\\n".encode())
"""


@dataclasses.dataclass(frozen=True)
class Done:
  """A command that has ended."""

  code: int
  out: str
  err: str


class Server:
  """Runs commands of phpjax.main one after the other, each in a process of its own."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    read, write = os.pipe()
    script = f"import os; os.dup2({write}, 3)\n{SERVER}"
    environment = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # the runs repeat small compiles too
    command = [sys.executable, "-c", script]
    self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, text=True, pass_fds=(write,))
    os.close(write)
    self.answers = os.fdopen(read)

  def __call__(self, *argv: str, **options: object) -> Done:
    """`python -m phpjax.main *argv`; `options` are those of the server's jobs."""
    job = {"argv": argv, "out": str(self.folder / "out"), "err": str(self.folder / "err"), **options}
    self.process.stdin.write(json.dumps(job) + "\n")
    self.process.stdin.flush()
    code = int(self.answers.readline())
    return Done(code, *((self.folder / name).read_text() for name in ("out", "err")))

  def close(self) -> None:
    """Ends the server."""
    self.process.stdin.close()
    self.process.wait(TIMEOUT_S)
    self.answers.close()


@pytest.fixture(scope="module", name="cli")
def cli_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
  """A server for the module."""
  server = Server(tmp_path_factory.mktemp("server"))
  yield server
  server.close()


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder of this test session that all xdist workers see."""
  base = tmp_path_factory.getbasetemp()
  return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", name="toybox")
def tiny_toybox(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The tiny toybox, composed once for all workers; tests must not change it."""
  from data_pipelines.toybox import compose

  base = shared_folder(tmp_path_factory)
  with open(base / "toybox.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    return compose.compose(base / "tiny_data", sizes=compose.TINY_SIZES, workers=1, progress=lambda done, total: None)


@pytest.fixture(scope="module", name="finished")
def finished_run(cli: Server, toybox: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The workdir of a finished SMALL run, one for all workers; tests must not change it."""
  folder = shared_folder(tmp_path_factory) / "small_run"
  with open(folder.with_suffix(".lock"), "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (folder / "results.json").is_file():
      done = cli(*SMALL, f"--config.data.root={toybox}", f"--workdir={folder}", traces=str(folder.with_suffix(".traces")))
      assert done.code == 0, done.err
      folder.with_suffix(".out").write_text(done.out)
  return folder
