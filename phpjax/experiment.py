"""From a config to objects: encoders with weights, datasets, tasks, method."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
from ml_collections import ConfigDict

from data_pipelines import DATASETS, DataError, Dataset, Media
from data_pipelines.toybox import compose
from phpjax import backend, routing, signals
from phpjax.benchmarks import BENCHMARKS, TaskInfo
from phpjax.encoders import ENCODERS, pretrained
from phpjax.errors import UserError
from phpjax.methods import METHODS, Backbone, Method, Sizes, make_method
from phpjax.tasks import Task

Tree = dict[str, Any]
ONLY_CONSTANTS = {"audio_text": "text"}  # encoders that are read once per task only, and what goes into them


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Everything a run holds fixed.

  Attributes:
    config: the resolved config.
    encoders: {modality: Pretrained}, those that run in every step.
    weights: {modality: name and sha256}, of all encoders.
    method: the continual method.
    tasks: {name: Task} in learning order.
    infos: {name: TaskInfo}.
  """

  config: ConfigDict
  encoders: dict[str, pretrained.Pretrained]
  weights: dict[str, dict[str, str]]
  method: Method
  tasks: dict[str, Task]
  infos: dict[str, TaskInfo]

  @property
  def modules(self) -> Tree:
    """{modality: linen module}."""
    return {m: e.module for m, e in self.encoders.items()}

  @property
  def media(self) -> Media:
    """How clips are decoded for these encoders."""
    return Media(self.encoders["visual"].module.image_size, self.encoders["audio"].module.sample_rate_hz, self.config.data.crop)

  @functools.cached_property
  def constants(self) -> dict[str, Tree]:
    """{task name: what it needs of the encoders once}; encoders that nothing else needs are opened for it and closed again."""
    wanted = {m for task in self.tasks.values() for m in task.constant_encoders}
    opened = {m: load(self.config, m) for m in self.config.encoders if m in ONLY_CONSTANTS and m in wanted}
    encoders, texts = {**self.encoders, **opened}, self.method.templates()
    return {name: jax.device_get(task.constants(encoders, **texts)) for name, task in self.tasks.items()}

  def key(self, *names: str) -> jax.Array:
    """A random key for a named purpose: a pure function of the seed."""
    key = jax.random.key(self.config.seed)
    for name in names:
      key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return key

  def init(self, *, abstract: bool = False) -> tuple[Tree, Tree]:
    """(params, state) before the first task; abstract: shapes and dtypes instead of arrays."""
    shared = self._make(self.method.init_shared, self.key("shared"), abstract=abstract)
    params = {"encoders": {m: e.params for m, e in self.encoders.items()}, "shared": shared, "tasks": {}}
    return params, {"shared": self._make(self.method.init_state, shared, abstract=abstract), "tasks": {}}

  def _make(self, function: Callable[..., Tree], *inputs: Any, abstract: bool) -> Tree:
    """A tree, by one compile instead of one per initialiser; or its shapes."""
    if abstract:
      return jax.eval_shape(function, *inputs)
    return backend.jit(function, compile_effort=0)(*inputs)  # runs once

  def add_task(self, params: Tree, state: Tree, name: str, *, abstract: bool = False) -> tuple[Tree, Tree]:
    """Appends a task's fresh (or warm-started) prompts, head and state; abstract as in `init`."""
    task, names = self.tasks[name], list(params["tasks"])
    previous = params["tasks"][names[-1]]["prompts"] if names else None

    def fresh(rng_prompts: jax.Array, rng_head: jax.Array, previous: Tree | None) -> Tree:
      head = self.method.init_head(rng_head, task) if learns(self.config, name) else {}
      return {"prompts": self.method.init_task(rng_prompts, task, previous), "head": head}

    tree = self._make(fresh, self.key("prompts", name), self.key("head", name), previous, abstract=abstract)
    params = {**params, "tasks": {**params["tasks"], name: tree}}
    fresh_state = {"head": self.method.init_head_state(task), "method": self.method.init_task_state(task)}
    if self.config.task_id == "inferred" and (self.method.learns or self.method.looks):  # filled when the task is learned
      fresh_state |= routing.nothing_seen(routing.width(self.encoders), routing.metric_of(self.config))
    return params, {**state, "tasks": {**state["tasks"], name: fresh_state}}


