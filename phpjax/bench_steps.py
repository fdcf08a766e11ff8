"""What a training step of an experiment costs: counted by the compiler, timed, and its memory. No data and no weights needed.

Weights are random; clips are zeros of the benchmarks' sizes, because no operation depends on values.
"""

from __future__ import annotations

import functools
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from phpjax import experiment, optimizer, partition, run, sharding
from phpjax.benchmarks import BENCHMARKS, TaskInfo
from phpjax.errors import UserError
from phpjax.steps import Live, Steps

Tree = dict[str, Any]
COLUMNS = ("task", "TFLOP per clip", "s per step", "clips/s", "s per evaluated clip", "peak GB")


def infos(names: tuple[str, ...]) -> dict[str, TaskInfo]:
  """Tasks of the official sizes; class names of three words, as long as the benchmarks' longest but one or two."""
  make = lambda name, seconds, count, words: TaskInfo(
    name, seconds, tuple(f"class number {i}" for i in range(count)), tuple(f"word {i}" for i in range(words))
  )
  return {name: make(name, *BENCHMARKS[name].official) for name in names}


def table(config: ConfigDict, arguments: list[str], repeats: int) -> Iterator[dict[str, str]]:
  """A row per task that is learned by steps, keyed by COLUMNS.

  Each is measured in a process of its own, the second time with its programs cached.
  """
  for name in (name for name in config.tasks if experiment.learns(config, name)):
    for times in (0, repeats):
      command = [sys.executable, "-m", "phpjax.bench", *arguments, f"--only={name}", f"--repeats={max(times, 1)}"]
      done = subprocess.run(command, capture_output=True, text=True, check=False)
      if done.returncode:
        raise UserError(f"task {name} cannot be measured: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    yield dict(zip(COLUMNS, (name, *found), strict=True))


def measure(config: ConfigDict, name: str, repeats: int) -> list[str]:
  """The columns of one task behind its name."""
  bench = Bench(config, name)
  step = bench.compile_step()
  flops = (step.cost_analysis()["flops"] + bench.task.uncounted_flops(bench.num_frames)) / config.batch_size
  seconds = median(lambda: bench.train(step), repeats)
  memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before evaluation, which compiles again
  clip = median(bench.evaluate, repeats) / config.eval_batch_size
  gigabytes = device_peak() or memory
  return [
    f"{flops / 1e12:.3f}",
    f"{seconds:.2f}",
    f"{config.batch_size / seconds:.2f}",
    f"{clip:.2f}",
    f"{gigabytes / 1e9:.2f}",
  ]


def device_peak() -> int:
  """Most bytes in use on the accelerator so far, 0 on a CPU."""
  return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def median(call: Callable[[], Any], repeats: int) -> float:
  """Seconds of a call, after one that does not count."""
  jax.block_until_ready(call())
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(call())
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


class Bench:
  """One task of an experiment, ready to step."""

  def __init__(self, config: ConfigDict, name: str):
    config = ConfigDict(config.to_dict())
    for encoder in config.encoders.values():
      encoder.weights = encoder.weights or "random"
    if "text" in config.encoders:
      config.encoders.text.unroll = True  # a compiler counts the body of a loop once
    self.config, self.mesh = config, sharding.make_mesh(tuple(config.mesh))
    self.built = experiment.build(config, infos((name,)), sharding.replicated(self.mesh))
    self.task, self.name = self.built.tasks[name], name
    params, state = self.built.add_task(*self.built.init(), name)
    self.constants = sharding.put_replicated(self.built.constants[name], self.mesh)
    trainable, self.frozen = partition.split(params, name, self.built.method.uses(self.task))
    settings = optimizer.settings(config.opt)
    effort = config.compile_effort
    self.steps = Steps(self.built.modules, self.built.method, settings, self.mesh, compile_effort=effort)
    trainable = sharding.put_replicated(trainable, self.mesh)
    task_state = sharding.put_replicated({"shared": state["shared"], "task": state["tasks"][name]}, self.mesh)
    self.live = Live(trainable, self.steps.init_optimizer(trainable), task_state)
    batch = self.rows(config.batch_size, BENCHMARKS[name].train_seconds(self.task.seconds, config.data))
    scale = {"shared": 1.0, "task": 1.0}
    self.rest = (self.frozen, None, self.constants, batch, jax.random.key(0), scale)  # what a step reads beside `live`
    run.return_freed_memory()

  def rows(self, batch_size: int, seconds: int) -> Tree:
    """A batch of zeros, on the devices."""
    media = self.built.media
    shapes: Tree = {
      "visual": ((seconds, media.image_size, media.image_size, 3), jnp.uint8),
      "audio": ((seconds, media.sample_rate_hz), jnp.int16),
      **self.task.label_shapes(seconds),
    }
    batch = {key: np.zeros((batch_size, *shape), dtype) for key, (shape, dtype) in shapes.items()}
    ones = {key: np.ones_like(x) for key, x in batch.items() if key.endswith("_mask")}
    batch |= {**ones, "mask": np.ones(batch_size, np.float32)}
    return sharding.put_batch(batch, self.mesh, self.task.device_keys)

  @property
  def num_frames(self) -> int:
    """Seconds of all clips of a training batch."""
    return int(np.prod(self.rest[3]["visual"].shape[:2]))

  def compile_step(self) -> Any:
    """The training step, compiled."""
    return self.steps.train.lower(self.task, self.live, *self.rest).compile()

  def train(self, step: Any) -> Any:
    """One step."""
    self.live, metrics = step(self.live, *self.rest)
    return metrics["loss"]

  @functools.cached_property
  def eval_batch(self) -> Tree:
    """Clips with all their seconds."""
    return self.rows(self.config.eval_batch_size, self.task.seconds)

  def evaluate(self) -> Any:
    """One batch of clips."""
    live = self.live
    return self.steps.predict(self.task, live.trainable, live.state, self.frozen, None, self.constants, self.eval_batch)


def save(rows: list[dict[str, str]], path: str) -> None:
  """The table as JSON."""
  pathlib.Path(path).write_text(json.dumps(rows, indent=1) + "\n")
