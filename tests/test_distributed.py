"""Several processes find each other, give what one gives, stop together, end together: real processes, real signals."""

import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
import small
from command import SMALL, Done, cli_server, finished_run, tiny_toybox  # noqa: F401  fixtures
from processes import Together, free_port, joined, main
from runs import checkpoints, comparable, learned, logged

from phpjax import checkpoint, distributed
from phpjax.errors import UserError

CLUSTERS = ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST", "JAX_COORDINATOR_ADDRESS")
SLURM = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "node[3-4]",
  "SLURM_NTASKS": "2",
  "SLURM_PROCID": "1",
  "SLURM_LOCALID": "0",
}


# -- who is there ------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
  for name in CLUSTERS:
    monkeypatch.delenv(name, raising=False)


def find(address=None, count=None, number=None):
  return distributed.find(address, count, number, 1.0)


def test_nothing_is_set_and_nothing_happens():
  assert find() is None
  distributed.check_equal({"anything": 1})
  assert distributed.is_primary() and not distributed.stop_agreed()
  parts = [{"x": np.arange(3)}]
  assert distributed.gather(parts) == parts and distributed.end_together(lambda: 2, good=(0,)) == 2
  with pytest.raises(ZeroDivisionError):
    distributed.end_together(lambda: 1 // 0, good=(0,))


def test_flags_the_environment_and_a_cluster(monkeypatch):
  assert find("host:1234", 2, 1) == distributed.Place("host:1234", 2, 1)
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "other:1")
  assert find(None, 2, 0) == distributed.Place("other:1", 2, 0)
  monkeypatch.delenv("JAX_COORDINATOR_ADDRESS")
  for name, value in SLURM.items():
    monkeypatch.setenv(name, value)
  assert find() == distributed.Place("node3:61447", 2, 1)  # 65536 - 4096 + the job's number
  assert find("host:1234") == distributed.Place("host:1234", 2, 1)
  assert find(count=1) is None
  monkeypatch.setenv("SLURM_NTASKS", "1")
  assert find() is None
  monkeypatch.setenv("SLURM_PROCID", "x")
  with pytest.raises(UserError, match=r"looks like a cluster.*ValueError.*--num_processes=1"):
    find()


@pytest.mark.parametrize(
  ("given", "said"),
  [
    (("host:1234",), "need --num_processes, --process_id too"),
    ((None, 2, 0), "need --coordinator_address too"),
    (("host:1234", 2, 2), r"--process_id=2 is outside 0\.\.1"),
    (("host", 2, 0), "is not HOST:PORT"),
  ],
)
def test_settings_that_do_not_fit(given, said):
  with pytest.raises(UserError, match=said):
    find(*given)


def test_packing_keeps_every_bit_and_every_batch():
  parts = [
    {"a": np.array([0.1, np.nan]), "s": np.array(["x", "longer"]), "m": np.ones((2, 3), bool)},
    {"a": np.zeros(0), "s": np.array(["y"]), "m": np.ones((1, 3), bool)},
  ]
  packed = distributed._unpack(distributed._pack(parts))
  for index, part in enumerate(parts):
    small.assert_same_bits({k: v for k, v in part.items() if k != "s"}, {k: v[index] for k, v in packed.items() if k != "s"})
    assert packed["s"][index].tolist() == part["s"].tolist()
  assert distributed._unpack(distributed._pack([])) == {}
  with pytest.raises(ValueError, match="pickle"):
    distributed._pack([{"o": np.array([{}], object)}])


