"""A step whose loss or gradient is not finite: what is saved and told, and that a mended run ends as if it had not been."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import small
from command import cli_server, tiny_toybox  # noqa: F401  fixtures
from PIL import Image
from runs import checkpoints, comparable, learned, logged

from data_pipelines import DATASETS, loader
from phpjax import checkpoint, nonfinite
from phpjax.errors import UserError

PROBE = ("--config=configs/linear_probe.py:tiny", "--config.tasks=('ave',)", "--config.num_epochs=2", "--config.data.toybox=")
SKIP = "--config.on_nonfinite=skip"
# Steps 1 and 2 are the first epoch. Behind step 3 another one is dispatched before its numbers are there; step 4 ends the run.
SKIPPED = ("skipped_steps",)
STEPS = (3, 4)

POISON = """
from phpjax import run
batches = run.Run.batches
def poisoned(self, name, split, **options):
  for batch in batches(self, name, split, **options):
    if split == "train" and options.get("epoch") == 1 and {clip!r} in batch["id"]:
      batch = {{**batch, "mask": batch["mask"] + [float("nan") if name == {clip!r} else 0 for name in batch["id"]]}}
    yield batch
run.Run.batches = poisoned
"""
BAD_PARAMETER = """
import jax
from phpjax import train
begin = train.begin
def bad(run, name):
  begin(run, name)
  run.live.trainable["task"]["head"] = jax.tree.map(lambda leaf: leaf * float("nan"), run.live.trainable["task"]["head"])
