"""Contrastive pretraining of the nano encoders on composed scenes (`python -m phpjax.pretrain --help`).

One frame and one second of sound of a scene are pulled towards texts in a joint space (CLIP, Radford et al. 2021):
the class texts of what is visible or audible, the scene's caption within the batch, and, for patch tokens, the class
text of the object that covers the patch (region-text contrast). Scenes come from seeds that no benchmark scene uses and
from known objects only. Everything is a pure function of the config.
"""

from __future__ import annotations

import collections
import functools
import multiprocessing
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import soxr
from absl import flags
from flax import traverse_util
from ml_collections import ConfigDict, config_flags

from data_pipelines.toybox import library as toybox_library
from data_pipelines.toybox import render
from data_pipelines.toybox import scene as toybox_scene
from phpjax import cli
from phpjax.encoders import make_encoder, pretrained, unit
from phpjax.encoders.tokenizer import Tokenizer, word_tokenizer

Batch = dict[str, np.ndarray]
# fmt: off
EXTRA_WORDS = [
  "a", "an", "the", "of", "and", "with", "picture", "sounds", "sound", "x", "background", "silence", "nothing", ".", ",", "?",
  "left", "right", "above", "below", "behind", "before", "after", "in", "on", "at", "near", "between", "while", "no", "is",
  "are", "moving", "silent", "loud", "quiet", "scene", "many", "one", "two", "three", "first", "last", "small", "large",
]
# fmt: on
VISUAL_TEMPLATES = ("{noun}", "a picture of {noun}", "{name} .", "x x x x {name} .")
AUDIO_TEMPLATES = ("{sounding}", "the sounds of {name}", "the sound of {noun}")


@functools.cache
def known_library() -> toybox_library.Library:
  """Known objects only; one per process."""
  return toybox_library.load_library()


def words(library: toybox_library.Library) -> list[str]:
  """Every word the tower may meet in class names, captions and templates, in a fixed order."""
  phrases = [
    *(" ".join(library.classes).replace("_", " ")).split(),
    *" ".join(library.noun.values()).split(),
    *" ".join(library.label.values()).split(),
    *" ".join(library.sounding.values()).split(),
    *EXTRA_WORDS,
  ]
  return list(dict.fromkeys(word.lower() for word in phrases))


def example(seed: tuple[int, ...], image_size: int, patch_size: int, sample_rate_hz: int) -> Batch:
  """One scene -> visual uint8 [H, W, 3], audio int16 [samples], visible and audible float32 [C], patch int32 [patches].

  `patch` is the class that covers at least 40 percent of a patch, C for background, -1 where it is unclear.
  """
  library, rng = known_library(), np.random.default_rng(seed)
  scene = toybox_scene.sample_scene(rng, library, seconds=2, num_objects=(1, 3))
  second = int(rng.integers(2))
  frame, alphas = render.render_frame(scene, library, second + float(rng.uniform()), image_size)
  wave = soxr.resample(render.render_second(scene, library, second), 32_000, sample_rate_hz)
  num_classes, grid = len(library.classes), image_size // patch_size
  visible, audible = np.zeros(num_classes, np.float32), np.zeros(num_classes, np.float32)
  patch, covered = np.full((grid, grid), -1, np.int32), np.zeros((grid, grid))
  for track, alpha in zip(scene.objects, alphas, strict=True):
    share = (alpha >= 128).reshape(grid, patch_size, grid, patch_size).mean((1, 3))
    patch[share > 0.4] = library.classes.index(track.class_id)
    covered += share
    visible[library.classes.index(track.class_id)] = float(share.sum() > 0.5)
  for voice in scene.voices:
    audible[library.classes.index(voice.class_id)] = max(audible[library.classes.index(voice.class_id)], voice.sounding[second])
  patch[covered < 0.05] = num_classes
  return {
    "visual": frame,
    "audio": np.clip(wave * 32767, -32768, 32767).astype(np.int16),
    "visible": visible,
    "audible": audible,
    "patch": patch.reshape(-1),
  }


def caption(present: np.ndarray, phrases: list[str], nothing: str, rng: np.random.Generator) -> str:
  """Names what is present, in random order."""
  chosen = [phrases[i] for i in rng.permutation(np.flatnonzero(present))]
  return " and ".join(chosen) if chosen else nothing


