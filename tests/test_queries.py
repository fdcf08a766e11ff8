"""What the unprompted encoders say is asked once per clip, and a method cannot tell it from asking in every step."""

import jax
import numpy as np
import pytest
import small
from command import tiny_toybox  # noqa: F401  fixture
from processes import Together, free_port

from phpjax import opening, queries, run, sharding
from phpjax.methods import l2p
from phpjax.signals import Stopped


@pytest.fixture(scope="module")
def opened(toybox):
  """A run of L2P on AVE and AVS, AVS's training clips mirrored, about to learn AVE."""
  config = small.config_of("l2p")
  config.tasks, config.data.root = ("ave", "avs"), str(toybox)
  with opening.open_run(config, None) as opened:
    run.begin(opened, "ave")
    run.add_task(opened, "avs")
    yield opened


@pytest.fixture(autouse=True)
def forgetful(opened):
  """Every test asks anew."""
  opened.queries.clear()


def plain(opened, name="ave", split="train", shuffle=True, epoch=0):
  size = opened.config.batch_size if split == "train" else opened.config.eval_batch_size
  return opened.batches(name, split, batch_size=size, shuffle=shuffle, epoch=epoch)


def on_devices(opened, batch, name="ave"):
  return sharding.put_batch(batch, opened.mesh, opened.experiment.tasks[name].device_keys)


def asks(opened, monkeypatch):
  """A list that grows with every batch the encoders are asked about."""
  counted, encode = [], opened.steps.encode
  monkeypatch.setattr(opened.steps, "encode", lambda *args: (counted.append(1), encode(*args))[1])
  return counted


def test_kept_features_are_those_of_the_step_and_choose_the_same_prompts(opened):
  task, seen = opened.experiment.tasks["ave"], set()
  for epoch in range(2):
    for batch in queries.added(opened, "ave", "train", plain(opened, epoch=epoch)):
      real = np.repeat(batch["mask"], task.seconds) > 0
      frozen = {"encoders": opened.params["encoders"]}
      rows = on_devices(opened, {k: v for k, v in batch.items() if k != "query"})
      expected = opened.steps.encode(task, False, {}, {}, frozen, None, {m: rows[m] for m in ("visual", "audio", "mask")})
      assert set(batch["query"]) == {"visual", "audio"}
      for m, found in batch["query"].items():
        assert found.pooled.dtype == np.float32 and found.pooled.shape == expected[m].pooled.shape
        np.testing.assert_allclose(found.pooled[real], np.asarray(expected[m].pooled)[real], rtol=1e-6, atol=1e-6)
        keys = opened.params["shared"][m]["keys"]
        here, there = (l2p.select(x[real], keys, 2)[0] for x in (found.pooled, np.asarray(expected[m].pooled)))
        np.testing.assert_array_equal(here, there)
        seen |= {x.tobytes() for x in found.pooled[real]}
  assert len(seen) > 2, "the seconds differ"


def test_a_prediction_is_the_same_with_and_without(opened):
  predict = opened.predictor("ave")
  pairs = list(zip(plain(opened, split="test"), queries.added(opened, "ave", "test", plain(opened, split="test")), strict=True))
  assert [list(b["mask"]) for _, b in pairs][-1][-1] == 0, "the last batch is padded"
  for without, kept in pairs:
    assert without["id"] == kept["id"] and "query" in kept
    real = without["mask"] > 0
    for key, x in predict(without).items():
      np.testing.assert_allclose(np.asarray(predict(kept)[key])[real], np.asarray(x)[real], rtol=1e-5, atol=1e-6)


def test_a_step_is_the_same_and_runs_the_encoders_once_less(opened):
  task, inputs = opened.experiment.tasks["ave"], opened.train_inputs("ave")
  kept = next(queries.added(opened, "ave", "train", plain(opened)))
  batches = {"kept": kept, "asked": {k: v for k, v in kept.items() if k != "query"}}
  done, flops = {}, {}
  for name, batch in batches.items():
    live = run.Live(*sharding.put_replicated(jax.device_get((opened.live.trainable, opened.live.opt_state, opened.live.state)), opened.mesh))  # fmt: skip  # noqa: E501
    args = (*inputs, on_devices(opened, batch), jax.random.key(0), {"shared": 1.0, "task": 1.0})
    flops[name] = opened.steps.train.lower(task, live, *args).cost_analysis()["flops"]
    done[name] = opened.steps.train(task, live, *args)
  for key, x in small.flat(done["asked"][1]).items():
    np.testing.assert_allclose(small.flat(done["kept"][1])[key], x, rtol=1e-5, err_msg=key)
  for key, x in small.flat(done["asked"][0].state).items():
    np.testing.assert_allclose(small.flat(done["kept"][0].state)[key], x, rtol=1e-4, atol=1e-6, err_msg=key)
  rows = on_devices(opened, batches["asked"])
  once = opened.steps.encode.lower(
    task, False, {}, {}, {"encoders": opened.params["encoders"]}, None, {m: rows[m] for m in ("visual", "audio", "mask")}
  ).cost_analysis()["flops"]
  assert flops["asked"] - flops["kept"] == pytest.approx(once, rel=0.02)


