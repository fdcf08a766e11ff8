"""`python -m data_pipelines.prepare`: what it writes, and what it says about broken clips and wrong input."""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import fabricate
import numpy as np
import pytest
from PIL import Image
from preparing import COUNT, PER_SHARD, ROOT, TIMEOUT_S, flags, journals, make_many, manifest, refused, shards

from data_pipelines import DATASETS, prepare, records
from data_pipelines.prepare_folder import locked

# Reads TFDS directories as a user would, in a process that has seen nothing of this project.
READ = """
import json, sys
import tensorflow_datasets as tfds
found = {}
for folder in sys.argv[1:]:
  sources = tfds.builder_from_directory(folder).as_data_source()
  found[folder] = {
    split: [{"clip": x["clip"].decode(), "ids": [i.decode() for i in x["ids"]], "frames": len(x["frames"]),
             "audio": [str(x["audio"].dtype), *x["audio"].shape], "labels": {k: len(v) for k, v in x["labels"].items()}}
            for x in source]
    for split, source in sources.items()
  }
assert "tensorflow" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture
def many(tmp_path: pathlib.Path) -> pathlib.Path:
  return make_many(tmp_path / "raw")


# What is written.


def test_tfds_reads_every_dataset_without_tensorflow(tmp_path):
  folders = {}
  for name in fabricate.LAYOUTS:  # the others are small and need no records
    fabricate.MAKERS[name](tmp_path / "raw" / DATASETS[name].folders[0])
    assert prepare.main(flags(tmp_path / "raw", tmp_path / "out", dataset=name)) == 0
    folders[name] = str(records.records_folder(tmp_path / "out" / DATASETS[name].folders[0], name))
  done = subprocess.run([sys.executable, "-c", READ, *folders.values()], capture_output=True, text=True, timeout=TIMEOUT_S)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  for name, folder in folders.items():
    dataset = DATASETS[name](tmp_path / "raw")
    assert set(found[folder]) == set(dataset.splits())
    for split, examples in found[folder].items():
      rows = dataset.records(split)
      assert sorted(i for x in examples for i in x["ids"]) == sorted(row.id for row in rows)
      for example in examples:
        assert example["frames"] == dataset.seconds and example["audio"] == ["int16", dataset.seconds * 8000]
        assert example["labels"] == dict.fromkeys(dataset.labels(rows[0]), len(example["ids"]))


def test_metadata_is_what_tfds_itself_expects(tmp_path, many):
  import tensorflow_datasets as tfds

  assert prepare.main(flags(many, tmp_path / "out")) == 0
  folder = tmp_path / "out/AVE/records/ave/1.0.0"
  info = tfds.builder_from_directory(str(folder)).info
  assert info.splits["train"].shard_lengths == [PER_SHARD] * 4
  assert info.splits["train"].filenames == [path.name for path in shards(tmp_path / "out")]
  assert info.splits["train"].num_bytes == sum(path.stat().st_size for path in shards(tmp_path / "out"))
  assert len(tfds.data_source("ave", data_dir=folder.parents[1], split="train[:25%]")) == COUNT // 4


def test_an_example_holds_encoded_frames_sound_and_all_rows_of_its_clip(tmp_path):
  import tensorflow_datasets as tfds

  fabricate.make_music_avqa(tmp_path / "raw/MUSIC-AVQA")
  assert prepare.main(flags(tmp_path / "raw", tmp_path / "out", "--image_size=16", dataset="music_avqa")) == 0
  source = tfds.builder_from_directory(str(tmp_path / "out/MUSIC-AVQA/records/music_avqa/1.0.0")).as_data_source("train")
  first, second = source
  assert first["ids"] == [b"00000001/1", b"00000001/2"] and second["ids"] == [b"va000002/3"]
  assert first["labels"]["question"].shape == (2, 14) and first["labels"]["label"].tolist() == [8, 4]
  assert first["duration_s"] == pytest.approx(30, abs=0.1) and first["masks"] == []
  images = [Image.open(io.BytesIO(frame)) for frame in first["frames"]]
  assert {(image.format, image.size) for image in images} == {("JPEG", (16, 16))}
  shown = np.array([np.asarray(image)[8, 8, 0] for image in images])
  np.testing.assert_allclose(shown, fabricate.levels(30)[np.linspace(0, 29, 10).astype(int)], atol=6)


def test_pictures_are_stored_byte_for_byte_and_videos_not_enlarged(tmp_path):
  import tensorflow_datasets as tfds

  fabricate.LAYOUTS["ave"]["dg_sct"](tmp_path / "raw")
  assert prepare.main(flags(tmp_path / "raw", tmp_path / "out")) == 0
  example = tfds.builder_from_directory(str(tmp_path / "out/AVE/records/ave/1.0.0")).as_data_source("train")[0]
  files = sorted((tmp_path / "raw/AVE/frames" / example["clip"].decode()).iterdir())
  assert example["frames"] == [path.read_bytes() for path in files] and example["duration_s"] == 10
  fabricate.make_ave(tmp_path / "mp4/AVE")
  assert prepare.main(flags(tmp_path / "mp4", tmp_path / "out2")) == 0
  example = tfds.builder_from_directory(str(tmp_path / "out2/AVE/records/ave/1.0.0")).as_data_source("train")[0]
  assert Image.open(io.BytesIO(example["frames"][0])).size == (32, 32)


def test_manifest_says_what_was_made_of_what(tmp_path, many):
  assert prepare.main(flags(many, tmp_path / "out")) == 0
  found = manifest(tmp_path / "out")
  settings = found["settings"]
  assert (settings["image_size"], settings["sample_rate_hz"], settings["clips_per_shard"]) == (448, 8000, PER_SHARD)
  assert settings["labels"] == {"trainSet.txt": hashlib.sha256((many / "AVE/trainSet.txt").read_bytes()).hexdigest()}
  assert {"av", "pillow", "soxr", "array_record"} <= settings["versions"].keys()
  assert found["left_out"] == [] and [len(shard["clips"]) for shard in found["shards"]] == [PER_SHARD] * 4
  for shard, path in zip(found["shards"], shards(tmp_path / "out"), strict=True):
    assert shard["file"] == path.name and shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
  video = many / "AVE/clip_000007.mp4"
  entry = json.loads(journals(tmp_path / "out")[1].read_text())["clips"][2]
  fingerprint = {"path": video.name, "size": video.stat().st_size, "sha256": hashlib.sha256(video.read_bytes()).hexdigest()}
  assert entry == {"clip": "clip_000007", "files": [fingerprint], "reason": ""}
  assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "out").rglob("*.json"))


# Broken clips and wrong input.


def test_strict_stops_at_a_missing_clip(tmp_path, many, capsys):
  (many / "AVE/clip_000000.mp4").unlink()
  before = refused(capsys, flags(many, tmp_path / "out", "--strict"), "1 of 20 clips cannot be used")
  assert "left out: train clip clip_000000: clip_000000.mp4: no such file" in before
  assert len(journals(tmp_path / "out")) == 1 and not (tmp_path / "out/AVE/records/ave/1.0.0/manifest.json").exists()


def test_shards_and_splits_without_a_whole_clip_are_valid(tmp_path):
  import tensorflow_datasets as tfds

  raw = make_many(tmp_path / "raw", splits={"train": range(15), "val": range(15, 20), "test": range(0)})
  for i in (*range(5, 10), *range(15, 20)):
    (raw / f"AVE/clip_{i:06d}.mp4").write_bytes(b"no video")
  assert prepare.main(flags(raw, tmp_path / "out", "--max_broken_percent=50")) == 0
  builder = tfds.builder_from_directory(str(tmp_path / "out/AVE/records/ave/1.0.0"))
  assert builder.info.splits["train"].shard_lengths == [5, 0, 5] and set(builder.info.splits) == {"train"}
  clips = [example["clip"].decode() for example in builder.as_data_source()["train"]]
  assert clips == [f"clip_{i:06d}" for i in (*range(5), *range(10, 15))]
  found = manifest(tmp_path / "out")["splits"]
  assert found["val"]["written"] == 0 and found["val"]["clips"] == 5 and found["test"]["clips"] == 0
  assert DATASETS["ave"](tmp_path / "out").coverage("val")["missing"] == [f"clip_{i:06d}" for i in range(15, 20)]


def test_every_kind_of_damage_has_its_reason(tmp_path, capsys):
  fabricate.LAYOUTS["ave"]["dg_sct"](tmp_path / "raw")
  fabricate.make_avsbench(tmp_path / "raw/AVSBench")
  frames, waves = tmp_path / "raw/AVE/frames", tmp_path / "raw/AVE/wave"
  first, second, third = fabricate.CLIP_IDS
  for path in (frames / first).iterdir():
    path.unlink()
  os.rename(frames / second / "00000001.jpg", os.fsencode(frames / second) + b"/0\xff.jpg")
  (frames / second / os.fsdecode(b"0\xff.jpg")).write_bytes(b"no picture")
  (waves / f"{third}.npy").write_bytes(b"")
  single = tmp_path / "raw/AVSBench/Single-source/s4_data"
  (single / "gt_masks/val" / fabricate.CATEGORY / "val_clip_0/val_clip_0_4.png").unlink()
  (single / "audio_wav/test" / fabricate.CATEGORY / "test_clip_0.wav").write_bytes(b"")
  for name in ("ave", "avsbench"):
    assert prepare.main(flags(tmp_path / "raw", tmp_path / "out", "--max_broken_percent=100", dataset=name)) == 0
  printed = capsys.readouterr().err
  assert f"clip {first}: frames/{first}: holds no frames" in printed
  assert "\\udcff.jpg: cannot be decoded as a picture" in printed
  assert f"clip {third}: wave/{third}.npy: cannot be read as an array" in printed
  assert "val_clip_0_4.png: no such file" in printed
  assert "test_clip_0.wav: " in printed
  assert {entry["clip"] for entry in manifest(tmp_path / "out")["left_out"]} == {first, second, third}


def test_names_beyond_ascii_survive(tmp_path, many):
  name = "Grüße_点"
  (many / "AVE/valSet.txt").write_text(f"Mandolin&{name}&good&0&5", encoding="utf-8")
  (many / f"AVE/{name}.mp4").write_bytes(fabricate.mp4_bytes())
  (many / "AVE" / os.fsdecode(b"stray_\xff.mp4")).write_bytes(b"")
  assert prepare.main(flags(many, tmp_path / "out")) == 0
  assert DATASETS["ave"](tmp_path / "out").coverage("val") == {"clips": 1, "missing": []}
  assert records.to_bytes(os.fsdecode(b"clip_\xff")) == b"clip_\xff"
  (many / "AVE/valSet.txt").write_bytes(b"Mandolin&clip_\xff&good&0&5")
  assert prepare.main(flags(many, tmp_path / "out2")) == 2


def test_too_little_space_is_said_before_anything_is_made(tmp_path, many, capsys, monkeypatch):
  usage = dataclasses.make_dataclass("usage", ["total", "used", "free"])
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 5000, 5000))
  refused(capsys, flags(many, tmp_path / "out"), "20 clips need about", "0.0 MB free", "--force")
  assert shards(tmp_path / "out") == []
  assert prepare.main(flags(many, tmp_path / "out", "--force")) == 0
  # The estimate is of the right size: clips are alike here, shards add little.
  lines = [line for line in capsys.readouterr().err.splitlines() if "clips need about" in line]
  said = float(lines[0].split("about ")[1].split(" MB")[0]) * 1e6
  real = sum(len(record) for record in _records(tmp_path / "out"))
  assert real < said < 1.2 * real


def _records(out: pathlib.Path) -> list[bytes]:
  from array_record.python.array_record_module import ArrayRecordReader

  return [record for path in shards(out) for record in ArrayRecordReader(str(path)).read_all()]


def test_a_disk_that_fills_up_is_one_line(tmp_path, many):
  limited = (
    "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); "
    "from data_pipelines import prepare; sys.exit(prepare.main(sys.argv[1:]))"
  )
  command = [sys.executable, "-c", limited, *flags(many, tmp_path / "out")]
  done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=ROOT)
  assert done.returncode == 2 and "Traceback" not in done.stderr
  assert "is the disk full?" in done.stderr.splitlines()[-1]
  assert journals(tmp_path / "out") == []


def test_wrong_input_is_one_line(tmp_path, many, capsys):
  out = tmp_path / "out"
  refused(capsys, flags(many, out, dataset="avee"), "unknown dataset 'avee'", "music_avqa")
  refused(capsys, flags(tmp_path / "nowhere", out), str(tmp_path / "nowhere"), "data_pipelines.toybox")
  refused(capsys, flags(many, many), "lies in the raw data")
  refused(capsys, flags(many, out, image_size=-1), "image_size")
  refused(capsys, flags(many, out, sample_rate_hz=0), "sample_rate_hz")
  assert not out.exists()
  assert prepare.main(flags(many, out)) == 0
  refused(capsys, flags(out, tmp_path / "twice"), "is prepared already")
  folder = out / "AVE/records/ave/1.0.0"
  with locked(folder):
    refused(capsys, flags(many, out), "another prepare is writing there")
  (many / "AVE/trainSet.txt").write_text("")
  refused(capsys, flags(many, tmp_path / "empty"), "have no rows")


@pytest.mark.parametrize("percent", ["nan", "-1", "101", "inf"])
def test_a_percentage_that_is_none_is_refused(tmp_path, many, capsys, percent):
  with pytest.raises(SystemExit) as ended:
    prepare.main(flags(many, tmp_path / "out", max_broken_percent=percent))
  assert ended.value.code == 2 and "--max_broken_percent must be between 0 and 100" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_a_clip_that_splits_share_is_stored_for_each_and_counted_so_in_the_space(tmp_path, capsys):
  raw = make_many(tmp_path / "raw", splits={"train": range(10), "test": range(10)})
  assert prepare.main(flags(raw, tmp_path / "out")) == 0
  assert "20 clips need about" in capsys.readouterr().err
  counts = manifest(tmp_path / "out")["splits"]
  assert counts["train"]["written"] == counts["test"]["written"] == 10
  again = DATASETS["ave"](tmp_path / "out")
  assert {again.prepared.shard_of(again.clip_key(row))[0] for row in again.records("train")} == {"test"}, "one copy is read"


def test_label_files_that_hide_others_are_found_out(tmp_path, many, capsys):
  """A folder that holds labels of something else would make the reader see both."""
  (tmp_path / "out/AVE").mkdir(parents=True)
  (tmp_path / "out/AVE/valSet.txt").write_text("Mandolin&clip_000001&good&0&5")
  refused(capsys, flags(many, tmp_path / "out"), "its label files do not read as those of", "empty that folder")