# What two processes do with the parts that one process does not have; each prints what it got as its last line.
PARTS = """
import json, os, signal, sys, time
import jax, numpy as np
from phpjax import distributed, sharding
from phpjax.errors import UserError
number = int(sys.argv[2])
distributed.start(distributed.Place(sys.argv[1], 2, number), {"seed": 0}, 30.0)
mesh, got = sharding.make_mesh((-1, 1)), {}
own = [{"x": np.arange(2 - number) / 3 + 10 * batch + number, "id": np.array(["ab" * (number + 1)])} for batch in range(3)]
got["gathered"] = [{k: v.tolist() for k, v in part.items()} for part in distributed.gather(own)]
got["dtype"] = str(distributed.gather(own)[0]["x"].dtype)
rows = sharding.put_batch({"x": np.array([number, number + 2.0])}, mesh, ("x",))["x"]
got["local"] = jax.device_get(sharding.local_rows(rows, mesh)).tolist()
got["all"] = np.asarray(sharding.all_rows(rows, mesh)).tolist()
tree = sharding.put_replicated({"w": np.arange(3.0), "n": 5}, mesh)
again = sharding.put_replicated(tree, mesh)
w = again["w"]
got["replicated"] = jax.device_get(w).tolist() + [int(again["n"]), str(w.dtype), len(w.global_shards)]
distributed.check_equal({"data": 1})
try:
  distributed.check_equal({"data": number})
except UserError as error:
  got["unequal"] = str(error)
calls = 0
while not distributed.stop_agreed():
  calls += 1
  if calls == 20 and number == 1:
    distributed.ask_to_stop("SIGTERM")
  time.sleep(0.02 * (1 + 2 * number))  # one is three times as fast
got["calls"], got["then"] = calls, distributed.stop_agreed()
print(json.dumps(got), flush=True)
code = int(sys.argv[3])
sys.exit(distributed.end_together(lambda: code if number else time.sleep(60 * bool(code)) or 0, good=(0,)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 2])
def test_what_two_processes_share(tmp_path, code):
  port = free_port()
  with Together(tmp_path, [["-c", PARTS, f"localhost:{port}", str(number), str(code)] for number in range(2)]) as pair:
    done = pair.wait(50)
  assert [d.code for d in done] == [code, code], [d.err[-2000:] for d in done]
  first, second = (json.loads(d.out.splitlines()[-1]) for d in done)
  for batch, part in enumerate(first["gathered"]):
    assert part["x"] == [0 / 3 + 10 * batch, 1 / 3 + 10 * batch, 10 * batch + 1] and part["id"] == ["ab", "abab"]
  assert first["dtype"] == "float64"
  assert (first["local"], second["local"], first["all"]) == ([0, 2], [1, 3], [0, 2, 1, 3])
  assert first["replicated"] == [0, 1, 2, 5, "float32", 2]
  assert (
    "process 1 (" in first["unequal"]
    and "differs from process 0" in first["unequal"]
    and "data (1, there 0)" in first["unequal"]
  )
  assert first["calls"] == second["calls"] >= 20 and first["then"]
  same = ("gathered", "dtype", "all", "replicated", "unequal", "calls", "then")
  assert [first[k] for k in same] == [second[k] for k in same]
  if code:  # process 1 failed while process 0 was at work for a minute
    assert "ends: process 1 of 2 on" in done[0].err and "has stopped, see its message" in done[0].err


def test_the_command_names_who_differs_and_who_is_missing(tmp_path):
  flags = ["-m", "phpjax.main", *SMALL, "--startup_timeout_s=30", f"--workdir={tmp_path / 'run'}"]
  port = free_port()
  commands = [[*flags, f"--config.seed={number}", *joined(number, 2, port)] for number in range(2)]
  alone = [*flags, "--startup_timeout_s=1", *joined(0, 2, free_port())]
  with Together(tmp_path, [*commands, alone]) as running:
    done = running.wait(60)
  assert [d.code for d in done] == [2, 2, 2]
  assert done[0].err == done[1].err and done[0].err.count("\n") == 1
  assert "error: process 1 (" in done[0].err and "differs from process 0" in done[0].err and "seed (1, there 0)" in done[0].err
  assert done[2].err.startswith("error: process 1 of 2 did not come to localhost:") and done[2].err.count("\n") == 1
  assert not (tmp_path / "run").exists()


# -- whole runs --------------------------------------------------------------------------------------------------


def good(done: list[Done], code: int = 0) -> None:
  assert [d.code for d in done] == [code] * len(done), [d.err[-2000:] for d in done]


@pytest.fixture(scope="module", name="flags")
def all_flags(toybox):
  return (*SMALL, f"--config.data.root={toybox}", "--config.compile_effort=0")


@pytest.fixture(scope="module", name="pair")
def finished_pair(flags, tmp_path_factory):
  """The SMALL run in two processes: (its workdir, what they said)."""
  folder = tmp_path_factory.mktemp("pair")
  with main(folder / "said", *flags, f"--workdir={folder / 'run'}") as running:
    done = running.wait()
  good(done)
  return folder / "run", done


def close(a, b, *, tolerance):
  """Asserts that all leaves of two trees are the same but for rounding."""
  left, right = small.flat(a), small.flat(b)
  assert left.keys() == right.keys()
  for name in left:
    np.testing.assert_allclose(left[name], right[name], rtol=tolerance, atol=tolerance, err_msg=name)


def alike(folder, other):
  """Asserts that two results.json agree, numbers but for what rounding in the parameters does to them."""
  left, right = (dict(jax.tree_util.tree_leaves_with_path(comparable(of))) for of in (folder, other))
  assert left.keys() == right.keys()
  for path, value in left.items():
    assert value == (pytest.approx(right[path], abs=1e-3) if isinstance(value, float) else right[path]), path


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(pair, flags, cli, tmp_path):
  by_two, by_one = tmp_path / "by_two", tmp_path / "by_one"
  for folder in (by_two, by_one):
    shutil.copytree(pair[0], folder)
  with main(tmp_path / "said", *flags, f"--workdir={by_two}", "--mode=evaluate") as running:
    good(running.wait())
  done = cli(*flags, f"--workdir={by_one}", "--mode=evaluate")
  assert done.code == 0, done.err
  assert (by_two / "evaluation.json").read_bytes() == (by_one / "evaluation.json").read_bytes()


@pytest.mark.slow
def test_two_processes_give_what_one_process_with_two_devices_gives(pair, finished):
  folder, done = pair
  alike(folder, finished)
  ours, theirs = logged(folder), logged(finished)
  assert [line["step"] for line in ours] == [line["step"] for line in theirs]
  np.testing.assert_allclose([line["loss"] for line in ours], [line["loss"] for line in theirs], rtol=2e-6)
  close(learned(folder), learned(finished), tolerance=2e-6)  # float32, sums over devices in another order
  assert {path.name for path in folder.rglob("*.png")} == {path.name for path in finished.rglob("*.png")}
  assert "process 0 of 2 on " in done[0].err and "mesh data 2, fsdp 1; batch_size 2 (1 here)" in done[0].err
  assert done[1].err.count("\n") == 1 and "process 1 of 2 on " in done[1].err, "process 0 alone tells what happens"


@pytest.fixture(scope="module", name="interrupted")
def interrupted_pair(flags, tmp_path_factory):
  """The same run, SIGTERM to process 1 while it trains: (its workdir, what they said, seconds until both had ended)."""
  folder = tmp_path_factory.mktemp("interrupted")
  with main(folder / "said", *flags, f"--workdir={folder / 'run'}") as running:
    log = folder / "run" / "metrics.jsonl"
    running.until(lambda: log.is_file() and log.stat().st_size > 0)
    os.kill(running.processes[1].pid, signal.SIGTERM)
    asked = time.monotonic()
    done = running.wait(60)
  return folder / "run", done, time.monotonic() - asked


@pytest.mark.slow
def test_a_signal_to_one_stops_both_after_the_same_step_and_they_continue(interrupted, pair, flags, tmp_path):
  stopped, done, seconds = interrupted
  good(done, 42)
  assert seconds < 15 and "SIGTERM on process 1 of 2" in done[0].err
  assert not (stopped / "results.json").exists()
  at = checkpoint.read_meta(checkpoints(stopped)[0])["position"]
  assert at["step"] == len(logged(stopped)) > 0
  folder = tmp_path / "run"
  shutil.copytree(stopped, folder)
  with main(tmp_path / "said", *flags, f"--workdir={folder}") as running:
    good(running.wait())
  assert comparable(folder) == comparable(pair[0])
  small.assert_same_bits(learned(folder), learned(pair[0]))
  assert [(x["step"], x["loss"]) for x in logged(folder)] == [(x["step"], x["loss"]) for x in logged(pair[0])]


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_signal_to_one_before_training_begins_ends_both_at_once(flags, tmp_path, number):
  with main(tmp_path / "said", *flags, f"--workdir={tmp_path / 'run'}") as running:
    running.until(lambda: all("devices, mesh data 2" in running.said(process).err for process in range(2)))
    os.kill(running.processes[number].pid, signal.SIGTERM)
    asked = time.monotonic()
    done = running.wait(60)
  good(done, 42)
  assert time.monotonic() - asked < 15 and not any("Traceback" in d.err for d in done)
  assert "SIGTERM: there is nothing new to save; the same command continues" in done[number].err
  assert f"ends: process {number} of 2 on" in done[1 - number].err and "was stopped by SIGTERM" in done[1 - number].err
  assert not [p for p in (tmp_path / "run").rglob("*") if p.name.startswith("run.") or p.name == "metrics.jsonl"]


@pytest.mark.slow
def test_one_process_continues_what_two_began_and_two_what_one_began(interrupted, pair, flags, cli, tmp_path):
  by_one, by_two = tmp_path / "by_one", tmp_path / "by_two"
  shutil.copytree(interrupted[0], by_one)
  done = cli(*flags, f"--workdir={by_one}")
  assert done.code == 0, done.err
  assert cli(*flags, f"--workdir={by_two}", stop_at=3).code == 42
  begun = len(logged(by_two))
  with main(tmp_path / "said", *flags, f"--workdir={by_two}") as running:
    good(running.wait())
  assert 0 < begun < len(logged(pair[0]))
  for folder in (by_one, by_two):
    alike(folder, pair[0])
    losses = [[line["loss"] for line in logged(of)] for of in (folder, pair[0])]
    np.testing.assert_allclose(*losses, rtol=2e-6)  # the same clips in the same steps
    close(learned(folder), learned(pair[0]), tolerance=2e-6)


@pytest.mark.slow
def test_when_one_is_killed_the_other_ends_and_the_same_command_continues(pair, flags, tmp_path):
  folder = tmp_path / "run"
  with main(tmp_path / "said", *flags, f"--workdir={folder}") as running:
    log = folder / "metrics.jsonl"
    running.until(lambda: log.is_file() and log.stat().st_size > 0)
    running.processes[1].kill()
    first, _ = running.wait(60)
  assert first.code == 1 and "if another process has ended, run the same command again on all of them" in first.err
  with main(tmp_path / "again", *flags, f"--workdir={folder}") as running:
    good(running.wait())
  assert comparable(folder) == comparable(pair[0])
  small.assert_same_bits(learned(folder), learned(pair[0]))


@pytest.mark.slow
def test_a_clip_that_one_process_cannot_read_ends_both(flags, toybox, tmp_path):
  root = tmp_path / "data"
  shutil.copytree(toybox, root)
  for path in (root / "AVE").rglob("*.mp4"):
    path.write_bytes(b"nothing")
    break
  with main(tmp_path / "said", *flags, f"--config.data.root={root}", f"--workdir={tmp_path / 'run'}") as running:
    done = running.wait(100)
  good(done, 2)
  assert sorted("ends: process" in d.err for d in done) == [False, True] and sum(path.name in d.err for d in done) == 1


# Features and squared gradients of a task's training clips, as a method reads them at the end of a task.
FEATURES = """
import sys, numpy as np, jax
from ml_collections import ConfigDict
from configs import php_avqa
from phpjax import distributed, fisher, opening, queries, run
number, count, out = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if count > 1:
  distributed.start(distributed.Place(sys.argv[1], count, number), {}, 60.0)
