"""What frozen encoders say of the clips, shared by runs: the same arrays, or none where anything that decides them differs."""

import os
import types

import ml_dtypes
import numpy as np
import pytest
import small
from command import tiny_toybox  # noqa: F401  fixture

from phpjax import opening, queries, query_files, run, train
from phpjax.encoders.base import Features
from phpjax.methods import METHODS, Method


def held(clips=3):
  """As phpjax/queries.py keeps it, one modality in the type that accelerators compute in."""
  rng = np.random.default_rng(0)
  make = lambda dtype: Features(rng.normal(size=(2, 4)).astype(np.float32), rng.normal(size=(2, 5, 3)).astype(dtype), 2)
  found = {f"clip {i}": {"visual": make(np.float32), "audio": make(ml_dtypes.bfloat16)} for i in range(clips)}
  return {"": small_zeros(found["clip 0"]), **found}


def small_zeros(clip):
  return {m: Features(np.zeros_like(f.pooled), np.zeros_like(f.tokens), f.num_special) for m, f in clip.items()}


def test_what_is_written_is_read_again(tmp_path):
  whole, file, said = held(), tmp_path / "new/x.npz", []
  query_files.write(file, whole, said.append)
  found = query_files.read(file, whole["clip 0"])
  assert said == [] and os.listdir(file.parent) == ["x.npz"] and list(found) == list(whole)
  for key, clip in whole.items():
    for m, features in clip.items():
      assert found[key][m].num_special == 2
      for name in ("pooled", "tokens"):
        there, here = getattr(found[key][m], name), getattr(features, name)
        assert there.dtype == here.dtype and there.tobytes() == here.tobytes()


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "other", "pickled", "shape", "padding"])
def test_what_is_not_whole_counts_for_nothing(tmp_path, damage):
  whole, file = held(), tmp_path / "x.npz"
  query_files.write(file, whole, pytest.fail)
  shapes = whole["clip 0"]
  if damage == "missing":
    file.unlink()
  elif damage == "empty":
    file.write_bytes(b"")
  elif damage == "cut":
    file.write_bytes(file.read_bytes()[:-200])
  elif damage == "other":
    file.write_text("no archive")
  elif damage == "pickled":
    np.savez(file, ids=np.array([{"a": 1}], dtype=object))
  elif damage == "shape":
    shapes = {m: Features(f.pooled[:, :3], f.tokens, f.num_special) for m, f in shapes.items()}
  else:
    query_files.write(file, {key: clip for key, clip in whole.items() if key}, pytest.fail)
  assert query_files.read(file, shapes) == {}


def test_a_disk_that_takes_nothing_is_said_and_costs_nothing_else(tmp_path):
  said = []
  (tmp_path / "file").write_text("")
  query_files.write(tmp_path / "file/x.npz", held(), said.append)
  assert len(said) == 1 and "is not written" in said[0]


def asked(opened, monkeypatch):
  """A list that grows with every batch the encoders are asked about."""
  counted, encode = [], opened.steps.encode
  monkeypatch.setattr(opened.steps, "encode", lambda *args: (counted.append(1), encode(*args))[1])
  return counted


def config_of(toybox, tmp_path, **changes):
  config = small.config_of("linear_probe")
  config.tasks, config.data.root, config.data.query_cache = ("ave",), str(toybox), str(tmp_path / "features")
  for field, value in changes.items():
    config[field] = value
  return config


def batches(opened, split="test"):
  plain = opened.batches("ave", split, batch_size=opened.config.eval_batch_size, shuffle=False)
  return list(queries.added(opened, "ave", split, plain))


def test_the_next_run_asks_no_encoder_and_gets_the_same_bits(toybox, tmp_path, monkeypatch):
  with opening.open_run(config_of(toybox, tmp_path), None) as first:
    run.begin(first, "ave")
    expected, [file] = batches(first), (tmp_path / "features").iterdir()
    assert file.name.startswith("ave_test_")
  with opening.open_run(config_of(toybox, tmp_path, num_epochs=2), None) as second:
    counted = asked(second, monkeypatch)
    for here, there in zip(batches(second), expected, strict=True):
      for m, features in there["features"].items():
        assert here["features"][m].tokens.tobytes() == features.tokens.tobytes()
        assert here["features"][m].pooled.tobytes() == features.pooled.tobytes()
    assert counted == []


def test_what_decides_the_features_decides_the_name(toybox, tmp_path):
  with opening.open_run(config_of(toybox, tmp_path), None) as opened:
    weights, video = opened.experiment.weights, tmp_path / "clip.mp4"
    video.write_bytes(b"1234")
    data = types.SimpleNamespace(records=opened.datasets["ave"].records, clip_files=lambda record: (video,))

    def name(fields=None, weights=weights, **changes):
      config = config_of(toybox, tmp_path, **changes)
      config.data.update(fields or {})
      made = {"datasets": {"ave": data}, "mesh": opened.mesh, "experiment": types.SimpleNamespace(weights=weights)}
      return query_files.path(types.SimpleNamespace(config=config, **made), "ave", "test", True).name

    other = {**weights, "visual": {**weights["visual"], "sha256": "another"}}
    assert name() == name(num_epochs=2, resume=False) == name({"num_threads": 1})
    names = {name(), name(eval_batch_size=2), name({"crop": True}), name(weights=other), name({"toybox_seed": 3})}
    before, status = name(), video.stat()
    os.utime(video, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert len(names) == 5 and name() != before, "another file under the same name"


@pytest.mark.slow
def test_a_method_that_never_prompts_is_the_same_with_and_without(toybox, tmp_path):
  """All four tasks: what the heads read comes from the host or from the encoders in the step."""
  results = []
  for kept in (1.5, 0.0):
    config = small.config_of("linear_probe")
    config.data.root, config.data.query_cache_gb = str(toybox), kept
    results.append(train.train_and_evaluate(config, tmp_path / str(kept)))
  for one, other in zip(*(r["per_task"] for r in results), strict=True):
    assert one["scores"].keys() == other["scores"].keys()
    for name, score in one["scores"].items():
      assert score == pytest.approx(other["scores"][name], abs=0.02), (one["task"], name)


def test_encoders_that_were_asked_before_do_not_run_in_the_step(toybox, tmp_path):
  with opening.open_run(config_of(toybox, tmp_path), None) as opened:
    run.begin(opened, "ave")
    [kept, *_] = batches(opened, "train")
    task, inputs, flops = opened.experiment.tasks["ave"], opened.train_inputs("ave"), []
    for batch in (kept, {key: x for key, x in kept.items() if key != "features"}):
      rows = queries.sharding.put_batch(batch, opened.mesh, task.device_keys)
      args = (*inputs, rows, queries.jax.random.key(0), {"shared": 1.0, "task": 1.0})
      flops.append(opened.steps.train.lower(task, opened.live, *args).cost_analysis()["flops"])
    assert flops[0] < 0.05 * flops[1]


def test_only_methods_that_leave_every_stream_alone_are_handed_kept_features():
  assert {name for name in METHODS if small.method_of(name).frozen} == {"linear_probe", "zero_shot", "ncm", "slda"}
  hooks = {"prefix": lambda self, context, step: {}, "start": lambda self, *args, **how: {"seen": args[-1]["visual"]}}
  for name, hook in hooks.items():
    other = type("Other", (Method,), {name: hook})
    assert not other(small.method_of("linear_probe").backbone).frozen, name