def data_root(config: ConfigDict, progress: Any = None) -> pathlib.Path:
  """The folder of the benchmarks; composes the toybox there when the config asks for it."""
  if not config.data.toybox:
    return pathlib.Path(config.data.root).expanduser()
  sizes, seed = compose.SIZES[config.data.toybox], config.data.toybox_seed
  # The version stands in the name: another checkout must not replace the clips under a running job.
  cached = f"~/.cache/phpjax/toybox-{config.data.toybox}-{seed}-{compose.version()[:8]}"
  root = pathlib.Path(config.data.root or cached).expanduser()
  partial = root.absolute().with_name(f".{root.name}.partial-{os.getpid()}")  # as `compose` names it, hundreds of megabytes
  with signals.at_end(lambda: shutil.rmtree(partial, ignore_errors=True)):
    return compose.compose(root, seed=seed, sizes=sizes, progress=progress)


def open_datasets(config: ConfigDict, progress: Any = None) -> dict[str, Dataset]:
  """{task name: Dataset}; raises UserError."""
  try:
    root = data_root(config, progress)
    return {name: BENCHMARKS[name].open(root, config.data) for name in config.tasks}
  except (DataError, OSError) as error:
    raise UserError(str(error)) from error


def evaluation_splits(config: ConfigDict) -> tuple[str, ...]:
  """The split that fills the accuracy matrix; beside test, the objects that nothing else shows, where the data has them."""
  return ("test", "unseen") if config.data.evaluation_split == "test" else (config.data.evaluation_split,)


def learns(config: ConfigDict, name: str) -> bool:
  """Whether the method takes gradient steps on a task."""
  method = METHODS.get(config.method.name, Method)
  return method.learns and (name in config.tasks[:1] or not method.first_task_only)


def num_epochs(config: ConfigDict, name: str) -> int:
  """Epochs of a task: `num_epochs` times the task's `epoch_factor`; none where the method takes no gradient steps."""
  return config.num_epochs * config.epoch_factor.get(name, 1) if learns(config, name) else 0


def selection_split(config: ConfigDict, name: str, dataset: Dataset) -> str | None:
  """The split that chooses the epoch of a task that counts; None: the last does, for want of such a split or a choice."""
  split = config.data.selection_split
  return split if split in dataset.splits() and num_epochs(config, name) > 1 else None


def used_splits(config: ConfigDict, name: str, dataset: Dataset) -> list[str]:
  """The splits of a task's dataset that a run reads, each once."""
  wanted = dict.fromkeys(("train", selection_split(config, name, dataset), *evaluation_splits(config)))
  return [split for split in wanted if split in dataset.splits()]


def data_identity(config: ConfigDict, datasets: dict[str, Dataset], infos: dict[str, TaskInfo]) -> dict[str, str]:
  """What a run reads, without its media: {"ave classes": digest, "ave train": count and digest of the ids, ...}."""
  digest = lambda value: hashlib.sha256(repr(value).encode()).hexdigest()[:12]
  identity = {"toybox": f"version {compose.version()[:12]}"} if config.data.toybox else {}
  for name, dataset in datasets.items():
    identity[f"{name} classes"] = digest(infos[name])
    for split in used_splits(config, name, dataset):
      ids = [record.id for record in dataset.records(split)]
      identity[f"{name} {split}"] = f"{len(ids)} rows, {digest(ids)}"
  return identity


def load(config: ConfigDict, name: str, sharding: Any = None) -> pretrained.Pretrained:
  """Opens the encoder called `name` in the config; raises ValueError and OSError."""
  e, dtype = config.encoders[name], backend.encoder_dtype(config.encoder_dtype)
  options = {"dtype": dtype, "seed": config.seed, "sharding": sharding, **sizes_of(e)}
  return pretrained.load(e.name, e.weights, modality=modality_of(name), **options)


