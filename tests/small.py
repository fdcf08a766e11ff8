"""Encoders of three narrow layers, tasks of two seconds and batches for them: as small as compile times ask for.

Parameters are drawn by numpy, so that no initialiser is compiled and nothing starts at zero.
"""

import importlib
import zlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from phpjax import compat
from phpjax.benchmarks import BENCHMARKS
from phpjax.encoders import AST, CLIPText, CLIPVision, pretrained
from phpjax.methods import PHP, Backbone, Sizes, make_method
from phpjax.tasks import Widths

Tree = dict[str, Any]
RELEASED = {name.removeprefix("method."): o.released for name, o in compat.OPTIONS.items() if name.startswith("method.")}
SECONDS, IMAGE, RATE_HZ, WORDS, CONTEXT = 2, 8, 4000, 32, 12
# Each kind of task once: MS3's is that of AVS.
TASKS = {name: benchmark.task for name, benchmark in BENCHMARKS.items() if name != "ms3"}
TASKS["ave_classes_1"] = BENCHMARKS["ave_classes_1"].task


def modules(*, visual_depth: int = 3, audio_depth: int = 3, text_depth: int = 3) -> Tree:
  """{modality: linen module}."""
  narrow = {"width": 16, "num_heads": 2, "embed_dim": 8, "mlp_ratio": 2.0, "activation": "quick_gelu"}
  return {
    "visual": CLIPVision(**narrow, depth=visual_depth, image_size=IMAGE, patch_size=4),
    "audio": AST(**narrow, depth=audio_depth, sample_rate_hz=RATE_HZ, num_mels=48, patch_size=16, stride=32),
    "text": CLIPText(**narrow, depth=text_depth, vocabulary_size=WORDS, context_length=CONTEXT),
  }


def fill(shapes: Any, seed: int = 0, scale: float = 0.2) -> Any:
  """Normal numbers for every leaf, around 1 for the scales of norms."""

  def draw(path: tuple, leaf: Any) -> np.ndarray:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return (rng.normal(0, scale, leaf.shape) + name.endswith("scale")).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def encoder_params(made: Tree, seed: int = 0) -> Tree:
  """{modality: params}."""
  return {m: fill(pretrained.shapes(module), seed) for m, module in made.items()}


def backbone(made: Tree) -> Backbone:
  """The sizes that a method sees."""
  return Backbone(**{m: Sizes.of(module) for m, module in made.items()})


def task(name: str, *, num_classes: int = 3, **options: Any) -> Any:
  """The task called `name` for these encoders."""
  made = modules()
  patches = made["visual"].num_tokens - 1
  extra = {"avs": {"image_size": IMAGE}, "avqa": {"num_words": 9}}.get(name, {})
  classes = tuple(f"class {i}" for i in range(num_classes))
  options = {"name": name, "classes": classes, **extra, **options}
  return BENCHMARKS[name].task(Widths(16, 16, 8, patches), SECONDS, num_classes, **options)


def config_of(method: str, variant: str = "tiny") -> ConfigDict:
  """The experiment of a method, by default at its smallest, with all of its modules."""
  return importlib.import_module(f"configs.{ {'php': 'php_avqa'}.get(method, method) }").get_config(variant)


def method_of(name: str, made: Tree | None = None, **options: Any) -> Any:
  """The method called `name` with the options of its `:tiny` config, on these encoders."""
  chosen = compat.resolve(config_of(name)).method
  options = {**{k: v for k, v in chosen.items() if k not in ("name", "compat")}, **options}
  return make_method(name, backbone(made or modules()), **options)


def php(made: Tree | None = None, cls: type = PHP, **options: Any) -> Any:
  """A PHP whose three phases have one layer each, unless `options` say otherwise."""
  sizes = {"num_mid_prompts": 4, "codebook_size": 6, "generator_depth": 1, "deep_length": 2, "num_latents": 3, "reduction": 4}
  phases = {"shallow": (0,), "mid": (1,), "deep": (2,)}
  return cls(backbone(made or modules()), **{**sizes, **phases, "audio_logit_scale": "exp", **options})


