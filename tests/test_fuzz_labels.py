"""Label files with mutated bytes: a reader gives rows or one DataError, and no row leads out of the root."""

import pathlib
import shutil

import pytest
from fabricated import every_layout
from fuzzing import counts, mutated, mutated_json, one_line, run_cases, writing_only
from hypothesis import strategies as st

from data_pipelines import DATASETS
from data_pipelines.prepare_folder import label_files
from data_pipelines.schema import DataError


def read(name: str, root: pathlib.Path) -> str:
  """Opens a dataset, reads all rows, finds their media -> "" or the message of a DataError; everything else goes on."""
  try:
    dataset = DATASETS[name](root)
    for split in dataset.splits():
      for record in dataset.records(split):
        dataset.labels(record)
        for path in dataset.clip_files(record):
          assert path.resolve().is_relative_to(root.resolve()), path
      dataset.coverage(split)
  except DataError as error:
    return one_line(str(error))
  return ""


@counts(25, 1500)
@every_layout
def test_mutated_label_files_are_read_or_refused(layout_roots, tmp_path, name, layout, count):
  root = shutil.copytree(layout_roots[name, layout], tmp_path / "raw")
  files = {path: path.read_bytes() for path in label_files(DATASETS[name](root))}
  assert files and read(name, root) == ""
  refused = []

  def check(data):
    for path, content in files.items():
      path.write_bytes(content)
    path = sorted(files)[data.draw(st.integers(0, len(files) - 1))]
    path.write_bytes((mutated_json if path.suffix == ".json" else mutated)(data, files[path]))
    refused.append(read(name, root))

  with writing_only(tmp_path / "raw", tmp_path):
    run_cases(count, check)
  assert any(refused), "no case was damaged enough to be refused"


@pytest.mark.parametrize("wrong", ["../../etc/passwd", "/etc/passwd", "..", ".", "a/b", "a\\b", "a" * 300])
@pytest.mark.parametrize(
  "layout", [("ave", "official"), ("llp", "official"), ("avsbench", "official"), ("music_avqa", "official")]
)
def test_names_that_lead_elsewhere_are_refused(layout_roots, tmp_path, layout, wrong):
  name, _ = layout
  root = shutil.copytree(layout_roots[layout], tmp_path / "raw")
  dataset = DATASETS[name](root)
  clip = dataset.records("train")[0].clip
  for path in label_files(dataset):
    path.write_bytes(
      path.read_bytes().replace(clip.encode(), wrong.encode("unicode_escape" if path.suffix == ".json" else "utf-8"))
    )
  with pytest.raises(DataError, match="cannot be the name of a file"):
    DATASETS[name](root).records("train")


@pytest.mark.parametrize("wrong", ["../..", "/etc", "a/b", "", "tr ain", "a-b"])
def test_splits_that_lead_elsewhere_are_refused(layout_roots, tmp_path, wrong):
  root = shutil.copytree(layout_roots["avsbench_ms3", "official"], tmp_path / "raw")
  table = root / "AVSBench/Multi-sources/ms3_meta_data.csv"
  table.write_text(table.read_text().replace(",train", f",{wrong}"))
  with pytest.raises(DataError, match=r"ms3_meta_data\.csv:2: .* is no name of a split"):
    DATASETS["avsbench_ms3"](root)
