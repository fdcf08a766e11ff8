"""A finished run of configs/php_avqa.py:tiny, trained once per test session; see `tiny_run`."""

import dataclasses
import fcntl
import json
import os
import pathlib
from typing import Any

import pytest


@dataclasses.dataclass(frozen=True)
class TinyRun:
  """Where a run lies; tests must not change it, copy `workdir` to damage it."""

  workdir: pathlib.Path
  data: pathlib.Path

  @property
  def results(self) -> dict[str, Any]:
    """The content of results.json."""
    return json.loads((self.workdir / "results.json").read_text())

  def clip(self) -> pathlib.Path:
    """A video of ten seconds with sound."""
    return sorted((self.data / "AVE").glob("*.mp4"))[0]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
  """The run, one for all xdist workers: the first that asks trains, the others wait for it."""
  base = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    base = base.parent  # of the whole session; without xdist it would be shared with other sessions
  run = TinyRun(base / "tiny_run", base / "tiny_data")
  with open(base / "tiny_run.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (run.workdir / "results.json").is_file():
      from configs import php_avqa  # not at the top: conftest has to set the environment before jax is imported
      from phpjax import train

      config = php_avqa.get_config("tiny")
      config.data.root = str(run.data)
      train.train_and_evaluate(config, run.workdir)
  return run
