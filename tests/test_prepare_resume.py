"""`python -m data_pipelines.prepare` run again: after a kill, with nothing to do, with other settings, with mended clips."""

import itertools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import fabricate
import pytest
from preparing import COUNT, PER_SHARD, ROOT, TIMEOUT_S, flags, journals, make_many, manifest, refused, shards, tree

from data_pipelines import encode, prepare, progress
from data_pipelines.shards import ShardMaker

# The command, killing itself when so many shards are finished: before the next is renamed, or before its journal is.
KILLED = """
import os, signal, sys
from data_pipelines import prepare, records, shards

finished, where = int(sys.argv[1]), sys.argv[2]
publish, write, done = shards.ShardMaker.publish, records.write_atomic, []

def killing_publish(self, shard, partial, entry, stamps):
  if len(done) == finished and where == "shard":
    os.kill(os.getpid(), signal.SIGKILL)
  publish(self, shard, partial, entry, stamps)
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

make_clip = shards.ShardMaker.make_clip
shards.ShardMaker.make_clip = lambda *arguments: time.sleep(0.1) or make_clip(*arguments)

if __name__ == "__main__":
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  sys.exit(prepare.main(sys.argv[1:]))
"""


@pytest.fixture
def many(tmp_path: pathlib.Path) -> pathlib.Path:
  return make_many(tmp_path / "raw")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
  """What an uninterrupted run with two workers writes for `many`."""
  folder = tmp_path_factory.mktemp("whole")
  assert prepare.main(flags(make_many(folder / "raw"), folder / "out", num_workers=2)) == 0
  return tree(folder / "out")


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_several_workers_list_what_is_broken_in_shards_that_are_not_finished(tmp_path, many, capsys):
  broken = [f"clip_{i:06d}" for i in (0, 1, 2, 9, 14)]  # the first shard says enough; two others are begun by then
  for name in broken:
    (many / f"AVE/{name}.mp4").write_bytes(b"")
  before = refused(capsys, flags(many, tmp_path / "out", num_workers=2), "5 of 20 clips", "more than 5 percent")
  assert sorted(re.findall(r"left out: train clip (\w+): ", before)) == broken
  assert 3 <= len(journals(tmp_path / "out")) <= 4


def test_one_worker_names_a_broken_clip_when_it_meets_it(tmp_path, many, capsys, monkeypatch):
  (many / "AVE/clip_000001.mp4").write_bytes(b"")
  seen = []
  publish = ShardMaker.publish
  monkeypatch.setattr(ShardMaker, "publish", lambda *args: (seen.append(capsys.readouterr().err), publish(*args)))
  assert prepare.main(flags(many, tmp_path / "out")) == 0
  assert "left out: train clip clip_000001: clip_000001.mp4: " in seen[0] and len(seen) == 4


# What tells that a source file changed.


def rewritten(path: pathlib.Path) -> bytes:
  """Changes a byte and gives the old content; the size and the time of the last change stay."""
  content, status = path.read_bytes(), path.stat()
  path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
  return content


@pytest.mark.parametrize("settled_s", [0, 2])
def test_a_copy_of_the_output_does_not_hide_a_change(tmp_path, many, capsys, monkeypatch, settled_s):
  """The copy's files are younger than the change."""
  monkeypatch.setattr(encode, "SETTLED_S", settled_s)
  assert prepare.main(flags(many, tmp_path / "out")) == 0
  video = many / "AVE/clip_000003.mp4"
  time.sleep(0.05)  # a tick of the clock
  content = rewritten(video)
  shutil.copytree(tmp_path / "out", tmp_path / "copy", copy_function=shutil.copyfile)
  refused(capsys, flags(many, tmp_path / "copy"), str(video), "--overwrite")
  video.write_bytes(content)
  assert prepare.main(flags(many, tmp_path / "copy")) == 0


