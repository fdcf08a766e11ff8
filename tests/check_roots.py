"""Fixtures of the tests of `python -m data_pipelines.check`: clean data roots, copies to damage, and the command itself."""

import json
import pathlib
import shutil
from collections.abc import Callable

import damage
import pytest

from data_pipelines import check

Run = Callable[..., tuple[int, str, dict]]


@pytest.fixture(scope="module", name="clean")
def clean_roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
  """Dataset -> a clean data root; tests must not change it."""
  roots = {name: tmp_path_factory.mktemp(name) for name in damage.CLEAN}
  for name, root in roots.items():
    damage.CLEAN[name](root)
  return roots


@pytest.fixture(name="copy_of")
def copy_of_root(clean: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> Callable[[str], pathlib.Path]:
  """Dataset -> a copy of its clean data root, to be damaged."""
  return lambda name: pathlib.Path(shutil.copytree(clean[name], tmp_path / "root"))


@pytest.fixture(name="run")
def run_command(capsys: pytest.CaptureFixture[str]) -> Run:
  """(dataset, root, *options) -> exit code, text, and the report of --json, which must agree."""

  def command(name: str, root: pathlib.Path, *options: str) -> tuple[int, str, dict]:
    arguments = [f"--dataset={name}", f"--root={root}", "--workers=2", *options]
    code = check.main(arguments)
    text = capsys.readouterr().out
    assert check.main([*arguments, "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == code
    return code, text, found["datasets"][name]

  return command


def told(report: dict, severity: str, name: str) -> list[dict]:
  """The findings of one check and severity."""
  return [f for f in report["findings"] if (f["severity"], f["check"]) == (severity, name)]
