"""What the user can mend is one line on stderr that says what, where and how, with exit code 2 and no traceback."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from command import ROOT, cli_server, tiny_toybox  # noqa: F401  fixtures

from data_pipelines import DATASETS, loader

TINY = "--config=configs/linear_probe.py:tiny"
FULL = "--config=configs/php_avqa.py"
PHP = "--config=configs/php_avqa.py:tiny"


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
  "--config.encoders.audio.name=tiny_vit": ("tiny_vit", "no audio encoder", "tiny_ast"),
  "--config.encoder_dtype=float16": ("encoder_dtype", "bfloat16"),
  "--config.data.toybox=foo": ("data.toybox", "foo", "default"),
  "--config.data.evaluation_split=tset": ("evaluation_split", "tset", "val"),
  "--config.data.mirrored=('avqa','dance')": ("data.mirrored: avqa, dance cannot be mirrored", "ave, avvp, avs"),
  "--config.data.num_workers=-1": ("data.num_workers=-1",),
  "--config.log_every_steps=0": ("log_every_steps",),
  "--config.epoch_factor.ave=0": ("epoch_factor.ave",),
  "--config.seed=-1": ("seed=-1",),
  "--config.num_epochs=0": ("num_epochs",),
  "--config.watchdog_minutes=-1": ("watchdog_minutes=-1",),
  "--config.task_id=guessed": ("task_id", "given"),
  "--config.mesh=(3,1)": ("mesh", "2 devices"),
  "--config=configs/no_such.py": ("configs/no_such.py",),
  "--config=configs/linear_probe.py:huge": ("huge", "toybox"),
  "--config=configs/linear_probe.py:toybox+no_deep": ("no_deep", "reversed"),
  "--config=configs/php_avqa.py:toybox+no_depth": ("no_depth", "released_toybox", "only_PHASE"),
  "--config=configs/php_avqa.py:tiny+clip_b16": ("clip_b16", "full size"),
  "--config.method.compat=publshed": ("method.compat='publshed'", "'released'"),
  "--config.opt.lr_scaling=cubic": ("opt.lr_scaling", "'sqrt'"),
  "--config.opt.reference_batch_size=0": ("opt.reference_batch_size",),
  "--config.opt.decay=L2": ("opt.decay='L2'", "'l2'"),
  "--config.opt.clip=all": ("opt.clip='all'", "'global'"),
  "--config.protocol.avvp=weak": ("protocol.avvp='weak'", "'official', 'released'"),
}
WRONG_OF_PHP = {
  ("method.write_back=maybe",): ("method.write_back",),
  ("method.deep_layout=mixed",): ("deep_layout", "reshaped"),
  ("method.audio_logit_scale=released",): ("audio_logit_scale", "raw"),
  ("method.deep_select=key_majority", "method.deep_pool=1"): ("deep_pool=1", "key_majority"),
  ("method.deep_pool=3",): ("deep_pool=3", "task"),
  ("method.deep_pool=many",): ("method.deep_pool", "many"),
  ("method.deep=(1,)",): ("more than one prompt of mid and deep in layer 1",),
}


@pytest.mark.parametrize("argument", WRONG)
def test_a_wrong_value_is_named(run, argument):
  refused(run(*(() if argument.startswith("--config=") else (TINY,)), argument), *WRONG[argument])


@pytest.mark.parametrize("arguments", WRONG_OF_PHP)
def test_options_of_php_that_do_not_fit_are_named(run, arguments):
  refused(run(PHP, *(f"--config.{argument}" for argument in arguments)), *WRONG_OF_PHP[arguments])


def test_the_probe_does_not_ask_for_what_it_does_not_read(run):
  done = run("--config=configs/linear_probe.py")
  refused(done, "clip_vit_b32", "htsat_tiny")
  assert "roberta_base" not in done.err


def test_options_of_an_encoder_that_does_not_know_them(run):
  refused(run(FULL, "--config.encoders.visual.statistics=laion"), "encoders.visual.statistics='laion'", "'clip'")
  refused(run(FULL, "--config.encoders.audio.mel_source=rat"), "encoders.audio.mel_source='rat'", "'rate'")
  refused(run(f"{FULL}:ast", "--config.encoders.audio.mel_source=rate"), "mel_source")
  refused(
    run(FULL, "--config.encoders.audio_text.name=clip_vit_b32"), "encoders.audio_text.name='clip_vit_b32' is no text encoder"
  )


def test_no_config_and_no_workdir(cli):
  refused(cli(), "--config")
  refused(cli(TINY), "--workdir")


def test_all_that_is_missing_is_named_in_one_line_with_the_command_that_makes_it(run, tmp_path):
  encoders = ("clip_vit_b32", "htsat_tiny", "clip_text_b32", "roberta_base")
  refused(run(FULL), "--config.data.root=", *(f"python -m phpjax.convert --encoder={name}" for name in encoders))
  wrong = ("--config.batch_size=3", "--config.method.name=phb")
  datasets = ("AVE", "LLP", "AVSBench", "MusicAVQA", "python -m data_pipelines.toybox")
  refused(run(FULL, f"--config.data.root={tmp_path}", *wrong), "batch_size=3", "phb", *encoders, *datasets)
  nano = ("--config.encoders.visual.name=nano_vit", "--config.encoders.visual.weights=/nowhere")
  refused(run(TINY, *nano), "/nowhere", "python -m phpjax.pretrain --config=configs/nano.py")


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


def test_a_split_without_any_good_clip_is_named(cli, toybox, tmp_path):
  data = tmp_path / "data"
  shutil.copytree(toybox, data)
  for record in DATASETS["ave"](data).records("test"):
    (data / "AVE" / f"{record.id}.mp4").write_bytes(b"")
  where = ("--config.data.toybox=", f"--config.data.root={data}", f"--workdir={tmp_path / 'run'}")
  done = cli(TINY, "--config.tasks=('ave',)", "--config.data.on_bad_clip=skip", *where)
  assert done.code == 2 and "Traceback" not in done.err, done.err
  assert done.err.splitlines()[-1] == "error: no clip of ave test can be scored: --config.data.on_bad_clip=error says why"


class Numbers:
  """Examples that are their own index."""

  def __init__(self, count):
    self.count = count

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    return {"id": str(index), "index": np.int32(index)}


def test_steps_before_an_unreadable_clip_are_not_lost(cli, toybox, tmp_path):
  data, folder = tmp_path / "data", tmp_path / "run"
  shutil.copytree(toybox, data)
  records = DATASETS["ave"](data).records("train")
  _, second = loader.batches(Numbers(len(records)), batch_size=2, seed=0, shuffle=True)
  bad = data / "AVE" / f"{records[max(second['index'])].id}.mp4"  # not the first clip: that one is opened before any step
  whole = bad.read_bytes()
  bad.write_bytes(whole[: len(whole) // 2])
  argv = ("--config=configs/s_prompts.py:tiny", "--config.tasks=('ave',)", "--config.data.toybox=")  # reads clips as they come
  argv += (f"--config.data.root={data}", f"--workdir={folder}")
  done = cli(*argv)
  assert done.code == 2 and bad.name in done.err.splitlines()[-1] and "Traceback" not in done.err
  bad.write_bytes(whole)
  done = cli(*argv)
  assert done.code == 0 and "epoch 1, step 2" in done.out + done.err, done.err


@pytest.mark.parametrize(
  ("code", "word"),
  [("assert False", "AssertionError"), ("import nowhere_to_be_found", "nowhere_to_be_found"), ("x = (", "never closed")],
)
def test_a_config_file_that_fails_is_one_line(run, tmp_path, code, word):
  (tmp_path / "broken.py").write_text(f"{code}\n")
  refused(run(f"--config={tmp_path / 'broken.py'}"), word)


def test_a_folder_that_cannot_be_made_is_one_line(cli, tmp_path):
  (tmp_path / "file").write_text("")
  refused(cli(TINY, f"--config.data.root={tmp_path / 'file' / 'data'}", f"--workdir={tmp_path / 'run'}"), "file")


def test_output_that_nobody_reads_is_no_error():
  """As in `... --list | head -1`."""
  read, write = os.pipe()
  os.close(read)
  command = [sys.executable, "-m", "phpjax.main", "--list"]
  done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
  os.close(write)
  assert done.returncode == 141 and done.stderr == ""


def test_help_and_list():
  listed = ("php", "linear_probe", "avqa", "clip_vit_b32", "llp")
  for flag, words in (("--help", ("--workdir", "--mode", "Exit codes")), ("--list", listed)):
    argv = [sys.executable, "-m", "phpjax.main", flag]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert all(word in done.stdout for word in words), done.stdout
