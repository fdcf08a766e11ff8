"""What the user can mend is one line on stderr that says what, where and how, with exit code 2 and no traceback."""

import shutil
import subprocess
import sys

import pytest
from command import ROOT, cli_server, tiny_toybox  # noqa: F401  fixtures

TINY = "--config=configs/linear_probe.py:tiny"
FULL = "--config=configs/linear_probe.py"


def refused(done, *words):
  """Checks the one line, which holds all `words`."""
  assert done.code == 2, (done.code, done.err)
  [line] = done.err.splitlines()
  assert line.startswith("error: ") and "Traceback" not in done.out, done.out
  for word in words:
    assert word in line, line
  return line


@pytest.fixture
def run(cli, tmp_path):
  """Runs a command with a workdir that must not be made."""

  def go(*argv):
    done = cli(*argv, f"--workdir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists(), "a command that is refused leaves nothing"
    return done

  return go


MISTYPED = [
  ("--config.batchsize=2", "batchsize", '"batch_size"'),
  ("--config.opt.heads.lr=1", "heads", '"head"'),
  ("--config.method.nmae=php", "nmae", '"name"'),
]


@pytest.mark.parametrize(("typed", "wrong", "meant"), MISTYPED)
def test_a_mistyped_key_is_named_with_what_was_meant(run, typed, wrong, meant):
  assert "did you mean" in refused(run(TINY, typed), wrong, meant).lower()


WRONG = {
  "--config.batch_size=many": ("batch_size", "many"),
  "--mode=learn": ("learn", "evaluate"),
  "--confg=x": ("confg", "config"),
  "more": ("more",),
  "--config.tasks=('ave','avx')": ("avx", "avvp"),
  "--config.method.name=phb": ("phb", "finetune"),
  "--config.encoders.audio.name=tiny_asd": ("tiny_asd", "tiny_ast"),
  "--config.num_epochs=0": ("num_epochs",),
  "--config.task_id=guessed": ("task_id", "given"),
  "--config.mesh=(3,1)": ("mesh", "2 devices"),
  "--config=configs/no_such.py": ("configs/no_such.py",),
  "--config=configs/linear_probe.py:huge": ("huge", "toybox"),
}


@pytest.mark.parametrize("argument", WRONG)
def test_a_wrong_value_is_named(run, argument):
  refused(run(*(() if argument.startswith("--config=") else (TINY,)), argument), *WRONG[argument])


def test_no_config_and_no_workdir(cli):
  refused(cli(), "--config")
  refused(cli(TINY), "--workdir")


def test_all_that_is_missing_is_named_in_one_line_with_the_command_that_makes_it(run, tmp_path):
  encoders = ("clip_vit_b32", "ast_base", "clip_text_b32")
  refused(run(FULL), "--config.data.root=", *(f"python -m phpjax.convert --encoder={name}" for name in encoders))
  wrong = ("--config.batch_size=3", "--config.method.name=phb")
  datasets = ("AVE", "LLP", "AVSBench", "MusicAVQA", "python -m data_pipelines.toybox")
  refused(run(FULL, f"--config.data.root={tmp_path}", *wrong), "batch_size=3", "phb", *encoders, *datasets)
  refused(run(TINY, "--config.encoders.visual.weights=/nowhere"), "/nowhere", "python -m phpjax.convert --encoder=tiny_vit")


def test_a_batch_that_the_devices_do_not_divide(run):
  refused(run(TINY, "--config.batch_size=5"), "batch_size=5", "2 devices", "4 or 6")
  refused(run(TINY, "--config.eval_batch_size=3"), "eval_batch_size=3", "2 or 4")


def test_an_unreadable_clip_is_named_and_nothing_is_lost(cli, toybox, tmp_path):
  data, folder = tmp_path / "data", tmp_path / "run"
  shutil.copytree(toybox, data)
  for clip in (data / "AVE").rglob("*.mp4"):
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
  where = (f"--config.data.root={data}", f"--workdir={folder}")
  line = refused(cli(TINY, "--config.tasks=('ave',)", "--config.data.toybox=", *where), ".mp4", str(data / "AVE"))
  assert "skip" in line or "again" in line
  assert (folder / "config.json").is_file(), "the same command goes on once the clip is mended"


def test_help_and_list():
  listed = ("php", "linear_probe", "avqa", "clip_vit_b32", "llp")
  for flag, words in (("--help", ("--workdir", "--mode", "Exit codes")), ("--list", listed)):
    argv = [sys.executable, "-m", "phpjax.main", flag]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert all(word in done.stdout for word in words), done.stdout
