"""PHP's switches: what each changes, that no answer depends on other clips of its batch, that remat changes no number."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from configs import php_avqa
from phpjax import compat, model, optimizer, partition
from phpjax.encoders import HTSAT
from phpjax.methods import php_noise

STAGES = {"depths": (2, 1), "heads": (2, 2), "window": 4, "image_size": 32, "num_mels": 8, "num_fft": 128, "hop": 64}
RELEASED = {**small.RELEASED, "audio_logit_scale": "exp"}


def modules(kind="htsat"):
  """The small encoders, with an HTS-AT of two stages as audio."""
  made = small.modules()
  if kind == "htsat":
    sizes = {"width": 16, "depth": 3, "num_heads": 2, "embed_dim": 8, "mlp_ratio": 2.0, "sample_rate_hz": small.RATE_HZ}
    made["audio"] = HTSAT(**sizes, **STAGES, repeats=1, low_hz=20.0, high_hz=1900.0, mel_rate_hz=small.RATE_HZ)
  if kind == "alone":
    made["audio"] = dataclasses.replace(made["audio"], with_text=False, embed_dim=16)
  return made


class Setup:
  """A method on small encoders, with parameters of one task."""

  def __init__(self, name="ave", kind="htsat", seed=0, **options):
    self.made = modules(kind)
    self.method = small.php(self.made, **options)
    special = self.made["audio"].num_special
    task = small.task(name)
    self.task = dataclasses.replace(task, widths=dataclasses.replace(task.widths, audio_special=special))
    params = small.params_of(self.method, {name: self.task}, self.made, seed)
    if kind == "htsat":
      frontend = params["encoders"]["audio"]["frontend"]
      params["encoders"]["audio"]["frontend"] = {
        **frontend,
        "mel": np.abs(frontend["mel"]),
        "var": np.abs(frontend["var"]) + 50,
      }
    self.trainable, self.frozen = partition.split(params, name, self.method.uses(self.task))
    own = {"head": self.task.init_state(), "method": self.method.init_task_state(self.task)}
    self.state = {"shared": {}, "task": own}
    self.constants = small.class_constants(name)
    self.name = name

  def outputs(self, trainable, batch, train=False, rng=None):
    options = {"rng": rng, "train": train}
    inputs = (self.task, trainable, self.frozen, self.state, None, batch)
    features, context, _ = model.forward(self.made, self.method, *inputs, **options)
    classes = self.method.class_features(self.made, trainable, self.frozen, self.constants)
    inputs = (self.task, trainable, self.frozen, self.state["task"]["head"], features, context, classes, batch)
    outputs, _ = self.method.predict(*inputs, **options)
    own = self.task.loss(outputs, batch)
    return own + sum(self.method.losses(self.task, context, features, outputs, batch).values()), outputs

  def answers(self, batch):
    return jax.device_get(jax.jit(self.outputs)(self.trainable, batch)[1])

  def gradients(self, batch, train=True):
    loss = lambda t: self.outputs(t, batch, train=train, rng=jax.random.key(1))[0]
    return jax.device_get(jax.jit(jax.value_and_grad(loss))(self.trainable))


def close(a, b, tolerance=2e-5):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["htsat", "ast"])
def test_remat_changes_no_number(kind):
  batch = small.batch("ave", 2)
  plain, kept = (Setup(kind=kind, remat=remat).gradients(batch) for remat in (False, True))
  close(kept, plain)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, RELEASED], ids=["paper", "released"])
@pytest.mark.parametrize("name", ["ave", "avs"])
def test_every_leaf_learns_with_stages_of_audio(name, options):
  # two ReLUs of two channels in the CLIP adapter are dead for some seeds
  _, gradients = Setup(name, seed=3, **options).gradients(small.batch(name, 2))
  dead = [path for path, x in small.flat(gradients).items() if not np.abs(x).max() > 0]
  # one row of a pool is chosen for the batch, the others wait (quirk 7): no leaf is all zero for it
  assert not dead


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.slow), RELEASED], ids=["paper", "released"])
@pytest.mark.parametrize("name", ["ave", *(pytest.param(name, marks=pytest.mark.slow) for name in ("avs", "avqa"))])
def test_an_answer_does_not_depend_on_its_neighbours(name, options):
  setup, batch = Setup(name, **options), small.batch(name, 3)
  whole = setup.answers(batch)
  alone = setup.answers({k: v[1:2] for k, v in batch.items()})
  close(jax.tree.map(lambda x: x[1:2], whole), alone, 1e-4)


@pytest.mark.slow
def test_padding_changes_neither_the_choice_nor_the_layout_of_a_training_batch():
  setup, batch = Setup(**{**RELEASED, "audio_noise": False}), small.batch("ave", 2)  # noise is drawn for the padding too
  padded = {k: np.concatenate([v, np.zeros_like(v[:1])]) for k, v in batch.items()}
  loss, _ = setup.gradients(batch)
  close(setup.gradients(padded)[0], loss, 1e-4)


def test_at_test_the_release_answers_with_noise_and_statistics_of_the_clip():
  batch = small.batch("avs", 2)
  quiet, noisy = (Setup("avs", **{**RELEASED, "train_mode_at_test": on}).answers(batch) for on in (False, True))
  assert np.abs(quiet["mask"] - noisy["mask"]).max() > 1e-3
  close(Setup("avs", **RELEASED).answers(batch), noisy)  # the same noise in every run


def test_statistics_are_those_of_the_real_rows():
  setup = Setup()
  module = setup.made["audio"].bind({"params": setup.frozen["encoders"]["audio"]})
  mel = jnp.asarray(np.random.default_rng(0).normal(-30, 10, (6, 20, 8)), jnp.float32)
  padded = jnp.concatenate([mel, jnp.full((2, 20, 8), -100.0)])
  close(module.normalise(padded, 1, jnp.asarray([1.0] * 6 + [0.0] * 2))[:6], module.normalise(mel, 1))
  each = jnp.concatenate([module.normalise(mel[:3], 1), module.normalise(mel[3:], 1)])
  close(module.normalise(mel, 2), each)
  frontend = setup.frozen["encoders"]["audio"]["frontend"]
  flat = np.asarray(mel).reshape(-1, 8)
  expected = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5) * frontend["scale"] + frontend["bias"]
  close(module.normalise(mel, 1), expected.reshape(mel.shape))


@pytest.mark.slow
@pytest.mark.parametrize("option", ["mixup", "audio_noise", "train_mode_at_test", "audio_repeats"])
def test_each_kind_of_noise_can_be_had_alone(option):
  batch, value = small.batch("avs", 2), "seconds" if option == "audio_repeats" else True
  train = option != "train_mode_at_test"
  plain, changed = (Setup("avs", **options).gradients(batch, train=train)[0] for options in ({}, {option: value}))
  assert abs(plain - changed) > 1e-5


def test_prompts_of_a_pool_that_wait_shrink_by_adam_and_decay():
  setup = Setup(**{**RELEASED, "audio_noise": False})
  _, gradients = setup.gradients(small.batch("ave", 2))
  opt = optimizer.settings(compat.resolve(php_avqa.get_config("released_toybox")).opt)
  tx = optimizer.make(opt)
  updates, _ = jax.jit(lambda g, t: tx.update(g, tx.init(t), t))(gradients, setup.trainable)
  before, moved, slopes = (small.flat(tree) for tree in (setup.trainable, jax.device_get(updates), gradients))
  pools = [path for path, x in slopes.items() if "deep" in path and x.ndim == 4]
  assert len(pools) == len(setup.method.deep)
  for path in pools:
    waiting = [row for row in range(setup.method.deep_pool) if not np.abs(slopes[path][:, row]).max()]
    assert len(waiting) == setup.method.deep_pool - 1
    value, step = before[path][:, waiting], moved[path][:, waiting]
    large = np.abs(value) > 0.05  # below, Adam's eps is felt
    np.testing.assert_allclose(step[large], -np.sign(value[large]) * dict(opt.groups)["prompts"].lr, rtol=0.05)


def test_without_write_back_audio_stays_what_it_was():
  options = {"mid": (), "deep": ()}
  batch = small.batch("ave", 2)

  def audio(**more):
    setup = Setup(**options, **more)
    inputs = (setup.task, setup.trainable, setup.frozen, setup.state, None, batch)
    forward = functools.partial(model.forward, setup.made, setup.method, setup.task, rng=None, train=False)
    return setup, jax.jit(lambda t: forward(t, *inputs[2:])[0]["audio"].tokens)(setup.trainable)

  released, kept = audio(write_back=False, gate_audio=False)
  _, written = audio()
  plain = jax.jit(lambda p, x: released.made["audio"].apply({"params": p}, x).tokens)
  untouched = plain(released.frozen["encoders"]["audio"], batch["audio"].reshape(-1, small.RATE_HZ))
  close(kept, untouched)
  assert np.abs(written - untouched).max() > 1e-3
  adapters = released.trainable["shared"]["adapters"]
  assert set(adapters["step_0_attention"]) == {"visual", "audio"} and set(adapters["step_0_mlp"]) == {"visual"}


@pytest.mark.slow
def test_an_encoder_without_a_space_for_text_learns_a_map_into_it():
  setup = Setup(kind="alone")
  _, gradients = setup.gradients(small.batch("ave", 2))
  learned = gradients["shared"]["maps"]
  assert set(learned) == {"audio"} and learned["audio"]["kernel"].shape == (16, 8)
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(learned))


# -- noise -------------------------------------------------------------------------------------------------------


def test_stripes_are_zero_and_differ_from_row_to_row():
  mel = jnp.ones((40, 200, 64))
  made = np.asarray(php_noise.spec_augment(jax.random.key(0), mel))
  assert set(np.unique(made)) == {0.0, 1.0}
  times, mels = (made == 0).all(axis=2).sum(axis=1), (made == 0).all(axis=1).sum(axis=1)
  assert times.max() <= 2 * (php_noise.TIME_WIDTH - 1) and mels.max() <= 2 * (php_noise.MEL_WIDTH - 1)
  assert len(set(times)) > 10 and times.mean() == pytest.approx(63 - 8, abs=12)  # two stripes of 0 to 63, some overlap


def test_rows_are_blended_with_their_mirror_image_among_the_real_ones():
  mel = jnp.arange(6.0)[:, None, None] * jnp.ones((6, 2, 2))
  for real, mirrors in ((6, (5, 4, 3, 2, 1, 0)), (4, (3, 2, 1, 0))):
    made = np.asarray(php_noise.mix_mirrored(jax.random.key(0), mel, jnp.arange(6) < real))[:, 0, 0]
    for row, mirror in enumerate(mirrors):
      assert min(row, mirror) - 1e-5 <= made[row] <= max(row, mirror) + 1e-5
    assert np.abs(made - np.arange(6))[:real].max() > 0.1


def test_dropped_paths_keep_the_mean():
  scale = np.asarray(php_noise.drop_path(jax.random.key(0), 4, 0.3, 5000))
  assert scale.shape == (4, 2, 5000) and (scale[0] == 1).all()
  np.testing.assert_allclose(scale.mean(axis=(1, 2)), 1, atol=0.02)
  assert (scale[3] == 0).mean() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("name", ["ave", "avvp", "avs", "avqa"])
def test_shapes_of_labels_are_those_of_batches(name):
  shapes, batch = small.task(name).label_shapes(small.SECONDS), small.labels(name, 2)
  assert set(shapes) == set(batch)
  for key, (shape, dtype) in shapes.items():
    assert batch[key].dtype == dtype and len(batch[key].shape[1:]) == len(shape), key
    assert batch[key].shape[1:] == shape or name == "avqa", key  # this batch asks two questions per clip
