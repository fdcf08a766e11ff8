"""The whole of PHP's released network on golden files: its weights and inputs by the files' own rules, our trees from them.

The weights are not stored but drawn again from their names, as the README of the golden files says.
"""

import dataclasses
import functools
import json
import zlib
from typing import Any

import jax
import numpy as np
import php_names
import small
from flax import traverse_util
from test_golden_encoders import FOLDER, golden

from phpjax import model
from phpjax.benchmarks import BENCHMARKS
from phpjax.encoders import audio_frontend, make_encoder, names
from phpjax.encoders.htsat import HTSAT
from phpjax.encoders.vit import CLIPVision
from phpjax.methods import PHP, Backbone, Sizes
from phpjax.tasks import Widths

Tree = dict[str, Any]
OURS = {"AVE": "ave", "LLP": "avvp", "AVQA": "avqa", "AVS": "avs"}
QUIET = {"audio_noise": False, "train_mode_at_test": False, "mixup": False}  # the files hold evaluation mode
FROZEN = ("ViT.", "htsat.", "text_encoder.", "token_embedding.", "clap_text_encoder.", "audio_projection.")
SMALL = {"gate", "gate_av", "gate_tk"}
TABLES = {"maben", "my_tokens", "positional_embedding", "class_embedding", "ctx", "prompt", "prompt_key"} | {
  "relative_position_bias_table", "tl_vectors", "pos_embedding", "cls_token"
}  # fmt: skip


def normal(shape: Any, seed: int, scale: float = 1.0, mean: float = 0.0) -> np.ndarray:
  return (np.random.RandomState(seed).standard_normal(tuple(shape)) * scale + mean).astype(np.float32)


def distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
  """(scale, mean) of a weight of the golden files."""
  leaf = name.rpartition(".")[-1]
  if leaf in SMALL:
    return 0.1, 0.5
  if leaf in ("running_mean", "running_var"):
    return {
      ("running_mean", True): (3.0, -25.0),
      ("running_mean", False): (0.1, 0.0),
      ("running_var", True): (20.0, 300.0),
      ("running_var", False): (0.05, 1.0),
    }[leaf, "bn0" in name]
  if leaf in TABLES or "embedding" in name:
    return 0.3, 0.0
  if leaf in ("proj", "text_projection") and len(shape) == 2:  # stored [in, out]
    return shape[0] ** -0.5, 0.0
  if len(shape) >= 2:
    return float(np.prod(shape[1:])) ** -0.5, 0.0
  return (0.05, 0.0) if "bias" in leaf else (0.1, 1.0)


@functools.cache
def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A weight by its name; tasks share those of equal names."""
  return normal(shape, zlib.crc32(f"e2e/{name}".encode()) & 0x7FFFFFFF, *distribution(name, shape))


def inputs(task: str, batch_size: int) -> Tree:
  """Standardised pictures float32 [B, T, H, W, 3], one wave per second float32 [B, T, 32000], labels."""
  seconds = 5 if task == "AVS" else 10
  rng = np.random.RandomState(1003)
  labels: Tree = {}
  if task == "AVE":
    labels["label"] = rng.randint(0, 29, (batch_size, 10)).astype(np.int32)
  elif task == "LLP":
    labels["label"] = (rng.rand(batch_size, 25) < 0.1).astype(np.float32)
    labels["label"][:, 3] = 1
  elif task == "AVQA":
    labels["question"] = rng.randint(0, 93, (batch_size, 14)).astype(np.int32)[:, None]
    labels["label"] = rng.randint(0, 42, (batch_size,)).astype(np.int32)[:, None]
    labels["question_mask"] = np.ones((batch_size, 1), np.float32)
  else:
    first = (rng.rand(batch_size, 1, 1, 224, 224) < 0.3).astype(np.float32)[:, :, 0]
    labels["label"] = np.concatenate([first, np.zeros((batch_size, seconds - 1, 224, 224), np.float32)], axis=1)
    labels["label_mask"] = np.eye(seconds, dtype=np.float32)[:1].repeat(batch_size, axis=0)
  return {
    "visual": normal((batch_size, seconds, 3, 224, 224), 1001).transpose(0, 1, 3, 4, 2),
    "audio": normal((batch_size, seconds, 32000), 1002, 0.1),
    "mask": np.ones(batch_size, np.float32),
    **labels,
  }


class Standardised(CLIPVision):
  """Takes the files' pictures, which are standardised already."""

  def stem(self, pixels: jax.Array) -> Any:
    return self.embed_pixels(pixels)


