"""Whole runs through the command line: what is learned stays, what is stopped goes on, what is finished says so."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import small
from command import SMALL, cli_server, finished_run, tiny_toybox  # noqa: F401  fixtures
from runs import checkpoints, comparable, learned, logged, results

import phpjax
from configs import php_avqa
from phpjax import checkpoint, logs, opening, resume

NUM_STEPS = 8  # 2 tasks, 2 epochs, 2 steps
LAST_OF_FIRST_EPOCH = 6  # of the second task


# Python of a child: SIGTERM to itself behind the first batch of a pass over the training clips of the second task.
AFTER_A_BATCH = """
import os, signal
from phpjax import progress
tell, seen = progress.Progress.batch, []
def batch(self, done, *more):
  tell(self, done, *more)
  seen.append(self._task)
  if "2/2" in self._task and seen.count(self._task) == 1:
    os.kill(os.getpid(), signal.SIGTERM)
progress.Progress.batch = batch
"""


def command(toybox, folder, *more):
  return (*SMALL, f"--config.data.root={toybox}", f"--workdir={folder}", *more)


@pytest.fixture(scope="module")
def stopped(cli, toybox, tmp_path_factory):
  """(workdir of a run that got SIGTERM after the first epoch of its second task, what it said)."""
  folder = tmp_path_factory.mktemp("stopped") / "run"
  return folder, cli(*command(toybox, folder), stop_at=LAST_OF_FIRST_EPOCH)


@pytest.fixture(scope="module")
def resumed(cli, toybox, stopped, tmp_path_factory):
  """(workdir after the same command was given again, what it said)."""
  folder = tmp_path_factory.mktemp("resumed") / "run"
  shutil.copytree(stopped[0], folder)
  return folder, cli(*command(toybox, folder))


# -- one run -----------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_is_promised(finished):
  assert {p.name for p in finished.iterdir()} >= {
    "config.json",
    "metrics.jsonl",
    "results.json",
    "checkpoints",
    "figures",
    "tensorboard",
  }
  found = results(finished)
  assert set(found) >= {
    "method", "tasks", "metric", "matrix", "mean_accuracy", "forgetting", "bwt", "per_task", "trivial", "unseen",
    "parameters", "seed", "steps", "seconds", "peak_memory_bytes", "data", "weights", "versions", "compat",
  }  # fmt: skip
  assert found["tasks"] == ["ave", "avs"] and found["method"] == "php" and found["steps"] == NUM_STEPS
  for matrix in (found["matrix"], found["unseen"]):
    assert [[x is None for x in row] for row in matrix] == [[False, True], [False, False]]
    assert all(0 <= x <= 1 for row in matrix for x in row if x is not None)
  assert found["mean_accuracy"] == pytest.approx(np.mean(found["matrix"][1]))
  assert set(found["parameters"]) == {"frozen", "shared", "per_task", "trainable_fraction", "trainable_fraction_without_heads"}
  assert {row["split"] for row in found["per_task"]} == {"test", "unseen"}
  assert len(list((finished / "figures").glob("*.png"))) >= 4


def test_every_step_is_logged_once(finished):
  lines = logged(finished)
  assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
  assert [(line["task"], line["epoch"]) for line in lines] == [(t, e) for t in ("ave", "avs") for e in (0, 0, 1, 1)]
  for line in lines:
    assert set(line) == {"step", "task", "epoch", "loss", "losses", "lr", "examples_per_s", "data_wait_s"}
    assert line["loss"] == pytest.approx(sum(line["losses"].values()), rel=1e-5)
  assert lines[2]["lr"]["head"] < lines[0]["lr"]["head"] and lines[4]["lr"]["shared"] < lines[4]["lr"]["head"]


def test_one_trace_per_task_over_two_epochs_and_all_evaluations(finished):
  seen = json.loads(finished.with_suffix(".traces").read_text())
  assert seen == {
    "traces": {"train/event": 1, "train/segmentation": 1, "predict/event": 1, "predict/segmentation": 1}, "compiles": 2,
  }  # fmt: skip


# -- stopping and going on ---------------------------------------------------------------------------------------


def test_sigterm_saves_and_exits_with_42(stopped):
  folder, done = stopped
  assert done.code == 42, done.err
  assert "Traceback" not in done.err and "SIGTERM" in done.out + done.err and not (folder / "results.json").exists()
  assert logged(folder)[-1]["step"] == LAST_OF_FIRST_EPOCH
  meta = checkpoint.read_meta(checkpoints(folder)[0])
  assert (meta["position"]["task"], meta["position"]["step"], meta["live"]) == (1, LAST_OF_FIRST_EPOCH, True)


def test_a_half_learned_task_can_be_loaded(stopped):
  loaded = phpjax.load(stopped[0])
  assert loaded.tasks == ("ave", "avs") and loaded.results is None
  stored = checkpoint.load_numpy(checkpoints(stopped[0])[0], "task_avs")["head"]
  small.assert_same_bits(jax.device_get(loaded.params["tasks"]["avs"]["head"]), stored)


def test_the_same_command_ends_where_an_uninterrupted_run_does(finished, resumed):
  folder, done = resumed
  assert done.code == 0, done.err
  assert "continuing" in done.out + done.err
  assert comparable(folder) == comparable(finished)
  assert [line["loss"] for line in logged(folder)] == [line["loss"] for line in logged(finished)]
  small.assert_same_bits(learned(folder), learned(finished))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["l2p.py:tiny", "slda.py:tiny+ave_classes"])
def test_other_methods_stop_and_go_on_too(cli, toybox, tmp_path, config):
  """A pool that asks the unprompted encoders, and statistics without a gradient for tasks that are inferred."""
  flags = (f"--config=configs/{config}", f"--config.data.root={toybox}", "--config.eval_batch_size=2")
  flags = (*flags, "--config.tasks=('ave','avs')", "--config.num_epochs=2") if "l2p" in config else flags
  cut = {"stop_at": 3} if "l2p" in config else {"before": AFTER_A_BATCH}
  done = cli(*flags, f"--workdir={tmp_path / 'whole'}")
  assert done.code == 0, done.err
  done = cli(*flags, f"--workdir={tmp_path / 'cut'}", **cut)
  assert done.code == 42 and not (tmp_path / "cut" / "results.json").exists(), done.err
  done = cli(*flags, f"--workdir={tmp_path / 'cut'}")
  assert done.code == 0, done.err
  assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
  small.assert_same_bits(learned(tmp_path / "cut"), learned(tmp_path / "whole"))


def test_each_evaluation_says_what_it_scored_beside_a_trivial_predictor(resumed):
  folder, done = resumed
  lines, found = [line for line in done.err.splitlines() if "trivial predictor" in line], results(folder)
  epochs = [line for line in lines if line.startswith("epoch ")]
  assert [line.split(":")[0] for line in epochs] == ["epoch 1/2, avs val", "epoch 2/2, avs val"]
  lines = [line for line in lines if line not in epochs]
  assert [line.split(":")[0] for line in lines] == ["ave test", "ave unseen", "avs test", "avs unseen"]
  for line in lines:
    name, split = line.split(":")[0].split()
    trivial = found["trivial_predictor"][name] if split == "test" else found["trivial_predictor_elsewhere"][name][split]
    said = found["data"]["evaluated"][name][split]
    scores = [row["scores"] for row in found["per_task"] if (row["after"], row["task"], row["split"]) == ("avs", name, split)]
    metric = found["metric"][name]
    assert f": {metric} {100 * scores[0][metric]:.1f} (trivial {100 * trivial['scores'][metric]:.1f})" in line
    assert f"trivial predictor: {trivial['name']};" in line
    assert said["scored_rows"] == said["rows"] == found["data"]["counts"][name][split] and said["left_out_clips"] == 0
    assert f"{said['rows']} of {said['rows']} rows scored, {said['clips']} of {said['clips']} clips read" in line
    assert line.endswith(f"protocol: {said['protocol']}")
  assert found["trivial"]["ave"] == found["trivial_predictor"]["ave"]["scores"]["segment_accuracy"]
  [title] = [line for line in done.err.splitlines() if line.startswith("accuracy matrix")]
  assert "on test" in title and "epoch chosen on val (ave, avs)" in title


def test_the_epoch_that_validation_prefers_is_the_one_that_counts(finished, resumed):
  """And the same one after a stop between the two."""
  for folder in (finished, resumed[0]):
    for name, how in results(folder)["data"]["model_selection"].items():
      assert how["split"] == "val" and how["epochs"] == len(how["scores"]) == 2
      assert how["scores"][how["epoch"] - 1] == max(how["scores"]), name


@pytest.mark.slow
def test_workers_change_no_number_and_mirrored_clips_do(cli, toybox, tmp_path):
  flags = (*SMALL[:1], *SMALL[2:4], "--config.tasks=('ave',)", "--config.num_epochs=1", f"--config.data.root={toybox}")
  mirrored, workers = "--config.data.mirrored=('ave',)", "--config.data.num_workers=1"
  for name, more in {"plain": (), "mirrored": (mirrored,), "workers": (mirrored, workers)}.items():
    done = cli(*flags, *more, f"--workdir={tmp_path / name}")
    assert done.code == 0, done.err
  losses = {path.name: [line["loss"] for line in logged(path)] for path in tmp_path.iterdir()}
  assert losses["mirrored"] == losses["workers"] and losses["plain"] != losses["workers"]
  assert comparable(tmp_path / "mirrored") == comparable(tmp_path / "workers")


def test_past_tasks_and_what_the_later_one_does_not_use_stay_bit_equal(stopped, resumed):
  during, after = checkpoints(stopped[0])[0], checkpoints(resumed[0])[0]
  held = checkpoint.read_meta(after)["learned"]
  assert list(held) == ["ave", "avs"] and checkpoint.read_meta(during)["learned"] == {"ave": held["ave"]}
  ends = {name: checkpoints(resumed[0])[0].parent / str(step) for name, step in held.items()}
  ave, shared = (checkpoint.load_numpy(ends["ave"], item) for item in ("task_ave", "shared"))
  assert set(ave) == {"prompts", "head"} and set(shared) == {"context", "clip_adapter", "clip_adapter_text", "contrastive"}
  holding = [step.name for step in checkpoints(resumed[0]) if (step / "task_ave").is_dir()]
  assert holding == [ends["ave"].name], "a finished task is written once, and kept"
  for later in (during, ends["avs"], after):
    small.assert_same_bits(checkpoint.load_numpy(later, "shared"), shared)  # AVS reads no class text
  one, two = (small.flat(checkpoint.load_numpy(step, "task_avs")) for step in (during, ends["avs"]))
  kept = [one[name].tobytes() == two[name].tobytes() for name in one]
  first_epoch = results(resumed[0])["data"]["model_selection"]["avs"]["epoch"] == 1
  assert all(kept) if first_epoch else not any(kept), "the later task has what it had after the epoch that was chosen"


def damaged(stopped, tmp_path, damage):
  """A stopped run whose newest step is damaged, opened again: (its position, the lines of its log)."""
  folder = tmp_path / "run"
  shutil.copytree(stopped[0], folder)
  damage(checkpoints(folder)[0])
  config = php_avqa.get_config("tiny")
  config.update(json.loads((folder / "config.json").read_text()))
  config.tasks, config.mesh = ("ave", "avs"), (-1, 1)
  for phase in ("shallow", "mid", "deep"):
    config.method[phase] = tuple(config.method[phase])
  with opening.open_run(config, folder) as opened:
    assert resume.restore(opened)
    assert opened.live is None and list(opened.params["tasks"]) == ["ave"] == list(opened.state["tasks"])
    logs.MetricsLog(folder, resume_step=opened.position.step, primary=True).close()  # as training would go on
    position, lines = dataclasses.replace(opened.position), logged(folder)
    resume.save(opened)
    opened.checkpoints.wait()
    assert checkpoint.read_meta(checkpoints(folder)[0])["position"]["step"] == 4, "the next save is not lost to the damaged one"
    return position, lines


def flip_bytes(step: pathlib.Path):
  """In every file of arrays: which of them an array is read from is orbax's business."""
  for path in (step / "task_avs").glob("ocdbt.process_*/d/*"):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_the_position(step: pathlib.Path):
  path = max((step / "meta").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
  path.write_text("{")


@pytest.mark.parametrize("damage", [flip_bytes, cut_the_position])
def test_a_damaged_checkpoint_costs_no_more_than_the_time_since_the_one_before(stopped, tmp_path, capsys, damage):
  """Here the step before even belongs to another task than the damaged one."""
  position, lines = damaged(stopped, tmp_path, damage)
  assert (position.task, position.epoch, position.step) == (1, 0, 4)
  assert [line["step"] for line in lines] == [1, 2, 3, 4], "steps that will be done again are forgotten"
  warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
  assert len(warnings) == 1 and str(tmp_path / "run" / "checkpoints") in warnings[0]


SMALL_FILES = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
"""


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line_and_with_space_the_run_goes_on(cli, toybox, stopped, finished, tmp_path):
  folder = tmp_path / "run"
  shutil.copytree(stopped[0], folder)
  before = checkpoints(folder)
  done = cli(*command(toybox, folder), before=SMALL_FILES)
  assert done.code == 2 and "Traceback" not in done.err, done.err
  assert done.err.splitlines()[-1].startswith(f"error: cannot write a checkpoint to {folder / 'checkpoints'}: ")
  assert "File too large" in done.err and "free some space and run the same command again" in done.err
  assert checkpoints(folder) == before
  done = cli(*command(toybox, folder))
  assert done.code == 0 and "continuing" in done.err, done.err
  assert comparable(folder) == comparable(finished)


DEV_FULL = {
  "config.json": "config.json.tmp",
  "metrics.jsonl": "metrics.jsonl.tmp",
  "results.json": "results.json.tmp",
  "figures/accuracy_matrix.png": "figures/accuracy_matrix.png",
}
FULL_AT_STEP_7 = """
import os, resource, signal
from phpjax import logs
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
write, free = logs.MetricsLog.step, resource.getrlimit(resource.RLIMIT_FSIZE)
def step(self, number, **fields):
  if number == 7:
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize("{path}") + 50, free[1]))
  try:
    write(self, number, **fields)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, free)