def modality_of(name: str) -> str:
  """What goes into the encoder called `name` in a config."""
  return ONLY_CONSTANTS.get(name, name)


def sizes_of(encoder: ConfigDict) -> dict[str, Any]:
  """The fields of an encoder's config beside name and weights: sizes that replace the table's, as image_size or seconds."""
  return {name: value for name, value in encoder.items() if name not in ("name", "weights")}


def build(config: ConfigDict, infos: dict[str, TaskInfo], sharding: Any = None) -> Experiment:
  """Opens the encoders, their weights placed by `sharding`, and makes tasks and method; raises UserError."""
  if found := refused(config, infos):
    raise UserError(found)
  try:
    encoders = {m: load(config, m, sharding) for m in config.encoders if m not in ONLY_CONSTANTS}
    weights = {m: {"name": e.name, "sha256": e.sha256} for m, e in encoders.items()}
    for m, e in ((m, e) for m, e in config.encoders.items() if m in ONLY_CONSTANTS):
      weights[m] = {"name": e.name, "sha256": pretrained.identity(e.name, e.weights, config.seed)}
    modules = modules_of(config)
    method = method_of(config, modules)
    protocol = config.get("protocol", {})
    tasks = {name: BENCHMARKS[name].make_task(info, modules, protocol.get(name, "official")) for name, info in infos.items()}
  except (ValueError, OSError) as error:
    raise UserError(str(error)) from error
  return Experiment(config, encoders, weights, method, tasks, infos)


def refused(config: ConfigDict, names: Iterable[str]) -> str:
  """One line about the tasks that mean nothing to the config's method, "" if there are none."""
  method = METHODS.get(config.method.name, Method)
  reasons = {name: reason for name in names if (reason := method.refuses(BENCHMARKS[name].task))}
  if not reasons:
    return ""
  kinds = {**BENCHMARKS, **{f"{family}_N": of for family, of in BENCHMARKS.families.items()}}
  fit = ", ".join(name for name, benchmark in kinds.items() if not method.refuses(benchmark.task))
  why = "; ".join(dict.fromkeys(reasons.values()))
  return f"method {config.method.name} cannot learn {', '.join(reasons)}: {why}; of --config.tasks it can learn {fit}"


def modules_of(config: ConfigDict) -> Tree:
  """{name: linen module} of all encoders of a config, without weights; raises ValueError and TypeError."""
  return {m: pretrained.module_of(e.name, e.weights, **sizes_of(e)) for m, e in config.encoders.items()}


def method_of(config: ConfigDict, modules: Tree) -> Method:
  """The method for these encoders {modality: module}; raises ValueError for options that do not fit them."""
  sizes = {m: Sizes.of(module) for m, module in modules.items()}
  options = {k: v for k, v in config.method.items() if k not in ("name", "compat")}
  return make_method(config.method.name, Backbone(**sizes), remat=config.remat, **options)


def listing() -> str:
  """Methods, tasks, encoders and datasets, one line each."""
  first = lambda cls: (cls.__doc__ or "").strip().splitlines()[0]
  data = {cls: name for name, cls in DATASETS.items()}
  lines = [
    "methods:",
    *(f"  {name:16s}{first(cls)}" for name, cls in METHODS.items()),
    "tasks:",
    *(f"  {name:16s}{first(benchmark.task)} [dataset {data[benchmark.dataset]}]" for name, benchmark in BENCHMARKS.items()),
    *(f"  {name + '_N':16s}{first(family)} [dataset {data[family.whole]}]" for name, family in BENCHMARKS.families.items()),
    "encoders:",
    *(f"  {name:16s}{first(cls)}" for name, (cls, _) in ENCODERS.items()),
    "datasets:",
    *(f"  {name:16s}{first(cls)}" for name, cls in DATASETS.items()),
  ]
  return "\n".join(lines)
