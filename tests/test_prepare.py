"""`python -m data_pipelines.prepare`: what it writes, going on after a kill, and what it says about wrong input."""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import fabricate
import numpy as np
import pytest
from PIL import Image

from data_pipelines import DATASETS, prepare, records
from data_pipelines.prepare_folder import locked

ROOT = pathlib.Path(__file__).resolve().parents[1]
COUNT, PER_SHARD = 20, 5  # clips of `many`, and of one shard: one broken clip of them is not more than 5 percent
TIMEOUT_S = 120

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

# The command, killing itself when so many shards are finished: before the next is renamed, or before its journal is.
KILLED = """
import os, signal, sys
from data_pipelines import prepare, records, shards

finished, where = int(sys.argv[1]), sys.argv[2]
publish, write, done = shards.ShardMaker.publish, records.write_atomic, []

def killing_publish(self, shard, partial, entry):
  if len(done) == finished and where == "shard":
    os.kill(os.getpid(), signal.SIGKILL)
  publish(self, shard, partial, entry)
  done.append(shard)

def killing_write(path, content):
  if len(done) == finished and where == "journal" and "array_record" in path.name:
    os.kill(os.getpid(), signal.SIGKILL)
  write(path, content)

shards.ShardMaker.publish, records.write_atomic = killing_publish, killing_write
sys.exit(prepare.main(sys.argv[3:]))
"""