logs.MetricsLog.step = step
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DEV_FULL, "a line of metrics.jsonl"])
def test_a_full_disk_under_any_other_file_ends_in_one_line_too(cli, toybox, stopped, finished, tmp_path, name):
  folder = tmp_path / "run"
  before, path = "", folder / name.split()[-1]
  if name == "config.json":  # of a new run
    folder.mkdir()
  else:
    shutil.copytree(stopped[0], folder)
  if name in DEV_FULL:
    (folder / DEV_FULL[name]).parent.mkdir(exist_ok=True)
    (folder / DEV_FULL[name]).symlink_to("/dev/full")
  else:
    before = FULL_AT_STEP_7.format(path=path)
  done = cli(*command(toybox, folder), before=before)
  assert done.code == 2 and "Traceback" not in done.err, done.err
  assert done.err.splitlines()[-1].startswith(f"error: cannot write {path}: ")
  assert done.err.splitlines()[-1].endswith("; free some space and run the same command again")
  assert not (folder / "results.json").exists()
  if name in DEV_FULL:
    (folder / DEV_FULL[name]).unlink(missing_ok=True)
  done = cli(*command(toybox, folder))
  assert done.code == 0, done.err
  assert comparable(folder) == comparable(finished)
  assert [line["loss"] for line in logged(folder)] == [line["loss"] for line in logged(finished)]
  assert (folder / "figures" / "accuracy_matrix.png").stat().st_size > 1000


