"""`python -m data_pipelines.check` on what `data_pipelines.prepare` wrote: whole, damaged, and with clips left out."""

import json
import pathlib
import shutil

import damage
import pytest
from check_roots import clean_roots, run_command, told  # noqa: F401

from data_pipelines import DATASETS, DataError, Media, MediaError, records
from data_pipelines.encode import Encoding
from data_pipelines.prepare import Options, prepare

MEDIA = Media(16, 8000)


def records_of(root: pathlib.Path, name: str = "ave") -> pathlib.Path:
  return records.records_folder(root / DATASETS[name].folders[0], name)


@pytest.fixture(scope="module")
def made(clean, tmp_path_factory) -> dict[str, pathlib.Path]:
  """Dataset -> a data root of records of its clean raw root, one clip a shard."""
  roots = {}
  for name, root in clean.items():
    prepare(name, root, roots.setdefault(name, tmp_path_factory.mktemp(f"records_{name}")), Encoding(), 1, Options())
  return roots


@pytest.fixture
def ave(made, tmp_path) -> pathlib.Path:
  """A copy of the records of AVE, to be damaged."""
  return pathlib.Path(shutil.copytree(made["ave"], tmp_path / "root"))


@pytest.mark.parametrize(
  ("name", "decode"), [*((name, decode) for name in damage.CLEAN for decode in ("all", "none")), ("ave", "sample")]
)
def test_whole_records_are_clean(run, made, name, decode):
  code, text, report = run(name, made[name], f"--decode={decode}")
  assert code == 0 and all(finding["severity"] == "note" for finding in report["findings"])
  manifest = json.loads((records_of(made[name], name) / "manifest.json").read_text())
  assert report["layout"] == {"ArrayRecord": len({clip for row in manifest["shards"] for clip in row["clips"]})}
  splits = report["splits"].values()
  assert all(row["usable"] == row["clips"] and not row["missing"] + row["broken"] for row in splits)
  assert all(row["decoded"] == (0 if decode == "none" else row["clips"]) for row in splits)
  assert not any(line["mark"] != "+" for line in report["tree"])
  assert decode == "none" or f"train on it with --config.data.root={made[name]}" in text


def shard(root: pathlib.Path, split: str = "train", index: int = 0) -> pathlib.Path:
  return sorted(records_of(root).glob(f"ave-{split}.array_record-*"))[index]


@pytest.mark.parametrize("decode", ["all", "none"])
@pytest.mark.parametrize(("loss", "words"), [("gone", "is missing"), ("cut", "is cut off: ")])
def test_a_lost_or_cut_shard_closes_its_split(run, ave, loss, words, decode):
  path = shard(ave)
  path.unlink() if loss == "gone" else damage.cut(path)
  code, text, report = run("ave", ave, f"--decode={decode}")
  assert code == 2 and report["splits"]["train"]["broken"] == 2 and report["splits"]["test"]["usable"] == 1
  assert [f["where"] for f in told(report, "gap", "shards")] == [str(path)]
  assert f"{path.name}: {words}" in text and "run data_pipelines.prepare again" in text
  assert all(path.name in example for example in told(report, "gap", "unreadable")[0]["examples"])
  with pytest.raises(MediaError, match=rf"{path.name}: {words}"):
    dataset = DATASETS["ave"](ave)
    dataset.decode(dataset.records("train")[0], MEDIA)


def test_damaged_bytes_are_found_by_the_sum_and_by_decoding(run, ave):
  path = shard(ave, index=1)
  content = path.read_bytes()
  path.write_bytes(content[:2000] + bytes(len(content) - 4000) + content[-2000:])
  code, text, report = run("ave", ave)
  assert code == 1 and report["splits"]["train"]["broken"] == 1
  assert f"{path.name}: is damaged or of another run: other bytes than the manifest's sha256" in text
  assert "clip '-bbbbbbbbb_' cannot be read" in told(report, "gap", "unreadable")[0]["examples"][0]
  assert run("ave", ave, "--decode=none")[0] == 0  # only names and sizes were asked for


