"""What a checkpoint holds of a run, and how a run goes on from one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

import jax

from phpjax import distributed, drift, sharding, workdir
from phpjax.errors import UserError
from phpjax.run import Best, Position, Run, add_task, begin, new_history
from phpjax.steps import Live

Tree = dict[str, Any]


def save(run: Run, *, learned: Iterable[str] = ()) -> None:
  """Writes a checkpoint of this moment, in the background.

  `learned` names tasks that have just ended: they are written here for the last time, and later checkpoints need this one.
  Random keys are functions of the seed and the step, so both are all there is to keep of them. Raises UserError when the
  workdir is another run's by now, or the disk is full.
  """
  if run.held is not None:
    run.held.confirm()
  run.absorb()
  run.position.saves += 1
  now = run.position.saves
  run.learned |= dict.fromkeys(learned, now)
  if run.best is not None:
    run.best.saved = run.best.saved or now  # nothing was learned since it was chosen: see `train.learn`
  seconds = run.position.seconds + time.monotonic() - run.started
  meta = {
    "position": {**dataclasses.asdict(run.position), "seconds": seconds},
    "history": run.history,
    "infos": {name: dataclasses.asdict(info) for name, info in run.experiment.infos.items()},
    "data": run.data_identity,
    "tasks": list(run.params["tasks"]),
    "learned": run.learned,
    "live": run.live is not None,
    "best": None if run.best is None else {"score": run.best.score, "epoch": run.best.epoch, "saved": run.best.saved},
    "needs": sorted({*run.learned.values(), *([run.best.saved] if run.best else [])} - {now}),
    "config": workdir.plain(run.config),
    "seed": run.config.seed,
    "weights": run.experiment.weights,
  }
  run.checkpoints.save(now, items(run, leave_out=[name for name, step in run.learned.items() if step != now]), meta)


def items(run: Run, leave_out: Iterable[str]) -> Tree:
  """{item: pytree} of a checkpoint, for reading one also the shapes of what it holds; without the tasks of `leave_out`."""
  tasks = {f"task_{name}": task_item(run, name) for name in run.params["tasks"] if name not in leave_out}
  live = {} if run.live is None else {"opt_state": run.live.opt_state}
  return {"shared": run.params["shared"], "state": run.state["shared"], **tasks, "live": live}


def task_item(run: Run, name: str) -> Tree:
  """A task's prompts, head and, if it has one, state."""
  state = run.state["tasks"][name]
  return {**run.params["tasks"][name], **({"state": state} if jax.tree.leaves(state) else {})}


def restore(run: Run) -> bool:
  """Goes to the newest good checkpoint, if any; raises UserError when the run cannot go on from it."""
  if not run.config.resume and run.checkpoints.steps():
    raise UserError(f"--workdir={run.folder} holds checkpoints and resume=False: take another --workdir")
  found = run.checkpoints.newest_good()
  distributed.check_equal({"newest good checkpoint": found and found[0]})  # before all of them restore it together
  if found is None:
    run.position.saves = max(run.checkpoints.steps(), default=0)  # a first one that was not finished keeps its number
    return False
  step, meta = found
  _check_same(run, meta)
  try:
    _go_to(run, meta, step)
  except Exception as error:  # orbax's are of many types; the files are what they were, so it is no damage
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise UserError(
      f"checkpoint {run.checkpoints.folder / str(step)} is whole and cannot be restored ({reason}): written by another "
      "version of phpjax, or of optax or flax?"
    ) from error
  return True


def _go_to(run: Run, meta: Tree, step: int) -> None:
  """Puts the run where a checkpoint was."""
  run.position, run.history = Position(**meta["position"]), {**new_history(), **meta["history"]}
  run.learned = dict(meta["learned"])
  for name in meta["tasks"]:
    add_task(run, name)
  _fill_finished(run)
  _fill(run, meta, step)
  run.position.saves = run.checkpoints.steps()[0]  # orbax never overwrites a step, not even a damaged one


def _check_same(run: Run, meta: Tree) -> None:
  """Raises UserError when the weights or the data are others now."""
  if (now := run.experiment.weights) != meta["weights"]:
    raise UserError(
      f"--workdir={run.folder} was trained with other encoder weights ({meta['weights']}, now {now}): "
      "point encoders.*.weights to the old files or take another --workdir"
    )
  if changed := sorted(k for k in meta["data"].keys() | run.data_identity if meta["data"].get(k) != run.data_identity.get(k)):
    raise UserError(
      f"--workdir={run.folder} was trained on other data ({', '.join(changed[:4])} differ): point data.root to the old "
      "files or take another --workdir"
    )


def _fill_finished(run: Run) -> None:
  """The finished tasks, each from the step that holds it, and the shared parameters as they were at its end."""
  for name, step in run.learned.items():
    found = run.checkpoints.restore(step, {"shared": run.params["shared"], f"task_{name}": task_item(run, name)})
    _put_task(run, name, found)
    run.anchors[name] = drift.anchor(found.get("shared", {}), run.experiment.method.uses(run.experiment.tasks[name]))


def _fill(run: Run, meta: Tree, step: int) -> None:
  """Everything else, from the step itself and from the one that holds the best epoch so far."""
  name = run.stage(run.position.task) if meta["live"] else None
  if name:
    begin(run, name)
  if meta["best"]:
    wanted = {item: tree for item, tree in items(run, leave_out=run.learned).items() if item != "live"}  # of the newest alone
    _put_items(run, run.checkpoints.restore(meta["best"]["saved"], wanted), name)
    run.best = Best(**meta["best"], trainable=jax.device_get(run.parts(name)[0]), state=jax.device_get(run.state_of(name)))
  found = run.checkpoints.restore(step, items(run, leave_out=run.learned))
  _put_items(run, found, name)
  if name:
    opt_state = found["live"]["opt_state"] if "live" in found else run.live.opt_state
    run.live = Live(run.parts(name)[0], opt_state, run.state_of(name))


def _put_items(run: Run, found: Tree, name: str | None) -> None:
  """What was restored of a step, into the whole trees; `name`: the stage that was being learned."""
  run.params = {**run.params, "shared": found.get("shared", {})}
  run.state = {**run.state, "shared": found.get("state", run.state["shared"])}
  for task in run.members(name) if name else ():
    _put_task(run, task, found)


def _put_task(run: Run, name: str, found: Tree) -> None:
  """The same of one task."""
  stored = found.get(f"task_{name}", {})
  params = {**run.params["tasks"][name], **{k: v for k, v in stored.items() if k != "state"}}
  run.params = {**run.params, "tasks": {**run.params["tasks"], name: params}}
  run.state = {**run.state, "tasks": {**run.state["tasks"], name: stored.get("state", run.state["tasks"][name])}}


def put_best(run: Run) -> None:
  """Puts the best epoch of the current task in the place of the last one."""
  trainable, state = sharding.put_replicated((run.best.trainable, run.best.state), run.mesh)
  run.live = Live(trainable, run.live.opt_state, state)
