"""Who may import whom: the layers of the house, checked on the source files themselves.

`main -> train -> everything`; `predict`, `report`, `sweep`, `bench`, `convert`, `pretrain` sit beside `train`; the
parts (`methods`, `tasks`, `encoders`, `metrics`, `data_pipelines`, `configs`) know only themselves; `benchmarks`
joins tasks, datasets and metrics, and the engine above asks it; `model` and `evaluate` receive objects. A new
module needs a line in MAY_IMPORT: choose its layer there.
"""

import ast
import pathlib
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = ("configs", "data_pipelines", "phpjax")

PARTS = {"configs", "data_pipelines", "phpjax.encoders", "phpjax.methods", "phpjax.metrics", "phpjax.tasks"}
TOOLS = {
  f"phpjax.{name}"
  for name in (
    "agreement",
    "backend",
    "checkpoint",
    "distributed",
    "drift",
    "errors",
    "events",
    "figures",
    "files",
    "lease",
    "logs",
    "manifest",
    "partition",
    "progress",
    "rendezvous",
    "sharding",
    "signals",
    "sources",
    "watchdog",
    "values",
    "workdir",
  )
}
BESIDE_TRAIN = {f"phpjax.{name}" for name in ("bench", "convert", "predict", "pretrain")}
ENGINE = {
  f"phpjax.{name}"
  for name in (
    "answers",
    "benchmarks",
    "checks",
    "compat",
    "evaluate",
    "experiment",
    "fisher",
    "joint",
    "model",
    "nonfinite",
    "opening",
    "optimizer",
    "predictions",
    "queries",
    "query_files",
    "results",
    "resume",
    "routing",
    "run",
    "scoring",
    "steps",
  )
}
COMPARISON = {f"phpjax.comparison{part}" for part in ("", "_figures", "_page", "_tables")}
BELOW_TRAIN = {*PARTS, *TOOLS, *ENGINE}

# Module or package -> the project's modules and packages it may import. The longest matching name counts.
MAY_IMPORT: dict[str, set[str]] = {
  **{name: {name} for name in PARTS},
  **{name: {name, "phpjax.errors"} for name in TOOLS},
  "phpjax.agreement": {"phpjax.signals"},
  "phpjax.checkpoint": {"phpjax.errors", "phpjax.files", "phpjax.manifest"},
  "phpjax.distributed": {"phpjax.agreement", "phpjax.errors", "phpjax.rendezvous"},
  "phpjax.evaluate": set(),
  "phpjax.lease": {"phpjax.errors", "phpjax.signals"},
  "phpjax.logs": {"phpjax.errors", "phpjax.events", "phpjax.files"},
  "phpjax.manifest": {"phpjax.files"},
  "phpjax.model": set(),
  "phpjax.nonfinite": {"phpjax.errors", "phpjax.workdir"},
  "phpjax.optimizer": {"phpjax.partition"},
  "phpjax.workdir": {"phpjax.errors", "phpjax.files"},
  "phpjax.steps": {"phpjax.backend", "phpjax.model", "phpjax.optimizer", "phpjax.sharding"},  # the two jitted functions
  "phpjax.predictions": {"phpjax.figures", "phpjax.metrics"},
  "phpjax.benchmarks": {
    "data_pipelines",
    "phpjax.benchmarks",
    "phpjax.errors",
    "phpjax.figures",
    "phpjax.metrics",
    "phpjax.predictions",
    "phpjax.tasks",
  },
  "phpjax.routing": {"phpjax.methods"},
  "phpjax.experiment": {
    *PARTS,
    "phpjax.backend",
    "phpjax.benchmarks",
    "phpjax.errors",
    "phpjax.routing",
    "phpjax.sharding",
    "phpjax.signals",
  },  # config -> objects
  "phpjax.answers": {"phpjax.experiment", "phpjax.partition", "phpjax.routing", "phpjax.sharding", "phpjax.steps"},
  "phpjax.compat": {"phpjax.encoders", "phpjax.errors"},
  "phpjax.checks": {
    "phpjax.routing",
    *PARTS,
    "phpjax.backend",
    "phpjax.benchmarks",
    "phpjax.compat",
    "phpjax.errors",
    "phpjax.experiment",
    "phpjax.model",
    "phpjax.sharding",
    "phpjax.values",
  },
  "phpjax.results": {*PARTS, *TOOLS, "phpjax.benchmarks", "phpjax.queries"},
  "phpjax.fisher": {"phpjax.errors", "phpjax.run", "phpjax.sharding", "phpjax.signals"},
  "phpjax.joint": {"phpjax.partition", "phpjax.run", "phpjax.tasks"},  # another Run
  "phpjax.run": {
    *PARTS,
    *TOOLS,
    "phpjax.answers",
    "phpjax.benchmarks",
    "phpjax.experiment",
    "phpjax.steps",
  },
  "phpjax.opening": {
    *TOOLS,
    "data_pipelines",
    "phpjax.benchmarks",
    "phpjax.checks",
    "phpjax.compat",
    "phpjax.experiment",
    "phpjax.joint",
    "phpjax.optimizer",
    "phpjax.run",
    "phpjax.steps",
  },
  "phpjax.queries": {*TOOLS, "phpjax.model", "phpjax.query_files", "phpjax.run"},
  "phpjax.query_files": {"phpjax.workdir"},
  "phpjax.resume": {*TOOLS, "phpjax.run", "phpjax.steps"},
  "phpjax.scoring": {
    *TOOLS,
    "data_pipelines",
    "phpjax.answers",
    "phpjax.benchmarks",
    "phpjax.evaluate",
    "phpjax.metrics",
    "phpjax.queries",
    "phpjax.results",
    "phpjax.run",
  },
  "phpjax.train": BELOW_TRAIN,
  **{name: {*BELOW_TRAIN, "phpjax.train", "phpjax.cli"} for name in BESIDE_TRAIN},
  "phpjax.bench_steps": BELOW_TRAIN,
  "phpjax.bench": {*BELOW_TRAIN, "phpjax.bench_steps", "phpjax.cli"},
  "phpjax.main": {*BELOW_TRAIN, "phpjax.train", "phpjax.cli"},
  "phpjax.cli": {"phpjax.errors"},
  "phpjax.finished": {
    "phpjax.checkpoint",
    "phpjax.errors",
    "phpjax.logs",
    "phpjax.manifest",
    "phpjax.metrics",
    "phpjax.workdir",
  },
  "phpjax.comparison": {"phpjax.finished"},
  "phpjax.comparison_tables": {"phpjax.comparison", "phpjax.finished"},
  "phpjax.comparison_figures": {"phpjax.comparison", "phpjax.comparison_tables", "phpjax.figures", "phpjax.finished"},
  "phpjax.comparison_page": {"phpjax.comparison", "phpjax.comparison_figures", "phpjax.comparison_tables"},
  "phpjax.report": {*(f"phpjax.{n}" for n in ("cli", "errors", "finished")), *COMPARISON},
  "phpjax.sweep_jobs": {"phpjax.errors", "phpjax.progress", "phpjax.workdir"},
  "phpjax.sweep": {*BELOW_TRAIN, "phpjax.cli", "phpjax.report", "phpjax.sweep_jobs"},
  "phpjax": {"phpjax.predict"},  # phpjax.load
}

