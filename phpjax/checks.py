"""What is wrong with a config or missing for it: all of it, in lines for the user, before anything slow starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import jax
from ml_collections import ConfigDict

from data_pipelines import DataError, Dataset
from data_pipelines.toybox import compose
from phpjax import backend, compat, experiment, model, routing, sharding, values
from phpjax.benchmarks import BENCHMARKS
from phpjax.encoders import ENCODERS, pretrained
from phpjax.errors import UserError
from phpjax.methods import METHODS

REQUIRED = ("seed", "tasks", "batch_size", "num_epochs", "epoch_factor", "mesh")
REQUIRED += ("method", "encoders", "protocol", "data", "opt")


def problems(config: ConfigDict) -> list[str]:
  """Everything that is wrong or missing in a resolved config, one line each; empty when a run can start."""
  if missing := [field for field in REQUIRED if field not in config]:
    return [f"--config is no experiment of phpjax.main: it has no {', '.join(missing)} (see configs/php_avqa.py)"]
  if found := values.problems(config):
    return found  # the others take them apart
  found = [*_choices(config), *compat.problems(config), *_numbers(config), *_devices(config)]
  return [*found, *_encoders(config), *_method(config), *_data(config)]


def _choices(config: ConfigDict) -> Iterator[str]:
  """Fields that take one of a few words, and the list of tasks."""
  for field, value, choices in (
    ("task_id", config.task_id, ("given", "inferred")),
    ("routing", routing.metric_of(config), routing.METRICS),
    ("on_nonfinite", config.on_nonfinite, ("stop", "skip")),
    ("encoder_dtype", config.encoder_dtype, backend.ENCODER_DTYPES),
    ("compile_effort", config.compile_effort, (0, 1, 2, 3)),
    ("data.toybox", config.data.toybox, ("", *compose.SIZES)),
    ("data.on_bad_clip", config.data.on_bad_clip, ("error", "skip")),
    ("data.evaluation_split", config.data.evaluation_split, ("test", "val")),
    ("data.selection_split", config.data.selection_split, ("val", "")),
  ):
    if value not in choices:
      yield f"{field}={value!r} is not one of {', '.join(map(repr, choices))}"
  if unknown := [name for name in config.tasks if name not in BENCHMARKS]:
    yield f"unknown tasks {', '.join(unknown)}; known: {', '.join(BENCHMARKS.known())}"
  if fixed := [name for name in config.data.mirrored if name not in BENCHMARKS or not BENCHMARKS[name].mirrored]:
    can = ", ".join(name for name, benchmark in BENCHMARKS.items() if benchmark.mirrored)
    yield f"data.mirrored: {', '.join(fixed)} cannot be mirrored, only {can}"
  if not config.tasks or len(set(config.tasks)) < len(config.tasks):
    yield "tasks must name at least one task, each once"


def _numbers(config: ConfigDict) -> Iterator[str]:
  """Fields with a least value."""
  for field, value, least in (
    ("seed", config.seed, 0),
    ("num_epochs", config.num_epochs, 1),
    *((f"epoch_factor.{name}", value, 1) for name, value in config.epoch_factor.items()),
    ("log_every_steps", config.log_every_steps, 1),
    ("save_every_steps", config.save_every_steps, 1),
    ("watchdog_minutes", config.watchdog_minutes, 0),
    ("data.num_threads", config.data.num_threads, 0),
    ("data.num_workers", config.data.num_workers, 0),
    ("data.questions_per_clip", config.data.questions_per_clip, 1),
    ("data.cache_gb", config.data.cache_gb, 0),
    ("data.query_cache_gb", config.data.get("query_cache_gb", 0), 0),
    ("data.toybox_seed", config.data.toybox_seed, 0),
    ("data.num_class_tasks", config.data.get("num_class_tasks", 1), 1),
    ("data.class_seed", config.data.get("class_seed", 0), 0),
    ("opt.reference_batch_size", config.opt.reference_batch_size, 1),
  ):
    if value < least:
      yield f"{field}={value} must be at least {least}"


def _devices(config: ConfigDict) -> Iterator[str]:
  """Batches and the mesh against the devices that are there."""
  for field in ("batch_size", "eval_batch_size"):
    if found := sharding.check_batch_size(config[field], jax.device_count(), field):
      yield found
  try:
    sharding.make_mesh(tuple(config.mesh))
  except UserError as error:
    yield str(error)


def _encoders(config: ConfigDict) -> Iterator[str]:
  """Names, and weights that are not there."""
  for entry, encoder in config.encoders.items():
    modality = experiment.modality_of(entry)
    if encoder.name not in ENCODERS:
      yield f"unknown encoder {encoder.name!r} for {entry}; known: {', '.join(sorted(ENCODERS))}"
    elif ENCODERS[encoder.name][0].modality != modality:
      fitting = sorted(name for name, (kind, _) in ENCODERS.items() if kind.modality == modality)
      yield f"encoders.{entry}.name={encoder.name!r} is no {modality} encoder; those are {', '.join(fitting)}"
    elif missing := pretrained.missing_weights(encoder.name, encoder.weights):
      yield missing


def _method(config: ConfigDict) -> Iterator[str]:
  """The method's name, whether it can learn the tasks, and whether its options fit the encoders."""
  if config.method.name not in METHODS:
    yield f"unknown method {config.method.name!r}; known: {', '.join(sorted(METHODS))}"
    return
  if found := experiment.refused(config, [name for name in config.tasks if name in BENCHMARKS]):
    yield found
  if all(e.name in ENCODERS and ENCODERS[e.name][0].modality == experiment.modality_of(m) for m, e in config.encoders.items()):
    try:
      modules = experiment.modules_of(config)
      model.layer_map({m: module for m, module in modules.items() if module.modality != "text"})
      experiment.method_of(config, modules)
    except (TypeError, ValueError) as error:  # TypeError: a size that the encoder does not have
      yield str(error)


