"""The two jitted functions of a run: one training step, one prediction."""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.flatten_util
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from phpjax import backend, model, optimizer, sharding

Tree = dict[str, Any]


@flax.struct.dataclass
class Live:
  """What a training step changes.

  Attributes:
    trainable: {"shared", "task": {"prompts", "head"}}.
    opt_state: of the trainable leaves only.
    state: {"shared", "task": {"head", "method"}}, what changes without a gradient.
  """

  trainable: Tree
  opt_state: Any
  state: Tree


@flax.struct.dataclass
class Old:
  """An earlier task whose head answers on the clips of the current one, `frozen["old"]` of a training step.

  Attributes:
    head, state, constants: as the task's own step has them; never changed.
    task: a static value, so that tasks of equal shapes share a compile.
  """

  head: Tree
  state: Tree
  constants: Tree
  task: Any = flax.struct.field(pytree_node=False)


class Steps:
  """Jitted for one run. Tasks that are equal as static values (same shapes) share a compile.

  Attributes:
    traces: how often each function was traced, keyed (function, task kind): a test holds it to one per task.
  """

  def __init__(self, modules: Tree, method: Any, opt: optimizer.Settings, mesh: Mesh, *, compile_effort: int = 3):
    self.modules, self.method, self.tx, self.mesh = modules, method, optimizer.make(opt), mesh
    self.traces: collections.Counter[tuple[str, str]] = collections.Counter()
    whole, rows = sharding.replicated(mesh), sharding.over_batch(mesh)
    jit = functools.partial(backend.jit, compile_effort=compile_effort)
    # Without out_shardings the first step's outputs could lie elsewhere than its inputs: a second compile.
    self.train = jit(self._train, save_memory=method.remat, static_argnums=0, donate_argnums=1, out_shardings=whole)
    self.predict = jit(self._predict, static_argnums=0, out_shardings=rows)
    self.predict_growing = jit(self._predict_growing, static_argnums=0, out_shardings=rows)
    self.encode = jit(self._encode, static_argnums=(0, 1), out_shardings=rows)
    self.add_squares = jit(self._add_squares, save_memory=method.remat, static_argnums=0, donate_argnums=1, out_shardings=whole)
    self.init_optimizer = jit(self.tx.init, out_shardings=whole)

  def _run(
    self,
    task: Any,
    trainable: Tree,
    state: Tree,
    frozen: Tree,
    past: Tree | None,
    constants: Tree,
    batch: Tree,
    *,
    rng: jax.Array | None,
    train: bool,
  ) -> tuple[Tree, Tree, Tree, Tree]:
    """-> (outputs, features, context, state)."""
    rng_forward, rng_head = (None, None) if rng is None else jax.random.split(rng)
    features, context, state = model.forward(
      self.modules, self.method, task, trainable, frozen, state, past, batch, rng=rng_forward, train=train
    )
    classes = self.method.class_features(self.modules, trainable, frozen, constants)
    outputs, head_state = self.method.predict(
      task, trainable, frozen, state["task"]["head"], features, context, classes, batch, rng=rng_head, train=train
    )
    return outputs, features, context, {**state, "task": {**state["task"], "head": head_state}}

  def _train(
    self,
    task: Any,
    live: Live,
    frozen: Tree,
    past: Tree | None,
    constants: Tree,
    batch: Tree,
    rng: jax.Array,
    lr_scale: Tree,
    go: jax.Array | bool = True,
  ) -> tuple[Live, Tree]:
    """One step -> (live, metrics). A step whose loss or gradient is not finite changes nothing and says so.

    Nor does one with `go` False: with the `finite` of the step before, whose numbers are not on the host yet, no step is
    applied behind one that was refused.
    """
    self.traces["train", task.kind] += 1

    losses_of = self._losses_together if task.kind == "joint" else self._losses

    def loss_fn(trainable: Tree) -> tuple[jax.Array, tuple[Tree, Tree]]:
      losses, state = losses_of(task, trainable, live.state, frozen, past, constants, batch, rng)
      return sum(losses.values()), (losses, state)

    (loss, (losses, state)), grads = jax.value_and_grad(loss_fn, has_aux=True)(live.trainable)

    def apply() -> Live:
      updates, opt_state = self.tx.update(grads, live.opt_state, live.trainable)
      updates = {part: jax.tree.map(lambda u: u * lr_scale[part], tree) for part, tree in updates.items()}  # noqa: B023
      return Live(optax.apply_updates(live.trainable, updates), opt_state, state)

    norm = jnp.linalg.norm(jax.flatten_util.ravel_pytree(grads)[0])
    finite = jnp.isfinite(loss) & jnp.isfinite(norm) & go
    return jax.lax.cond(finite, apply, lambda: live), {"loss": loss, "losses": losses, "grad_norm": norm, "finite": finite}

  def _losses(
    self,
    task: Any,
    trainable: Tree,
    state: Tree,
    frozen: Tree,
    past: Tree | None,
    constants: Tree,
    batch: Tree,
    rng: jax.Array,
    among: tuple[Tree, int] | None = None,
  ) -> tuple[Tree, Tree]:
    """-> (the weighted losses of a training step by their names, state).

    among: of a growing label set that is learned at once, the heads of all of its tasks and the place of this one.
    """
    outputs, features, context, after = self._run(task, trainable, state, frozen, past, constants, batch, rng=rng, train=True)
    if among is None:
      own = task.loss(outputs, batch)
    else:
      heads, place = among
      own = task.loss_among(self._side_by_side(task, heads, trainable, frozen, features, context, batch), place, batch)
    losses = {
      "task": self.method.task_weight(task) * own,
      **self.method.losses(task, context, features, outputs, batch),
    }
    if frozen.get("old"):
      losses["distillation"] = self._distillation(task, trainable, frozen, state, features, context, batch, rng)
    return losses, after

  def _losses_together(
    self, tasks: Any, trainable: Tree, state: Tree, frozen: Tree, past: None, constants: Tree, batch: Tree, rng: jax.Array
  ) -> tuple[Tree, Tree]:
    """The same of all tasks at once, each on its own batch with its own part of every tree, as `Together` lays them out."""
    losses: Tree = {}
    growing = [task for task in tasks.members if task.growing]
    head = lambda task: {
      "head": tasks.select(trainable, task)["task"]["head"],
      "state": tasks.select(state, task)["task"]["head"],
      "constants": constants[task.name],
    }
    heads = jax.tree.map(lambda *x: jnp.stack(x), *map(head, growing)) if growing else None
    places = {task.name: place for place, task in enumerate(growing)}  # by name: tasks of equal shapes are equal
    for i, task in enumerate(tasks.members):
      parts = (tasks.select(trainable, task), tasks.select(state, task), frozen, past, constants[task.name])
      inputs = (*parts, tasks.batch_of(batch, task), jax.random.fold_in(rng, i))
      found, after = self._losses(task, *inputs, among=(heads, places[task.name]) if task.growing else None)
      losses |= {f"{task.name}/{name}": loss for name, loss in found.items()}
      state = tasks.put(state, task, after)
    return losses, state

  def _distillation(
    self, task: Any, trainable: Tree, frozen: Tree, state: Tree, features: Tree, context: Tree, batch: Tree, rng: jax.Array
  ) -> jax.Array:
    """How far the answers of earlier tasks' heads are from those that they give with the teacher's parameters, summed."""
    taught = {key: self.method.teacher(state["shared"])[key] for key in trainable["shared"]}  # the others do not learn now
    taught = jax.lax.stop_gradient({**trainable, "shared": taught})
    # with the noise of the clips as the student hears and sees them
    noise = {"rng": jax.random.split(rng)[0], "train": True}
    theirs = model.forward(self.modules, self.method, task, taught, frozen, state, None, batch, **noise)

    def answers(here: Any, old: Old, trainable: Tree, features: Tree, context: Tree) -> Tree:
      own = {**trainable, "task": {"prompts": {}, "head": old.head}}
      classes = self.method.class_features(self.modules, own, frozen, old.constants)
      inputs = (here, own, frozen, old.state, features, context, classes, batch)
      return self.method.predict(*inputs, rng=None, train=False)[0]

    total = jnp.zeros(())
    for old in frozen["old"]:
      here = dataclasses.replace(old.task, seconds=batch["visual"].shape[1])
      student, teacher = answers(here, old, trainable, features, context), answers(here, old, taught, *theirs[:2])
      total += self.method.distil(here, student, jax.lax.stop_gradient(teacher), batch)
    return total

  def _predict(
    self, task: Any, trainable: Tree, state: Tree, frozen: Tree, past: Tree | None, constants: Tree, batch: Tree
  ) -> Tree:
    """Evaluation mode -> the task's scores, arrays with a leading B."""
    self.traces["predict", task.kind] += 1
    outputs, _, _, _ = self._run(task, trainable, state, frozen, past, constants, batch, rng=None, train=False)
    return task.scores(outputs)

  def _predict_growing(
    self,
    task: Any,
    heads: Tree,
    counts: jax.Array,
    trainable: Tree,
    state: Tree,
    frozen: Tree,
    past: Tree | None,
    constants: Tree,
    batch: Tree,
  ) -> Tree:
    """Evaluation mode, the heads of K tasks side by side: {"scores": [B, K, C]}, -inf for tasks that do not count.

    heads: {"head", "state", "constants"} of the tasks, stacked, [K, ...] each; counts: bool [K].
    """
    self.traces["predict", task.kind] += 1
    del constants  # those of each head stand with it
    features, context, state = model.forward(
      self.modules, self.method, task, trainable, frozen, state, past, batch, rng=None, train=False
    )
    scores = self._side_by_side(task, heads, trainable, frozen, features, context, batch)
    return {"scores": jnp.where(counts[:, None], scores, -jnp.inf)}

  def _side_by_side(
    self, task: Any, heads: Tree, trainable: Tree, frozen: Tree, features: Tree, context: Tree, batch: Tree
  ) -> jax.Array:
    """What K tasks of a growing label set say of the same features, by their heads as in `_predict_growing`: [B, K, C]."""

    def scores(of: Tree) -> jax.Array:
      own = {**trainable, "task": {**trainable["task"], "head": of["head"]}}
      classes = self.method.class_features(self.modules, own, frozen, of["constants"])
      inputs = (own, frozen, of["state"], features, context, classes, batch)
      return task.scores(self.method.predict(task, *inputs, rng=None, train=False)[0])["scores"]

    return jnp.moveaxis(jax.vmap(scores)(heads), 0, 1)

  def _encode(
    self, task: Any, prompted: bool, trainable: Tree, state: Tree, frozen: Tree, past: Tree | None, batch: Tree
  ) -> Tree:
    """Evaluation mode -> {modality: Features}, with the task's prompts or with none."""
    self.traces["encode", task.kind] += 1
    method = self.method if prompted else self.method.empty()
    return model.forward(self.modules, method, task, trainable, frozen, state, past, batch, rng=None, train=False)[0]

  def _add_squares(
    self,
    task: Any,
    total: tuple[Tree, jax.Array],
    trainable: Tree,
    state: Tree,
    frozen: Tree,
    past: Tree | None,
    constants: Tree,
    batch: Tree,
  ) -> tuple[Tree, jax.Array]:
    """Evaluation mode; adds the batch to (squared gradients of the task's own loss on each clip alone, their number).

    Like trainable["shared"] the first, which is what the gradients are of; one clip's at a time on every device.
    """
    self.traces["squares", task.kind] += 1
    inputs = (trainable, state, frozen, past, constants)

    def on_device(inputs: tuple, rows: Tree) -> tuple[Tree, jax.Array]:
      trainable, *others = inputs

      def loss(shared: Tree, clip: Tree) -> jax.Array:
        outputs, *_ = self._run(task, {**trainable, "shared": shared}, *others, clip, rng=None, train=False)
        return task.loss(outputs, clip)

      def add(total: tuple[Tree, jax.Array], row: Tree) -> tuple[tuple[Tree, jax.Array], None]:
        grads = jax.grad(loss)(trainable["shared"], jax.tree.map(lambda x: x[None], row))
        squares = jax.tree.map(lambda t, g: t + jnp.where(row["mask"] > 0, g * g, 0), total[0], grads)
        return (squares, total[1] + row["mask"]), None

      nothing = jax.tree.map(jnp.zeros_like, trainable["shared"]), jnp.zeros(())
      return jax.lax.psum(jax.lax.scan(add, nothing, rows)[0], sharding.AXES)

    # by hand, or the compiler would run every clip on all devices; unchecked, for a checked gradient is summed over them
    whole, rows = PartitionSpec(), PartitionSpec(sharding.AXES)
    mapped = jax.shard_map(on_device, mesh=self.mesh, in_specs=(whole, rows), out_specs=whole, check_vma=False)
    return jax.tree.map(jnp.add, total, mapped(inputs, batch))
