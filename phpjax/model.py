"""The one forward pass: all encoders in lock step, one layer at a time, with the method between the layers."""

from __future__ import annotations

import functools
from typing import Any

import jax

Tree = dict[str, Any]


def forward(
  encoders: Tree,
  method: Any,
  task: Any,
  trainable: Tree,
  frozen: Tree,
  state: Tree,
  past: Tree | None,
  batch: Tree,
  *,
  rng: jax.Array | None,
  train: bool,
) -> tuple[Tree, Tree, Tree]:
  """Runs the encoders layer by layer, with the method between the layers -> (features, context, state).

  Args:
    encoders: {modality: linen module}. A modality that the batch lacks is not run.
    method: a `methods.base.Method`.
    task: a `tasks.base.Task`.
    trainable: {"shared", "task": {"prompts", "head"}}.
    frozen: {"encoders": {modality: params}, "shared": leaves this task reads but does not train}.
    state: what changes without a gradient, of this task and shared.
    past: other tasks' prompts stacked [num_tasks, ...] with "valid" [num_tasks], or None.
    batch: {modality: [B, ...]}; seconds are folded into the batch of the encoders. Where it holds {modality: Features} under
      "features", those encoders are not run.
    rng: for dropout and the like, None at evaluation.
    train: whether this is a training step.
  """
  kept = jax.checkpoint if method.remat else lambda f: f
  given = batch.get("features", {})  # of a method that changes nothing between the layers (`Method.frozen`)
  modules = {m: e.bind({"params": frozen["encoders"][m]}) for m, e in encoders.items() if m in batch and m not in given}
  query = _query(encoders, method, task, trainable, frozen, state, batch) if method.needs_query else None
  mask, rng_stem = batch.get("mask"), None if rng is None else jax.random.fold_in(rng, 0)
  how = {"task": task, "mask": mask, "rng": rng_stem, "train": train}
  streams = {m: _embed(method, m, module, batch[m], how) for m, module in modules.items()}
  # there is no context before the stems
  streams = method.adapt({"trainable": trainable, "frozen": frozen}, "embed", 0, streams)
  streams = {m: module.positions(streams[m]) if hasattr(module, "positions") else streams[m] for m, module in modules.items()}
  options = {"query": query, "mask": mask, "rng": rng, "train": train}
  context = method.start(task, trainable, frozen, state, past, streams, **options)
  streams = method.adapt(context, "stem", 0, streams)
  layers = layer_map(counted(encoders, batch))
  for step in range(len(next(iter(layers.values())))):
    at = {m: layers[m][step] - 1 for m in modules}
    for m, module in modules.items():
      streams[m] = _finish_early_layers(module, layers[m], step, streams[m])
      streams[m] = module.enter(at[m], streams[m])
    streams = method.adapt(context, "input", step, streams)
    context = method.observe(context, step, streams)
    prefix = method.prefix(context, step)
    attend = {m: kept(functools.partial(module.attention, at[m])) for m, module in modules.items()}
    streams = {m: attend[m](streams[m], prefix.get(m)) for m in modules}
    streams = kept(functools.partial(method.adapt, context, "attention", step))(streams)
    streams = {m: kept(functools.partial(module.mlp, at[m]))(streams[m]) for m, module in modules.items()}
    streams = kept(functools.partial(method.adapt, context, "mlp", step))(streams)
  features = {**given, **{m: module.pool(streams[m]) for m, module in modules.items()}}
  return features, context, context.get("state", state)  # a method that keeps statistics puts the new ones there


def counted(encoders: Tree, batch: Tree) -> Tree:
  """The encoders by whose depths steps are numbered: vision and audio even where the batch lacks one of them, so that one
  tower alone keeps its step numbers; text only where the batch holds it."""
  towers = encoders.keys() - {"text"}
  return {m: e for m, e in encoders.items() if m in batch or (m in towers and towers & batch.keys())}


def layer_map(modules: Tree) -> dict[str, tuple[int, ...]]:
  """How many layers of each encoder are finished after each step; equal depths give 1, 2, 3, ...

  Raises ValueError when one depth is no multiple of the smallest.
  """
  depths = {m: module.depth for m, module in modules.items()}
  steps = min(depths.values())
  if any(depth % steps for depth in depths.values()):
    raise ValueError(f"encoders of depths {depths} cannot run in lock step: each must be a multiple of the smallest")
  return {m: tuple(depth // steps * (step + 1) for step in range(steps)) for m, depth in depths.items()}


def _finish_early_layers(module: Any, layers: tuple[int, ...], step: int, stream: Any) -> Any:
  """The layers of this step but its last, without the method (none when all encoders are equally deep)."""
  for layer in range(layers[step - 1] if step else 0, layers[step] - 1):
    stream = module.mlp(layer, module.attention(layer, module.enter(layer, stream)))
  return stream


def _embed(method: Any, modality: str, module: Any, inputs: jax.Array, how: Tree) -> Any:
  """Text stops before positions are added; vision and audio run their stem, as the method wants it."""
  return module.embed(inputs) if hasattr(module, "positions") else method.stem(modality, module, inputs, **how)


def _query(encoders: Tree, method: Any, task: Any, trainable: Tree, frozen: Tree, state: Tree, batch: Tree) -> Tree:
  """Unprompted features: from the batch when cached, else from the same loop with the empty method."""
  if "query" in batch:
    return batch["query"]
  features, _, _ = forward(encoders, method.empty(), task, trainable, frozen, state, None, batch, rng=None, train=False)
  return jax.lax.stop_gradient(features)
