"""Pretraining of the nano encoders: it can be redone, and never sees what is tested."""

import hashlib
import json

import jax
import numpy as np
import pytest
import small

from configs import nano
from data_pipelines.toybox.clips import KNOWN
from data_pipelines.toybox.compose import TINY_SIZES, plan_all
from data_pipelines.toybox.library import read_manifest
from phpjax import pretrain
from phpjax.encoders import ENCODERS, pretrained

SIZES = (16, 8, 4000)  # image, patch, samples per second


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """(folder, scores) of configs/nano.py:tiny."""
  folder = tmp_path_factory.mktemp("nano")
  return folder, pretrain.pretrain(nano.get_config("tiny"), folder)


def digests(folder):
  files = folder.rglob("*.safetensors")
  return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_it_writes_encoders_that_open_and_says_how_they_were_made(tiny):
  folder, scores = tiny
  assert all(0 <= value <= 1 for value in scores.values()) and {"visual_to_caption_R@1", "patch_accuracy"} <= set(scores)
  for modality, name in nano.get_config("tiny").encoders.items():
    opened = pretrained.load(name, str(folder / name), modality=modality)
    assert isinstance(opened.module, ENCODERS[name][0])
    assert opened.metadata["config"] == json.loads(nano.get_config("tiny").to_json()) and opened.metadata["test"] == scores


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(tiny, tmp_path):
  folder, scores = tiny
  assert pretrain.pretrain(nano.get_config("tiny"), tmp_path) == scores
  assert digests(folder) == digests(tmp_path) and len(digests(folder)) == 3


@pytest.mark.parametrize("modality", ["visual", "audio"])
def test_the_stream_may_be_scaled(modality):
  """Tokens are scaled exactly (all norms see the same up to eps), pooled features stay."""
  module = small.modules()[modality].clone(eps=1e-12)
  params = small.encoder_params({modality: module})[modality]
  inputs = small.inputs(2)[modality].reshape(4, *small.inputs(2)[modality].shape[2:])
  run = jax.jit(module.apply)
  one, other = run({"params": params}, inputs), run({"params": pretrain.rescale_stream(params, 0.25)}, inputs)
  np.testing.assert_allclose(other.tokens, 0.25 * one.tokens, rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(other.pooled, one.pooled, rtol=1e-3, atol=1e-5)


def test_only_known_objects_are_drawn():
  names = {entry["file"] for entry in read_manifest()["files"] if entry["split"] in KNOWN}
  library = pretrain.known_library()
  drawn = {piece.name for pieces in (*library.pictures.values(), *library.sounds.values()) for piece in pieces}
  assert drawn and drawn | set(library.background_names) <= names


def test_training_scenes_test_scenes_and_benchmarks_have_seeds_of_their_own(monkeypatch):
  """Every generator that is made for a batch of either kind, against those of all toybox clips."""
  make, made = np.random.default_rng, []

  def watched(seed):
    made.append(tuple(np.trim_zeros(np.asarray(seed), "b").tolist()))  # zeros at the end do not change a generator
    return make(seed)

  def seeds(draw):
    made.clear()
    draw()
    return set(made)

  c, sizes = nano.get_config(), (16, 8, 4000)
  c.batch_size, c.num_captions = 3, 1
  pretrain.make_batch(1, c, sizes)  # the library makes its noise once, from a seed of its own
  monkeypatch.setattr(np.random, "default_rng", watched)
  train = seeds(lambda: [pretrain.make_batch(step, c, sizes) for step in (1, 2, c.num_steps)])
  test = seeds(lambda: [pretrain.make_batch(-step, c, sizes) for step in (1, 2, c.num_steps)])
  assert len(train) == len(test) == 9, "a scene per row; the texts of a batch share the generator of row 0"
  benchmarks = seeds(lambda: [plan_all(toybox_seed, TINY_SIZES) for toybox_seed in (0, 1)])
  assert len(benchmarks) > 50 and not train & test and not (train | test) & benchmarks


def test_a_batch_does_not_depend_on_who_draws_it():
  c = nano.get_config("tiny")
  alone, again = (list(pretrain.batches(range(1, 3), c, SIZES)) for _ in range(2))
  c.num_workers = 1
  pooled = list(pretrain.batches(range(1, 3), c, SIZES))
  for one, two, three in zip(alone, again, pooled, strict=True):
    for key in one:
      np.testing.assert_array_equal(one[key], two[key])
      np.testing.assert_array_equal(one[key], three[key])