# -- a finished run ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copy(finished, tmp_path_factory):
  """A finished workdir that may be changed."""
  folder = tmp_path_factory.mktemp("copy") / "run"
  shutil.copytree(finished, folder)
  return folder


def test_a_finished_workdir_says_so(cli, copy, toybox):
  before = (copy / "results.json").read_bytes(), (copy / "metrics.jsonl").read_bytes(), checkpoints(copy)
  done = cli(*command(toybox, copy))
  assert done.code == 0, done.err
  assert "finished" in (done.out + done.err).lower() and "continuing" not in done.out + done.err
  assert ((copy / "results.json").read_bytes(), (copy / "metrics.jsonl").read_bytes(), checkpoints(copy)) == before


def test_evaluate_reproduces_the_last_row(cli, copy, toybox):
  before = results(copy)
  done = cli(*command(toybox, copy), "--mode=evaluate")
  assert done.code == 0, done.err
  found = json.loads((copy / "evaluation.json").read_text())
  assert found["per_task"] == [row for row in before["per_task"] if row["after"] == "avs"]
  assert results(copy) == before and len(logged(copy)) == NUM_STEPS


def test_another_config_is_refused(cli, copy, toybox):
  before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
  done = cli(*command(toybox, copy), "--config.seed=5", "--config.opt.head.lr=0.5")
  assert done.code == 2
  [line] = done.err.splitlines()
  assert line.startswith("error:") and "seed (there 0, now 5)" in line and "opt.head.lr" in line and str(copy) in line
  assert {p: p.stat().st_mtime_ns for p in copy.rglob("*")} == before, "nothing is touched"