class Recording(PHP):
  """PHP that keeps what the files hold of its way through the encoders."""

  def adapt(self, context: Tree, site: str, step: int, streams: Tree) -> Tree:
    after = super().adapt(context, site, step, streams)
    if site == "embed":
      return after
    seen, (x, y), (x_, y_) = context.setdefault("seen", {}), *([s["visual"], s["audio"]] for s in (streams, after))
    shallow = step in self.shallow
    if site == "input":
      seen[f"x_before_attn_{step:02d}"], seen[f"y_before_block_{step:02d}"] = x_.tokens, y_.tokens
    elif site == "attention":
      seen[f"y_after_block_{step:02d}"], seen[f"x_before_mlp_{step:02d}"] = y.tokens, x_.tokens
      if shallow:
        seen[f"vis_adapter_blocks_p1_{step}"] = x_.tokens - x.tokens
        seen[f"audio_adapter_blocks_p1_{step}"] = y_.aside - y.tokens
    elif site == "mlp" and shallow:
      seen[f"vis_adapter_blocks_p2_{step}"] = x_.tokens - x.tokens
    return after


@dataclasses.dataclass
class Network:
  """One task's network of the release, as ours.

  Attributes:
    weights: {torch name: array} of what learns.
    batch: the inputs of the file.
    frozen, trainable, state, constants: as a training step takes them.
  """

  config: Tree
  arrays: Tree
  weights: Tree
  modules: Tree
  method: PHP
  task: Any
  batch: Tree
  frozen: Tree
  trainable: Tree
  state: Tree
  constants: Tree

  @property
  def inputs(self) -> tuple[Tree, ...]:
    """What `loss` takes."""
    return self.trainable, self.frozen, self.state, self.constants, self.batch

  def loss(self, trainable: Tree, frozen: Tree, state: Tree, constants: Tree, batch: Tree) -> tuple[jax.Array, Tree]:
    """Evaluation mode -> (loss as in training, {"outputs", "features", "seen", "prefixes", "added"})."""
    # As the release at batch 2: one choice of deep prompts for the batch. Nothing else asks for `train` here.
    features, context, state = model.forward(
      self.modules, self.method, self.task, trainable, frozen, state, None, batch, rng=None, train=True
    )
    classes = self.method.class_features(self.modules, trainable, frozen, constants)
    outputs, _ = self.method.predict(
      self.task, trainable, frozen, state["task"]["head"], features, context, classes, batch, rng=None, train=False
    )
    own = self.method.task_weight(self.task) * self.task.loss(outputs, batch)
    others = self.method.losses(self.task, context, features, outputs, batch)
    kept = {name: context[name] for name in ("seen", "prefixes", "added")}
    return own + sum(others.values()), {"outputs": outputs, "features": features, **kept}


def encoders_of(weights: Tree, config: Tree) -> tuple[Tree, Tree]:
  """-> ({modality: module}, {modality: params}) from the release's names."""
  made = make_encoder("clip_vit_b32")
  fields = [f.name for f in dataclasses.fields(made) if f.name not in ("parent", "name")]
  visual = Standardised(**{field: getattr(made, field) for field in fields})
  modules = {"visual": visual, "audio": make_encoder("htsat_tiny")}
  prefixes = {"ViT.": "visual.", "text_encoder.": "", "htsat.": "audio_branch.", "clap_text_encoder.": ""}
  renamed = dict(weights)
  for theirs, ours in prefixes.items():
    renamed |= {ours + name.removeprefix(theirs): x for name, x in weights.items() if name.startswith(theirs)}
  audio: HTSAT = modules["audio"]
  bank = audio_frontend.slaney_mel_bank(64, 1024, 32_000, 50.0, 14_000.0)  # the constructor's own
  renamed |= {"logit_scale": np.float32(config["logit_scale"]), "logit_scale_a": np.float32(config["logit_scale_a"])}
  renamed |= {"audio_branch.logmel_extractor.melW": bank, "logit_scale_t": np.float32(0)}
  rules = {"visual": names.clip_vision_openai(visual), "audio": names.htsat_laion(audio)}
  if "token_embedding.weight" in weights:
    modules["text"] = make_encoder("clip_text_b32")
    rules["text"] = names.clip_text_openai(modules["text"])
  if "text_branch.pooler.dense.weight" in renamed:
    modules["audio_text"] = make_encoder("roberta_base")
    rules["audio_text"] = names.clap_text_laion(modules["audio_text"])
  flat = {m: {ours: op(renamed[theirs]) for ours, theirs, op in rows} for m, rows in rules.items()}
  return modules, {m: traverse_util.unflatten_dict(tree, sep="/") for m, tree in flat.items()}