# Package -> the only libraries it may import beside the standard one.
LIBRARIES: dict[str, set[str]] = {
  "configs": {"ml_collections"},
  "data_pipelines": {"PIL", "absl", "array_record", "av", "grain", "h5py", "numpy", "soxr", "tensorflow_datasets"},
  "phpjax.metrics": {"numpy"},
}
ONLY_IN = {"torch": "phpjax.sources", "transformers": "nowhere", "tensorflow": "nowhere"}


def inside(name: str, package: str) -> bool:
  """Whether the dotted `name` is `package` or lies in it."""
  return name == package or name.startswith(f"{package}.")


def module_name(path: pathlib.Path, root: pathlib.Path) -> str:
  """phpjax/methods/__init__.py -> phpjax.methods."""
  parts = path.relative_to(root).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(root: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
  """Every (dotted name, file) of the project below `root`."""
  for package in PROJECT:
    for path in sorted((root / package).rglob("*.py")):
      yield module_name(path, root), path


def imports(path: pathlib.Path, name: str) -> Iterator[tuple[int, str]]:
  """Every (line, absolute dotted name) that a file imports, at any depth of the code."""
  package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
  for node in ast.walk(ast.parse(path.read_text(), str(path))):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      above = package[: len(package) - node.level + 1] if node.level else []
      source = ".".join([*above, *([node.module] if node.module else [])])
      yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def rule(name: str) -> str | None:
  """The entry of MAY_IMPORT for a module: the longest name it lies in; `phpjax` is a rule for itself only."""
  found = [key for key in MAY_IMPORT if (name == key if key == "phpjax" else inside(name, key))]
  return max(found, key=len, default=None)


def is_allowed(name: str, imported: str) -> bool:
  """Whether module `name` may import `imported`."""
  top = imported.split(".")[0]
  if top in PROJECT:
    return any(inside(imported, allowed) for allowed in MAY_IMPORT[rule(name)])
  if top in sys.stdlib_module_names:
    return True
  if top in ONLY_IN and not inside(name, ONLY_IN[top]):
    return False
  return all(top in libraries for package, libraries in LIBRARIES.items() if inside(name, package))


def violations(root: pathlib.Path) -> list[str]:
  """One line for each import that crosses a layer, and for each module without a rule."""
  found = []
  for name, path in sources(root):
    if rule(name) is None:
      found.append(f"{path.relative_to(root)}: no rule in MAY_IMPORT")
      continue
    found += [
      f"{path.relative_to(root)}:{line}: {name} may not import {imported}"
      for line, imported in imports(path, name)
      if not is_allowed(name, imported)
    ]
  return found


def test_every_import_keeps_to_its_layer():
  assert violations(ROOT) == []


def test_every_package_is_covered():
  for package in PROJECT:
    folders = [p for p in (ROOT / package).rglob("*") if p.is_dir() and any(p.glob("*.py"))]
    assert (ROOT / package).is_dir()
    for folder in folders:
      assert rule(module_name(folder / "__init__.py", ROOT)), f"no rule for {folder.relative_to(ROOT)}"


def _write(root: pathlib.Path, file: str, text: str) -> None:
  (root / file).parent.mkdir(parents=True, exist_ok=True)
  (root / file).write_text(text)


@pytest.mark.parametrize(
  ("file", "text"),
  [
    ("phpjax/model.py", "from phpjax.methods import base"),
    ("phpjax/evaluate.py", "import phpjax.tasks"),
    ("phpjax/optimizer.py", "from phpjax import partition, train"),
    ("phpjax/train.py", "from phpjax import predict"),
    ("phpjax/train.py", "def f():\n  from phpjax.main import main\n"),
    ("phpjax/predict.py", "from phpjax import report"),
    ("phpjax/report.py", "from phpjax import sweep"),
    ("phpjax/checkpoint.py", "from . import partition"),
    ("phpjax/methods/php.py", "from phpjax.encoders.base import Stream"),
    ("phpjax/methods/php.py", "from ..tasks import event"),
    ("phpjax/methods/__init__.py", "from ..encoders import vit"),
    ("phpjax/tasks/event.py", "from data_pipelines import schema"),
    ("phpjax/tasks/event.py", "from phpjax.benchmarks import Benchmark"),
    ("phpjax/figures.py", "from phpjax import benchmarks"),
    ("phpjax/benchmarks/ave.py", "from phpjax import results"),
    ("phpjax/benchmarks/ave.py", "from phpjax.methods import php"),
    ("phpjax/metrics/ave.py", "import jax.numpy as jnp"),
    ("phpjax/metrics/deep/ave.py", "import scipy"),
    ("phpjax/encoders/vit.py", "import torch"),
    ("data_pipelines/loader.py", "import jax"),
    ("data_pipelines/toybox/scene.py", "from phpjax import metrics"),
    ("configs/base.py", "import jax.numpy"),
    ("configs/base.py", "from phpjax.methods import METHODS"),
    ("phpjax/new_module.py", "import numpy"),
  ],
)
def test_a_crossing_is_found(tmp_path, file, text):
  _write(tmp_path, file, text)
  (line,) = violations(tmp_path)
  assert line.startswith(file)


def test_what_is_allowed_passes(tmp_path):
  _write(tmp_path, "phpjax/train.py", "import jax\nfrom data_pipelines import ave\nfrom phpjax import model")
  _write(tmp_path, "phpjax/methods/php.py", "from .prompts import Prefix\nfrom phpjax.methods import base")
  _write(tmp_path, "phpjax/optimizer.py", "import optax\nfrom phpjax.partition import labels")
  _write(tmp_path, "phpjax/sources.py", "import torch")
  _write(tmp_path, "phpjax/convert.py", "from phpjax import encoders, sources")
  _write(tmp_path, "phpjax/__init__.py", "def load():\n  from phpjax import predict\n")
  _write(tmp_path, "phpjax/metrics/ave.py", "import math\nimport numpy\nfrom phpjax.metrics import rows")
  assert violations(tmp_path) == []


def test_nothing_is_imported_by_string():
  found = []
  for _, path in sources(ROOT):
    for node in ast.walk(ast.parse(path.read_text())):
      if not isinstance(node, ast.Call):
        continue
      if ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
  assert found == []


def test_files_and_functions_stay_short():
  found = []
  for _, path in sources(ROOT):
    text = path.read_text()
    if text.count("\n") > 400:
      found.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines, at most 400")
    for node in ast.walk(ast.parse(text)):
      is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
      if is_function and node.end_lineno - node.lineno >= 60:
        found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} is longer than 60 lines")
  assert found == []