def test_a_shard_of_another_version_is_told(run, ave):
  first, second = shard(ave, index=0), shard(ave, index=1)
  manifest = json.loads((records_of(ave) / "manifest.json").read_text())
  sizes = {row["file"]: row for row in manifest["shards"]}
  first.write_bytes(second.read_bytes())
  sizes[first.name]["size"] = second.stat().st_size  # as large by chance
  (records_of(ave) / "manifest.json").write_text(json.dumps(manifest))
  stray = shutil.copy(first, first.with_name("ave-train.array_record-00000-of-00009"))
  code, text, report = run("ave", ave)
  assert code == 1 and f"{first.name}: is damaged or of another run" in text
  assert "another clip stands where the manifest has 'aaaaaaaaaaa'" in told(report, "gap", "unreadable")[0]["examples"][0]
  assert told(report, "gap", "shards")[1]["examples"] == [pathlib.Path(stray).name]


def test_records_of_another_version_are_refused(run, ave):
  records_of(ave).rename(records_of(ave).with_name("0.9.0"))
  code, text, report = run("ave", ave)
  assert code == 2 and "records/ave: holds records of version 0.9.0, not 1.0.0; run data_pipelines.prepare" in text
  assert not told(report, "gap", "missing") and run("ave", ave, "--labels_only")[0] == 0
  with pytest.raises(DataError, match=r"holds records of version 0\.9\.0"):
    DATASETS["ave"](ave).coverage("train")


@pytest.mark.parametrize(
  ("name", "content", "words"),
  [
    ("manifest.json", None, "is not complete; run the same data_pipelines.prepare again"),
    ("manifest.json", "{", "manifest.json: is damaged"),
  ],
)
def test_metadata_that_is_lost_or_damaged(run, ave, name, content, words):
  (records_of(ave) / name).unlink()
  if content is not None:
    (records_of(ave) / name).write_text(content)
  code, text, _ = run("ave", ave)
  assert code == 2 and words in text


@pytest.mark.parametrize(("content", "words"), [("{", "is damaged"), ("[]", "is missing or no"), (None, "is missing or no")])
@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_metadata_of_tfds_that_is_lost_or_damaged_keeps_nobody_from_reading(run, ave, name, content, words):
  (records_of(ave) / name).unlink()
  if content is not None:
    (records_of(ave) / name).write_text(content)
  code, text, _ = run("ave", ave)
  assert code == 1 and f"{name}: {words}" in text and "TFDS cannot open these records" in text
  assert DATASETS["ave"](ave).coverage("train")["missing"] == []


def test_clips_that_were_left_out_are_missing_with_their_reason(run, clean, tmp_path):
  raw = pathlib.Path(shutil.copytree(clean["ave"], tmp_path / "raw"))
  damage.cut(raw / "AVE/video/aaaaaaaaaaa.mp4")
  prepare("ave", raw, tmp_path / "out", Encoding(), 8, Options(max_broken_percent=50))
  code, text, report = run("ave", tmp_path / "out")
  assert code == 1 and report["splits"]["train"]["missing"] == 1 and "train: 1 of 2 clips without media" in text
  (example,) = told(report, "gap", "missing")[0]["examples"]
  assert example.startswith("aaaaaaaaaaa: left out (video/aaaaaaaaaaa.mp4: cannot be decoded")
  assert report["next"][0].startswith("mend the raw media and run the same data_pipelines.prepare again")


def test_labels_changed_since_and_rows_that_were_never_prepared(run, ave):
  damage.write_ave_rows(ave / "AVE", damage.AVE_ROWS | {"train": (*damage.AVE_ROWS["train"], "Cat&ddddddddddd&good&0&9")})
  code, text, report = run("ave", ave)
  assert code == 1 and "AVE/trainSet.txt: was changed: the records were made with another one" in text
  assert told(report, "gap", "missing")[0]["examples"] == ["ddddddddddd: left out (not in the label files that were prepared)"]


def test_silent_clips_are_named(run, clean, tmp_path):
  raw = pathlib.Path(shutil.copytree(clean["avsbench"], tmp_path / "raw"))
  damage.silence(raw, "val")
  prepare("avsbench", raw, tmp_path / "out", Encoding(), 8, Options())
  code, _, report = run("avsbench", tmp_path / "out")
  assert code == 1 and told(report, "gap", "silent")[0]["examples"] == ["val_clip_0: silent, below -60 dBFS"]