def open_network(name: str) -> Network:
  """The network of a golden file."""
  config, arrays = golden(name)
  shapes = json.loads((FOLDER / config["param_shapes_file"]).read_text())
  weights = {n: drawn(n, tuple(s)) for n, s in shapes.items() if not constant(n)}
  modules, params = encoders_of(weights, config)
  text = modules.get("text", make_encoder("clip_text_b32"))  # AVQA's network has none
  sizes = {m: Sizes.of(module) for m, module in {**modules, "text": text}.items()}
  method = Recording(Backbone(**sizes), **{**small.RELEASED, **QUIET})
  task = task_of(config["task"], modules)
  constants = {}
  if task.kind == "event":
    ids = arrays["in/clip_tokens"]
    words = jax.jit(modules["audio_text"].apply)({"params": params["audio_text"]}, arrays["in/roberta_ids"])
    constants = {"class_ids": ids[:, : ids.argmax(-1).max() + 1], "audio_text": words.pooled}
  params.pop("audio_text", None)
  learned = {name: x for name, x in weights.items() if not name.startswith(FROZEN)}
  uses = method.uses(task)
  tree = trees(learned, config["task"])
  frozen = {"encoders": params, "shared": {k: v for k, v in tree["shared"].items() if k not in uses}}
  trainable = {**tree, "shared": {k: v for k, v in tree["shared"].items() if k in uses}}
  head_state = php_names.avs_head(learned)[1] if task.kind == "segmentation" else {}
  keys = php_names.deep(learned)["keys"]
  state = {"shared": {}, "task": {"head": head_state, "method": {"deep_keys": keys}}}
  batch = inputs(config["task"], config["B"])
  return Network(config, arrays, learned, modules, method, task, batch, frozen, trainable, state, constants)


def trees(weights: Tree, task: str) -> Tree:
  """{"shared", "task": {"prompts", "head"}} from the release's names, without what is dead in it."""
  adapters = {
    f"step_{step}_{site}": {
      m: php_names.adapter(weights, f"{theirs}_adapter_blocks_{part}.{step}.")
      for m, theirs in (("visual", "vis"), ("audio", "audio"))
      if site == "attention" or m == "visual"
    }
    for step in range(2)
    for site, part in (("attention", "p1"), ("mlp", "p2"))
  }
  shared = {
    "adapters": adapters,
    "clip_adapter": php_names.clip_adapter(weights),
    "clip_adapter_text": php_names.clip_adapter(weights, "clip_adapter_text."),
    "contrastive": php_names.contrastive(weights),
  }
  if "prompt_learner.ctx" in weights:
    shared["context"] = php_names.context(weights)
  heads = {"AVQA": php_names.avqa_head, "AVS": lambda w: php_names.avs_head(w)[0]}
  deep = {f"step_{5 + i}": x for i, x in enumerate(php_names.deep(weights)["prompt"])}
  prompts = {"mid": php_names.middle(weights), "deep": {"visual": deep}}
  return {"shared": shared, "task": {"prompts": prompts, "head": heads.get(task, lambda w: {})(weights)}}


def constant(name: str) -> bool:
  """Whether the reference computes a tensor itself."""
  return "spectrogram_extractor" in name or "logmel_extractor" in name or name == "logit_scale"


def task_of(name: str, modules: Tree) -> Any:
  """Our task of the files' sizes."""
  visual, audio = modules["visual"], modules["audio"]
  widths = Widths(visual.width, audio.width, visual.embed_dim, visual.num_tokens - 1, 1, 0)
  count = {"AVE": 29, "LLP": 25, "AVQA": 42, "AVS": 1}[name]
  seconds = 5 if name == "AVS" else 10
  extra = {"LLP": {"protocol": "released"}, "AVQA": {"num_words": 93}, "AVS": {"image_size": 224}}.get(name, {})
  classes = tuple(f"class {i}" for i in range(count))
  return BENCHMARKS[OURS[name]].task(widths, seconds, count, name=OURS[name], classes=classes, **extra)