def make_batch(step: int, c: ConfigDict, sizes: tuple[int, int, int]) -> Batch:
  """Batch `step` (negative: test scenes): scenes, and the texts as ids."""
  seeds = [(c.seed, abs(step), int(step < 0), row) for row in range(c.batch_size)]
  batch = {k: np.stack([e[k] for e in rows]) for rows in [[example(s, *sizes) for s in seeds]] for k in rows[0]}
  library, rng = known_library(), np.random.default_rng((c.seed, abs(step), int(step < 0)))
  labels = [library.label, {name: name.replace("_", " ") for name in library.classes}]  # "piano keyboard" and "keyboard"
  names = [*(labels[rng.integers(2)][name] for name in library.classes), "background"]
  nouns = [*(library.noun[n] for n in library.classes), "background"]
  sounding = [*(library.sounding[n] for n in library.classes), "silence"]
  fill = lambda templates, i: rng.choice(templates).format(name=names[i], noun=nouns[i], sounding=sounding[i])
  batch["texts"] = np.array(
    [fill(VISUAL_TEMPLATES, i) for i in range(len(names))]
    + [fill(AUDIO_TEMPLATES, i) for i in range(len(names))]
    + [caption(row, nouns, "background", rng) for row in batch["visible"][: c.num_captions]]
    + [caption(row, sounding, "silence", rng) for row in batch["audible"][: c.num_captions]]
  )
  return batch


def batches(steps: range, c: ConfigDict, sizes: tuple[int, int, int]) -> Iterator[Batch]:
  """Batches in order, drawn in `num_workers` processes (0: in this one); the content does not depend on the number."""
  draw = functools.partial(make_batch, c=c, sizes=sizes)
  if not c.num_workers:
    yield from map(draw, steps)
    return
  with multiprocessing.get_context("spawn").Pool(c.num_workers) as pool:
    waiting: collections.deque[Any] = collections.deque()  # bounded: the pool would draw far ahead and fill the memory
    for step in steps:
      waiting.append(pool.apply_async(draw, (step,)))
      if len(waiting) > 4 * c.num_workers:
        yield waiting.popleft().get()
    while waiting:
      yield waiting.popleft().get()


def soft_cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
  """Mean over rows of CE against target weights, which are normalised to one per row."""
  target = target / target.sum(-1, keepdims=True).clip(1e-6)
  return -(target * jax.nn.log_softmax(logits)).sum(-1).mean()


def encode(encoders: dict[str, Any], params: dict[str, Any], batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Unit features: visual [B, E], audio [B, E], patches [B, patches, E], text [rows, E]."""
  visual = encoders["visual"].bind({"params": params["visual"]})
  features = visual(batch["visual"])
  pooled = {
    "visual": features.pooled,
    "audio": encoders["audio"].apply({"params": params["audio"]}, batch["audio"]).pooled,
    "text": encoders["text"].apply({"params": params["text"]}, batch["ids"]).pooled,
    "patches": visual.project(features.tokens[:, features.num_special :]),
  }
  return {k: unit(v) for k, v in pooled.items()}


def loss_fn(
  params: dict[str, Any],
  encoders: dict[str, Any],
  batch: dict[str, jax.Array],
  weights: tuple[float, float, float],
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Sum of the contrastive losses, and each of them."""
  region_weight, background_weight, caption_weight = weights
  features, num = encode(encoders, params, batch), batch["visible"].shape[1] + 1
  scale = {m: jnp.exp(params[m]["logit_scale"]).clip(1, 100) for m in ("visual", "audio")}
  text, captions = (
    features["text"][: 2 * num].reshape(2, num, -1),
    features["text"][2 * num :].reshape(2, -1, features["text"].shape[-1]),
  )
  losses = {}
  for i, (m, present) in enumerate((("visual", batch["visible"]), ("audio", batch["audible"]))):
    target = jnp.concatenate([present, (present.sum(-1, keepdims=True) == 0).astype(present.dtype)], axis=-1)
    losses[f"{m}_class"] = soft_cross_entropy(scale[m] * features[m] @ text[i].T, target)
    captioned = present[: captions.shape[1]]
    same = (present[:, None] == captioned[None]).all(-1).astype(jnp.float32)  # equal contents are no negatives
    logits = scale[m] * features[m] @ captions[i].T
    losses[f"{m}_caption"] = caption_weight * (soft_cross_entropy(logits, same) + soft_cross_entropy(logits.T, same.T)) / 2
  logits = scale["visual"] * features["patches"] @ text[0].T
  weight = jnp.where(batch["patch"] == num - 1, background_weight, 1.0) * (batch["patch"] >= 0)
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch["patch"].clip(0))
  losses["region"] = region_weight * (cross_entropy * weight).sum() / weight.sum().clip(1)
  return sum(losses.values()), losses


