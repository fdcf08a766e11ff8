"""Published weights through phpjax.convert equal their own features.

PHPJAX_REAL_WEIGHTS names the folder with dinov2-small, whisper-tiny.en and all-MiniLM-L6-v2; PHPJAX_REAL_GOLDEN the one with
the expected features. A missing folder is a failure, not a skip: these tests run only when asked for (marker `real`).
"""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phpjax import convert
from phpjax.encoders import audio_frontend, pretrained

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "real"
GOLDEN = pathlib.Path(os.environ.get("PHPJAX_REAL_GOLDEN", SHARED / "golden"))
pytestmark = pytest.mark.real


@pytest.fixture(autouse=True)
def exact():
  """Full float32 products, as the expected features were made."""
  with jax.default_matmul_precision("highest"):
    yield


def golden(name):
  with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
    return dict(file)


def opened(encoder, folder, tmp_path, modality, **sizes):
  """Converts and opens an encoder."""
  weights = os.environ.get("PHPJAX_REAL_WEIGHTS")
  assert weights, "set PHPJAX_REAL_WEIGHTS to the folder with the real weights (see docs/encoders.md)"
  convert.convert(encoder, pathlib.Path(weights) / folder, tmp_path / encoder)
  return pretrained.load(encoder, str(tmp_path / encoder), modality=modality, **sizes)


def apply(encoder, method, *inputs):
  return jax.jit(lambda params, *x: encoder.module.apply({"params": params}, *x, method=method))(encoder.params, *inputs)


def within(actual, expected, tolerance):
  assert np.abs(np.asarray(actual) - expected).max() <= tolerance


def test_dinov2(tmp_path):
  g = golden("dinov2")
  encoder = opened("dinov2_s14", "dinov2-small", tmp_path, "visual")
  features = apply(encoder, "__call__", g["pixels"])
  within(features.pooled, g["cls"], 1e-3)
  tokens = apply(encoder, lambda m, x: m.ln_post(x), features.tokens)
  within(tokens[:, features.num_special :].mean(1), g["mean"], 1e-3)


@pytest.mark.parametrize("seconds", [2, 30])
def test_whisper(tmp_path, seconds):
  g = golden("whisper")
  if seconds == 2:
    log_mel = audio_frontend.whisper_log_mel(audio_frontend.to_float(jnp.asarray(g["wave"])))
    within(log_mel, g["log_mel_2s"].swapaxes(1, 2), 1e-3)
  encoder = opened("whisper_tiny", "whisper-tiny.en", tmp_path, "audio", seconds=seconds)
  features = apply(encoder, "__call__", g["wave"])
  within(features.pooled, g[f"mean_{seconds}s"], 1e-3)
  tokens = apply(encoder, lambda m, x: m.ln_post(x), features.tokens)
  within(tokens[:, :5], g[f"first5_{seconds}s"], 1e-3)


def test_minilm(tmp_path):
  g = golden("minilm")
  encoder = opened("minilm_l6", "all-MiniLM-L6-v2", tmp_path, "text")
  ids = encoder.tokenizer([str(text) for text in g["text"]], encoder.module.context_length)
  np.testing.assert_array_equal(ids, g["input_ids"] * g["attention_mask"])
  within(apply(encoder, "__call__", ids).pooled, g["mean"], 1e-4)
