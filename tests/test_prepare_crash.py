"""`python -m data_pipelines.prepare` where a clip, or something else, kills the process that decodes it."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
from preparing import COUNT, ROOT, TIMEOUT_S, flags, journals, make_many, manifest, refused, tree

from data_pipelines import prepare, records
from data_pipelines.prepare_suspects import in_flight, suspects

pytestmark = pytest.mark.slow

# The command with a decoder that crashes at the clips of KILLERS; its workers run the top of this file too.
CRASHING = """
import os, signal, sys
from data_pipelines import prepare, shards

encode = shards.encode_clip

def crashing(dataset, record, encoding):
  if how := dict(x.split("=") for x in os.environ["KILLERS"].split()).get(record.clip):
    os.kill(os.getpid(), signal.SIGSEGV) if how == "SIGSEGV" else os._exit(int(how))
  return encode(dataset, record, encoding)

shards.encode_clip = crashing

if __name__ == "__main__":
  sys.exit(prepare.main(sys.argv[1:]))
"""
KILLERS = {
  "clip_000005": "SIGSEGV",
  "clip_000008": "3",
}  # both of the second shard, the first among those that tell the space needed
LISTED = [
  {"split": "train", "clip": "clip_000005", "reason": "ends the process that decodes it (SIGSEGV)"},
  {"split": "train", "clip": "clip_000008", "reason": "ends the process that decodes it (exit code 3)"},
]


def crashing(folder: pathlib.Path, arguments: list[str], killers: dict[str, str]) -> subprocess.CompletedProcess[str]:
  """Runs the command in a process of its own."""
  (script := folder / "crashing.py").write_text(CRASHING)
  env = os.environ | {"PYTHONPATH": str(ROOT), "KILLERS": " ".join(f"{k}={v}" for k, v in killers.items())}
  return subprocess.run([sys.executable, script, *arguments], env=env, capture_output=True, text=True, timeout=TIMEOUT_S)


def test_clips_that_kill_their_process_are_left_out(tmp_path):
  """With workers in the same run; with one process, which is the command itself, in the next ones. Both give the same bytes."""
  many, more = make_many(tmp_path / "raw"), "--max_broken_percent=10"
  done = crashing(tmp_path, flags(many, tmp_path / "out", more, num_workers=2), KILLERS)
  assert done.returncode == 0, done.stderr
  assert manifest(tmp_path / "out")["left_out"] == LISTED
  assert manifest(tmp_path / "out")["splits"]["train"]["written"] == COUNT - 2
  for entry in LISTED:
    assert done.stderr.count(f"left out: train clip {entry['clip']}: {entry['reason']}") == 1
  assert [crashing(tmp_path, flags(many, tmp_path / "alone", more), KILLERS).returncode for _ in range(3)] == [-11, 3, 0]
  assert tree(tmp_path / "alone") == tree(tmp_path / "out")
  # Another run has nothing to do, nor anybody to suspect; a mended clip is taken in.
  assert suspects(records.records_folder(tmp_path / "out/AVE", "ave")) == []
  assert crashing(tmp_path, flags(many, tmp_path / "out", more), KILLERS).returncode == 0
  for name in KILLERS:
    video = many / f"AVE/{name}.mp4"
    video.write_bytes(video.read_bytes() + bytes(8))
  assert prepare.main(flags(many, tmp_path / "out", "--strict")) == 0


def test_too_many_of_them_stop_the_run(tmp_path):
  killers = {f"clip_{i:06d}": "1" for i in (1, 3, 4, 6, 8)}  # not those that tell the space needed
  done = crashing(tmp_path, flags(make_many(tmp_path / "raw"), tmp_path / "out", num_workers=2), killers)
  assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
  # One is allowed. A pool ends with one or, where both of its workers are at one, two of them: the second pool is the last.
  said = re.search(r"(\d) of 20 clips cannot be used", done.stderr.splitlines()[-1])
  assert said and said[1] in "23", done.stderr.splitlines()[-1]


# The command whose first worker at a clip is killed from outside, as for want of memory.
KILLED_ONCE = """
import os, pathlib, signal, sys
from data_pipelines import prepare, shards

