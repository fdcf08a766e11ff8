"""What a continual method may change. The base class changes nothing: it is the linear-probe baseline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax

Tree = dict[str, Any]
MODALITIES = ("visual", "audio", "text")


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What a method needs to know of one encoder: plain numbers, so that nothing is hard-coded.

  Attributes:
    layer_widths, layer_tokens: channels and number of the tokens that each layer reads.
    embed_dim: of the pooled features.
    joint: these can be compared with another modality's and carry a temperature.
    noisy: an audio encoder that can be run in training mode (see `Method.stem`).
    num_special: tokens that are not of a patch; with none, pooled features are made of the mean of all tokens.
  """

  layer_widths: tuple[int, ...]
  layer_tokens: tuple[int, ...]
  num_heads: int
  embed_dim: int
  joint: bool = True
  noisy: bool = False
  num_special: int = 0

  @classmethod
  def of(cls, module: Any) -> Sizes:
    """The sizes of an encoder."""
    widths = tuple(module.layer_width(i) for i in range(module.depth))
    tokens = tuple(module.layer_tokens(i) for i in range(module.depth))
    noisy, special = hasattr(module, "embed_normalised"), getattr(module, "num_special", 0)
    return cls(widths, tokens, module.num_heads, module.embed_dim, module.joint, noisy, special)

  @property
  def depth(self) -> int:
    """Layers."""
    return len(self.layer_widths)

  @property
  def width(self) -> int:
    """Channels of the first layer; of all layers if `uniform`."""
    return self.layer_widths[0]

  @property
  def num_tokens(self) -> int:
    """Tokens of the first layer; of all layers if `uniform`."""
    return self.layer_tokens[0]

  @property
  def uniform(self) -> bool:
    """Whether all layers are alike (those of HTS-AT change from stage to stage)."""
    return len(set(zip(self.layer_widths, self.layer_tokens, strict=True))) == 1


@dataclasses.dataclass(frozen=True)
class Backbone:
  """The encoders' sizes, one field per modality (None: not configured).

  Attributes:
    audio_text: the text tower whose space the audio encoder shares, where that is not `text` (CLAP's beside CLIP's).
  """

  visual: Sizes | None = None
  audio: Sizes | None = None
  text: Sizes | None = None
  audio_text: Sizes | None = None

  def present(self) -> tuple[str, ...]:
    """The configured modalities, in the order visual, audio, text."""
    return tuple(m for m in MODALITIES if getattr(self, m) is not None)


@dataclasses.dataclass(frozen=True)
class TrainingClips:
  """What `Method.end_task` may ask about the training clips of the task that has just been learned; evaluation mode.

  Every call runs over all of them once. Every process gets the same, and all of them must ask alike.

  Attributes:
    features: `features(prompted)` -> ({modality: Features}, batch) of one batch after another.
    squared_gradients: `squared_gradients()` -> {key of `uses`: tree} on the host: the mean over clips of the squared gradient
      of the task's own loss (without `task_weight`) on that clip alone, the diagonal of the empirical Fisher information.
  """

  features: Callable[[bool], Iterator[tuple[Tree, Tree]]]
  squared_gradients: Callable[[], Tree]