def prompts_of(method: Any, of: Any, seed: int = 0) -> Tree:
  """A task's prompts, nothing at zero."""
  return fill(jax.eval_shape(lambda: method.init_task(jax.random.key(0), of, None)), seed)


def params_of(method: Any, tasks: Tree, made: Tree, seed: int = 0) -> Tree:
  """The whole parameter tree of these tasks, nothing at zero."""
  shared = jax.eval_shape(lambda: method.init_shared(jax.random.key(0)))
  head = lambda t: jax.eval_shape(lambda: method.init_head(jax.random.key(0), t))
  return {
    "encoders": encoder_params(made, seed),
    "shared": fill(shared, seed),
    "tasks": {
      name: {"prompts": prompts_of(method, t, seed + i), "head": fill(head(t), seed + i)}
      for i, (name, t) in enumerate(tasks.items())
    },
  }


def inputs(batch_size: int, seed: int = 0) -> Tree:
  """Frames, sound and mask of a batch."""
  rng = np.random.default_rng(seed)
  return {
    "visual": rng.integers(0, 256, (batch_size, SECONDS, IMAGE, IMAGE, 3), np.uint8),
    "audio": rng.integers(-20_000, 20_000, (batch_size, SECONDS, RATE_HZ), np.int16),
    "mask": np.ones(batch_size, np.float32),
  }


def labels(name: str, batch_size: int, seed: int = 0) -> Tree:
  """What the task's loss reads beside the inputs."""
  rng = np.random.default_rng(seed + 100)
  if name == "ave":
    return {"label": rng.integers(0, 3, (batch_size, SECONDS), np.int32)}
  if name.startswith("ave_classes"):
    return {"label": rng.integers(0, 3, batch_size, np.int32)}
  if name == "avvp":
    return {"label": rng.integers(0, 2, (batch_size, 3)).astype(np.float32)}
  if name == "avs":
    label_mask = np.zeros((batch_size, SECONDS), np.float32)
    label_mask[:, 0] = 1
    return {"label": rng.integers(0, 2, (batch_size, SECONDS, IMAGE, IMAGE), np.uint8), "label_mask": label_mask}
  return {
    "question": rng.integers(0, 9, (batch_size, 2, 14), np.int32),
    "question_mask": np.ones((batch_size, 2), np.float32),
    "label": rng.integers(0, 3, (batch_size, 2), np.int32),
  }


def batch(name: str, batch_size: int, seed: int = 0) -> Tree:
  """A whole batch of a task."""
  return {**inputs(batch_size, seed), **labels(name, batch_size, seed)}


def text_ids(count: int, seed: int = 0) -> np.ndarray:
  """int32 [count, 9]: start, words, end (the largest id), padding."""
  rng = np.random.default_rng(seed)
  ids = np.zeros((count, 9), np.int32)
  for row, length in zip(ids, rng.integers(5, 8, count), strict=True):
    row[:length] = [WORDS - 2, *rng.integers(2, WORDS - 2, length - 2), WORDS - 1]
  return ids


def class_constants(name: str, num_classes: int = 3) -> Tree:
  """The constants of an event task: class texts; of the others nothing."""
  rng = np.random.default_rng(5)
  rows = num_classes + (name == "avvp")
  return (
    {"class_ids": text_ids(rows), "audio_text": rng.normal(size=(rows, 8)).astype(np.float32)}
    if name in ("ave", "avvp")
    else {}
  )


def flat(tree: Any) -> dict[str, np.ndarray]:
  """{path: array} on the host."""
  leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
  return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def assert_same_bits(left: Any, right: Any) -> None:
  """Same structure, dtypes, shapes and bytes."""
  left, right = flat(left), flat(right)
  assert set(left) == set(right)
  for name, x in left.items():
    y = right[name]
    assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), name
