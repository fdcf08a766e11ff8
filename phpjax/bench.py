"""Measures frozen encoders, or the training steps of an experiment, on this machine, one row of a table each.

  python -m phpjax.bench --encoders=clip_vit_b32,htsat_tiny
  python -m phpjax.bench --config=configs/php_avqa.py --config.batch_size=1 --config.eval_batch_size=1 [--out=FILE]

Training steps: operations of the compiled step, seconds of a step and of an evaluated clip (medians), and the memory of a
process that found its programs compiled; see phpjax/bench_steps.py.

Encoders: weights are random numbers written to a temporary folder and opened as published ones are. Columns: parameters; tokens
per second of media (per picture, per text); GFLOP of a forward pass of one second, picture or text; seconds to open the weights
(the better of two); examples per second at --batch_size, the median of --repeats runs.
"""

from __future__ import annotations

import functools
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from phpjax import bench_steps, cli, compat, experiment
from phpjax.bench_steps import median
from phpjax.encoders import ENCODERS, make_encoder, pretrained
from phpjax.encoders.tokenizer import word_tokenizer
from phpjax.errors import UserError

TEXT_LENGTH = 16  # tokens of a caption
COLUMNS = ("encoder", "parameters", "tokens", "GFLOP", "load s", "examples/s")


def measure(name: str, batch_size: int, repeats: int) -> dict[str, Any]:
  """One row, keyed by COLUMNS."""
  module = make_encoder(name)
  flat = {k: np.zeros(v.shape, np.float32) for k, v in pretrained.flat_shapes(module).items()}
  with tempfile.TemporaryDirectory() as folder:
    rng = np.random.default_rng(0)
    for array in flat.values():
      array[...] = rng.normal(0, 0.02, array.shape)
    pretrained.write(folder, name, flat, {})
    word_tokenizer(["a"], 8).save(str(pathlib.Path(folder) / "tokenizer.json"))
    seconds = []
    for _ in range(2):
      start = time.perf_counter()
      encoder = pretrained.load(name, folder, modality=module.modality)
      jax.block_until_ready(encoder.params)
      seconds.append(time.perf_counter() - start)
  example = np.asarray(pretrained.example_input(module))
  example = example[:, :1].repeat(TEXT_LENGTH, axis=1) + 2 if module.modality == "text" else example
  forward = jax.jit(functools.partial(layer_by_layer, module))
  one = forward.lower(encoder.params, example).compile()
  batch = example.repeat(batch_size, axis=0)
  tokens = jax.eval_shape(lambda p, x: module.apply({"params": p}, x, method="stem"), encoder.params, example).tokens.shape[1]
  duration = getattr(module, "seconds", 1.0)
  return {
    "encoder": name,
    "parameters": f"{sum(x.size for x in flat.values()) / 1e6:.1f} M",
    "tokens": f"{tokens / duration:.0f}",
    "GFLOP": f"{one.cost_analysis()['flops'] / duration / 1e9:.2f}",
    "load s": f"{min(seconds):.2f}",
    "examples/s": f"{batch_size / median(lambda: forward(encoder.params, batch), repeats):.1f}",
  }


def layer_by_layer(module: Any, params: Any, x: jax.Array) -> jax.Array:
  """Pooled features [B, E], as the methods run an encoder (a text tower's own loop would hide its FLOPs from the compiler)."""
  bound = module.bind({"params": params})
  stream = bound.stem(x)
  for layer in range(module.depth):
    stream = bound.mlp(layer, bound.attention(layer, bound.enter(layer, stream)))
  return bound.pool(stream).pooled


def main(argv: list[str]) -> None:
  """Command line."""
  values = flags.FlagValues()  # its own: those of another command stay as they are
  holder = config_flags.DEFINE_config_file("config", None, "An experiment: measure its training steps.", flag_values=values)
  flags.DEFINE_string("out", None, "With --config: a file for the table as JSON.", flag_values=values)
  flags.DEFINE_string("only", None, "With --config: one task, measured in this process.", flag_values=values)
  flags.DEFINE_list("encoders", None, f"Names of {', '.join(ENCODERS)}; without it all published ones.", flag_values=values)
  flags.DEFINE_integer("batch_size", 8, "Examples at once, of encoders.", lower_bound=1, flag_values=values)
  flags.DEFINE_integer("repeats", 5, "Runs that are timed.", lower_bound=1, flag_values=values)
  rest, given = cli.parse_flags(argv, __doc__, values)[1:], values.flag_values_dict()
  chosen = given["encoders"] or [name for name in ENCODERS if not name.startswith(("nano", "tiny"))]
  problems = [f"unknown encoder {name!r}; known: {', '.join(ENCODERS)}" for name in chosen if name not in ENCODERS]
  problems += [f"unknown argument {word}" for word in rest]
  if problems:
    raise UserError("; ".join(problems))
  if values["config"].present:
    measure_steps(compat.resolve(cli.open_config(holder)), argv[1:], given)
  else:
    show(COLUMNS, (measure(name, given["batch_size"], given["repeats"]) for name in chosen))


def measure_steps(config: ConfigDict, arguments: list[str], given: dict[str, Any]) -> None:
  """The table of an experiment's tasks, or one task's numbers as JSON; raises UserError where there is no step."""
  wanted = [given["only"]] if given["only"] else config.tasks
  if not any(experiment.learns(config, name) for name in wanted):
    on = f" on {given['only']}" if given["only"] else ""
    raise UserError(f"method {config.method.name} takes no training step{on}: there is nothing to measure")
  cli.use_compile_cache()
  if given["only"]:
    print(json.dumps(bench_steps.measure(config, given["only"], given["repeats"])))
    return
  rows = show(bench_steps.COLUMNS, bench_steps.table(config, arguments, given["repeats"]))
  if given["out"]:
    bench_steps.save(rows, given["out"])


def show(columns: Sequence[str], rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
  """Prints rows as they come, as a table in Markdown, and gives them back."""
  print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
  shown = []
  for row in rows:
    print(f"| {' | '.join(row[column] for column in columns)} |", flush=True)
    shown.append(row)
  return shown


if __name__ == "__main__":
  sys.exit(cli.guarded(lambda: main(sys.argv)))