@dataclasses.dataclass(frozen=True)
class Method:
  """Linear probe: no prompts, a head per task; and the hooks that other methods override.

  Trees: `trainable = {"shared": ..., "task": {"prompts": ..., "head": ...}}` is what learns now;
  `frozen = {"encoders": ..., "shared": ...}` is what this task reads and must not change; with `needs_old`, that of a training
  step holds earlier tasks' heads too, as "old". Methods are hashable and hold no arrays, so they may be closed over by jit.

  Parameters without heads: 0 shared, 0 per task; a method that has some says how many by a formula.

  Attributes:
    backbone: sizes of the encoders.
    remat: keep only what stands between layers for the gradient and compute the rest again: less memory, more time.
    needs_query: run the unprompted encoders first and hand their features to `start`.
    start_reads: `start` looks at the streams. If not, and no other hook of the layers is overridden, the method is `frozen`: it
      may be handed features that are kept, and its `start` no streams.
    needs_past: hand the other tasks' prompts, stacked and masked, to `start`.
    needs_old: run the training clips through the `teacher` too, and hand to `distil` what it and the current parameters let
      earlier tasks' heads say of them.
    joint: learn all tasks at once instead of one after another (phpjax/joint.py).
    routed: where the task is not given at test, a clip gets the prompts of the task that it looks like; False: the method does
      not need to know (its prompts are those of all tasks, or chosen by the clip).
    routed_head: of a growing label set, the head of that task alone answers then; False: the heads of all tasks do.
    learns: takes gradient steps. If not, no epoch is trained: a task is done once `end_task` has returned.
    first_task_only: takes gradient steps on the first task of a run only, and only there has a head that learns.
    looks: where it takes no gradient steps, it looks at the training clips, in `end_task`; if not, no clip is looked at for
      routing either, so that it has no prompts of a task.
  """

  backbone: Backbone
  remat: bool = False
  needs_query: ClassVar[bool] = False
  start_reads: ClassVar[bool] = True
  needs_past: ClassVar[bool] = False
  needs_old: ClassVar[bool] = False
  joint: ClassVar[bool] = False
  routed: ClassVar[bool] = True
  routed_head: ClassVar[bool] = True
  learns: ClassVar[bool] = True
  first_task_only: ClassVar[bool] = False
  looks: ClassVar[bool] = True

  @property
  def frozen(self) -> bool:
    """Whether no hook sees or changes a stream: features are those of the frozen encoders, whoever computed them."""
    hooks = ("stem", *(("start",) if self.start_reads else ()), "observe", "prefix", "adapt")
    return all(getattr(type(self), hook) is getattr(Method, hook) for hook in hooks)

  def notes(self, tasks: Mapping[str, Any]) -> Iterator[str]:
    """What a run on these tasks, {name: Task} in learning order, has to say of the method once."""
    del tasks
    yield from ()

  @classmethod
  def refuses(cls, task: Any) -> str | None:
    """Why a task (a `Task` or its class) means nothing to this method, for people; None: it can be learned."""
    del task

  def templates(self) -> dict[str, str]:
    """{modality: class text with {} for the class} that `Task.constants` is to take instead of its own."""
    return {}

  def init_shared(self, rng: jax.Array) -> Tree:
    """Parameters that learn on every task."""
    del rng
    return {}

  def init_task(self, rng: jax.Array, task: Any, previous: Tree | None) -> Tree:
    """Prompts of one task; `previous` are those of the task before (None for the first)."""
    del rng, task, previous
    return {}

  def init_state(self, shared: Tree) -> Tree:
    """Shared state: what changes without a gradient; `shared` are the parameters of `init_shared`. Its structure stays."""
    del shared
    return {}

  def init_task_state(self, task: Any) -> Tree:
    """One task's state beside that of its head, `state["task"]["method"]` of `start`."""
    del task
    return {}

  def uses(self, task: Any) -> tuple[str, ...]:
    """Top-level keys of `shared` that this task reads; the others are frozen while it learns."""
    del task
    return ()

  def empty(self) -> Method:
    """The method that changes nothing, for query passes."""
    return Method(self.backbone, self.remat)

  def stem(self, modality: str, module: Any, inputs: jax.Array, **how: Any) -> Any:
    """Inputs of vision or audio, [B, T, ...] -> the first tokens of their encoder, seconds folded into the batch.

    `how` holds `task`, `mask`, `rng` and `train` as `start` has them.
    """
    del modality, how
    return module.stem(inputs.reshape(-1, *inputs.shape[2:]))

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
    """Once per forward, with the stems' streams: whatever `prefix` and `adapt` need later (the context).

    `mask` float32 [B] is 0 for clips that pad the batch, None if there is none.
    """
    del task, trainable, frozen, state, past, streams, query, mask, rng, train
    return {}

  def observe(self, context: Tree, step: int, streams: Tree) -> Tree:
    """The context, with what it takes from the tokens that the attention of this step is about to read; before `prefix`."""
    del step, streams
    return context

  def prefix(self, context: Tree, step: int) -> Tree:
    """{modality: Prefix} for the attention of this step."""
    del context, step
    return {}

  def adapt(self, context: Tree, site: str, step: int, streams: Tree) -> Tree:
    """Changes streams at a site: "embed", "stem", then per step "input", "attention", "mlp".

    At "embed" (text, before positions) `start` has not run yet: the context is {"trainable", "frozen"} there.
    """
    del context, site, step
    return streams

  def class_features(self, encoders: Tree, trainable: Tree, frozen: Tree, constants: Tree) -> Tree:
    """What depends on the classes and the parameters but not on the batch; once per step or evaluation."""
    del encoders, trainable, frozen, constants
    return {}

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
    """Features -> (outputs, state of the task); by default the task's own head."""
    del frozen, context, classes
    return task.predict(trainable["task"]["head"], state, features, batch, rng=rng, train=train)

  def init_head(self, rng: jax.Array, task: Any) -> Tree:
    """The head's parameters; a method that overrides `predict` may need another. Asked of tasks that take gradient steps."""
    return task.init_head(rng)

  def init_head_state(self, task: Any) -> Tree:
    """What of the head changes without a gradient, `state` of `predict`."""
    return task.init_state()

  def task_weight(self, task: Any) -> float:
    """Weight of the task's own loss."""
    del task
    return 1.0

  def losses(self, task: Any, context: Tree, features: Tree, outputs: Tree, batch: Tree) -> Tree:
    """Named, weighted losses beside the task's own."""
    del task, context, features, outputs, batch
    return {}

  def teacher(self, state: Tree) -> Tree:
    """The shared parameters of a teacher, out of the shared state (`needs_old`)."""
    raise NotImplementedError

  def distil(self, task: Any, student: Tree, teacher: Tree, batch: Tree) -> jax.Array:
    """Weighted loss between two outputs of an earlier task's head on the same clips, a scalar (`needs_old`)."""
    raise NotImplementedError

  def end_task(self, params: Tree, state: Tree, task: Any, clips: TrainingClips) -> tuple[Tree, Tree]:
    """After a task: consolidate (statistics, centroids); by default nothing.

    Args:
      params, state: the whole trees, of all tasks so far; those of earlier tasks are written already and must stay as they are.
        What is kept of an array beside it must be a copy: the next task's steps take both.
      task: the task that has just been learned.
      clips: its training clips.
    """
    del task, clips
    return params, state