train.begin = bad
"""


class Numbers:
  """Examples that are their own index."""

  def __init__(self, count):
    self.count = count

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    return {"id": str(index), "index": np.int32(index)}


def clips_of(toybox, step):
  """The ids of a step's batch, in its order."""
  records = DATASETS["ave"](toybox).records("train")
  epoch = list(loader.batches(Numbers(len(records)), batch_size=2, seed=0, shuffle=True, epoch=(step - 1) // 2))
  return [records[index].id for index in epoch[(step - 1) % 2]["index"]]


def steps_of(folder):
  return [line["step"] for line in logged(folder)]


def assert_same_end(one, other):
  assert comparable(one, but=SKIPPED) == comparable(other, but=SKIPPED)
  small.assert_same_bits(learned(one), learned(other))


@pytest.fixture(scope="module")
def train(cli, toybox):
  """Runs the probe on a workdir."""

  def go(folder, *more, data=toybox, **job):
    return cli(*PROBE, f"--config.data.root={data}", f"--workdir={folder}", *more, **job)

  return go


@pytest.fixture(scope="module")
def clean(train, tmp_path_factory):
  """The workdir of a run in which nothing goes wrong."""
  folder = tmp_path_factory.mktemp("clean") / "run"
  done = train(folder)
  assert done.code == 0, done.err
  return folder


@pytest.fixture(scope="module", params=[STEPS[0], pytest.param(STEPS[1], marks=pytest.mark.slow)])
def refused(request, train, toybox, tmp_path_factory):
  """(the step, what poisons it, the workdir that it stopped, what was said)."""
  folder = tmp_path_factory.mktemp("refused") / "run"
  poison = POISON.format(clip=clips_of(toybox, request.param)[1])
  return request.param, poison, folder, train(folder, before=poison)


def copy_of(folder, tmp_path):
  shutil.copytree(folder, tmp_path / "run")
  return tmp_path / "run"


def test_one_line_and_a_file_say_what_was_not_finite(refused, toybox):
  step, _, folder, done = refused
  assert done.code == 2, done.err
  clips, line = clips_of(toybox, step), done.err.splitlines()[-1]
  assert line.startswith(f"error: step {step} of task ave:") and "Traceback" not in done.err
  for word in (*clips, str(folder / nonfinite.FILE), f"mask of {clips[1]} is not finite", "on_nonfinite=skip", "task nan"):
    assert word in line, line
  found = json.loads((folder / nonfinite.FILE).read_text())
  assert {k: found[k] for k in ("step", "task", "epoch", "ids")} == {"step": step, "task": "ave", "epoch": 1, "ids": clips}
  assert found["loss"] == found["losses"]["task"] == "nan" and isinstance(found["grad_norm"], str)
  assert found["batch"] == {"mask": [clips[1]]} and found["parameters"] == []


def test_the_state_before_the_step_is_saved_and_nothing_behind_it(refused, train, clean, tmp_path):
  """With the data mended, the run ends where one ends in which nothing went wrong: bit by bit."""
  step, _, stopped, _ = refused
  position = checkpoint.read_meta(checkpoints(stopped)[0])["position"]
  assert (position["step"], position["epoch"], position["batch"]) == (step - 1, 1, step - 3)
  assert steps_of(stopped) == list(range(1, step))
  folder = copy_of(stopped, tmp_path)
  done = train(folder)
  assert done.code == 0 and f"step {step}" in done.err, done.err
  assert_same_end(folder, clean)
  assert json.loads((folder / "results.json").read_text())["skipped_steps"] == 0


@pytest.mark.slow
def test_told_to_skip_it_goes_on_without_the_step(refused, train, clean, tmp_path):
  step, poison, stopped, _ = refused
  folder, whole = copy_of(stopped, tmp_path), tmp_path / "whole"
  for workdir in (folder, whole):
    done = train(workdir, SKIP, before=poison)
    assert done.code == 0, done.err
    [line] = [line for line in done.err.splitlines() if "left out: loss" in line]
    assert f"step {step} of task ave" in line and str(workdir / nonfinite.FILE) in line
    found = json.loads((workdir / "results.json").read_text())
    assert (found["skipped_steps"], found["steps"]) == (1, 4)
  assert_same_end(folder, whole)
  ends = [learned(f) for f in (folder, clean)]
  assert any(ends[0][name].tobytes() != ends[1][name].tobytes() for name in ends[0]), "the step counts where it is done"
  assert all(np.isfinite(leaf).all() for leaf in ends[0].values())


@pytest.mark.parametrize("more", [(), (SKIP,)])
def test_parameters_that_are_not_finite_are_never_saved(train, tmp_path, more):
  """Nor can leaving out steps help."""
  done = train(tmp_path / "run", *more, before=BAD_PARAMETER)
  line = done.err.splitlines()[-1]
  assert done.code == 2 and "Traceback" not in done.err, done.err
  assert "task/head/" in line and "not finite before the step" in line
  found = json.loads((tmp_path / "run" / nonfinite.FILE).read_text())["parameters"]
  assert found and all(name.startswith("task/head/") for name in found)
  assert not [p for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]


def test_a_wave_that_is_not_finite_is_named_by_its_file(train, toybox, tmp_path):
  """It never gets as far as a step; the steps before it are kept."""
  data, order = tmp_path / "data", [record.id for record in DATASETS["ave"](toybox).records("train")]
  clip = max(clips_of(toybox, 2), key=order.index)  # not the first one: that is opened before any step
  shutil.copytree(toybox, data)
  (data / "AVE" / f"{clip}.mp4").unlink()
  for folder in (data / "AVE" / "frames" / clip, data / "AVE" / "wave"):
    folder.mkdir(parents=True)
  for number in range(1, 11):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(data / "AVE" / "frames" / clip / f"{number:08d}.jpg")
  wave = np.zeros(320_000, np.float32)
  wave[1234] = np.nan
  np.save(data / "AVE" / "wave" / f"{clip}.npy", wave)
  done = train(tmp_path / "run", "--config.data.query_cache_gb=0", data=data)  # else all clips are read before the first step
  line = done.err.splitlines()[-1]
  assert done.code == 2 and f"{clip}.npy" in line and "not finite" in line and "Traceback" not in done.err, done.err
  assert checkpoint.read_meta(checkpoints(tmp_path / "run")[0])["position"]["step"] == 1


# -- what is said ------------------------------------------------------------------------------------------------

BATCH = {"id": ["a", "b", ""], "audio": np.zeros((3, 2, 4), np.float32), "mask": np.array([1, 1, 0], np.float32)}
METRICS = {
  "loss": np.float32(np.inf),
  "losses": {"task": np.float32(np.inf), "key": np.float32(-1)},
  "grad_norm": np.float32(0.5),
}


def made(batch=BATCH, trainable=None):
  trainable = {"head": np.zeros(3)} if trainable is None else trainable
  return nonfinite.record(step=7, task="avs", epoch=2, batch=batch, metrics=METRICS, trainable=trainable)


def test_leaves_that_are_not_finite_are_found_whatever_their_type():
  huge = np.array([1e300])  # finite, though no float32
  tree = {"a": {"b": jnp.array([1, jnp.nan]), "c": huge}, "d": jnp.array([jnp.inf], jnp.bfloat16), "e": np.array([3]), "f": 1.0}
  assert nonfinite.leaves(tree) == ["a/b", "d"]


def test_the_clip_whose_sound_is_not_finite_is_named_and_its_numbers_are_json(tmp_path):
  audio = BATCH["audio"].copy()
  audio[1, 0, 3] = -np.inf
  found = made({**BATCH, "audio": audio})
  assert found["batch"] == {"audio": ["b"]} and found["ids"] == ["a", "b"]
  assert (found["loss"], found["losses"], found["grad_norm"]) == ("inf", {"task": "inf", "key": -1.0}, 0.5)
  paths = [nonfinite.write(tmp_path, found, process) for process in (0, 1)]
  assert len(set(paths)) == 2 and all(json.loads(path.read_text()) == found for path in paths)
  error = nonfinite.refuse(found, paths[0])
  assert isinstance(error, nonfinite.StepRefused) and "audio of b is not finite: mend the data" in str(error)


def test_an_overflow_asks_for_a_lower_rate_and_bad_parameters_for_a_new_start(tmp_path):
  overflow = nonfinite.refuse(made(), tmp_path / "file")
  assert isinstance(overflow, nonfinite.StepRefused) and "lower opt.*.lr" in str(overflow) and "mend" not in str(overflow)
  lost = nonfinite.refuse(made(trainable={"head": np.array([np.nan])}), tmp_path / "file")
  assert isinstance(lost, UserError) and not isinstance(lost, nonfinite.StepRefused) and "head were not finite" in str(lost)