make_clip = shards.ShardMaker.make_clip

def killed(self, split, clip):
  once = self.dataset.root / "killed"
  if __name__ != "__main__" and clip == "clip_000001" and not once.exists():
    once.touch()
    with shards.in_flight(self.folder, split, clip):
      os.kill(os.getpid(), signal.SIGKILL)
  return make_clip(self, split, clip)

shards.ShardMaker.make_clip = killed

if __name__ == "__main__":
  sys.exit(prepare.main(sys.argv[1:]))
"""


def test_a_worker_that_no_clip_killed_is_one_line_that_names_its_clips(tmp_path):
  many = make_many(tmp_path / "raw")
  (script := tmp_path / "killed.py").write_text(KILLED_ONCE)
  arguments = flags(many, tmp_path / "out", num_workers=2)
  env = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run([sys.executable, script, *arguments], env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
  assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
  line = done.stderr.splitlines()[-1]
  assert line.startswith("error: a worker died, perhaps for want of memory") and "fewer --num_workers" in line
  assert "train clip clip_000001" in line
  assert prepare.main(arguments) == 0 and prepare.main(flags(many, tmp_path / "other")) == 0
  assert tree(tmp_path / "out") == tree(tmp_path / "other")


def test_who_is_in_flight_is_known_until_it_is_done(tmp_path):
  (tmp_path / records.JOURNAL).mkdir()
  with in_flight(tmp_path, "train", "a/b"), in_flight(tmp_path, "test", "a/b"):
    assert suspects(tmp_path) == [("test", "a/b"), ("train", "a/b")]
  assert suspects(tmp_path) == []
  (tmp_path / records.JOURNAL / ".0.in_flight").write_text("")  # killed before it was written
  assert suspects(tmp_path) == []


# Kills that leave something half written outside the shards.


KILLED_AT = """
import os, pathlib, signal, sys
from data_pipelines import prepare

rename = pathlib.Path.rename

def killing(self, target):
  if pathlib.Path(target).name == sys.argv[1]:
    os.kill(os.getpid(), signal.SIGKILL)
  return rename(self, target)

pathlib.Path.rename = killing
sys.exit(prepare.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("file", ["trainSet.txt", "settings.json", "features.json", "dataset_info.json", "manifest.json"])
def test_killed_while_labels_or_metadata_are_written(tmp_path, file):
  many = make_many(tmp_path / "raw")
  arguments = flags(many, tmp_path / "out", clips_per_shard=COUNT)
  command = [sys.executable, "-c", KILLED_AT, file, *arguments]
  assert subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, cwd=ROOT).returncode == -signal.SIGKILL
  assert list((tmp_path / "out").rglob(f".{file}.*.partial")) and not list((tmp_path / "out").rglob("manifest.json"))
  assert prepare.main(arguments) == 0
  assert prepare.main(flags(many, tmp_path / "other", clips_per_shard=COUNT)) == 0
  assert tree(tmp_path / "out") == tree(tmp_path / "other")


def test_a_write_that_is_cut_short_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "labels.txt"
  records.write_atomic(path, b"old")

  def killed(handle: int) -> None:
    raise KeyboardInterrupt

  monkeypatch.setattr(os, "fsync", killed)
  with pytest.raises(KeyboardInterrupt):
    records.write_atomic(path, b"new and longer")
  assert path.read_bytes() == b"old"


def test_a_damaged_journal_is_one_clear_line(tmp_path, capsys):
  many = make_many(tmp_path / "raw")
  assert prepare.main(flags(many, tmp_path / "out")) == 0
  journal, *_ = journals(tmp_path / "out")
  content = journal.read_text()
  capsys.readouterr()
  for damage, words in (("{}", "has no 'clips'"), ("[]", "is damaged"), ('{"clips": [{"clip": "a"}]}', "has no 'files'")):
    journal.write_text(damage)
    refused(capsys, flags(many, tmp_path / "out"), f"{journal}: is damaged", words, "delete it and run")
  journal.unlink()
  assert prepare.main(flags(many, tmp_path / "out")) == 0
  assert journal.read_text() == content