# The command with workers (which run the top of this file too) that take their time.
SLOW = """
import signal, sys, time
from data_pipelines import prepare, shards

entry = shards.ShardMaker.entry
shards.ShardMaker.entry = lambda *arguments: time.sleep(0.1) or entry(*arguments)

if __name__ == "__main__":
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  sys.exit(prepare.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
  """The content of an mp4 file."""
  return fabricate.write_mp4(tmp_path_factory.mktemp("clip") / "clip.mp4").read_bytes()


def make_many(root: pathlib.Path, clip: bytes, *, splits: dict[str, range] | None = None) -> pathlib.Path:
  """A data root with an AVE of COUNT equal clips, all in the split train or as `splits` says."""
  (folder := root / "AVE").mkdir(parents=True)
  names = [f"clip_{i:06d}" for i in range(COUNT)]
  for split, members in (splits or {"train": range(COUNT)}).items():
    lines = [f"Mandolin&{names[i]}&good&0&{i % 10}" for i in members]
    (folder / f"{split}Set.txt").write_text("\n".join(lines))
  for name in names:
    (folder / f"{name}.mp4").write_bytes(clip)
  return root


@pytest.fixture
def many(tmp_path: pathlib.Path, clip: bytes) -> pathlib.Path:
  return make_many(tmp_path / "raw", clip)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, clip: bytes) -> dict[str, str]:
  """What an uninterrupted run with two workers writes for `many`."""
  folder = tmp_path_factory.mktemp("whole")
  assert prepare.main(flags(make_many(folder / "raw", clip), folder / "out", num_workers=2)) == 0
  return tree(folder / "out")


def flags(root: pathlib.Path, out: pathlib.Path, *switches: str, dataset: str = "ave", **options: object) -> list[str]:
  given = {"clips_per_shard": PER_SHARD, "num_workers": 1, "sample_rate_hz": 8000} | options
  return [f"--dataset={dataset}", f"--root={root}", f"--out={out}", *(f"--{k}={v}" for k, v in given.items()), *switches]


def tree(folder: pathlib.Path) -> dict[str, str]:
  """sha256 of every file below a folder, by its path."""
  files = [path for path in folder.rglob("*") if path.is_file()]
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


# What is written.


def test_tfds_reads_every_dataset_without_tensorflow(tmp_path):
  folders = {}
  for name, make in fabricate.MAKERS.items():
    make(tmp_path / "raw" / DATASETS[name].folders[0])
  for name in DATASETS:
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
  assert example["frames"] == [path.read_bytes() for path in files]
  fabricate.make_ave(tmp_path / "mp4/AVE")
  assert prepare.main(flags(tmp_path / "mp4", tmp_path / "out2")) == 0
  example = tfds.builder_from_directory(str(tmp_path / "out2/AVE/records/ave/1.0.0")).as_data_source("train")[0]
  assert Image.open(io.BytesIO(example["frames"][0])).size == (32, 32)


def test_manifest_says_what_was_made_of_what(tmp_path, many, whole):
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


# Going on.


@pytest.mark.parametrize(("finished", "where"), [(0, "shard"), (1, "journal"), (2, "shard")])
def test_killed_and_started_again_gives_the_same_bytes(tmp_path, many, whole, finished, where, capsys):
  arguments = flags(many, tmp_path / "out")
  command = [sys.executable, "-c", KILLED, str(finished), where, *arguments]
  assert subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, cwd=ROOT).returncode == -signal.SIGKILL
  assert len(journals(tmp_path / "out")) == finished and tree(tmp_path / "out") != whole
  times = {path: path.stat().st_mtime_ns for path in journals(tmp_path / "out")}
  assert prepare.main(arguments) == 0
  assert tree(tmp_path / "out") == whole
  assert {path: path.stat().st_mtime_ns for path in times} == times
  assert finished == 0 or f"{finished} of 4 shards are finished" in capsys.readouterr().err


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, prepare.STOPPED)])
def test_workers_end_with_a_run_that_is_stopped(tmp_path, many, whole, sent, code):
  (script := tmp_path / "slow.py").write_text(SLOW)
  command = [sys.executable, str(script), *flags(many, tmp_path / "out", num_workers=2)]
  run = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)
  until(lambda: journals(tmp_path / "out") or run.poll() is not None)
  workers = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
  run.send_signal(sent)
  assert run.wait(TIMEOUT_S) == code and len(workers) >= 2
  assert (code != prepare.STOPPED) or run.stderr.read().splitlines()[-1].startswith("stopped; what is finished is kept")
  until(lambda: not any(alive(int(pid)) for pid in workers))
  assert 0 < len(journals(tmp_path / "out")) < 4
  assert prepare.main(flags(many, tmp_path / "out")) == 0
  assert tree(tmp_path / "out") == whole


def until(true, timeout_s: float = 30) -> None:
  """Waits until a condition holds; fails if it does not."""
  end = time.monotonic() + timeout_s
  while not true():
    assert time.monotonic() < end
    time.sleep(0.02)


def alive(pid: int) -> bool:
  """Whether a process runs; one that ended and whose parent is gone may wait to be collected."""
  state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
  return bool(state) and not state.startswith("Z")


def test_a_finished_run_is_left_alone(tmp_path, many, whole, capsys):
  assert prepare.main(flags(many, tmp_path / "out")) == 0
  times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
  capsys.readouterr()
  assert prepare.main(flags(many, tmp_path / "out", num_workers=2)) == 0
  assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()} == times
  assert "4 of 4 shards are finished" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_a_damaged_shard_alone_is_made_again(tmp_path, many, whole, damage):
  assert prepare.main(flags(many, tmp_path / "out")) == 0
  broken, *others = shards(tmp_path / "out")
  times = [path.stat().st_mtime_ns for path in others]
  content = bytearray(broken.read_bytes())
  content[5000] ^= 1
  broken.unlink() if damage == "gone" else broken.write_bytes(content)
  assert prepare.main(flags(many, tmp_path / "out")) == 0
  assert tree(tmp_path / "out") == whole and [path.stat().st_mtime_ns for path in others] == times


@pytest.mark.parametrize(
  ("option", "words"),
  [
    ({"image_size": 64}, "image_size was 448, is 64"),
    ({"sample_rate_hz": 16000}, "sample_rate_hz was 8000, is 16000"),
    ({"clips_per_shard": 4}, "clips_per_shard was 5, is 4"),
  ],
)
def test_other_settings_are_refused_and_overwritten_on_request(tmp_path, many, capsys, option, words):
  assert prepare.main(flags(many, tmp_path / "out")) == 0
  before = tree(tmp_path / "out")
  refused(capsys, flags(many, tmp_path / "out", **option), words, "--overwrite")
  assert tree(tmp_path / "out") == before
  assert prepare.main(flags(many, tmp_path / "out", "--overwrite", **option)) == 0
  assert prepare.main(flags(many, tmp_path / "fresh", **option)) == 0
  assert tree(tmp_path / "out") == tree(tmp_path / "fresh") != before


def test_changed_labels_and_media_are_refused(tmp_path, many, capsys):
  assert prepare.main(flags(many, tmp_path / "out")) == 0
  video = many / "AVE/clip_000003.mp4"
  content = video.read_bytes()
  video.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # the size tells nothing
  refused(capsys, flags(many, tmp_path / "out"), str(video), "--overwrite")
  video.unlink()
  refused(capsys, flags(many, tmp_path / "out"), str(video), "--overwrite")
  video.write_bytes(content)  # touched, and the same
  assert prepare.main(flags(many, tmp_path / "out")) == 0
  with (many / "AVE/trainSet.txt").open("a") as file:
    file.write("\nMandolin&clip_000001&good&0&5")
  refused(capsys, flags(many, tmp_path / "out"), "labels/trainSet.txt was", "--overwrite")


# Broken clips and wrong input.


def test_a_broken_clip_is_listed_and_skipped_and_can_be_mended(tmp_path, many, whole, capsys):
  video = many / "AVE/clip_000006.mp4"
  content = video.read_bytes()
  video.write_bytes(content[:900])
  assert prepare.main(flags(many, tmp_path / "out")) == 0
  assert "left out: train clip clip_000006: clip_000006.mp4: cannot be decoded" in capsys.readouterr().err
  (entry,) = manifest(tmp_path / "out")["left_out"]
  assert entry["split"] == "train" and entry["clip"] == "clip_000006" and entry["reason"].startswith("clip_000006.mp4: cannot")
  assert manifest(tmp_path / "out")["splits"]["train"]["written"] == COUNT - 1
  # --strict says so too when nothing is left to do; mended, its shard alone is made again.
  refused(capsys, flags(many, tmp_path / "out", "--strict"), "1 of 20 clips cannot be used", "--strict")
  video.write_bytes(content)
  untouched = {path: path.stat().st_mtime_ns for path in shards(tmp_path / "out") if "00001-of" not in path.name}
  assert prepare.main(flags(many, tmp_path / "out", "--strict")) == 0
  assert tree(tmp_path / "out") == whole
  assert {path: path.stat().st_mtime_ns for path in untouched} == untouched


def test_strict_stops_at_a_missing_clip(tmp_path, many, capsys):
  (many / "AVE/clip_000000.mp4").unlink()
  before = refused(capsys, flags(many, tmp_path / "out", "--strict"), "1 of 20 clips cannot be used")
  assert "left out: train clip clip_000000: clip_000000.mp4: no such file" in before
  assert len(journals(tmp_path / "out")) == 1 and not (tmp_path / "out/AVE/records/ave/1.0.0/manifest.json").exists()


def test_more_than_five_percent_stop_the_run_and_keep_what_is_finished(tmp_path, many, whole, capsys):
  kept = {}
  for i in (7, 11):
    video = many / f"AVE/clip_{i:06d}.mp4"
    kept[video] = video.read_bytes()
    video.write_bytes(b"")
  before = refused(capsys, flags(many, tmp_path / "out"), "2 of 20 clips", "more than 5 percent", "--max_broken_percent")
  assert "clip_000007" in before and "clip_000011" in before
  assert len(journals(tmp_path / "out")) == 3  # the last was not begun
  times = journals(tmp_path / "out")[0].stat().st_mtime_ns
  for video, content in kept.items():
    video.write_bytes(content)
  assert prepare.main(flags(many, tmp_path / "out")) == 0
  assert tree(tmp_path / "out") == whole and journals(tmp_path / "out")[0].stat().st_mtime_ns == times


def test_shards_and_splits_without_a_whole_clip_are_valid(tmp_path, clip, capsys):
  import tensorflow_datasets as tfds

  raw = make_many(tmp_path / "raw", clip, splits={"train": range(15), "val": range(15, 20), "test": range(0)})
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


def test_names_beyond_ascii_survive(tmp_path, clip, many):
  name = "Grüße_点"
  (many / "AVE/valSet.txt").write_text(f"Mandolin&{name}&good&0&5", encoding="utf-8")
  (many / f"AVE/{name}.mp4").write_bytes(clip)
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


def test_label_files_that_hide_others_are_found_out(tmp_path, many, capsys):
  """A folder that holds labels of something else would make the reader see both."""
  (tmp_path / "out/AVE").mkdir(parents=True)
  (tmp_path / "out/AVE/valSet.txt").write_text("Mandolin&clip_000001&good&0&5")
  refused(capsys, flags(many, tmp_path / "out"), "its label files do not read as those of", "empty that folder")