def test_files_that_nobody_touched_are_not_read_again(tmp_path, many, monkeypatch):
  monkeypatch.setattr(encode, "SETTLED_S", 0)
  assert prepare.main(flags(many, tmp_path / "out")) == 0
  read, sha256 = [], encode.file_sha256
  monkeypatch.setattr(encode, "file_sha256", lambda path: read.append(path.name) or sha256(path))
  assert prepare.main(flags(many, tmp_path / "out")) == 0 and read == []
  os.utime(many / "AVE/clip_000004.mp4")
  assert prepare.main(flags(many, tmp_path / "out")) == 0 and read == ["clip_000004.mp4"]
  stamps = next((tmp_path / "out").rglob("*.stamps"))
  stamps.unlink()  # they may be deleted
  encode._kept_sha256.cache_clear()
  assert prepare.main(flags(many, tmp_path / "out")) == 0 and len(read) == 1 + PER_SHARD


def test_a_change_before_the_journal_is_written_is_seen(tmp_path, many, capsys, monkeypatch):
  publish, video = ShardMaker.publish, many / "AVE/clip_000001.mp4"
  with monkeypatch.context() as patched:
    patched.setattr(ShardMaker, "publish", lambda self, shard, *rest: (shard.file.endswith("00000-of-00004")
                    and rewritten(video), publish(self, shard, *rest)))  # fmt: skip
    assert prepare.main(flags(many, tmp_path / "out")) == 0
  refused(capsys, flags(many, tmp_path / "out"), str(video), "--overwrite")


def test_a_clip_that_changes_while_it_is_read_is_left_out_and_made_by_the_next_run(tmp_path, many, capsys, monkeypatch):
  example, video = ShardMaker._example, many / "AVE/clip_000001.mp4"  # no clip that tells the space needed
  kept = {}

  def changing(self, clip: str, rows: list) -> bytes:
    found = example(self, clip, rows)
    if clip == video.stem:
      kept[video] = rewritten(video)
    return found

  with monkeypatch.context() as patched:
    patched.setattr(ShardMaker, "_example", changing)
    assert prepare.main(flags(many, tmp_path / "out")) == 0
  assert "clip_000001: clip_000001.mp4: changed while it was read" in capsys.readouterr().err
  video.write_bytes(video.read_bytes() + bytes(8))
  assert prepare.main(flags(many, tmp_path / "out", "--strict")) == 0 and manifest(tmp_path / "out")["left_out"] == []


@pytest.mark.parametrize("which", ["the last frame", "the sound"])
def test_every_file_of_a_clip_counts(tmp_path, capsys, which):
  fabricate.LAYOUTS["ave"]["dg_sct"](tmp_path / "raw")
  assert prepare.main(flags(tmp_path / "raw", tmp_path / "out")) == 0
  root, clip = tmp_path / "raw/AVE", fabricate.CLIP_IDS[0]
  changed = root / f"wave/{clip}.npy" if which == "the sound" else sorted((root / "frames" / clip).iterdir())[-1]
  content = rewritten(changed)
  refused(capsys, flags(tmp_path / "raw", tmp_path / "out"), str(changed), "--overwrite")
  changed.write_bytes(content)
  assert prepare.main(flags(tmp_path / "raw", tmp_path / "out")) == 0


# Progress.


def test_progress_counts_what_is_left_to_make_and_says_how_long_it_takes(tmp_path, many, capsys, monkeypatch):
  assert prepare.main(flags(many, tmp_path / "out")) == 0
  journals(tmp_path / "out")[1].unlink()
  journals(tmp_path / "out")[2].unlink()
  capsys.readouterr()
  ticks = itertools.count(0, 11)  # seconds between two looks at the clock
  monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: next(ticks)))
  assert prepare.main(flags(many, tmp_path / "out")) == 0
  lines = [
    line for line in capsys.readouterr().err.splitlines() if "clips" in line and "space" not in line and "need" not in line
  ]
  assert lines[0] == "prepare: 1/10 clips, 11 s, about 99 s left"
  assert lines[1] == "prepare: 2/10 clips, 22 s, about 88 s left"
  assert lines[-1].startswith("prepare: 10 clips in ")
