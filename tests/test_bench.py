"""The benchmark of training steps, on the tiny experiment."""

import json
import sys

import pytest

from phpjax import bench, bench_steps
from phpjax.errors import UserError

TINY = ["bench", "--config=configs/php_avqa.py:tiny", "--config.tasks=('avqa',)", "--config.mesh=(-1, 1)"]


@pytest.fixture(name="run")
def run_bench(monkeypatch):
  """The command in this process; configs read their overrides from sys.argv."""

  def run(*more):
    monkeypatch.setattr(sys, "argv", [*TINY, *more])
    bench.main(sys.argv)

  return run


@pytest.mark.slow
def test_one_task_is_measured_in_this_process(run, capsys):
  run("--only=avqa", "--repeats=1")
  found = [float(x) for x in json.loads(capsys.readouterr().out.splitlines()[-1])]
  assert len(found) == len(bench_steps.COLUMNS) - 1 and all(x >= 0 for x in found)
  assert found[2] > 0 and found[4] > 0


def test_a_task_that_cannot_be_measured_is_named(run):
  with pytest.raises(UserError, match=r"task avqa cannot be measured: .*no_such"):
    run("--config.encoders.visual.name=no_such")
