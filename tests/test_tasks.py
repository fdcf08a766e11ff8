"""Losses, heads and scores of the tasks against plain numpy; equality by shape."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from small import TASKS

from phpjax.encoders import Features, pretrained
from phpjax.tasks.base import masked_mean

B, T, C = 4, small.SECONDS, 3
MASK = np.array([1, 1, 0, 1], np.float32)  # the third clip is padding


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sigmoid(x):
  return 1 / (1 + np.exp(-x.astype(np.float64)))


def features(rows=B, seed=0):
  """What the encoders of `small` give."""
  made = small.modules()
  return {
    m: Features(
      draw(rows * T, 8, seed=seed), draw(rows * T, made[m].num_tokens, 16, seed=seed + 1), num_special=made[m].num_special
    )
    for m in ("visual", "audio")
  }


def head_of(task):
  return small.fill(jax.eval_shape(lambda: task.init_head(jax.random.key(0))))


def predict(task, *, train=False, batch=None, state=None, head=None, rows=B, rng=None):
  state = jax.tree.map(np.asarray, task.init_state()) if state is None else state
  run = jax.jit(lambda head, state, features, batch, rng: task.predict(head, state, features, batch, rng=rng, train=train))
  return run(head or head_of(task), state, features(rows), batch or small.batch(task.name, rows), rng)


# -- AVE ---------------------------------------------------------------------------------------------------------


def test_ave_is_cross_entropy_per_second_over_the_real_clips():
  outputs = {"visual": draw(B, T, C), "audio": draw(B, T, C, seed=1)}
  label = np.random.default_rng(2).integers(0, C, (B, T))
  logits = (outputs["visual"] + outputs["audio"]).astype(np.float64)
  per_clip = [
    np.mean([math.log(sum(math.exp(v) for v in logits[b, t])) - logits[b, t, label[b, t]] for t in range(T)]) for b in range(B)
  ]
  task = small.task("ave")
  assert task.loss(outputs, {"label": label, "mask": MASK}) == pytest.approx(
    (per_clip[0] + per_clip[1] + per_clip[3]) / 3, rel=1e-5
  )
  np.testing.assert_allclose(task.scores(outputs)["scores"], logits, rtol=1e-6)


def test_no_real_clip_is_no_loss():
  assert masked_mean(jnp.array([3.0, 5.0]), jnp.zeros(2)) == 0
  assert masked_mean(jnp.array([3.0, 5.0]), jnp.array([0.0, 1.0])) == 5


@pytest.mark.parametrize("name", ["ave", "avvp"])
def test_the_event_head_is_linear_on_features_of_unit_scale(name):
  task, head = small.task(name), head_of(small.task(name))
  outputs, state = predict(task, head=head)
  assert state == {}
  for m in ("visual", "audio"):
    x = features()[m].pooled.astype(np.float64)
    x = x / np.linalg.norm(x, axis=-1, keepdims=True) * math.sqrt(8)
    expected = (x @ head[m]["kernel"] + head[m]["bias"]).reshape(B, T, C)
    np.testing.assert_allclose(outputs[m], expected, rtol=1e-4, atol=1e-5)


def test_class_texts_are_float32_whatever_the_encoders_are_kept_in():
  task = small.task("ave", classes=("drum", "bell", "horn"))
  open_text = lambda dtype: pretrained.load("tiny_text", "random", modality="text", dtype=dtype, depth=1)
  half, full = (task.constants({"text": open_text(dtype)}) for dtype in (jnp.bfloat16, jnp.float32))
  assert half["audio_text"].dtype == jnp.float32 and half["class_ids"].dtype == jnp.int32
  np.testing.assert_allclose(half["audio_text"], full["audio_text"], rtol=0.1, atol=0.05)
  assert task.constants({}) == {}


# -- AVVP --------------------------------------------------------------------------------------------------------


def numpy_clip_probability(outputs):
  """Linear softmax over all seconds of both modalities, one clip and class at a time."""
  pooled = np.zeros((B, C))
  for b in range(B):
    for c in range(C):
      p = [float(sigmoid(outputs[m][b, t, c])) for m in ("visual", "audio") for t in range(T)]
      pooled[b, c] = sum(v * v for v in p) / sum(p)
  return pooled


def test_avvp_pools_by_linear_softmax():
  task, outputs = small.task("avvp"), {"visual": draw(B, T, C), "audio": draw(B, T, C, seed=1)}
  label = np.random.default_rng(2).integers(0, 2, (B, C)).astype(np.float32)
  pooled = numpy_clip_probability(outputs)
  np.testing.assert_allclose(task.clip_probability(outputs), pooled, rtol=1e-5)
  per_clip = -(label * np.log(pooled) + (1 - label) * np.log(1 - pooled)).sum(-1)
  assert task.loss(outputs, {"label": label, "mask": MASK}) == pytest.approx((per_clip * MASK).sum() / 3, rel=1e-5)
  scores = task.scores(outputs)
  np.testing.assert_allclose(scores["audio"], sigmoid(outputs["audio"]), rtol=1e-5)
  np.testing.assert_allclose(scores["clip"], pooled, rtol=1e-5)


def test_avvp_finds_a_class_that_is_heard_in_one_second_only():
  quiet = np.full((1, T, C), -6, np.float32)
  loud = quiet.copy()
  loud[0, 1, 2] = 6
  task = small.task("avvp")
  clip = np.asarray(task.clip_probability({"visual": quiet, "audio": loud}))[0]
  assert clip[2] > 0.9 and clip[:2].max() < 0.1


def test_avvp_stays_finite_where_everything_is_certain():
  task, label = small.task("avvp"), np.eye(4, C, dtype=np.float32)
  sure = {m: np.full((B, T, C), s, np.float32) for m, s in (("visual", -200), ("audio", -200))}
  for outputs in (sure, jax.tree.map(lambda x: -x, sure)):
    loss, gradient = jax.value_and_grad(lambda o: task.loss(o, {"label": label, "mask": MASK}))(outputs)
    assert np.isfinite(loss) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_calibration_turns_similarities_into_log_odds():
  task = small.task("avvp")
  raw, calibration = {m: draw(B, T, C + 1, seed=i) for i, m in enumerate(("visual", "audio"))}, task.init_calibration()
  calibration = small.fill(calibration)
  for m, odds in task.calibrate(calibration, raw).items():
    x = raw[m].astype(np.float64)
    share = x - np.log(np.exp(x).sum(-1, keepdims=True))
    expected = np.exp(calibration[m]["log_scale"]) * share[..., :-1] + calibration[m]["bias"]
    np.testing.assert_allclose(odds, expected, rtol=1e-4, atol=1e-5)
  ave = small.task("ave")
  assert ave.init_calibration() == {} and ave.calibrate({}, raw) is raw
  assert task.text_classes() == (*task.classes, "background") and ave.text_classes() == ave.classes


# -- AVS ---------------------------------------------------------------------------------------------------------


def test_avs_is_pixel_cross_entropy_of_the_labelled_seconds():
  task, logits = small.task("avs"), draw(B, T, 6, 6)
  label = np.random.default_rng(2).integers(0, 2, (B, T, 6, 6), np.uint8)
  label_mask = np.array([[1, 0], [1, 1], [1, 1], [0, 1]], np.float32)
  p = sigmoid(logits)
  entropy = -(label * np.log(p) + (1 - label) * np.log(1 - p)).mean((2, 3))
  per_clip = [entropy[0, 0], entropy[1].mean(), entropy[3, 1]]
  batch = {"label": label, "label_mask": label_mask, "mask": MASK}
  assert task.loss({"mask": logits}, batch) == pytest.approx(np.mean(per_clip), rel=1e-5)
  without = {**batch, "label_mask": np.zeros_like(label_mask)}
  assert task.loss({"mask": logits}, without) == 0


@pytest.fixture(scope="module")
def decoder():
  """(task, head, state after a training step and an evaluation, their outputs)."""
  task = small.task("avs")
  head, batch = head_of(task), {**small.batch("avs", B), "mask": MASK}
  start = jax.tree.map(lambda x: np.asarray(x) + 0.25, task.init_state())
  trained, after = predict(task, train=True, batch=batch, state=start, head=head)
  seen, same = predict(task, batch=batch, state=start, head=head)
  return task, head, batch, start, after, same, trained, seen


def test_running_statistics_change_in_training_only(decoder):
  _, _, _, start, after, same, trained, seen = decoder
  small.assert_same_bits(same, start)
  before, now = small.flat(start), small.flat(after)
  assert set(before) == set(now) and all(np.abs(now[k] - before[k]).max() > 0 for k in before)
  assert trained["mask"].shape == seen["mask"].shape == (B, T, small.IMAGE, small.IMAGE)
  assert np.abs(np.asarray(trained["mask"]) - np.asarray(seen["mask"])).max() > 1e-3


def test_running_statistics_ignore_padding(decoder):
  task, head, batch, start, after, _, trained, _ = decoder
  garbage = features()
  rows = np.repeat(MASK == 0, T)
  for m in garbage:
    garbage[m].tokens[rows] = 1e3
  run = jax.jit(lambda f: task.predict(head, start, f, batch, rng=None, train=True))
  outputs, state = run(garbage)
  for name, x in small.flat(state).items():
    np.testing.assert_allclose(x, small.flat(after)[name], rtol=1e-5, atol=1e-6, err_msg=name)
  np.testing.assert_allclose(outputs["mask"][MASK > 0], trained["mask"][MASK > 0], rtol=1e-4, atol=1e-5)
  # the first norm, by hand: statistics of the three real clips only, momentum 0.9
  real = (
    features()["visual"].tokens[~rows][:, 1:].reshape(-1, 2, 2, 16) @ head["reduce"]["kernel"][0, 0] + head["reduce"]["bias"]
  )
  x = jax.image.resize(real, (len(real), 4, 4, real.shape[-1]), "bilinear")
  x = np.asarray(
    jax.lax.conv_general_dilated(x, head["up_0_conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
  )
  np.testing.assert_allclose(after["up_0_norm"]["mean"], 0.9 * 0.25 + 0.1 * x.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(after["up_0_norm"]["var"], 0.9 * 1.25 + 0.1 * x.var((0, 1, 2)), rtol=1e-4, atol=1e-5)


def test_avs_needs_patches_that_double_up_to_pixels():
  task = small.task("avs")
  assert len(task.head().channels) == 2
  with pytest.raises(ValueError, match="power of two"):
    dataclasses.replace(task, image_size=14).head()


# -- AVQA --------------------------------------------------------------------------------------------------------


def test_avqa_is_cross_entropy_over_the_real_questions():
  task, logits = small.task("avqa"), draw(B, 2, C)
  label = np.random.default_rng(2).integers(0, C, (B, 2))
  question_mask = np.array([[1, 1], [1, 0], [1, 1], [1, 0]], np.float32)
  x = logits.astype(np.float64)
  asked = [(0, 0), (0, 1), (1, 0), (3, 0)]
  expected = np.mean([math.log(sum(math.exp(v) for v in x[b, q])) - x[b, q, label[b, q]] for b, q in asked])
  batch = {"label": label, "question_mask": question_mask, "mask": MASK}
  assert task.loss({"answer": logits}, batch) == pytest.approx(expected, rel=1e-5)
  assert task.scores({"answer": logits})["scores"] is logits


def test_questions_about_one_clip_do_not_see_each_other_and_dropout_is_for_training():
  task, batch = small.task("avqa"), small.batch("avqa", 2)
  head = head_of(task)
  outputs, _ = predict(task, batch=batch, head=head, rows=2)
  assert outputs["answer"].shape == (2, 2, C)
  turned = {**batch, "question": batch["question"][:, ::-1]}
  np.testing.assert_allclose(
    predict(task, batch=turned, head=head, rows=2)[0]["answer"], outputs["answer"][:, ::-1], rtol=1e-4, atol=1e-5
  )
  assert np.abs(outputs["answer"][:, 0] - outputs["answer"][:, 1]).max() > 1e-3
  dropped = [predict(task, batch=batch, head=head, rows=2, train=True, rng=jax.random.key(k))[0]["answer"] for k in (0, 0, 1)]
  assert (dropped[0] == dropped[1]).all() and (dropped[0] != dropped[2]).any()


# -- all ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_tasks_of_equal_shapes_are_equal(name):
  one = small.task(name)
  renamed = dataclasses.replace(one, name="other", classes=("x", "y", "z"))
  assert one == renamed and hash(one) == hash(renamed)
  for field, value in (("num_classes", 4), ("seconds", 5), ("widths", dataclasses.replace(one.widths, embed=9))):
    assert dataclasses.replace(one, **{field: value}) != one
  assert all(one != small.task(other) for other in TASKS if other != name), "another kind of task is another static value"


@pytest.mark.parametrize("name", TASKS)
def test_a_step_is_handed_all_that_a_task_reads(name):
  task = small.task(name)
  batch = {k: v for k, v in small.batch(name, B).items() if k in task.device_keys}
  state = jax.tree.map(np.asarray, task.init_state())

  def loss(head, f):
    outputs, after = task.predict(head, state, f, batch, rng=jax.random.key(0), train=True)
    return task.loss(outputs, batch), after

  value, after = jax.eval_shape(loss, head_of(task), features())
  assert value.shape == () and jax.tree.structure(after) == jax.tree.structure(state)
  assert {"visual", "audio", "mask"} <= set(task.device_keys)