config = php_avqa.get_config("tiny")
config.tasks, config.data.root, config.eval_batch_size = ("ave",), sys.argv[5], 4
config.method.shallow = config.method.mid = ()
with opening.open_run(config, None) as opened:
  run.begin(opened, "ave")
  arrays = {}
  for index, (features, batch) in enumerate(queries.features(opened, "ave", False)):
    for name, leaf in jax.tree_util.tree_leaves_with_path(features):
      arrays[f"{index}{jax.tree_util.keystr(name)}"] = np.asarray(leaf)
    arrays |= {f"{index}/{key}": np.asarray(value) for key, value in batch.items()}
  for name, leaf in jax.tree_util.tree_leaves_with_path(fisher.squared_gradients(opened, "ave")):
    arrays[f"squares{jax.tree_util.keystr(name)}"] = leaf
np.savez(out, **arrays)
sys.exit(distributed.end_together(lambda: 0, good=(0,)))
"""


@pytest.mark.slow
def test_features_and_squared_gradients_of_all_rows_on_every_process(toybox, tmp_path):
  port, outs = free_port(), [tmp_path / f"{name}.npz" for name in ("zero", "one", "alone")]
  argv = lambda number, count: ["-c", FEATURES, f"localhost:{port}", str(number), str(count)]
  commands = [[*argv(number, 2), str(outs[number]), str(toybox)] for number in range(2)]
  with Together(tmp_path / "pair", commands) as pair:
    good(pair.wait())
  with Together(tmp_path / "single", [[*argv(0, 1), str(outs[2]), str(toybox)]], devices=2) as single:
    good(single.wait())
  zero, one, alone = (dict(np.load(path)) for path in outs)
  small.assert_same_bits(
    {k: v for k, v in zero.items() if v.dtype.kind != "U"}, {k: v for k, v in one.items() if v.dtype.kind != "U"}
  )
  assert zero.keys() == alone.keys() and zero["0/id"].tolist() == alone["0/id"].tolist()
  assert alone["squares['context']"].max() > 0
  for key in (key for key in alone if alone[key].dtype.kind != "U"):
    np.testing.assert_allclose(zero[key], alone[key], rtol=1e-5, atol=1e-6, err_msg=key)
