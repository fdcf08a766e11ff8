"""Prepared records with mutated files: `prepare`, `check` and the reader refuse them in one line and write nowhere else."""

import pathlib
import shutil

import damage
import pytest
from fuzzing import counts, mutated, mutated_json, one_line, run_cases, writing_only
from hypothesis import strategies as st
from preparing import flags

from data_pipelines import DATASETS, check, prepare
from data_pipelines.schema import DataError, Media

MEDIA = Media(image_size=16, sample_rate_hz=8000)
FOLDER = pathlib.Path("AVE/records/ave/1.0.0")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A folder of `raw` media, and of `out`, what `prepare` made of them in shards of one clip."""
  top = tmp_path_factory.mktemp("records")
  damage.clean_ave(top / "raw")
  assert prepare.main(flags(top / "raw", top / "out", clips_per_shard=1)) == 0
  return top


def read(root: pathlib.Path) -> list[str]:
  """Decodes all clips of prepared records -> the messages of the DataErrors; everything else goes on."""
  told = []
  try:
    dataset = DATASETS["ave"](root)
    rows = [row for split in dataset.splits() for row in dataset.records(split)]
    dataset.coverage("train")
  except DataError as error:
    return [one_line(str(error))]
  for row in rows:
    try:
      dataset.decode(row, MEDIA)
    except DataError as error:
      told.append(one_line(str(error)))
  return told


def change(data: st.DataObject, root: pathlib.Path, contents: dict[pathlib.Path, bytes]) -> pathlib.Path:
  """Puts all files back and mutates one."""
  for path, content in contents.items():
    path.write_bytes(content)
  path = data.draw(st.sampled_from(sorted(contents)))
  path.write_bytes((mutated_json if path.suffix in (".json", ".stamps", ".in_flight") else mutated)(data, contents[path]))
  return path


@counts(60, 3000)
def test_mutated_records_are_read_or_refused(made, tmp_path, count):
  root = shutil.copytree(made / "out", tmp_path / "out")
  contents = {path: path.read_bytes() for path in (root / FOLDER).iterdir() if path.is_file()}
  assert read(root) == []
  refused = []

  def look(data):
    change(data, root, contents)
    refused.append(bool(read(root)))

  run_cases(count, look)
  assert True in refused and False in refused


@counts(10, 300)
def test_mutated_records_are_checked(made, tmp_path, count, capsys):
  root = shutil.copytree(made / "out", tmp_path / "out")
  contents = {path: path.read_bytes() for path in (root / FOLDER).iterdir() if path.is_file()}
  codes = set()

  def look(data):
    change(data, root, contents)
    codes.add(check.main(["--dataset=ave", f"--root={root}", "--workers=1"]))
    assert "the check itself failed" not in (told := capsys.readouterr()).out + told.err

  run_cases(count, look)
  assert codes > {2}


@counts(25, 600)
def test_prepare_goes_on_from_mutated_files_or_refuses(made, tmp_path, count, capsys):
  root, raw = shutil.copytree(made / "out", tmp_path / "out"), made / "raw"
  folder = root / FOLDER
  (folder / "journal/.0123456789abcdef.in_flight").write_text('["train", "aaaaaaaaaaa"]')
  contents = {path: path.read_bytes() for path in (*folder.iterdir(), *(folder / "journal").iterdir()) if path.is_file()}
  arguments, codes = flags(raw, root, clips_per_shard=1), set()

  def look(data):
    for path in [*folder.iterdir(), *(folder / "journal").iterdir()]:
      if path.is_file() and path not in contents:
        path.unlink()
    changed = change(data, root, contents)
    if changed.suffix != ".in_flight":
      (folder / "journal/.0123456789abcdef.in_flight").unlink()  # a process would be started to try its clip
    codes.add(code := prepare.main(arguments))
    *_, last = capsys.readouterr().err.splitlines() or [""]
    assert code in (0, 2) and (code == 0 or one_line(last).startswith("error: "))
    if code == 0:
      assert read(root) == []

  with writing_only(root, tmp_path):
    run_cases(count, look)
  assert codes == {0, 2}


@pytest.mark.parametrize("wrong", ["../../../../raw/secret", "/etc/passwd", "..", ""])
def test_a_manifest_cannot_name_files_outside(made, tmp_path, wrong):
  root = shutil.copytree(made / "out", tmp_path / "out")
  manifest = root / FOLDER / "manifest.json"
  content = manifest.read_text()
  manifest.write_text(content.replace('"file": "ave-train.array_record-00000-of-00002"', f'"file": "{wrong}"'))
  with pytest.raises(DataError, match="is no name of a shard"):
    DATASETS["ave"](root).coverage("train")
  manifest.write_text(content.replace('"trainSet.txt":', f'"{wrong}":'))
  with pytest.raises(DataError, match="is no path inside the dataset folder"):
    DATASETS["ave"](root).coverage("train")


def test_metadata_cannot_import_a_module(made, tmp_path, monkeypatch):
  root = shutil.copytree(made / "out", tmp_path / "out")
  (tmp_path / "evil_feature.py").write_text("raise SystemExit('imported')\n")
  monkeypatch.syspath_prepend(tmp_path)
  path = root / FOLDER / "features.json"
  path.write_text(path.read_text().replace("tensorflow_datasets.core.features.tensor_feature.Tensor", "evil_feature.Tensor"))
  assert read(root) == []
  assert check.main(["--dataset=ave", f"--root={root}", "--workers=1"]) in (0, 1)


def test_a_journal_of_other_clips_is_not_believed(made, tmp_path):
  root = shutil.copytree(made / "out", tmp_path / "out")
  journal = root / FOLDER / "journal/ave-train.array_record-00000-of-00002.json"
  before = journal.read_text()
  for wrong in (before.replace("aaaaaaaaaaa", "zzz"), before.replace('"split": "train"', '"split": "../../x"')):
    journal.write_text(wrong)
    assert wrong != before and prepare.main(flags(made / "raw", root, clips_per_shard=1)) == 0
    assert journal.read_text() == before and read(root) == []