def _data(config: ConfigDict) -> Iterator[str]:
  """What is missing of the datasets; the toybox is composed and misses nothing."""
  if config.data.toybox:
    return
  if not config.data.root:
    yield (
      "data.root is empty: set --config.data.root=DIR to the folder that holds the benchmarks "
      "(or run the embedded default, --config=....py:toybox)"
    )
    return
  for name in (n for n in config.tasks if n in BENCHMARKS):
    try:
      BENCHMARKS[name].open(experiment.data_root(config), config.data)
    except DataError as error:
      yield str(error)


def notes(config: ConfigDict) -> Iterator[str]:
  """What may be meant and deserves a line."""
  for family, kind in BENCHMARKS.families.items():
    count, groups = sum(type(BENCHMARKS[name]) is kind for name in config.tasks), config.data.get("num_class_tasks", 1)
    if 0 < count < groups:
      yield f"tasks: {count} of the {groups} groups of classes of {family} (data.num_class_tasks), the others are not learned"


def unusable(datasets: Mapping[str, Dataset], config: ConfigDict) -> list[str]:
  """What keeps opened datasets from being trained on and scored: reads every row that the run will use, and no media."""
  found, scored = [], config.data.evaluation_split
  for name, dataset in datasets.items():
    where = f"{type(dataset).__name__} in {dataset.label_root}"
    if missing := [split for split in ("train", scored) if split not in dataset.splits()]:
      found.append(f"{where} has no split {' and no '.join(missing)}, only {', '.join(dataset.splits())}")
      continue
    try:
      rows = {split: dataset.records(split) for split in experiment.used_splits(config, name, dataset)}
    except DataError as error:
      found.append(str(error))
      continue
    if empty := [split for split, records in rows.items() if not records]:
      found.append(f"{where}: the split {' and '.join(empty)} is empty")
    elif reason := BENCHMARKS[name].unusable(scored, rows[scored]):
      found.append(f"{where}: {reason}")
  return found
