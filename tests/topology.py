"""One process of test_topology.py: opens a workdir on as many devices as XLA_FLAGS says, trains on, and writes what it has.

  python tests/topology.py '{"folder": ..., "data": ..., "out": FILE.npz, "steps": N, "double": false, "lr": RATE}'

A folder without a checkpoint gets one after STEPS_BEFORE steps. `out` gets, of the run as it is found: `params/...` and
`opt_state/...` before any step, `gradient/...` of the next step (clipped), and `trained/...` after `steps` more.
"""

import itertools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BATCH, STEPS_BEFORE = 8, 3


def flat(tree: Any, name: str) -> dict[str, np.ndarray]:
  paths = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
  return {f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}": np.asarray(leaf) for path, leaf in paths}


def advance(opened: Any, steps: int) -> None:
  """Trains the first task for `steps` steps, epoch after epoch at the first one's rate."""
  name, scale = opened.names[0], {"shared": 1.0, "task": 1.0}
  task, key, inputs = opened.experiment.tasks[name], opened.experiment.key("train", name), opened.train_inputs(name)
  epochs = (opened.batches(name, "train", batch_size=BATCH, shuffle=True, epoch=epoch) for epoch in itertools.count())
  for batch in itertools.islice(itertools.chain.from_iterable(epochs), steps):
    rows = sharding.put_batch(batch, opened.mesh, task.device_keys)
    opened.live, _ = opened.steps.train(task, opened.live, *inputs, rows, jax.random.fold_in(key, opened.position.step), scale)
    opened.position.step += 1


def gradient(opened: Any) -> Any:
  """Of the next step, clipped: what Adam's first moment becomes when it starts from nothing, but for a factor."""
  held, step = opened.live, opened.position.step
  fresh = jax.tree.map(jnp.copy, held.trainable)  # the step takes its buffers
  opened.live = Live(fresh, opened.steps.init_optimizer(fresh), jax.tree.map(jnp.copy, held.state))
  advance(opened, 1)
  moments = [value for _, value in optax.tree_utils.tree_get_all_with_path(opened.live.opt_state, "mu")]
  opened.live, opened.position.step = held, step
  return jax.tree.map(lambda x: x / (1 - opened.config.opt.b1), moments)


def main(job: dict[str, Any]) -> None:
  """Does the job; a folder that holds no checkpoint is only given one."""
  config = php_avqa.get_config("tiny")
  for label in ("shared", "prompts", "head"):
    config.opt[label].lr = job["lr"]
  config.tasks, config.data.root, config.batch_size, config.eval_batch_size = ("ave",), job["data"], BATCH, BATCH
  with opening.open_run(config, pathlib.Path(job["folder"])) as opened:
    if not resume.restore(opened):
      run.begin(opened, "ave")
      advance(opened, STEPS_BEFORE)
      opened.position.batch = STEPS_BEFORE
      resume.save(opened)
    found = flat(opened.live.trainable, "params") | flat(opened.live.opt_state, "opt_state")
    found |= flat(gradient(opened), "gradient")
    advance(opened, job["steps"])
    found |= flat(opened.live.trainable, "trained")
    np.savez(job["out"], devices=jax.device_count(), **found)


if __name__ == "__main__":
  job = json.loads(sys.argv[1])
  if job["double"]:  # before flax and phpjax take it as the type of their parameters: everything is float64 then
    jax.config.update("jax_enable_x64", True)
    jnp.float32 = jnp.float64
  import pathlib

  import optax
  from absl import flags

  from configs import php_avqa
  from phpjax import opening, resume, run, sharding
  from phpjax.steps import Live

  flags.FLAGS.mark_as_parsed()
  main(job)
