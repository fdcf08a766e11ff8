"""Every layout of every benchmark, damaged: `data_pipelines.check` and `prepare` both say exactly what is wrong."""

import json
import os
import pathlib
import shutil

import damage
import fabricate
import numpy as np
import pytest
from fabricated import LAYOUTS, every_layout
from PIL import Image
from preparing import flags

from data_pipelines import DATASETS, Media, check, prepare, records
from data_pipelines.base import Dataset
from data_pipelines.checks.report import Report

MEDIA = Media(image_size=16, sample_rate_hz=8000)
ODD = os.fsdecode(b"caf\xe9")


@pytest.fixture
def copy(layout_roots, tmp_path, name, layout) -> Dataset:
  """The dataset of this layout in a copy, to be damaged."""
  return DATASETS[name](shutil.copytree(layout_roots[name, layout], tmp_path / "raw"))


def examples(report: Report, severity: str, name: str) -> str:
  """The examples of one check, one a line."""
  found = [f.examples for f in report.findings if (f.severity, f.check) == (severity, name)]
  return "\n".join(line for lines in found for line in lines)


def lose(path: pathlib.Path) -> None:
  shutil.rmtree(path) if path.is_dir() else path.unlink()


@every_layout
def test_clips_lost_cut_and_empty_and_names_that_are_no_utf8(copy, name, layout, tmp_path, capsys):
  lost, broken = copy.records("train")[0], copy.records("test")[0]
  lost_files, files = copy.clip_files(lost), copy.clip_files(broken)
  lose(lost_files[0])
  kind, bad = ("truncated", files[0]) if len(files) == 1 else ("zero_byte", files[1])
  damage.cut(bad) if kind == "truncated" else bad.write_bytes(b"")
  (files[0].parent / (ODD + bad.suffix)).write_bytes(b"x")
  report = check.check(name, tmp_path / "raw", workers=2)
  assert report.exit_code == 2  # no clip of test is left
  assert lost.clip in examples(report, "gap", "missing") or str(lost_files[0]) in examples(report, "gap", "missing")
  words = {"truncated": "is cut off", "zero_byte": "is empty (0 bytes)"}[kind]
  assert f"{bad}: {words}" in examples(report, "gap", kind)
  assert "caf\\udce9" in examples(report, "gap", "names")
  assert prepare.main(flags(tmp_path / "raw", tmp_path / "out", "--max_broken_percent=100", dataset=name)) == 0
  told = [line for line in capsys.readouterr().err.splitlines() if "left out: " in line]
  rows = {(split, copy.clip_key(row)) for split in copy.splits() for row in copy.records(split)}
  assert len(told) == sum(key in map(copy.clip_key, (lost, broken)) for _, key in rows)
  keys = [records.clip_text(copy.clip_key(record)) for record in (lost, broken)]
  assert any(f"train clip {keys[0]}: " in line and "no such file" in line for line in told)
  reason = "cannot be decoded" if bad.suffix in (".mp4", ".wav") else "cannot be read as a"
  assert any(f"test clip {keys[1]}: {bad.relative_to(copy.root)}: {reason}" in line for line in told)


@pytest.mark.parametrize(("name", "layout"), [pair for pair in LAYOUTS if pair[0].startswith("avsbench")])
def test_masks_of_zeros_and_ones_are_told_and_read_as_the_same(layout_roots, copy, name, layout, tmp_path):
  (record,) = copy.records("test")
  for path in copy.masks(record):
    image = np.asarray(Image.open(path).convert("L"))
    assert set(np.unique(image)) == {0, 255}
    Image.fromarray(image // 255).save(path)
  report = check.check(name, tmp_path / "raw", workers=2)
  assert f"{copy.masks(record)[0]}: values 0 and 1, and 4 more of this clip" in examples(report, "note", "0_1_masks")
  assert prepare.main(flags(tmp_path / "raw", tmp_path / "out", "--strict", dataset=name)) == 0
  labels = [DATASETS[name](root).decode(record, MEDIA)["label"] for root in (layout_roots[name, layout], tmp_path / "out")]
  assert labels[0].mean() == 0.5
  np.testing.assert_array_equal(*labels)


def labels_of(dataset: Dataset, name: str) -> pathlib.Path:
  """The file that says which rows are for testing."""
  names = {"llp": "AVVP_test_pd.csv", "avsbench": "s4_meta_data.csv", "avsbench_ms3": "ms3_meta_data.csv"}
  if name == "ave":
    return dataset.find_file("testSet.txt", "Annotations.txt", "Annotations_with_domain.txt")
  return dataset.label_root / names.get(name, "avqa-test.json")


def shift(path: pathlib.Path) -> None:
  """A first column that counts the rows, as tables have that were saved again: header and columns stand one place on."""
  if path.suffix == ".json":
    path.write_text(json.dumps([{"index": i, "row": row} for i, row in enumerate(json.loads(path.read_text()))]))
    return
  lines = path.read_text().splitlines()
  separator = next(sign for sign in ("&", "\t", ",") if sign in lines[0])
  path.write_text("\n".join(f"{i}{separator}{line}" for i, line in enumerate(lines)))


@every_layout
def test_shifted_columns_are_named_by_both(copy, name, layout, tmp_path, capsys):
  path = labels_of(copy, name)
  shift(path)
  report = check.check(name, tmp_path / "raw", labels_only=True)
  found = [f.what for f in report.findings if f.check in ("damaged_labels", "no_labels")]
  if not found:  # S4's columns are found by their names
    assert name == "avsbench" and layout != "no_header"
    assert DATASETS[name](tmp_path / "raw").records("test") == copy.records("test")
    return
  assert report.exit_code == 2 and str(path) in found[0]
  assert prepare.main(flags(tmp_path / "raw", tmp_path / "out", dataset=name)) == 2
  assert capsys.readouterr().err.splitlines()[-1] == f"error: {found[0]}"


def repeat_last_row(dataset: Dataset, name: str) -> None:
  """Of the rows for testing."""
  path = labels_of(dataset, name)
  if path.suffix == ".json":
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([*rows, rows[-1]]))
  elif name == "ave" and path.name != "testSet.txt":
    fabricate.write_orders(dataset.label_root, {"test": [2, 2]})
  else:
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[-1]]))


@every_layout
def test_rows_that_stand_twice_are_named_by_both(copy, name, layout, tmp_path, capsys):
  record = copy.records("test")[-1]
  repeat_last_row(copy, name)
  report = check.check(name, tmp_path / "raw", labels_only=True)
  (finding,) = [f for f in report.findings if f.check == "repeats" and f.severity == "gap"]
  assert (finding.where, finding.what, finding.examples) == ("test", "1 row repeated word for word", (record.id,))
  assert prepare.main(flags(tmp_path / "raw", tmp_path / "out", dataset=name)) == 0
  assert f"prepare: test: 1 row repeated word for word: {record.id}\n" in capsys.readouterr().err
  assert [row.id for row in DATASETS[name](tmp_path / "out").records("test")].count(record.id) == 2


@every_layout
def test_labels_that_are_no_utf8_are_named_by_both(copy, name, layout, tmp_path, capsys):
  path = labels_of(copy, name)
  path.write_bytes(path.read_bytes() + b"\xff\xfe")
  report = check.check(name, tmp_path / "raw", labels_only=True)
  assert report.exit_code == 2 and any(f"{path}: cannot be read as " in finding.what for finding in report.findings)
  assert prepare.main(flags(tmp_path / "raw", tmp_path / "out", dataset=name)) == 2
  assert f"error: {path}: cannot be read as " in capsys.readouterr().err.splitlines()[-1]
