"""Fisher information of a run's shared parameters: squared gradients of single clips."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from phpjax import sharding
from phpjax.errors import UserError
from phpjax.run import Run
from phpjax.signals import Stopped

Tree = dict[str, Any]


def squared_gradients(run: Run, name: str) -> Tree:
  """{key of the shared parameters that a task uses: mean over its training clips of the squared gradient of its own loss}.

  Evaluation mode, the parameters of now; on the host, the same on every process. Raises UserError when one is not finite, and
  Stopped after a signal.
  """
  task, (trainable, frozen) = run.task(name), run.parts(name)
  inputs = (trainable, run.state_of(name), frozen, run.past(name), run.constants(name))
  nothing = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), trainable["shared"]), np.float32(0)
  total = sharding.put_replicated(nothing, run.mesh)
  for batch in run.batches(name, "train", batch_size=run.config.eval_batch_size, shuffle=False):
    if run.should_stop():
      raise Stopped
    total = run.steps.add_squares(task, total, *inputs, sharding.put_batch(batch, run.mesh, task.device_keys))
  squares, count = jax.device_get(total)
  if not all(np.isfinite(x).all() for x in jax.tree.leaves(squares)):
    raise UserError(
      f"task {name} is learned, but the gradient of one of its clips is not finite: lower opt.*.lr (in another --workdir)"
    )
  return jax.tree.map(lambda x: x / count, squares)
