"""A method that keeps statistics: its state flows through training, the end of a task, checkpoints and back."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from command import tiny_toybox  # noqa: F401  fixture

from configs import linear_probe
from phpjax import methods, opening, queries, resume, run, train
from phpjax.errors import UserError

NUM_CLIPS, STEPS, SECONDS = 4, 2, 10  # of AVE in the tiny toybox, one epoch of batches of two


@dataclasses.dataclass(frozen=True)
class Keeper(methods.Method):
  """Counts the seconds it has seen (shared) and the steps of a task, and keeps the mean unprompted feature of a task."""

  def init_state(self, shared):
    return {"seconds": jnp.zeros(())}

  def init_task_state(self, task):
    return {"steps": jnp.zeros(()), "mean": jnp.zeros(self.backbone.visual.embed_dim)}

  def start(self, task, trainable, frozen, state, past, streams, *, query, mask, rng, train):
    if not train:
      return {}
    own = state["task"]["method"]
    shared = {"seconds": state["shared"]["seconds"] + streams["visual"].tokens.shape[0]}
    return {"state": {"shared": shared, "task": {**state["task"], "method": {**own, "steps": own["steps"] + 1}}}}

  def end_task(self, params, state, task, clips):
    rows = [np.asarray(found["visual"].pooled)[np.repeat(batch["mask"], SECONDS) > 0] for found, batch in clips.features(False)]
    own = {**state["tasks"][task.name]["method"], "mean": jnp.asarray(np.concatenate(rows).mean(0))}
    tasks = {**state["tasks"], task.name: {**state["tasks"][task.name], "method": own}}
    return params, {**state, "tasks": tasks}


@pytest.fixture
def config(monkeypatch, toybox):
  monkeypatch.setitem(methods.METHODS, "keeper", Keeper)
  c = linear_probe.get_config("tiny")
  c.method.name, c.tasks, c.data.root = "keeper", ("ave",), str(toybox)
  return c


@pytest.mark.slow
def test_the_state_of_a_method_is_kept_and_comes_back(config, tmp_path):
  train.train_and_evaluate(config, tmp_path / "run")
  with opening.open_run(config, tmp_path / "run") as opened:
    assert resume.restore(opened)
    kept = jax.device_get(opened.state)
    assert kept["shared"]["seconds"] == NUM_CLIPS * SECONDS and kept["tasks"]["ave"]["method"]["steps"] == STEPS
    encoder = opened.experiment.encoders["visual"]
    frames = np.concatenate([batch["visual"] for _, batch in queries.features(opened, "ave", False)])[:NUM_CLIPS]
    pooled = jax.jit(encoder.module.apply)({"params": encoder.params}, frames.reshape(-1, *frames.shape[2:])).pooled
    np.testing.assert_allclose(kept["tasks"]["ave"]["method"]["mean"], pooled.mean(0), rtol=1e-4, atol=1e-5)
    small.assert_same_bits(opened.params["encoders"]["visual"], encoder.params)


@pytest.mark.parametrize(("dtype", "expected"), [("auto", jnp.float32), ("float32", jnp.float32), ("bfloat16", jnp.bfloat16)])
def test_frozen_weights_are_kept_as_asked_and_trainable_ones_in_float32(config, dtype, expected):
  config.method.name, config.encoder_dtype = "linear_probe", dtype
  with opening.open_run(config, None) as opened:
    run.begin(opened, "ave")
    kernels = [x for path, x in small.flat(opened.params["encoders"]).items() if path.endswith("kernel")]
    assert {x.dtype for x in kernels} == {jnp.dtype(expected)}
    assert {x.dtype for x in jax.tree.leaves(opened.live.trainable)} == {jnp.dtype("float32")}


SPLIT = "AVE/{}Set.txt"


@pytest.mark.parametrize(
  ("file", "content", "chosen", "words"),
  [
    (SPLIT.format("test"), None, "test", "no split test"),
    (SPLIT.format("train"), "", "test", "train"),
    (SPLIT.format("unseen"), "only&two\n", "test", "unseenSet.txt"),
    (SPLIT.format("val"), "only&two\n", "val", "valSet.txt"),
  ],
)
def test_data_that_cannot_be_scored_is_named_before_anything_is_trained(config, toybox, tmp_path, file, content, chosen, words):
  config.method.name, config.data.toybox, config.data.root = "linear_probe", "", str(tmp_path / "data")
  config.data.evaluation_split = chosen
  shutil.copytree(toybox, tmp_path / "data")
  if content is None:
    (tmp_path / "data" / file).unlink()
  else:
    (tmp_path / "data" / file).write_text(content)
  opened = opening.open_run(config, tmp_path / "run")
  with pytest.raises(UserError, match=words):
    opened.__enter__()
  assert not (tmp_path / "run").exists()


def test_a_split_that_the_run_does_not_read_may_be_damaged(config, toybox, tmp_path):
  config.method.name, config.data.toybox, config.data.root = "linear_probe", "", str(tmp_path / "data")
  assert config.num_epochs == 1, "there is nothing to choose on val"
  shutil.copytree(toybox, tmp_path / "data")
  (tmp_path / "data" / SPLIT.format("val")).write_text("only&two\n")
  with opening.open_run(config, None) as opened:
    assert opened.used_splits("ave") == ["train", "test", "unseen"] and not any("val" in key for key in opened.data_identity)
