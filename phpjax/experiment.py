"""From a config to objects: encoders with weights, datasets, tasks, method. Checks everything before anything starts."""

from __future__ import annotations

import dataclasses
import pathlib
import zlib
from typing import Any

import jax
from ml_collections import ConfigDict

from data_pipelines import DATASETS, DataError, Dataset, Media
from data_pipelines.toybox import compose
from phpjax import backend, sharding
from phpjax.encoders import ENCODERS, pretrained
from phpjax.errors import UserError
from phpjax.methods import METHODS, Backbone, Method, Sizes, make_method
from phpjax.tasks import TASKS, Task, Widths

Tree = dict[str, Any]
CHOICES = {
  "task_id": ("given",),
  "on_nonfinite": ("stop", "skip"),
  "encoder_dtype": backend.ENCODER_DTYPES,
  "compat": ("paper",),
  "on_bad_clip": ("error", "skip"),
  "evaluation_split": ("test", "val"),
}


@dataclasses.dataclass(frozen=True)
class TaskInfo:
  """What a task needs of its dataset; small enough to be stored beside a checkpoint, so that none is needed to load it."""

  name: str
  seconds: int
  classes: tuple[str, ...]
  words: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Everything a run holds fixed.

  Attributes:
    config: the resolved config.
    encoders: {modality: Pretrained}.
    method: the continual method.
    tasks: {name: Task} in learning order.
    infos: {name: TaskInfo}.
  """

  config: ConfigDict
  encoders: dict[str, pretrained.Pretrained]
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
    return Media(self.encoders["visual"].module.image_size, self.encoders["audio"].module.sample_rate_hz)

  def key(self, *names: str) -> jax.Array:
    """A random key for a named purpose: a pure function of the seed."""
    key = jax.random.key(self.config.seed)
    for name in names:
      key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return key

  def init(self) -> tuple[Tree, Tree]:
    """(params, state) before the first task."""
    params = {
      "encoders": {m: e.params for m, e in self.encoders.items()},
      "shared": backend.jit(self.method.init_shared, self.config.compile_effort)(self.key("shared")),
      "tasks": {},
    }
    return params, {"shared": self.method.init_state(), "tasks": {}}

  def add_task(self, params: Tree, state: Tree, name: str) -> tuple[Tree, Tree]:
    """Appends a task's fresh (or warm-started) prompts, head and state."""
    task, names = self.tasks[name], list(params["tasks"])
    previous = params["tasks"][names[-1]]["prompts"] if names else None

    def fresh(rng_prompts: jax.Array, rng_head: jax.Array, previous: Tree | None) -> Tree:
      return {"prompts": self.method.init_task(rng_prompts, task, previous), "head": self.method.init_head(rng_head, task)}

    # one compile instead of one per initialiser
    tree = backend.jit(fresh, self.config.compile_effort)(self.key("prompts", name), self.key("head", name), previous)
    params = {**params, "tasks": {**params["tasks"], name: tree}}
    return params, {**state, "tasks": {**state["tasks"], name: task.init_state()}}


def problems(config: ConfigDict, *, needs_data: bool = True) -> list[str]:
  """Everything that is wrong or missing, one line each; empty when a run can start."""
  found = []
  for field, value in (
    ("task_id", config.task_id),
    ("on_nonfinite", config.on_nonfinite),
    ("encoder_dtype", config.encoder_dtype),
    ("compat", config.method.compat),
    ("on_bad_clip", config.data.on_bad_clip),
    ("evaluation_split", config.data.evaluation_split),
  ):
    if value not in CHOICES[field]:
      found.append(f"{field}={value!r} is not one of {', '.join(CHOICES[field])}")
  if config.method.name not in METHODS:
    found.append(f"unknown method {config.method.name!r}; known: {', '.join(sorted(METHODS))}")
  names = list(config.tasks)
  if unknown := [name for name in names if name not in TASKS]:
    found.append(f"unknown tasks {', '.join(unknown)}; known: {', '.join(TASKS)}")
  if not names or len(set(names)) < len(names):
    found.append("tasks must name at least one task, each once")
  for modality, encoder in config.encoders.items():
    if encoder.name not in ENCODERS:
      found.append(f"unknown encoder {encoder.name!r} for {modality}; known: {', '.join(sorted(ENCODERS))}")
    elif missing := pretrained.missing_weights(encoder.name, encoder.weights):
      found.append(missing)
  for field in ("batch_size", "eval_batch_size"):
    found += filter(None, [sharding.check_batch_size(config[field], jax.device_count(), field)])
  if config.num_epochs < 1:
    found.append(f"num_epochs={config.num_epochs} must be at least 1")
  if config.compile_effort not in range(4):
    found.append(f"compile_effort={config.compile_effort} is not 0, 1, 2 or 3")
  if needs_data and not config.data.toybox:
    found += _data_problems(config, names)
  return found


