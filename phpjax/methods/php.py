"""PHP: progressive homeostatic and plastic prompts (Yin et al., ICCV 2025, arXiv 2507.21588).

Three phases inside two frozen encoders that run in lock step:
  shallow  task-shared adapters in which each modality reads the other (blocks 0, 1; after attention and after the MLP);
  middle   task-specific, modality-shared generators that turn the input into prompts (blocks 3, 4);
  deep     task-specific prompts, one set per modality (blocks 5 to 11).
Event tasks are scored against class texts: visual features against CLIP text with learnable context words, audio
features against the audio-text tower. Where the released code departs from the paper's intent, this is the intent
(reference table of quirks: 1, 3, 4, 5, 6 and 22 repaired).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from phpjax.methods.base import Method, Tree
from phpjax.methods.php_modules import ClipAdapter, MiddlePrompts, ShallowAdapter
from phpjax.methods.prompts import broadcast_prefix, l2_normalise, similarity

PAIR = ("visual", "audio")
NUM_CONTEXT_WORDS = 4  # place holders of the visual class texts (phpjax/tasks/event.py)


@dataclasses.dataclass(frozen=True)
class PHP(Method):
  """Progressive homeostatic and plastic prompt tuning.

  Attributes:
    shallow, mid, deep: steps that carry adapters, generated prompts, deep prompts; empty switches a phase off.
    num_latents, reduction, groups, alpha, beta, gamma: of the shallow adapters.
    num_mid_prompts: prompts per middle layer, half of them keys, half values.
    codebook_size, generator_depth: of the prompt generators.
    deep_length: deep prompts per layer, each for keys and for values.
    num_context: learnable context words in front of a class name.
    audio_logit_scale: "released" multiplies audio scores by the stored scale as it is, "exp" by its exponential
      as CLAP itself does (quirk 12).
    warm_start: a task's prompts begin where the previous task's ended (quirk 8), else fresh.
    class_weight, audio_to_visual_weight, visual_to_audio_weight: loss weights of event tasks.
  """

  shallow: tuple[int, ...] = (0, 1)
  mid: tuple[int, ...] = (3, 4)
  deep: tuple[int, ...] = (5, 6, 7, 8, 9, 10, 11)
  num_latents: int = 32
  reduction: int = 8
  groups: int = 2
  alpha: float = 0.2
  beta: float = 0.05
  gamma: float = 0.01
  num_mid_prompts: int = 32
  codebook_size: int = 256
  generator_depth: int = 3
  deep_length: int = 10
  num_context: int = 4
  audio_logit_scale: str = "released"
  warm_start: bool = True
  class_weight: float = 5.0
  audio_to_visual_weight: float = 2.0
  visual_to_audio_weight: float = 1.5

  def __post_init__(self) -> None:
    problems = []
    if missing := [m for m in ("visual", "audio", "text") if m not in self.backbone.present()]:
      problems.append(f"needs encoders for {', '.join(missing)}")
    else:
      problems += self._phase_problems()
    if self.audio_logit_scale not in ("released", "exp"):
      problems.append(f"audio_logit_scale is released or exp, not {self.audio_logit_scale!r}")
    if not 1 <= self.num_context <= NUM_CONTEXT_WORDS:
      problems.append(f"num_context is 1 to {NUM_CONTEXT_WORDS} (place holders before a class name), not {self.num_context}")
    if self.num_mid_prompts % 2:
      problems.append(f"num_mid_prompts must be even, not {self.num_mid_prompts}")
    if problems:
      raise ValueError("method php " + "; ".join(problems))

  def _phase_problems(self) -> list[str]:
    """What is wrong with the phases for these encoders."""
    visual, audio, found = self.backbone.visual, self.backbone.audio, []
    encoders = {m: getattr(self.backbone, m) for m in ("visual", "audio", "text")}
    if alone := [m for m, sizes in encoders.items() if m != "text" and not sizes.joint]:
      found.append(f"compares features with class texts, but the encoder for {' and '.join(alone)} shares no space with text")
    elif len({sizes.embed_dim for sizes in encoders.values()}) > 1:
      shown = ", ".join(f"{m} {sizes.embed_dim}" for m, sizes in encoders.items())
      found.append(f"compares features of all encoders and needs embeddings of one size, got {shown}")
    if changing := [m for m, sizes in encoders.items() if not sizes.uniform]:
      found.append(f"does not run yet on an encoder whose layers differ in width, as that for {changing[0]} does")
    if self.mid and visual.width != audio.width:
      found.append(
        f"shares its middle generators between modalities and needs equal widths, got visual {visual.width} and audio "
        f"{audio.width}"
      )
    depth = min(visual.depth, audio.depth)  # a deeper encoder takes several layers per step
    outside = [layer for layer in (*self.shallow, *self.mid, *self.deep) if not 0 <= layer < depth]
    if outside:
      found.append(f"has a prompt in layer {max(outside)}, the encoders have {depth} layers")
    prompted = (*self.mid, *self.deep)
    if twice := sorted({layer for layer in prompted if prompted.count(layer) > 1}):
      found.append(f"has more than one prompt of mid and deep in layer {twice[0]}, a layer takes one")
    return found

  # -- modules -------------------------------------------------------------------------------------------------

  def adapter(self) -> ShallowAdapter:
    """The shallow adapter; gated for both modalities, or writing audio back would inject noise at step 0 (quirk 22)."""
    return ShallowAdapter(self.num_latents, self.reduction, self.groups, self.alpha, self.beta, self.gamma)

  def generators(self) -> MiddlePrompts:
    """The middle phase of one task."""
    return MiddlePrompts(
      len(self.mid), self.num_mid_prompts, self.codebook_size, self.generator_depth, self.backbone.visual.num_heads
    )

  # -- parameters ----------------------------------------------------------------------------------------------

  def init_shared(self, rng: jax.Array) -> Tree:
    """Shallow adapters, class context, CLIP adapters and the audio map of the contrastive head."""
    embed = self.backbone.visual.embed_dim
    row = jnp.zeros((1, embed))
    keys = iter(jax.random.split(rng, 64))
    adapters = self._init_adapters([next(keys) for _ in range(2 * len(PAIR) * len(self.shallow))]) if self.shallow else {}
    shared = {
      "context": 0.02 * jax.random.normal(next(keys), (self.num_context, self.backbone.text.width)),
      "clip_adapter": ClipAdapter().init(next(keys), row)["params"],
      "clip_adapter_text": ClipAdapter().init(next(keys), row)["params"],
      "contrastive": {"kernel": jnp.eye(embed), "bias": jnp.zeros(embed)},
    }
    return {"adapters": adapters, **shared} if adapters else shared

  def _init_adapters(self, keys: list[jax.Array]) -> Tree:
    """An adapter per shallow step, site and modality; vectorised over the first two, which compiles a quarter of the code."""
    sites = [f"step_{step}_{site}" for step in self.shallow for site in ("attention", "mlp")]
    stems = {m: jnp.zeros((1, getattr(self.backbone, m).num_tokens, getattr(self.backbone, m).width)) for m in PAIR}
    init = lambda key, m: self.adapter().init(key, stems[m], stems[other(m)])["params"]
    stacked = {m: jax.vmap(functools.partial(init, m=m))(jnp.stack(keys[i :: len(PAIR)])) for i, m in enumerate(PAIR)}
    return {site: jax.tree.map(lambda x, i=i: x[i], stacked) for i, site in enumerate(sites)}

  def init_task(self, rng: jax.Array, task: Any, previous: Tree | None) -> Tree:
    """Middle generators and deep prompts U(-1, 1); warm-started from the previous task unless switched off."""
    if previous is not None and self.warm_start:
      return jax.tree.map(jnp.copy, previous)
    prompts: Tree = {}
    key_mid, *keys = jax.random.split(rng, 3)
    if self.mid:
      width = self.backbone.visual.width
      prompts["mid"] = self.generators().init(key_mid, jnp.zeros((1, 2, width)), jnp.zeros(width))["params"]
    if self.deep:
      prompts["deep"] = {
        m: jax.random.uniform(key, (len(self.deep), 2, self.deep_length, getattr(self.backbone, m).width), minval=-1, maxval=1)
        for m, key in zip(PAIR, keys, strict=True)
      }
    return prompts

  def init_head(self, rng: jax.Array, task: Any) -> Tree:
    """Event tasks need only the task's calibration: their classifier is text."""
    return task.init_calibration() if task.kind == "event" else task.init_head(rng)

  def uses(self, task: Any) -> tuple[str, ...]:
    """The adapters always, the class-text parts for event tasks only."""
    adapters = ("adapters",) if self.shallow else ()
    return (*adapters, "context", "clip_adapter", "clip_adapter_text", "contrastive") if task.kind == "event" else adapters

  # -- inside the encoders -------------------------------------------------------------------------------------

  def start(
    self,
    task: Any,
    trainable: Tree,
    frozen: Tree,
    state: Tree,
    past: Tree | None,
    streams: Tree,
    *,
    query: Tree | None,
    rng: jax.Array | None,
    train: bool,
  ) -> Tree:
    """Generates the middle prompts from the stems (before any norm) and lays out the deep ones."""
    del task, state, past, query, rng, train
    shared, prompts = {**frozen["shared"], **trainable["shared"]}, self.prompts(trainable)
    prefixes: dict[int, Tree] = {step: {} for step in (*self.mid, *self.deep)}
    for m in (m for m in PAIR if m in streams):
      tokens = streams[m].tokens
      if self.mid:
        class_token = frozen["encoders"]["visual"]["class_embedding"]
        generated = self.generators().apply({"params": prompts["mid"]}, tokens, class_token)
        prefixes.update({step: {**prefixes[step], m: prefix} for step, prefix in zip(self.mid, generated, strict=True)})
      for slot, step in enumerate(self.deep):
        prefixes[step] = {**prefixes[step], m: broadcast_prefix(prompts["deep"][m][slot], tokens.shape[0], "normed")}
    scale = jnp.exp(frozen["encoders"]["visual"]["logit_scale"])
    return {
      "prefixes": prefixes,
      "adapters": shared.get("adapters", {}),
      "contrastive": shared["contrastive"],
      "logit_scale": scale,
    }

  def prompts(self, trainable: Tree) -> Tree:
    """Where the task-specific prompts live."""
    return trainable["task"]["prompts"]

  def prefix(self, context: Tree, step: int) -> Tree:
    """Middle or deep prompts of this step."""
    return context["prefixes"].get(step, {})

  def adapt(self, context: Tree, site: str, step: int, streams: Tree) -> Tree:
    """Shallow adapters: both modalities read the un-adapted pair; identity where a partner is absent."""
    if site not in ("attention", "mlp"):
      return streams
    params = context["adapters"].get(f"step_{step}_{site}")
    if params is None or any(m not in streams for m in PAIR):
      return streams
    residual = {m: self.adapter().apply({"params": params[m]}, streams[m].tokens, streams[other(m)].tokens) for m in PAIR}
    return {**streams, **{m: streams[m].replace(tokens=streams[m].tokens + residual[m]) for m in PAIR}}

  # -- event tasks ---------------------------------------------------------------------------------------------

  def class_features(self, encoders: Tree, trainable: Tree, frozen: Tree, constants: Tree) -> Tree:
    """Class texts, the visual ones with the learnable context: {"visual": [C, E], "audio": [C, E]}, unit length."""
    if "class_ids" not in constants:
      return {}
    shared = {**frozen["shared"], **trainable["shared"]}
    text = encoders["text"].bind({"params": frozen["encoders"]["text"]})
    stream = text.embed(constants["class_ids"])
    # the template's first words behind the start token are place holders for the learnable context
    words = shared["context"].astype(stream.tokens.dtype)
    stream = text.positions(stream.replace(tokens=stream.tokens.at[:, 1 : 1 + self.num_context].set(words)))
    features = text.pool(text.layers(stream)).pooled
    visual = ClipAdapter().apply({"params": shared["clip_adapter_text"]}, features)
    return {"visual": visual, "audio": l2_normalise(constants["audio_text"])}

  def predict(
    self,
    task: Any,
    trainable: Tree,
    frozen: Tree,
    state: Tree,
    features: Tree,
    context: Tree,
    classes: Tree,
    batch: Tree,
    *,
    rng: jax.Array | None,
    train: bool,
  ) -> tuple[Tree, Tree]:
    """Event tasks: similarity to the class texts per second and modality; other tasks: the task's own head."""
    if task.kind != "event":
      return super().predict(task, trainable, frozen, state, features, context, classes, batch, rng=rng, train=train)
    shared = {**frozen["shared"], **trainable["shared"]}
    visual = ClipAdapter().apply({"params": shared["clip_adapter"]}, features["visual"].pooled)
    audio = l2_normalise(features["audio"].pooled)
    scale = {m: frozen["encoders"][m]["logit_scale"] for m in PAIR}
    scale = {
      "visual": jnp.exp(scale["visual"]),
      "audio": jnp.exp(scale["audio"]) if self.audio_logit_scale == "exp" else scale["audio"],
    }
    logits = {
      "visual": similarity(2 * scale["visual"] * visual, classes["visual"]),
      "audio": similarity(2 * scale["audio"] * audio, classes["audio"]),
    }
    logits = {m: x.reshape(-1, task.seconds, x.shape[-1]) for m, x in logits.items()}
    return task.calibrate(trainable["task"]["head"], logits), state

  def task_weight(self, task: Any) -> float:
    """5 for event tasks, 1 for the others."""
    return self.class_weight if task.kind == "event" else 1.0

  def losses(self, task: Any, context: Tree, features: Tree, outputs: Tree, batch: Tree) -> Tree:
    """Audio-visual contrast between the clips of the batch (event tasks): 2 CE(audio to video) + 1.5 CE(video to audio)."""
    if task.kind != "event":
      return {}
    visual, audio = (features[m].pooled.reshape(-1, task.seconds, features[m].pooled.shape[-1]) for m in PAIR)
    head = context["contrastive"]
    audio = l2_normalise((audio @ head["kernel"] + head["bias"]).mean(axis=1))
    visual = l2_normalise(visual.mean(axis=1))
    logits = similarity(context["logit_scale"] * audio, visual)  # [B, B]
    real = batch["mask"]
    padding = jnp.where(real > 0, 0.0, -1e9)
    target = jnp.arange(logits.shape[0])
    mean = lambda x: jnp.sum(x * real) / jnp.maximum(real.sum(), 1)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return {
      "audio_to_visual": self.audio_to_visual_weight * mean(cross_entropy(logits + padding, target)),
      "visual_to_audio": self.visual_to_audio_weight * mean(cross_entropy(logits.T + padding, target)),
    }


def other(modality: str) -> str:
  """The partner of a modality."""
  return "audio" if modality == "visual" else "visual"
