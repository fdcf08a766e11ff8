"""APER, first called ADAM: prompts of the first task, then statistics of classes (Zhou et al., IJCV 2024, arXiv 2303.07338)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from phpjax.methods.base import TrainingClips, Tree
from phpjax.methods.prompts import broadcast_prefix, check_text, num_steps, option_problems, width_at
from phpjax.methods.slda import SLDA


@dataclasses.dataclass(frozen=True)
class APER(SLDA):
  """APER: adapts by deep prompts on the first task alone, and merges what they give with the frozen features; then `slda`.

  The paper's: gradient steps on the first task only, with a linear head that no answer reads once the task is learned, then
  frozen for good; the adapted features beside those of the frozen model; classes told apart by their statistics; VPT-Deep
  (Jia et al., ECCV 2022, arXiv 2203.12119) as one of its ways to adapt. RanPAC's (McDonnell et al., NeurIPS 2023, arXiv
  2307.02251): second moments of all tasks in the place of the paper's nearest mean by cosine. Ours: linear discriminants as in
  `slda` (RanPAC has ridge regression on random projections), two towers, and prompts as keys and values of every step, through
  its layer norm and projections: what VPT-Deep's tokens are to all others, for what becomes of them is thrown away.

  No clip is kept, and nothing of an old task changes but the covariance, as in `slda`. Until the first task is learned, as for
  the choice of its epoch, its linear head answers.

  Parameters, all shared, over the modalities with widths D_s in step s: length times the sum of D_s over all steps.

  Raises ValueError for a length below 1 and what `slda` refuses.

  Attributes:
    length: prompts of a step.
    merge: lay the frozen pooled features beside the prompted ones; if not, the prompted ones stand alone.
  """

  learns: ClassVar[bool] = True
  first_task_only: ClassVar[bool] = True
  routed: ClassVar[bool] = False
  routed_head: ClassVar[bool] = False
  length: int = 10
  merge: bool = True

  def __post_init__(self) -> None:
    super().__post_init__()
    if problems := [*option_problems(self, ("length",))]:
      raise ValueError("method aper " + "; ".join(problems))

  @property
  def needs_query(self) -> bool:
    """Only what is merged is asked for."""
    return self.merge

  @property
  def width(self) -> int:
    """As of `slda`, and with `merge` the frozen pooled features."""
    return super().width + self.merge * sum(getattr(self.backbone, m).embed_dim for m in self.modalities)

  def init_shared(self, rng: jax.Array) -> Tree:
    """{modality: {step: [P, D]}}, uniform as in `copl`: VPT's range where patches have as many numbers as a token."""
    shared: Tree = {m: {} for m in self.modalities}
    for i, m in enumerate(self.modalities):
      for step in range(num_steps(self.backbone)):
        key, width = jax.random.fold_in(rng, 1000 * i + step), width_at(self.backbone, m, step)
        drawn = jax.random.uniform(key, (self.length, width), minval=-1, maxval=1)
        shared[m][f"step_{step}"] = drawn * (3 / width) ** 0.5
    return shared

  def uses(self, task: Any) -> tuple[str, ...]:
    """All prompts."""
    del task
    return self.modalities

  def init_head(self, rng: jax.Array, task: Any) -> Tree:
    """The one that the prompts learn with."""
    return task.init_head(rng)

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
    """The same prompts for every second; beside them the frozen features."""
    del task, frozen, past, mask, rng, train
    check_text(self.backbone, streams)
    prefixes: dict[str, Tree] = {}
    for m, prompts in ((m, prompts) for m, prompts in trainable["shared"].items() if m in streams):
      for step, prompt in prompts.items():
        prefixes.setdefault(step, {})[m] = broadcast_prefix((prompt, prompt), len(streams[m].tokens), "input")
    return {"all_tasks": state["shared"], "frozen": query, "prefixes": prefixes}

  def prefix(self, context: Tree, step: int) -> Tree:
    """The prompts of this step."""
    return context["prefixes"].get(f"step_{step}", {})

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
    """By the statistics; by the head in training, and as long as there are no statistics."""
    head = trainable["task"]["head"]
    by_head = lambda: task.predict(head, task.init_state(), features, batch, rng=rng, train=train)[0]
    if train:
      return by_head(), state
    inputs = (task, trainable, frozen, state, {**features, "frozen": context["frozen"]}, context, classes, batch)
    outputs, _ = super().predict(*inputs, rng=rng, train=train)
    if head:
      outputs = jax.tree.map(functools.partial(jnp.where, context["all_tasks"]["count"] > 0), outputs, by_head())
    return outputs, state

  def parts(self, features: Tree) -> Iterator[jax.Array]:
    """What is laid side by side of every second: prompted features, then the frozen ones."""
    yield from super().parts(features)
    if self.merge:
      yield from (features["frozen"][m].pooled for m in self.modalities)

  def features_of(self, clips: TrainingClips) -> Iterator[tuple[Tree, Tree]]:
    """The prompted features, and under "frozen" those of the same clips without prompts."""
    if not self.merge:
      yield from clips.features(True)
      return
    for (prompted, batch), (frozen, _) in zip(clips.features(True), clips.features(False), strict=True):
      yield {**prompted, "frozen": frozen}, batch