def _data_problems(config: ConfigDict, names: list[str]) -> list[str]:
  """What is missing of the datasets."""
  if not config.data.root:
    return [
      "data.root is empty: set --config.data.root=DIR to the folder that holds the benchmarks "
      "(or run the embedded default, --config=....py:toybox)"
    ]
  found = []
  for name in (n for n in names if n in TASKS):
    try:
      DATASETS[TASKS[name][1]](config.data.root)
    except DataError as error:
      found.append(str(error))
  return found


def data_root(config: ConfigDict, progress: Any = None) -> pathlib.Path:
  """The folder of the benchmarks; composes the toybox there when the config asks for it."""
  if not config.data.toybox:
    return pathlib.Path(config.data.root).expanduser()
  root = pathlib.Path(config.data.root or f"~/.cache/phpjax/toybox-{config.data.toybox}-{config.data.toybox_seed}").expanduser()
  sizes = {"default": compose.DEFAULT_SIZES, "tiny": compose.TINY_SIZES}[config.data.toybox]
  return compose.compose(root, seed=config.data.toybox_seed, sizes=sizes, progress=progress)


def open_datasets(config: ConfigDict, progress: Any = None) -> dict[str, Dataset]:
  """{task name: Dataset}; raises UserError."""
  try:
    root = data_root(config, progress)
    return {name: DATASETS[TASKS[name][1]](root) for name in config.tasks}
  except DataError as error:
    raise UserError(str(error)) from error


def describe(name: str, dataset: Dataset) -> TaskInfo:
  """The dataset's part of a task."""
  words = tuple(dataset.vocabulary["words"]) if name == "avqa" else ()
  classes = (*dataset.classes, "background") if name == "ave" else tuple(dataset.classes)
  return TaskInfo(name, dataset.seconds, classes, words)


def build(config: ConfigDict, infos: dict[str, TaskInfo]) -> Experiment:
  """Opens the encoders and makes tasks and method; raises UserError for what the user can mend."""
  try:
    encoders = {
      m: pretrained.load(e.name, e.weights, modality=m, dtype=backend.encoder_dtype(config.encoder_dtype), seed=config.seed)
      for m, e in config.encoders.items()
    }
    backbone = Backbone(
      **{
        m: Sizes(e.module.width, e.module.num_tokens, e.module.num_heads, e.module.depth, e.module.embed_dim)
        for m, e in encoders.items()
      }
    )
    options = {k: v for k, v in config.method.items() if k not in ("name", "compat")}
    method = make_method(config.method.name, backbone, **options)
    tasks = {name: make_task(info, encoders) for name, info in infos.items()}
  except (ValueError, OSError) as error:
    raise UserError(str(error)) from error
  return Experiment(config, encoders, method, tasks, infos)


def make_task(info: TaskInfo, encoders: dict[str, pretrained.Pretrained]) -> Task:
  """A task sized by its dataset and the encoders."""
  visual, audio = encoders["visual"].module, encoders["audio"].module
  widths = Widths(
    visual.width, audio.width, visual.embed_dim, visual.num_tokens - visual.num_special, visual.num_special, audio.num_special
  )
  options: Tree = {}
  if info.name == "avs":
    options["image_size"] = visual.image_size
  if info.name == "avqa":
    options["num_words"] = len(info.words)
  kind = TASKS[info.name][0]
  return kind(widths, info.seconds, len(info.classes), name=info.name, classes=info.classes, **options)


def listing() -> str:
  """Methods, tasks, encoders and datasets, one line each."""
  first = lambda cls: (cls.__doc__ or "").strip().splitlines()[0]
  lines = [
    "methods:",
    *(f"  {name:16s}{first(cls)}" for name, cls in METHODS.items()),
    "tasks:",
    *(f"  {name:16s}{first(cls)} [dataset {data}]" for name, (cls, data) in TASKS.items()),
    "encoders:",
    *(f"  {name:16s}{first(cls)}" for name, (cls, _) in ENCODERS.items()),
    "datasets:",
    *(f"  {name:16s}{first(cls)}" for name, cls in DATASETS.items()),
  ]
  return "\n".join(lines)
