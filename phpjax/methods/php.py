"""PHP: progressive homeostatic and plastic prompts (Yin et al., ICCV 2025, arXiv 2507.21588).

Three phases inside two frozen encoders that run in lock step:
  shallow  task-shared adapters in which each modality reads the other (blocks 0, 1; after attention and after the MLP);
  middle   task-specific, modality-shared generators that turn the input into prompts (blocks 3, 4);
  deep     task-specific prompts, one set per modality (blocks 5 to 11).
Event tasks are scored against class texts: visual features against CLIP text with learnable context words, audio
features against the audio-text tower. Where the released code departs from the paper's intent, the default is the intent;
phpjax/compat.py lists the options that bring the release back.

An audio encoder of stages (HTS-AT) takes middle prompts as numbers added to its first channels, as released, and deep ones
as extra keys and values in every window; one whose layers are alike (AST) takes both as a prefix, as vision does.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from phpjax.methods.base import Tree
from phpjax.methods.class_texts import encode
from phpjax.methods.php_modules import (
  ClipAdapter,
  MiddlePrompts,
  ShallowAdapter,
  add_to_first_channels,
  contrast,
  lay_out_reshaped,
  pool_cells,
  select_by_key,
)
from phpjax.methods.php_noise import clip_keys, noisy_stem
from phpjax.methods.php_options import PAIR, PHPOptions
from phpjax.methods.prompts import Prefix, broadcast_prefix, l2_normalise, similarity


@dataclasses.dataclass(frozen=True)
class PHP(PHPOptions):
  """Progressive homeostatic and plastic prompt tuning.

  Parameters without heads, of step l with vision of N tokens and D channels and sound of n_l and d_l, and of features of size
  E_v and E_a in the space of their texts:
    A(N, D, n, d) = (n + 1) N + (d + 1) D + num_latents D + 1 + (D + 1) (2 D + 1) + 3 (D + 1) h + (h + 1) D + h + 1
                    + 2 D floor(D / reduction) / groups + 4 D + 1      h = floor(D / 2)
  shared
    adapters      sum over `shallow`, after attention and after the MLP, of A(N, D, n_l, d_l) + A(n_l, d_l, N, D); without
                  `gate_audio` 1 less for each of the audio side, without `write_back` none of these after the MLP
    context       num_context * width of the text encoder
    clip_adapter, clip_adapter_text   2 E_v floor(E_v / 4) each
    contrastive   E_a E_v + E_v
    maps          of each encoder that shares no space with text: its feature size * E + 1
  per task
    mid           codebook_size D + 2 (D + 1) D + |mid| (generator_depth (3 D D + 3 (D + 1) D + 4 D)
                  + (D + 1) num_mid_prompts codebook_size)
    deep          2 deep_pool deep_length sum over `deep` of D + d_l; without `deep_audio` of D
  """

  # -- modules -------------------------------------------------------------------------------------------------

  def adapter(self, modality: str) -> ShallowAdapter:
    """The shallow adapter of a modality."""
    gated = modality == "visual" or self.gate_audio
    return ShallowAdapter(self.num_latents, self.reduction, self.groups, self.alpha, self.beta, self.gamma, gated)

  def adapted(self, site: str) -> tuple[str, ...]:
    """The modalities that have an adapter at a site: nothing reads audio's second one unless it is written back."""
    return PAIR if self.write_back or site == "attention" else ("visual",)

  def generators(self) -> MiddlePrompts:
    """The middle phase of one task."""
    sizes = (len(self.mid), self.num_mid_prompts, self.codebook_size, self.generator_depth, self.backbone.visual.num_heads)
    return MiddlePrompts(*sizes, remat=self.remat)

  # -- parameters ----------------------------------------------------------------------------------------------

  def init_shared(self, rng: jax.Array) -> Tree:
    """Shallow adapters, class context, CLIP adapters and the audio map of the contrastive head."""
    embed = {m: self.text_of(m).embed_dim for m in PAIR}
    row = jnp.zeros((1, embed["visual"]))
    keys = iter(jax.random.split(rng, 64))
    adapters = self._init_adapters([next(keys) for _ in range(2 * len(PAIR) * len(self.shallow))]) if self.shallow else {}
    shared = {
      "context": 0.02 * jax.random.normal(next(keys), (self.num_context, self.backbone.text.width)),
      "clip_adapter": ClipAdapter().init(next(keys), row)["params"],
      "clip_adapter_text": ClipAdapter().init(next(keys), row)["params"],
      "contrastive": {"kernel": jnp.eye(embed["audio"], embed["visual"]), "bias": jnp.zeros(embed["visual"])},
    }
    if maps := {m: sizes for m in PAIR if not (sizes := getattr(self.backbone, m)).joint}:
      init, scale = nn.initializers.lecun_normal(), math.log(1 / 0.07)  # where CLIP's temperature started
      kernel = {m: init(next(keys), (sizes.embed_dim, embed[m])) for m, sizes in maps.items()}
      shared["maps"] = {m: {"kernel": x, "logit_scale": jnp.asarray(scale)} for m, x in kernel.items()}
    return {"adapters": adapters, **shared} if adapters else shared

  def _init_adapters(self, keys: list[jax.Array]) -> Tree:
    """An adapter per shallow step, site and modality; vectorised over sites of equal sizes, which compiles less code."""
    sites = [(step, site) for step in self.shallow for site in ("attention", "mlp")]
    adapters: Tree = {f"step_{step}_{site}": {} for step, site in sites}
    visual = self.backbone.visual
    for sizes in dict.fromkeys(self.audio_layer(step) for step in self.shallow):
      chosen = [i for i, (step, _) in enumerate(sites) if self.audio_layer(step) == sizes]
      stems = {"visual": jnp.zeros((1, visual.num_tokens, visual.width)), "audio": jnp.zeros((1, *sizes))}
      for k, m in enumerate(PAIR):
        init = lambda key, m=m, stems=stems: self.adapter(m).init(key, stems[m], stems[other(m)])["params"]
        stacked = jax.vmap(init)(jnp.stack([keys[len(PAIR) * i + k] for i in chosen]))
        for row, i in enumerate(chosen):
          if m in self.adapted(sites[i][1]):
            adapters["step_{}_{}".format(*sites[i])][m] = jax.tree.map(lambda x, row=row: x[row], stacked)
    return adapters

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
      deep = {m: self._init_deep(m, key) for m, key in zip(PAIR, keys, strict=True)}
      prompts["deep"] = deep if self.deep_audio else {"visual": deep["visual"]}
    return prompts

  def _init_deep(self, modality: str, rng: jax.Array) -> Tree:
    """{step: [2, P, D], keys and values} or, of a pool, [2, pool, P, D]."""
    pool = () if self.deep_select == "task" else (self.deep_pool,)
    width = lambda step: self.audio_layer(step)[1] if modality == "audio" else self.backbone.visual.width
    shapes = {step: (2, *pool, self.deep_length, width(step)) for step in self.deep}
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    numbers = jax.random.uniform(rng, (int(ends[-1]),), minval=-1, maxval=1)
    pieces = jnp.split(numbers, ends[:-1])
    return {f"step_{step}": x.reshape(shape) for (step, shape), x in zip(shapes.items(), pieces, strict=True)}

  def init_task_state(self, task: Any) -> Tree:
    """The pool's keys U(-1, 1), which nothing ever trains: the same for every task."""
    if self.deep_select == "task" or not self.deep:
      return {}
    shape = (self.deep_pool, self.backbone.visual.width)
    return {"deep_keys": jax.random.uniform(jax.random.key(0), shape, minval=-1, maxval=1)}

  def init_head(self, rng: jax.Array, task: Any) -> Tree:
    """Event tasks need only the task's calibration: their classifier is text."""
    return task.init_calibration() if task.kind == "event" else task.init_head(rng)

  def uses(self, task: Any) -> tuple[str, ...]:
    """The adapters always, the class-text parts for event tasks only."""
    adapters = ("adapters",) if self.shallow else ()
    maps = ("maps",) if any(not getattr(self.backbone, m).joint for m in PAIR) else ()
    words = ("context", "clip_adapter", "clip_adapter_text", "contrastive", *maps)
    return (*adapters, *words) if task.kind == "event" else adapters

  # -- inside the encoders -------------------------------------------------------------------------------------

  def stem(self, modality: str, module: Any, inputs: jax.Array, **how: Any) -> Any:
    """Audio in training mode or repeated as the release does, if the options say so; at test clip by clip."""
    task, train, (clips, seconds) = how["task"], how["train"], inputs.shape[:2]
    noise = self.audio_noise if train else self.train_mode_at_test
    mix = self.mixup and task.kind == "segmentation" and (train or self.train_mode_at_test)
    repeats = task.seconds if self.audio_repeats == "seconds" else None
    if modality != "audio" or not (noise or mix or repeats):
      return super().stem(modality, module, inputs, **how)
    wave, keys, mask = inputs.reshape(clips * seconds, -1), None, None
    if noise or mix:
      keys = how["rng"][None] if train else clip_keys(inputs)
      mask = None if how["mask"] is None or not train else jnp.repeat(how["mask"], seconds)
    return noisy_stem(module, wave, keys, noise=noise, mix=mix, repeats=repeats, mask=mask)

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
    mask: jax.Array | None,
    rng: jax.Array | None,
    train: bool,
  ) -> Tree:
    """Generates the middle prompts from the stems (before any norm) and lays out the deep ones."""
    del past, query, rng
    shared, prompts = {**frozen["shared"], **trainable["shared"]}, self.prompts(trainable)
    prefixes: dict[int, Tree] = {step: {} for step in (*self.mid, *self.deep)}
    added: dict[int, jax.Array] = {}
    for m in (m for m in PAIR if m in streams):
      if self.mid:
        tokens, staged = streams[m].tokens, not getattr(self.backbone, m).uniform
        tokens = pool_cells(tokens, self.backbone.visual.width) if staged else tokens
        class_token = frozen["encoders"]["visual"]["class_embedding"]  # for audio too (quirk 9)
        generated = self.generators().apply({"params": prompts["mid"]}, tokens, class_token)
        for step, prefix in zip(self.mid, generated, strict=True):
          if staged:
            added[step] = jnp.stack([prefix.key, prefix.value], axis=1)
          else:
            prefixes[step][m] = prefix
    if self.deep:
      rows = len(next(iter(streams.values())).tokens)
      clips = len(mask) if mask is not None else rows // task.seconds
      chosen, real = self._choose(state, streams, clips, mask, train)
      for m in (m for m in prompts["deep"] if m in streams):
        for step in self.deep:
          prefixes[step][m] = self._lay_out(prompts["deep"][m][f"step_{step}"], chosen, rows, real)
    return {
      "prefixes": prefixes,
      "added": added,
      "adapters": shared.get("adapters", {}),
      "contrastive": shared["contrastive"],
      "maps": shared.get("maps", {}),
      "logit_scale": jnp.exp(self._logit_scale("visual", shared, frozen)) if task.kind == "event" else None,
    }

  def _choose(
    self, state: Tree, streams: Tree, clips: int, mask: jax.Array | None, train: bool
  ) -> tuple[jax.Array | None, jax.Array | int]:
    """-> (which set of a pool each group of rows takes, int32 [groups]; None without a pool), real rows of a group.

    The whole batch is a group in training, each clip is one at test, as in the release, which tests clip by clip.
    """
    rows = len(next(iter(streams.values())).tokens)
    groups = 1 if train else clips
    real = rows // groups if mask is None or not train else rows // clips * mask.sum().astype(jnp.int32)
    if self.deep_select == "task":
      return None, real
    if "visual" not in streams:  # nothing to ask with
      return jnp.zeros(groups, jnp.int32), real
    query = streams["visual"].tokens.mean(axis=1)
    votes = None if mask is None or not train else jnp.repeat(mask, rows // clips)
    return select_by_key(query, state["task"]["method"]["deep_keys"], groups, votes), real

  def _lay_out(self, prompt: jax.Array, chosen: jax.Array | None, rows: int, real: jax.Array | int) -> Prefix:
    """prompt [2, P, D] or, of a pool, [2, pool, P, D] -> keys and values for every row."""
    if self.deep_layout == "keys_values" and chosen is None:
      return broadcast_prefix(prompt, rows, "normed")
    sets = prompt[None] if chosen is None else prompt.swapaxes(0, 1)[chosen]  # [groups, 2, P, D]
    each = rows // len(sets)
    if self.deep_layout == "reshaped":
      key, value = jax.vmap(lambda x: lay_out_reshaped(x, real, each))(sets)  # [groups, rows / groups, P, D]
      return Prefix(key.reshape(rows, *key.shape[2:]), value.reshape(rows, *value.shape[2:]), "normed")
    return Prefix(*(jnp.repeat(sets[:, i], each, axis=0) for i in (0, 1)), "normed")

  def prompts(self, trainable: Tree) -> Tree:
    """Where the task-specific prompts live."""
    return trainable["task"]["prompts"]

  def prefix(self, context: Tree, step: int) -> Tree:
    """Middle or deep prompts of this step."""
    return context["prefixes"].get(step, {})

  def adapt(self, context: Tree, site: str, step: int, streams: Tree) -> Tree:
    """Middle prompts of staged audio; shallow adapters, which both read the un-adapted pair; no partner, no change."""
    if site == "input" and "audio" in streams and step in context["added"]:
      tokens = add_to_first_channels(streams["audio"].tokens, context["added"][step])
      return {**streams, "audio": streams["audio"].replace(tokens=tokens)}
    params = context["adapters"].get(f"step_{step}_{site}") if site in ("attention", "mlp") else None
    if params is None or any(m not in streams for m in PAIR):
      return streams
    visual, audio = streams["visual"], streams["audio"]
    pair = {"visual": visual.tokens, "audio": audio.tokens if audio.aside is None else audio.aside}
    residual = {m: self.adapter(m).apply({"params": params[m]}, pair[m], pair[other(m)]) for m in self.adapted(site)}
    visual = visual.replace(tokens=visual.tokens + residual["visual"])
    if self.write_back:
      audio = audio.replace(tokens=audio.tokens + residual["audio"])
    else:  # only the visual adapter behind the MLP hears of it (quirk 3)
      audio = audio.replace(aside=pair["audio"] + residual["audio"] if site == "attention" else None)
    return {**streams, "visual": visual, "audio": audio}

  # -- event tasks ---------------------------------------------------------------------------------------------

  def class_features(self, encoders: Tree, trainable: Tree, frozen: Tree, constants: Tree) -> Tree:
    """Class texts, the visual ones with the learnable context: {"visual": [C, E], "audio": [C, E]}, unit length."""
    if "class_ids" not in constants:
      return {}
    shared = {**frozen["shared"], **trainable["shared"]}
    text = encoders["text"].bind({"params": frozen["encoders"]["text"]})
    features = encode(text, constants["class_ids"], shared["context"])
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
      if self.train_mode_at_test and not train:
        return self._predict_noisy(task, trainable["task"]["head"], state, features, batch), state
      return super().predict(task, trainable, frozen, state, features, context, classes, batch, rng=rng, train=train)
    shared = {**frozen["shared"], **trainable["shared"]}
    visual = ClipAdapter().apply({"params": shared["clip_adapter"]}, self._embedding("visual", shared, features))
    audio = l2_normalise(self._embedding("audio", shared, features))
    scale = {m: self._logit_scale(m, shared, frozen) for m in PAIR}
    raw = self.audio_logit_scale == "raw"
    scale = {"visual": jnp.exp(scale["visual"]), "audio": scale["audio"] if raw else jnp.exp(scale["audio"])}
    logits = {
      "visual": similarity(2 * scale["visual"] * visual, classes["visual"]),
      "audio": similarity(2 * scale["audio"] * audio, classes["audio"]),
    }
    logits = {m: x.reshape(-1, task.seconds, x.shape[-1]) for m, x in logits.items()}
    return task.calibrate(trainable["task"]["head"], logits), state

  def _embedding(self, modality: str, shared: Tree, features: Tree) -> jax.Array:
    """Pooled features in the space of the class texts; an encoder that shares none with text learns a map (ours)."""
    pooled = features[modality].pooled
    return pooled if getattr(self.backbone, modality).joint else pooled @ shared["maps"][modality]["kernel"]

  def _logit_scale(self, modality: str, shared: Tree, frozen: Tree) -> jax.Array:
    """The logarithm of the temperature: the encoder's own, or the map's."""
    stored = frozen["encoders"][modality] if getattr(self.backbone, modality).joint else shared["maps"][modality]
    return stored["logit_scale"]

  def _predict_noisy(self, task: Any, head: Tree, state: Tree, features: Tree, batch: Tree) -> Tree:
    """A head in training mode, clip by clip: dropout, and batch norm by the statistics of the clip's own frames."""
    clips = len(batch["mask"])
    split = jax.tree.map(lambda x: x.reshape(clips, -1, *x.shape[1:]), features)
    own = jax.tree.map(lambda x: x[:, None], batch)  # batches of one clip
    one = lambda f, b, key: task.predict(head, state, f, b, rng=key, train=True)[0]
    return jax.tree.map(lambda x: x[:, 0], jax.vmap(one)(split, own, clip_keys(batch["audio"])))

  def task_weight(self, task: Any) -> float:
    """5 for event tasks, 1 for the others."""
    return self.class_weight if task.kind == "event" else 1.0

  def losses(self, task: Any, context: Tree, features: Tree, outputs: Tree, batch: Tree) -> Tree:
    """Audio-visual contrast between the clips of the batch (event tasks): 2 CE(audio to video) + 1.5 CE(video to audio)."""
    if task.kind != "event":
      return {}
    pooled = (self._embedding(m, context, features) for m in PAIR)
    visual, audio = (x.reshape(-1, task.seconds, x.shape[-1]) for x in pooled)
    head = context["contrastive"]
    logits = contrast(visual, audio, head["kernel"], head["bias"], context["logit_scale"])  # [B, B]
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