# -- modes that learn nothing ------------------------------------------------------------------------------------


def test_a_dry_run_prints_and_writes_nothing(cli, toybox, tmp_path):
  done = cli(*command(toybox, tmp_path / "run"), "--mode=dry_run")
  assert done.code == 0, done.err
  assert not (tmp_path / "run").exists()
  lines = done.out.splitlines()
  assert any(line.split() == ["ave", "train", "4", "val", "2", "test", "3", "unseen", "3"] for line in lines), "data counts"
  [head] = [i for i, line in enumerate(lines) if line.startswith("parameters")]
  table = [line.split() for line in lines[head + 1 : head + 3]]
  assert lines[head].endswith("without head"), "the last column"
  assert all(float(row[-1].strip("%")) < float(row[-2].strip("%")) for row in table if row[0] == "avs")
  assert [row[0] for row in table] == ["ave", "avs"] and table[1][2] == "0", "AVS trains no shared parameter here"
  assert "num_mid_prompts" in done.out and "GiB" in done.out


def test_evaluating_nothing_is_refused_and_makes_no_folder(cli, toybox, tmp_path):
  done = cli(*command(toybox, tmp_path / "run"), "--mode=evaluate")
  assert done.code == 2 and len(done.err.splitlines()) == 1, done.err
  assert "--mode=train" in done.err and not (tmp_path / "run").exists()


# -- choices -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_settings_are_chosen_on_val_and_frozen_weights_may_be_half_as_wide(cli, toybox, tmp_path):
  folder = tmp_path / "run"
  choices = ("--config.tasks=('ave',)", "--config.num_epochs=1", "--config.data.evaluation_split=val")
  flags = (*SMALL[:1], *SMALL[2:4], *choices, "--config.encoder_dtype=bfloat16")
  done = cli(*flags, f"--config.data.root={toybox}", f"--workdir={folder}")
  assert done.code == 0, done.err
  found = results(folder)
  assert {row["split"] for row in found["per_task"]} == {"val"} and not found["unseen"]
  assert found["data"]["evaluation_split"] == "val" and 0 <= found["trivial"]["ave"] <= 1
  assert all(np.isfinite(line["loss"]) for line in logged(folder))
