"""What a training step costs at full size: the compiler's count against the formulas, and against the original's."""

import jax
import jax.numpy as jnp
import pytest

from configs import php_avqa
from phpjax import bench_steps, compat, experiment, optimizer, partition, sharding
from phpjax.benchmarks import BENCHMARKS
from phpjax.encoders import pretrained
from phpjax.methods import php_flops
from phpjax.steps import Live, Steps

TEXT_TOKENS = 10  # of the longest class text


def one_device():
  axes = (jax.sharding.AxisType.Auto,) * 2
  return jax.make_mesh((1, 1), sharding.AXES, axis_types=axes, devices=jax.local_devices()[:1])


def lowered(config, name):
  """-> (the compiled step of one clip, method, task); nothing is computed, only shapes are."""
  modules = experiment.modules_of(config)
  method, info = experiment.method_of(config, modules), bench_steps.infos((name,))[name]
  task = BENCHMARKS[name].make_task(info, modules, config.protocol.get(name, "official"))
  running = {m: e for m, e in modules.items() if m not in experiment.ONLY_CONSTANTS}
  key = jax.random.key(0)
  make = lambda f, *a: jax.eval_shape(lambda: f(*a))
  own = {"prompts": make(method.init_task, key, task, None), "head": make(method.init_head, key, task)}
  params = {"encoders": {m: pretrained.shapes(e) for m, e in running.items()}, "shared": make(method.init_shared, key)}
  trainable, frozen = partition.split({**params, "tasks": {name: own}}, name, method.uses(task))
  state = {"shared": {}, "task": {"head": make(task.init_state), "method": make(method.init_task_state, task)}}
  steps = Steps(running, method, optimizer.settings(config.opt), one_device(), compile_effort=0)
  live = Live(trainable, jax.eval_shape(steps.tx.init, trainable), state)
  rows = len(task.text_classes()) if task.kind == "event" else 0
  ids, words = jax.ShapeDtypeStruct((rows, TEXT_TOKENS), jnp.int32), jax.ShapeDtypeStruct((rows, 512), jnp.float32)
  constants = {"class_ids": ids, "audio_text": words} if rows else {}
  seconds, size = task.seconds, modules["visual"].image_size
  media = {"visual": ((seconds, size, size, 3), jnp.uint8), "audio": ((seconds, 32_000), jnp.int16)}
  batch = {k: jax.ShapeDtypeStruct((1, *s), d) for k, (s, d) in {**media, **task.label_shapes(seconds)}.items()}
  batch["mask"] = jax.ShapeDtypeStruct((1,), jnp.float32)
  scale = {"shared": 1.0, "task": 1.0}
  step = steps.train.lower(task, live, frozen, None, constants, batch, key, scale).compile()
  return step, method, task


@pytest.mark.slow
@pytest.mark.parametrize(
  ("variant", "name", "limit", "original"),
  [("full", "ave", 1.25e12, 2.11e12), ("released", "avs", 1.08e12, 1.21e12)],
)
def test_a_step_costs_what_the_formulas_say_and_less_than_the_original(variant, name, limit, original):
  config = php_avqa.get_config(variant)
  for encoder in config.encoders.values():
    encoder.weights = "random"
  config.encoders.text.unroll = True  # a compiler counts the body of a loop once
  step, method, task = lowered(compat.resolve(config), name)
  counted = step.cost_analysis()["flops"] + task.uncounted_flops(task.seconds)
  stems = {
    "visual": php_flops.product(49, 3072, 768),
    "audio": php_flops.product(4096, 16, 96) + php_flops.product(1001, 513, 64),
  }
  rows = len(task.text_classes()) if task.kind == "event" else 0
  expected = php_flops.train_step(method, task, stems, 1, rows * TEXT_TOKENS)
  print(
    f"{variant} {name}: {counted / 1e12:.3f} TFLOP by the compiler, {expected / 1e12:.3f} by hand, original {original / 1e12}"
  )
  assert counted <= limit < original
  assert expected == pytest.approx(counted, rel=0.05)
