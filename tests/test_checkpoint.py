"""A checkpoint gives back the same bits, and says so when it cannot."""

import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_disk import files_that_stay_small  # noqa: F401  fixture
from ml_collections import ConfigDict
from small import assert_same_bits

from phpjax import checkpoint, manifest, optimizer, sharding
from phpjax.errors import UserError
from phpjax.steps import Live

GROUPS = {label: {"lr": 0.1, "weight_decay": 0.1} for label in ("shared", "prompts", "head")}
OPT = ConfigDict({**GROUPS, "clip_norm": 1.0, "b1": 0.9, "b2": 0.99, "eps": 1e-8})


def items(seed):
  """Trained parameters and an optimizer state in use, with numbers that are hard to keep."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  head = {"k": draw(64, 64), "odd": jnp.asarray([np.nan, np.inf, -0.0, 1e-45], jnp.float32), "b": draw().astype(jnp.bfloat16)}
  trainable = {"shared": {"adapters": draw(3)}, "task": {"prompts": {"p": draw(2, 2)}, "head": {"k": head["k"]}}}
  tx = optimizer.make(optimizer.settings(OPT))
  _, opt_state = tx.update(trainable, tx.init(trainable), trainable)
  live = Live(trainable, opt_state, {"shared": {}, "task": {"norm": {"mean": draw(4)}}})
  tree = {
    "shared": {"adapters": draw(3), "context": {"w": draw(5)}},
    "task_ave": {"prompts": {"p": draw(2, 2)}, "head": head},
    "task_avs": {},
    "live": {"opt_state": live.opt_state, "state": live.state},
  }
  return sharding.put_replicated(tree, sharding.make_mesh((-1, 1)))


def meta(step: int, **fields: object) -> dict:
  return {"position": {"step": 10 * step}, "needs": [], "learned": {}, **fields}


@pytest.fixture
def saved(tmp_path):
  """Two steps, committed."""
  checkpoints = checkpoint.Checkpoints(tmp_path)
  for step in (1, 2):
    checkpoints.save(step, items(step), meta(step))
  checkpoints.wait()
  yield checkpoints
  checkpoints.close()


def data_file(folder: pathlib.Path) -> pathlib.Path:
  """The file that holds most of the numbers."""
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: pathlib.Path, at: float) -> None:
  """Changes one byte, at this share of the file."""
  data = bytearray(path.read_bytes())
  data[int(at * (len(data) - 1))] ^= 0x40
  path.write_bytes(data)


def opened(checkpoints: checkpoint.Checkpoints) -> int | None:
  """The position of the newest good step."""
  found = checkpoints.newest_good()
  return found and found[1]["position"]["step"]


def test_a_step_is_restored_bit_for_bit(saved):
  for step in (2, 1):
    wanted = items(step)
    blank = jax.tree.map(jnp.zeros_like, wanted)
    restored = saved.restore(step, blank)
    assert "task_avs" not in restored, "empty items are not written"
    assert_same_bits(restored, {k: v for k, v in wanted.items() if k != "task_avs"})
    assert all(a.sharding == b.sharding for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True))
    assert jax.tree.structure(restored["live"]) == jax.tree.structure(wanted["live"]), "the optimizer can go on with it"
    assert checkpoint.open_meta(saved.folder, step)["position"] == {"step": 10 * step}
  assert saved.steps() == [2, 1]


def test_one_item_is_restored_alone(saved):
  [(name, restored)] = saved.restore(2, {"task_ave": items(1)["task_ave"]}).items()
  assert name == "task_ave"
  assert_same_bits(restored, items(2)["task_ave"])


def test_arrays_are_read_without_a_known_structure(saved):
  restored = checkpoint.load_numpy(saved.folder / "2", "task_ave")
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(restored))
  assert_same_bits(restored, items(2)["task_ave"])


def test_what_is_saved_is_of_the_moment_of_saving(tmp_path):
  """The meta data and, by donation, the arrays change while they are being written."""
  checkpoints, grown, tree = checkpoint.Checkpoints(tmp_path), {"rows": [1]}, items(1)
  step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
  changed = jax.tree.map(lambda x: x.copy(), tree)
  checkpoints.save(1, changed, meta(1, history=grown))
  for _ in range(20):
    changed = step(changed)
    grown["rows"].append(2)
  checkpoints.wait()
  assert checkpoint.open_meta(checkpoints.folder, 1)["history"] == {"rows": [1]}
  for name, wanted in tree.items():
    if wanted:
      assert_same_bits(checkpoint.load_numpy(checkpoints.folder / "1", name), jax.tree.map(np.asarray, wanted))
  checkpoints.close()


# -- which steps stay --------------------------------------------------------------------------------------------


def test_the_newest_steps_stay_and_all_that_they_need(saved):
  for step, needs in {3: [], 4: [3], 5: [3, 4], 6: [3], 7: [3]}.items():
    saved.save(step, items(step), meta(step, needs=needs))
    saved.wait()
    assert saved.steps() == {3: [3, 2], 4: [4, 3], 5: [5, 4, 3], 6: [6, 5, 4, 3], 7: [7, 6, 3]}[step]
  again = checkpoint.Checkpoints(saved.folder.parent)
  again.save(8, items(8), meta(8))
  again.wait()
  assert again.steps() == [8, 7, 3], "a continued run knows what the steps before it need"
  again.close()


def test_a_damaged_step_does_not_push_out_a_good_one(saved):
  flip(data_file(saved.folder / "2"), 0.5)
  assert opened(saved) == 10
  saved.save(3, items(3), meta(3))
  saved.wait()
  assert saved.steps() == [3, 1]


# -- damage ------------------------------------------------------------------------------------------------------


def truncated(step: pathlib.Path) -> None:
  path = data_file(step)
  os.truncate(path, path.stat().st_size // 2)


def zeroed(step: pathlib.Path) -> None:
  path = data_file(step)
  path.write_bytes(bytes(path.stat().st_size))


def empty(step: pathlib.Path) -> None:
  shutil.rmtree(step)
  step.mkdir()


def half_written(step: pathlib.Path) -> None:
  """What a kill leaves while a step is being written."""
  step.rename(step.with_name(f"{step.name}.orbax-checkpoint-tmp"))


DAMAGES = {
  "truncated": truncated,
  "deleted": lambda step: data_file(step).unlink(),
  "zeroed": zeroed,
  "one flipped byte": lambda step: flip(data_file(step), 0.5),
  "missing manifest": lambda step: (step / manifest.FILE).unlink(),
  "missing item": lambda step: shutil.rmtree(step / "task_ave"),
  "empty step folder": empty,
  "half-written temporary folder": half_written,
  "flipped manifest": lambda step: flip(step / manifest.FILE, 0.5),
  "position cut short": lambda step: (step / "meta" / "metadata").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_step_is_named_and_the_one_before_is_used(tmp_path, capsys, damage):
  first = checkpoint.Checkpoints(tmp_path)
  for step in (1, 2):
    first.save(step, items(step), meta(step))
  first.close()
  DAMAGES[damage](first.folder / "2")
  again = checkpoint.Checkpoints(tmp_path)  # as a process that starts anew
  assert opened(again) == 10
  assert_same_bits(again.restore(1, {"task_ave": items(2)["task_ave"]}), {"task_ave": items(1)["task_ave"]})
  warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: checkpoint")]
  if damage == "half-written temporary folder":  # no step at all: orbax sweeps it away
    assert not warnings
  else:
    [warning] = warnings
    assert str(first.folder / "2") in warning
  again.save(3, items(3), meta(3))
  again.close()
  assert [p.name for p in sorted(first.folder.iterdir()) if p.is_dir()] == ["1", "3"], "the damaged one goes"


@pytest.mark.parametrize("part", ["shared", "task_ave", "live", "meta", "_CHECKPOINT_METADATA"])
def test_every_file_of_a_step_is_watched(saved, part):
  """Also what orbax would restore without complaint, or not read at all."""
  path = saved.folder / "2" / part
  for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file() and p.stat().st_size]:
    before = file.read_bytes()
    for at in (0, 0.5, 1):
      flip(file, at)
      with pytest.raises(manifest.DamagedError, match="damaged"):
        checkpoint.open_meta(saved.folder, 2)
      file.write_bytes(before)
  assert checkpoint.open_meta(saved.folder, 2)["position"] == {"step": 20}


def test_a_step_is_only_as_good_as_those_that_it_needs(saved, capsys):
  saved.save(3, items(3), meta(3))
  saved.save(4, items(4), meta(4, needs=[3]))
  saved.save(5, items(5), meta(5, needs=[3]))
  saved.wait()
  flip(data_file(saved.folder / "3" / "task_ave"), 0.5)
  with pytest.raises(UserError, match="no checkpoint"):
    opened(saved)
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 3 and all(str(saved.folder / "3") in line for line in lines), "each names the file that is damaged"


@pytest.mark.parametrize("name", ["../2/meta/metadata", "/etc/hostname", "a\0b", "shared/../../../x"])
def test_a_manifest_reads_nothing_outside_its_step(saved, name):
  path = saved.folder / "2" / manifest.FILE
  listed = json.loads(path.read_text())
  listed["files"][name] = {"bytes": 1, "sha256": "0"}
  path.write_text(json.dumps(listed))
  with pytest.raises(manifest.DamagedError, match=r"manifest\.json is damaged"):
    checkpoint.open_meta(saved.folder, 2)


@pytest.mark.parametrize(
  ("field", "value"), [("items", ["../../../secret"]), ("items", ["/etc"]), ("items", [".."]), ("needs", ["../1"])]
)
def test_a_step_names_only_items_and_steps(saved, field, value):
  path = saved.folder / "2" / "meta" / "metadata"
  path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
  with pytest.raises(manifest.DamagedError, match="names what is no item or no step"):
    checkpoint.read_meta(saved.folder / "2")


def test_only_numbers_are_steps(tmp_path):
  for name in ("1", "12", "\u00b2", "x", "3.tmp"):
    (tmp_path / name).mkdir()
  assert checkpoint.steps_of(tmp_path) == [12, 1] and checkpoint.steps_of(tmp_path / "none") == []


def test_an_optimizer_that_nobody_reads_may_be_damaged(saved):
  """Of a step that is needed, the parameters count."""
  saved.save(3, items(3), meta(3, needs=[1]))
  saved.wait()
  flip(data_file(saved.folder / "1" / "live"), 0.5)
  assert opened(saved) == 30
  flip(data_file(saved.folder / "1" / "shared"), 0.5)
  assert opened(saved) == 20


def test_a_disk_that_cannot_be_read_now_condemns_nothing(saved, monkeypatch):
  with monkeypatch.context() as patched:
    patched.setattr(manifest, "_sha256", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(UserError, match=r"cannot read checkpoint .*Input/output error.*run the same command again"):
      opened(saved)
  assert opened(saved) == 20
  saved.save(3, items(3), meta(3))
  saved.wait()
  assert saved.steps() == [3, 2]


def test_no_good_step_is_one_clear_error_and_no_step_is_none(saved, tmp_path, capsys):
  for step in ("1", "2"):
    flip(data_file(saved.folder / step / "task_ave"), 0.5)
  with pytest.raises(UserError, match="no checkpoint"):
    opened(saved)
  assert len(capsys.readouterr().err.strip().splitlines()) == 2
  empty = checkpoint.Checkpoints(tmp_path / "empty")
  assert opened(empty) is None
  empty.close()


def test_only_a_first_step_may_be_unfinished_and_alone(tmp_path, capsys):
  """It is what a kill within the first save leaves; a later step without its manifest means that files were lost."""
  for step, fine in ((1, True), (5, False)):
    checkpoints = checkpoint.Checkpoints(tmp_path / str(step))
    checkpoints.save(step, items(step), meta(step))
    checkpoints.wait()
    (checkpoints.folder / str(step) / manifest.FILE).unlink()
    if fine:
      assert opened(checkpoints) is None
      assert "the step was not finished" in capsys.readouterr().err
    else:
      with pytest.raises(UserError, match="no checkpoint"):
        opened(checkpoints)
    checkpoints.close()


@pytest.mark.parametrize("version", [1, 99])
def test_other_versions_are_refused_by_name(tmp_path, monkeypatch, version):
  checkpoints = checkpoint.Checkpoints(tmp_path)
  with monkeypatch.context() as patched:
    patched.setattr(checkpoint, "VERSION", version)
    checkpoints.save(1, {"shared": {"a": jnp.ones(1)}}, meta(1))
    checkpoints.wait()
  with pytest.raises(UserError, match=f"version {version}, this phpjax reads version {checkpoint.VERSION}"):
    opened(checkpoints)
  checkpoints.close()


# -- a disk that is full -----------------------------------------------------------------------------------------


def test_a_full_disk_is_told_and_costs_no_earlier_step(tmp_path, small_files):
  checkpoints, large = (
    checkpoint.Checkpoints(tmp_path),
    {"shared": {"w": jnp.asarray(np.random.default_rng(0).normal(size=1 << 16))}},
  )
  for step in (1, 2):
    checkpoints.save(step, large, meta(step))
  checkpoints.wait()
  small_files()
  with pytest.raises(UserError, match=r"cannot write a checkpoint to .*; earlier checkpoints are kept, free some space"):
    checkpoints.save(3, large, meta(3))
    checkpoints.wait()
  assert opened(checkpoints) == 20 and {p.name for p in checkpoints.folder.iterdir()} >= {"1", "2"}