def test_every_split_is_asked_about_once(opened, monkeypatch):
  counted = asks(opened, monkeypatch)
  for _ in range(2):
    for name, split in (("ave", "train"), ("ave", "test"), ("avs", "test")):
      assert all("query" in batch for batch in queries.added(opened, name, split, plain(opened, name, split)))
  clips = [len(opened.source(name, split)) for name, split in opened.queries]
  size = opened.config.eval_batch_size
  assert len(counted) == sum(-(-n // size) for n in clips)
  held = opened.queries["ave", "train"]
  assert len(held) == clips[0] + 1 and not np.any(held[""]["visual"].pooled), "and zeros for padding"


def test_mirrored_clips_are_asked_about_in_every_step(opened, monkeypatch):
  counted = asks(opened, monkeypatch)
  assert opened.config.data.mirrored == ("avs", "ms3")
  found = queries.added(opened, "avs", "train", plain(opened, "avs"), fixed="avs" not in opened.config.data.mirrored)
  assert "query" not in next(found) and counted == [] and opened.queries == {}


def test_what_does_not_fit_into_memory_is_asked_in_every_step(opened, monkeypatch):
  counted = asks(opened, monkeypatch)
  seconds, embed = opened.experiment.tasks["ave"].seconds, 2 * 16
  train = len(opened.source("ave", "train")) * seconds * embed * 4
  config = opened.config.copy_and_resolve_references().unlock()
  config.data.query_cache_gb = (train + 1) / 1e9
  monkeypatch.setattr(run.Run, "config", config)
  assert "query" in next(queries.added(opened, "ave", "train", plain(opened)))
  done = len(counted)
  assert "query" not in next(queries.added(opened, "ave", "test", plain(opened, split="test")))
  assert len(counted) == done > 0


def test_what_fits_is_a_matter_of_config_and_data_not_of_what_was_asked_before(opened, monkeypatch):
  """Else a run that goes on, which has asked for nothing yet, would take other features than one that was not cut."""
  config = opened.config.copy_and_resolve_references().unlock()
  config.data.query_cache_gb = queries._num_bytes(opened, "ave", "train") / 1e9
  monkeypatch.setattr(run.Run, "config", config)
  assert "query" not in next(queries.added(opened, "ave", "test", plain(opened, split="test"))), "behind what fills the room"
  assert "query" in next(queries.added(opened, "ave", "train", plain(opened)))


def test_ids_that_do_not_name_clips_are_no_keys(opened, monkeypatch):
  batches = opened.batches
  same = lambda *a, **k: ({**batch, "id": ["clip" if name else "" for name in batch["id"]]} for batch in batches(*a, **k))
  monkeypatch.setattr(opened, "batches", same)
  assert "query" not in next(queries.added(opened, "ave", "train", plain(opened)))


def test_a_signal_ends_the_pass(opened, monkeypatch):
  monkeypatch.setattr(opened, "stop", True)
  with pytest.raises(Stopped):
    queries.added(opened, "ave", "train", plain(opened))
  assert opened.queries == {}


def test_methods_that_do_not_ask_keep_their_batches(toybox):
  config = small.config_of("s_prompts")
  config.tasks, config.data.root = ("ave",), str(toybox)
  with opening.open_run(config, None) as opened:
    batches = iter(())
    assert queries.added(opened, "ave", "train", batches) is batches and opened.queries == {}


ASKED = """
import sys
import numpy as np
sys.path.insert(0, "tests")
import small
from phpjax import distributed, queries, opening, run, sharding
number, count, out = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if count > 1:
  distributed.start(distributed.Place(sys.argv[1], count, number), {}, 60.0)
config = small.config_of("l2p")
config.tasks, config.data.root, config.eval_batch_size = ("ave",), sys.argv[5], 4
asked = {}
with opening.open_run(config, None) as opened:
  run.begin(opened, "ave")
  for split, shuffle in (("train", True), ("test", False)):
    batches = opened.batches("ave", split, batch_size=config.batch_size, shuffle=shuffle)
    for index, batch in enumerate(queries.added(opened, "ave", split, batches)):
      rows = sharding.put_batch(batch, opened.mesh, opened.experiment.tasks["ave"].device_keys)
      assert rows["query"]["visual"].pooled.shape[0] == config.batch_size * opened.experiment.tasks["ave"].seconds
      for m, query in batch["query"].items():
        for name, clip in zip(batch["id"], np.split(query.pooled, len(batch["id"])), strict=True):
          asked[f"{split}/{m}/{name}"] = clip
  scores = opened.predictor("ave")(batch)
  asked["scores"] = np.concatenate([np.asarray(x).reshape(len(batch["id"]), -1) for x in scores.values()], axis=1)[:, :1]
np.savez(out, **asked)
sys.exit(distributed.end_together(lambda: 0, good=(0,)))
"""


@pytest.mark.slow
def test_two_processes_ask_as_one_does_and_each_gets_its_own_rows(toybox, tmp_path):
  port, outs = free_port(), [tmp_path / f"{name}.npz" for name in ("zero", "one", "alone")]
  argv = lambda number, count: ["-c", ASKED, f"localhost:{port}", str(number), str(count), str(outs[number]), str(toybox)]
  with Together(tmp_path / "pair", [argv(number, 2) for number in range(2)]) as pair:
    done = pair.wait(400)
  assert [d.code for d in done] == [0, 0], [d.err[-2000:] for d in done]
  alone = argv(0, 1)
  alone[5] = str(outs[2])
  with Together(tmp_path / "single", [alone], devices=2) as single:
    done = single.wait(400)
  assert [d.code for d in done] == [0], [d.err[-2000:] for d in done]
  zero, one, whole = (dict(np.load(path)) for path in outs)
  clips = {key for key in whole if "/" in key and not key.endswith("/")}
  assert {k for x in (zero, one) for k in x if k in clips} == clips and not set(zero) & set(one) & clips
  for key in clips:
    np.testing.assert_allclose((zero if key in zero else one)[key], whole[key], rtol=1e-5, atol=1e-6, err_msg=key)
  np.testing.assert_allclose(np.concatenate([zero["scores"], one["scores"]]), whole["scores"], rtol=1e-4, atol=1e-5)
