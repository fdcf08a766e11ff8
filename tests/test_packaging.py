"""What is installed: declared dependencies, exact lock files, data files, the licence and the citation."""

import ast
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = pathlib.Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
LOCKS = sorted((ROOT / "requirements").glob("py*.lock"))
PIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][0-9A-Za-z.!+]*")
# Import name -> distribution, where they differ.
DISTRIBUTIONS = {
  "PIL": "pillow",
  "absl": "absl-py",
  "orbax": "orbax-checkpoint",
  "google": "protobuf",
  "sklearn": "scikit-learn",
}
# What the toybox job, prepare and predict need.
AGREED = {
  "jax",
  "flax",
  "optax",
  "orbax-checkpoint",
  "tensorflow-datasets",
  "grain",
  "einops",
  "ml-collections",
  "librosa",
  "array-record",
  "av",
  "soxr",
  "pillow",
  "safetensors",
  "tokenizers",
  "matplotlib",
  "h5py",
}


def normal(name: str) -> str:
  """Distribution names as pip compares them."""
  return re.sub(r"[-_.]+", "-", name).lower()


CORE = {normal(Requirement(text).name) for text in PROJECT["dependencies"]}


def pins(path: pathlib.Path) -> dict[str, str]:
  """Distribution -> version of a lock file."""
  lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
  return {normal(name): version for name, version in (line.split("==") for line in lines)}


def test_core_dependencies_hold_what_was_agreed():
  assert AGREED <= CORE
  assert {"test", "parity", "convert", "cuda", "tpu", "wandb"} <= set(PROJECT["optional-dependencies"])
  assert PROJECT["license"] == "Apache-2.0"
  assert PROJECT["requires-python"] == ">=3.11"


def test_every_import_is_declared():
  missing = set()
  for package in PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]:
    for path in (ROOT / package.rstrip("*")).rglob("*.py"):
      for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
          names = [node.module]
        known = {"phpjax", "data_pipelines", *(["torch"] if path.stem == "sources" else [])}
        for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - known:
          if normal(DISTRIBUTIONS.get(top, top)) not in CORE:
            missing.add(f"{path.relative_to(ROOT)}: {top}")
  assert not missing


@pytest.mark.parametrize("path", LOCKS, ids=lambda p: p.stem)
def test_lock_file_is_exact_and_covers_core_and_test(path):
  for line in path.read_text().splitlines():
    assert line.startswith("#") or PIN.fullmatch(line), f"{path.name}: not an exact pin: {line}"
  locked = pins(path)
  for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]:
    wanted = Requirement(text)
    version = locked[normal(wanted.name)]
    assert wanted.specifier.contains(Version(version)), f"{path.name}: {wanted} excludes {version}"


def test_lock_files_are_those_of_the_tested_pythons():
  assert [p.stem for p in LOCKS] == ["py311", "py312"]
  assert pins(LOCKS[0])["jax"] == "0.10.2"  # the last jax for Python 3.11
  assert pins(LOCKS[1])["jax"].startswith("0.11.")


def test_wheel_holds_every_module_and_data_file(tmp_path):
  source = tmp_path / "source"
  skip = shutil.ignore_patterns("__pycache__")
  for name in ("phpjax", "data_pipelines"):
    shutil.copytree(ROOT / name, source / name, ignore=skip)
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source / name)
  expected = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file() and p.parent != source}
  for folder in ("data_pipelines/toybox/media", "phpjax/encoders/nano"):
    assert any(name.startswith(f"{folder}/") for name in expected), f"{folder} is empty"
  subprocess.run(
    [
      sys.executable,
      "-m",
      "pip",
      "wheel",
      "--quiet",
      "--no-build-isolation",
      "--no-deps",
      "--no-index",
      "--wheel-dir",
      tmp_path,
      source,
    ],
    check=True,
    timeout=120,
  )
  (wheel,) = tmp_path.glob("phpjax-*.whl")
  held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
  assert held == expected


def test_licence_and_citation():
  licence = (ROOT / "LICENSE").read_text()
  assert "Apache License" in licence and "Version 2.0, January 2004" in licence and len(licence) > 11_000
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert citation["license"] == PROJECT["license"] and citation["version"] == PROJECT["version"]
  urls = [reference.get("url", "") for reference in citation["references"]]
  assert len(urls) == 4
  for number in ("2507.21588", "2501.14369", "2503.04258"):
    assert any(number in url for url in urls)
