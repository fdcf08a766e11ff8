"""Who learns what: the one split that drives gradients, optimizer state, checkpoints and precision.

params = {"encoders": ..., "shared": ..., "tasks": {name: {"prompts": ..., "head": ...}}}. The split is by these reserved
keys and happens outside jit, so that tasks of equal shapes share one compiled step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

Tree = dict[str, Any]
LABELS = ("shared", "prompts", "head", "frozen")


def split(params: Tree, task: str, uses: Iterable[str]) -> tuple[Tree, Tree]:
  """-> (what learns on `task`, what it reads but must not change).

  Args:
    params: the whole tree.
    task: name of the task.
    uses: top-level keys of `shared` that learn on this task.

  Raises:
    KeyError: `uses` names a key that does not exist, or the task is unknown.
  """
  uses, shared = set(uses), params["shared"]
  if unknown := uses - set(shared):
    raise KeyError(f"no shared parameters called {sorted(unknown)}; there are {sorted(shared)}")
  if task not in params["tasks"]:
    raise KeyError(f"no parameters for task {task!r}; there are {sorted(params['tasks'])}")
  trainable = {"shared": {k: v for k, v in shared.items() if k in uses}, "task": params["tasks"][task]}
  frozen = {"encoders": params["encoders"], "shared": {k: v for k, v in shared.items() if k not in uses}}
  return trainable, frozen


def merge(params: Tree, trainable: Tree, task: str) -> Tree:
  """Inverse of `split`; everything else keeps the very same arrays."""
  return {
    **params,
    "shared": {**params["shared"], **trainable["shared"]},
    "tasks": {**params["tasks"], task: trainable["task"]},
  }


def labels(params: Tree, task: str, uses: Iterable[str]) -> Tree:
  """The mask over the whole tree: "shared", "prompts", "head" or "frozen" per leaf, for whoever holds everything at once.

  Raises ValueError for a top-level key or a part of a task that no rule covers, KeyError for a name that matches nothing.
  """
  uses = set(uses)
  split(params, task, uses)  # raises for names that do not exist
  if unknown := set(params) - {"encoders", "shared", "tasks"}:
    raise ValueError(f"no rule covers the parameters {sorted(unknown)}")
  fill = lambda tree, label: jax.tree.map(lambda _: label, tree)
  return {
    "encoders": fill(params["encoders"], "frozen"),
    "shared": {k: fill(v, "shared" if k in uses else "frozen") for k, v in params["shared"].items()},
    "tasks": {name: live_task_labels(tree) if name == task else fill(tree, "frozen") for name, tree in params["tasks"].items()},
  }


def live_labels(trainable: Tree) -> Tree:
  """The same mask for the live subtree that `split` returns."""
  return {"shared": jax.tree.map(lambda _: "shared", trainable["shared"]), "task": live_task_labels(trainable["task"])}


def live_task_labels(tree: Tree) -> Tree:
  """ "prompts" or "head" per leaf of one task's tree."""
  if unknown := set(tree) - {"prompts", "head"}:
    raise ValueError(f"no rule covers the task parameters {sorted(unknown)}: a task holds prompts and head")
  return {part: jax.tree.map(lambda _, part=part: part, sub) for part, sub in tree.items()}


def stack_past(params: Tree, task: str, num_tasks: int) -> Tree | None:
  """Other tasks' prompts stacked [num_tasks, ...], zero-padded, with "valid" float32 [num_tasks]; None without a live prompt.

  The order is that of learning. All tasks' prompts must have the shapes of this task's. Never differentiated.
  """
  own = params["tasks"][task]["prompts"]
  if not jax.tree.leaves(own):
    return None
  others = [tree["prompts"] for name, tree in params["tasks"].items() if name != task]
  valid = jnp.asarray([1.0] * len(others) + [0.0] * (num_tasks - len(others)), jnp.float32)
  padding = [jax.tree.map(jnp.zeros_like, own)] * (num_tasks - len(others))
  return {"prompts": jax.tree.map(lambda *x: jnp.stack(x), *others, *padding), "valid": valid}


def settled(params: Tree, state: Tree, task: str) -> Tree:
  """What must not change any more while `task` is learned: the encoders, and other tasks' parameters and state."""
  others = lambda tree: {name: sub for name, sub in tree["tasks"].items() if name != task}
  return {"encoders": params["encoders"], "tasks": others(params), "state": {"tasks": others(state)}}


def replaced(before: Tree, after: Tree) -> list[str]:
  """Paths of the leaves that are not the very same arrays in both trees, or only in one of them; nothing is computed."""
  old, new = (
    {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for tree in (before, after)
  )
  return [path for path in {**old, **new} if path not in old or path not in new or old[path] is not new[path]]


def count(tree: Any) -> int:
  """Number of scalars."""
  return sum(x.size for x in jax.tree.leaves(tree))


def num_bytes(tree: Any) -> int:
  """Bytes of all arrays (or shapes)."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