def scores(features: dict[str, np.ndarray], batch: Batch) -> dict[str, float]:
  """Retrieval scene -> caption (a caption of the same contents counts) and accuracy of the best class text."""
  num, result = batch["visible"].shape[1] + 1, {}
  captions = features["text"][2 * num :].reshape(2, -1, features["text"].shape[-1])
  for i, (m, present) in enumerate((("visual", batch["visible"]), ("audio", batch["audible"]))):
    order = np.argsort(-(features[m] @ captions[i].T), axis=1, kind="stable")
    hit = (present[order] == present[:, None]).all(-1)
    result |= {f"{m}_to_caption_R@{k}": float(hit[:, :k].any(1).mean()) for k in (1, 5, 10)}
    sounding = present.sum(1) > 0
    best = (features[m] @ features["text"][i * num : (i + 1) * num - 1].T).argmax(1)
    result[f"{m}_top1_is_present"] = float(np.take_along_axis(present, best[:, None], 1)[sounding].mean())
  real = batch["patch"] >= 0
  best = (features["patches"] @ features["text"][:num].T).argmax(-1)
  result["patch_accuracy"] = float((best == batch["patch"])[real].mean())
  return result


def pretrain(c: ConfigDict, out: pathlib.Path) -> dict[str, float]:
  """Trains, tests on scenes of other seeds, writes a folder per encoder; returns the test scores."""
  names, library = dict(c.encoders), known_library()
  encoders = {m: make_encoder(name) for m, name in names.items()}
  sizes = (encoders["visual"].image_size, encoders["visual"].patch_size, encoders["audio"].sample_rate_hz)
  (out / names["text"]).mkdir(parents=True, exist_ok=True)
  word_tokenizer(words(library), encoders["text"].vocabulary_size).save(str(out / names["text"] / "tokenizer.json"))
  tokenizer = Tokenizer(out / names["text"] / "tokenizer.json")
  lengths = (24, encoders["text"].context_length)  # few captions are longer than 24 tokens; each length is a compile

  def device_batch(batch: Batch) -> dict[str, jax.Array]:
    ids = tokenizer(list(batch["texts"]), encoders["text"].context_length)
    length = next(n for n in lengths if n >= ids.shape[1])
    return {k: jnp.asarray(v) for k, v in batch.items() if k != "texts"} | {
      "ids": np.pad(ids, [(0, 0), (0, length - ids.shape[1])])
    }

  keys = jax.random.split(jax.random.key(c.seed), 3)
  params = {
    m: encoders[m].init(key, pretrained.example_input(encoders[m]))["params"] for m, key in zip(names, keys, strict=True)
  }
  schedule = optax.warmup_cosine_decay_schedule(0.0, c.lr, c.warmup_steps, max(c.num_steps, c.warmup_steps + 1))
  decayed = lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=c.weight_decay, mask=decayed))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step_fn(params: Any, opt_state: Any, batch: Any) -> Any:
    grads, losses = jax.grad(loss_fn, has_aux=True)(
      params, encoders, batch, (c.region_weight, c.background_weight, c.caption_weight)
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, losses

  opt_state, start = jax.jit(tx.init)(params), time.time()
  for step, batch in enumerate(batches(range(1, c.num_steps + 1), c, sizes), start=1):
    params, opt_state, losses = step_fn(params, opt_state, device_batch(batch))
    if step % c.log_every_steps == 0 or step == c.num_steps:
      left = (time.time() - start) / step * (c.num_steps - step)
      shown = " ".join(f"{k} {float(v):.3f}" for k, v in losses.items())
      print(f"step {step}/{c.num_steps}  {shown}  {left / 60:.1f} min left", file=sys.stderr, flush=True)
    if step % c.save_every_steps == 0:
      write(out, names, params, {"source": "phpjax.pretrain, unfinished", "step": step})
  params = unit_tokens(encoders, params, device_batch(make_batch(c.num_steps, c, sizes)))
  result = test(encoders, params, c, sizes, device_batch)
  metadata = {
    "source": "phpjax.pretrain",
    "config": c.to_dict(),
    "test": result,
    "minutes": round((time.time() - start) / 60, 1),
    "licence": "trained on public-domain pictures and CC0 sounds",
  }
  write(out, names, params, metadata)
  return result


def rescale_stream(params: dict[str, Any], factor: float) -> dict[str, Any]:
  """Multiplies a pre-norm tower's residual stream by `factor`: tokens change, pooled features do not (but for the norms' eps).

  Everything that writes into the stream is scaled; all that reads it stands behind a layer norm, which undoes the factor.
  """
  first = ("ln_pre",) if "ln_pre" in params else tuple(k for k in params if k.endswith("_embedding"))
  writes = lambda path: path[0] in first or path[1:2] == ("fc_2",) or path[1:3] == ("attn", "out")
  flat = traverse_util.flatten_dict(params)
  return traverse_util.unflatten_dict({path: x * factor if writes(path) else x for path, x in flat.items()})


def unit_tokens(encoders: dict[str, Any], params: dict[str, Any], batch: dict[str, jax.Array]) -> dict[str, Any]:
  """Both towers with last-layer tokens of RMS 1 on this batch.

  Training leaves them at 7 to 10, and the published heads read raw tokens: most would stand where a tanh is flat.
  """
  for m in ("visual", "audio"):
    tokens = jax.jit(encoders[m].apply)({"params": params[m]}, batch[m]).tokens
    params = {**params, m: rescale_stream(params[m], 1 / float(jnp.sqrt(jnp.mean(tokens**2))))}
  return params


def write(out: pathlib.Path, names: dict[str, str], params: Any, metadata: dict[str, Any]) -> None:
  """A folder per encoder, weights in half precision (the package has to stay small)."""
  for m, name in names.items():
    pretrained.write(out / name, name, params[m], metadata, np.float16)


def test(
  encoders: dict[str, Any], params: Any, c: ConfigDict, sizes: tuple[int, int, int], device_batch: Any
) -> dict[str, float]:
  """Scores on `num_test_scenes` scenes of other seeds."""
  encode_fn, parts, c = (
    jax.jit(functools.partial(encode, encoders)),
    [],
    ConfigDict(c.to_dict() | {"num_captions": c.batch_size}),
  )
  for step in range(1, -(-c.num_test_scenes // c.batch_size) + 1):
    batch = make_batch(-step, c, sizes)
    parts.append((batch, jax.device_get(encode_fn(params, device_batch(batch)))))
  num = parts[0][0]["visible"].shape[1] + 1
  batch = {k: np.concatenate([b[k] for b, _ in parts]) for k in ("visible", "audible", "patch")}
  features = {k: np.concatenate([f[k] for _, f in parts]) for k in ("visual", "audio", "patches")}
  captions = np.stack([f["text"][2 * num :].reshape(2, -1, f["text"].shape[-1]) for _, f in parts], axis=1)
  captions = captions.reshape(-1, captions.shape[-1])
  features["text"] = np.concatenate([parts[0][1]["text"][: 2 * num], captions])
  return scores(features, batch)


_CONFIG = config_flags.DEFINE_config_file("config", "configs/nano.py", "What to train.", lock_config=True)
_OUT = flags.DEFINE_string("out", "runs/nano", "Folder for the encoder folders.")


def main(argv: list[str]) -> None:
  """Command line."""
  del argv
  result = pretrain(cli.open_config(_CONFIG), pathlib.Path(_OUT.value).expanduser())
  for name, value in result.items():
    print(f"{name:28s} {value:.3f}")


if __name__ == "__main__":
  sys.exit(cli.guarded(lambda: main(cli.parse_flags(sys.argv, __doc__))))
