"""EWC: elastic weight consolidation (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796), on PHP's modules as one shared set."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phpjax.methods.base import TrainingClips, Tree
from phpjax.methods.finetune import FineTune


@dataclasses.dataclass(frozen=True)
class EWC(FineTune):
  """Fine-tuning whose shared parameters are pulled back to where earlier tasks left them, each by its Fisher information.

  While task n learns, the loss is that of `finetune` and (eq. 3, one term per earlier task)

    ewc_weight / 2 * sum over tasks k < n, parameters i of F_k,i (theta_i - theta_k,i)^2,

  F_k the mean over the training clips of task k of the squared gradient of its own loss at its end (the diagonal of the
  empirical Fisher information: the labels are those of the data, the loss that of one clip, without `class_weight`), theta_k
  the parameters at its end. What a task does not use has F = 0 for it; what the current task does not use does not move and is
  left out. Heads are each task's own and need no anchor.

  A sum of parabolas is one parabola, so what is kept does not grow with the tasks (Huszar, PNAS 2018, arXiv 1712.03847):
  "fisher" F = sum_k F_k and "anchor" a = sum_k F_k theta_k / F, like the shared parameters, and per top-level key of them the
  height of the vertex, "offset" = sum_k,i F_k,i (theta_k,i - a_i)^2, so that the penalty is exactly the sum above.

  Online (Schwarz et al., ICML 2018, arXiv 1805.06370, section 3.2): F = ewc_decay * F + F_n, the anchor is where the last task
  ended and the weight of the parabola ewc_decay * F; that paper's normalising of F is not done.

  Parameters: as many as `finetune` has, shared(php) + prompts of one task(php), and a head per task. State: 2 numbers per
  shared parameter and one per top-level key.

  Attributes:
    ewc_weight: lambda.
    ewc_online: keep one decaying parabola around the last anchor.
    ewc_decay: gamma of the online form.
  """

  ewc_weight: float = 400.0
  ewc_online: bool = False
  ewc_decay: float = 0.95

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.ewc_weight < 0:
      raise ValueError(f"method ewc: ewc_weight={self.ewc_weight} must be at least 0")
    if not 0 < self.ewc_decay <= 1:
      raise ValueError(f"method ewc: ewc_decay={self.ewc_decay} must be above 0 and at most 1")

  def init_state(self, shared: Tree) -> Tree:
    """Nothing to hold on to yet: {"fisher", "anchor": like `shared`, "offset": {key: scalar}}, all zero."""
    zeros = lambda: jax.tree.map(jnp.zeros_like, shared)
    return {"fisher": zeros(), "anchor": zeros(), "offset": {key: jnp.zeros(()) for key in shared}}

  def start(
    self, task: Any, trainable: Tree, frozen: Tree, state: Tree, past: Tree | None, streams: Tree, **options: Any
  ) -> Tree:
    """As `finetune`; in training also how far the parameters have moved."""
    context = super().start(task, trainable, frozen, state, past, streams, **options)
    return {**context, "strain": self.strain(state["shared"], trainable["shared"])} if options["train"] else context

  def strain(self, state: Tree, shared: Tree) -> jax.Array:
    """Sum over earlier tasks and the parameters in `shared` of F (theta - anchor)^2, a scalar."""
    total = jnp.zeros(())
    for key, tree in shared.items():
      squares = jax.tree.map(lambda f, x, a: jnp.sum(f * (x - a) ** 2), state["fisher"][key], tree, state["anchor"][key])
      total += sum(jax.tree.leaves(squares)) + state["offset"][key]
    return total * self.ewc_decay if self.ewc_online else total

  def losses(self, task: Any, context: Tree, features: Tree, outputs: Tree, batch: Tree) -> Tree:
    """Those of `finetune`, and the penalty."""
    return {**super().losses(task, context, features, outputs, batch), "ewc": self.ewc_weight / 2 * context["strain"]}

  def end_task(self, params: Tree, state: Tree, task: Any, clips: TrainingClips) -> tuple[Tree, Tree]:
    """Adds the parabola of the task to those of the tasks before it."""
    del task
    return params, {**state, "shared": self.consolidate(state["shared"], params["shared"], clips.squared_gradients())}

  def consolidate(self, state: Tree, shared: Tree, fisher: Tree) -> Tree:
    """The state with one more task, on the host.

    Args:
      state: as `init_state` has it.
      shared: the parameters at the end of the task.
      fisher: {key: tree}, of the keys that the task uses.
    """
    old, now = jax.device_get((state, shared))
    added: Tree = {"fisher": {}, "anchor": {}, "offset": {}}
    for key, tree in now.items():
      leaves, structure = jax.tree.flatten(tree)
      parts = [jax.tree.leaves(old[name][key]) for name in ("fisher", "anchor")]
      news = jax.tree.leaves(fisher[key]) if key in fisher else [np.zeros_like(x) for x in leaves]
      found = [self._add(*numbers) for numbers in zip(*parts, news, leaves, strict=True)]
      added["fisher"][key], added["anchor"][key] = (jax.tree.unflatten(structure, [x[i] for x in found]) for i in (0, 1))
      added["offset"][key] = np.float32(old["offset"][key] + sum(x[2] for x in found))
    return added

  def _add(
    self, fisher: np.ndarray, anchor: np.ndarray, new: np.ndarray, end: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, float]:
    """The parabola of one leaf and that of a task -> (F, anchor, by how much the vertex rises)."""
    if self.ewc_online:
      return self.ewc_decay * fisher + new, np.array(end), 0.0
    total = fisher + new
    share = np.divide(new, total, out=np.zeros_like(total), where=total > 0)
    return total, anchor + share * (end - anchor), float(np.sum(fisher * share * (end - anchor) ** 2, dtype=np.float64))
