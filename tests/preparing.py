"""Runs of `data_pipelines.prepare` on an AVE of equal clips, and what they leave behind."""

import hashlib
import json
import pathlib

import fabricate
import pytest

from data_pipelines import prepare

ROOT = pathlib.Path(__file__).resolve().parents[1]
COUNT, PER_SHARD = 20, 5  # clips of `make_many`, and of one shard: one broken clip of them is not more than 5 percent
TIMEOUT_S = 120


def make_many(root: pathlib.Path, *, splits: dict[str, range] | None = None) -> pathlib.Path:
  """A data root with an AVE of COUNT equal clips, all in the split train or as `splits` says."""
  (folder := root / "AVE").mkdir(parents=True)
  names = [f"clip_{i:06d}" for i in range(COUNT)]
  for split, members in (splits or {"train": range(COUNT)}).items():
    lines = [f"Mandolin&{names[i]}&good&0&{i % 10}" for i in members]
    (folder / f"{split}Set.txt").write_text("\n".join(lines))
  for name in names:
    (folder / f"{name}.mp4").write_bytes(fabricate.mp4_bytes())
  return root


def flags(root: pathlib.Path, out: pathlib.Path, *switches: str, dataset: str = "ave", **options: object) -> list[str]:
  given = {"clips_per_shard": PER_SHARD, "num_workers": 1, "sample_rate_hz": 8000} | options
  return [f"--dataset={dataset}", f"--root={root}", f"--out={out}", *(f"--{k}={v}" for k, v in given.items()), *switches]


def tree(folder: pathlib.Path) -> dict[str, str]:
  """sha256 of every file below a folder, by its path; but for the stamps, which differ from run to run."""
  files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".stamps"]
  return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def shards(out: pathlib.Path) -> list[pathlib.Path]:
  return sorted((out / "AVE/records/ave/1.0.0").glob("ave-*"))


def journals(out: pathlib.Path) -> list[pathlib.Path]:
  return sorted((out / "AVE/records/ave/1.0.0/journal").glob("ave-*.json"))


def manifest(out: pathlib.Path) -> dict:
  return json.loads((out / "AVE/records/ave/1.0.0/manifest.json").read_text())


def refused(capsys: pytest.CaptureFixture, arguments: list[str], *words: str) -> str:
  """The one line of an error that holds all the words; what was printed before it is given back."""
  assert prepare.main(arguments) == 2
  *before, line = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ") and all(word in line for word in words), line
  return "\n".join(before)
