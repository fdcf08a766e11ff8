"""A run that is cut at any point and started again ends with the very numbers of one that was not.

In one process, with the jitted steps of the first run: what is tested is what a run keeps and finds again. Real processes and
signals: test_end_to_end.py and test_soak.py.
"""

import contextlib
import functools
import pathlib
import shutil

import numpy as np
import pytest
import small
from command import tiny_toybox  # noqa: F401  fixture
from ml_collections import ConfigDict
from runs import checkpoints, comparable, learned, logged, results

from data_pipelines import DataError
from phpjax import checkpoint, experiment, manifest, opening, run, signals, train
from phpjax.benchmarks import BENCHMARKS
from phpjax.errors import UserError
from phpjax.methods import METHODS
from phpjax.steps import Steps

# Cut when the given event happens for the n-th time. Of a run: 2 tasks, 2 epochs of 2 steps and a validation each; evaluation
# batches are of two rows, those of `val` one, of `test` and `unseen` two each. A method without gradients has no steps and no
# validation, at most a pass of two batches; one that learns on the first task only has such a pass on the second. LAST is the
# last of a method's tasks.
CUTS = {
  "within an epoch": ("step", 1),
  "after the last step of an epoch": ("step", 2),
  "in the evaluation of the first task": ("ave test", 1),
  "between two evaluations": ("ave test", 2),
  "within the second task": ("step", 5),
  "within a later epoch": ("step", 3),
  "after a better epoch": ("step", 7),
  "before a validation": ("LAST val", 1),
  "in the validation of a task that alone has one": ("ave val", 1),
  "within a pass": ("batch", 1),
  "in the last evaluation": ("LAST unseen", 1),
  "after the last task": ("finish", 1),
}


def tasks_of(method: str) -> tuple[str, ...]:
  """At most two that the method learns; two of one that learns on the first task only."""
  if METHODS[method].first_task_only:
    return "ave", "ave_classes_1"
  return tuple(name for name in ("ave", "avs", "avvp") if not METHODS[method].refuses(BENCHMARKS[name].task))[:2]


def cuts_of(method: str) -> list[str]:
  """The cuts whose events happen."""
  of = METHODS[method]
  all_learn, none_learns = of.learns and not of.first_task_only, not of.learns

  def happens(event: str, count: int) -> bool:
    steps = 8 if all_learn else 0 if none_learns else 4
    known = {"step": count <= steps, "LAST val": all_learn, "ave val": of.first_task_only, "batch": of.looks and not all_learn}
    return known.get(event, True)

  return [name for name, cut in CUTS.items() if happens(*cut)]


BY_DEFAULT = ("within an epoch", "in the evaluation of the first task", "after a better epoch", "after the last task")
CASES = [
  pytest.param(method, cut, marks=() if method == "php" and cut in BY_DEFAULT else pytest.mark.slow)
  for method in METHODS
  for cut in cuts_of(method)
]


class Cut(Exception):
  """The run is cut where it saves nothing any more."""


def config_of(method: str, toybox: pathlib.Path) -> ConfigDict:
  """Two tasks, if the method learns two, of two short epochs; four where they are learned at once, to as many steps."""
  c = small.config_of(method)
  c.tasks, c.num_epochs, c.data.root = tasks_of(method), 4 if METHODS[method].joint else 2, str(toybox)
  c.eval_batch_size, c.save_every_steps = 2, 3
  if "deep" in c.method:
    c.method.shallow, c.method.mid = (), ()
  return c


@pytest.fixture(scope="module")
def made():
  """(what builds an experiment, what makes its steps), each once for each method: all runs of a method have one config."""
  built, steps, build = {}, {}, experiment.build

  def build_once(config: ConfigDict, *args: object) -> experiment.Experiment:
    if (key := config.to_json()) not in built:
      built[key] = build(config, *args)
    return built[key]

  def steps_once(modules: dict, method: object, *args: object, **options: object) -> Steps:
    return steps.setdefault(repr(method), Steps(modules, method, *args, **options))

  return build_once, steps_once


@contextlib.contextmanager
def watched(
  monkeypatch: pytest.MonkeyPatch, made: tuple, event: str, count: int, *, kill: tuple = (), seen: list | None = None
):
  """Runs are asked to stop, as by a signal, when an event happens for the `count`-th time, or killed when `kill` does.

  `seen` gets all events.
  """
  seen = [] if seen is None else seen

  def happened(opened: run.Run, name: str) -> None:
    seen.append(name)
    if (name, seen.count(name)) == kill:
      raise Cut
    opened.stop |= name == event and seen.count(name) == count

  @contextlib.contextmanager
  def watched(*args: object):
    with opening.open_run(*args) as opened:
      step, evaluation = opened.progress.step, opened.progress.evaluation
      opened.progress.step = lambda *a, **k: (step(*a, **k), happened(opened, "step"))
      batch = opened.progress.batch
      opened.progress.batch = lambda *a, **k: (batch(*a, **k), happened(opened, "batch"))
      opened.progress.evaluation = lambda name, *a: (evaluation(name, *a), happened(opened, name))
      yield opened

  def finish(opened: run.Run) -> dict:
    if event == "finish":
      raise Cut
    return finish.before(opened)

  finish.before = train.results.finish
  with monkeypatch.context() as patched:
    patched.setattr(opening.experiment, "build", made[0])
    patched.setattr(opening, "Steps", made[1])
    patched.setattr(train, "open_run", watched)
    patched.setattr(train.results, "finish", finish)
    patched.setattr(train.results, "draw", lambda *args: None)
    yield


@pytest.fixture(scope="module")
def whole(made, toybox, tmp_path_factory):
  """method -> the workdir of a run that nothing cut, made once."""

  @functools.cache
  def make(method: str) -> pathlib.Path:
    folder = tmp_path_factory.mktemp(method) / "run"
    with pytest.MonkeyPatch.context() as patch, watched(patch, made, "never", 0):
      train.train_and_evaluate(config_of(method, toybox), folder)
    return folder

  return make


def not_finite(path: str, value: object) -> list[str]:
  """The paths of the numbers in JSON types and arrays that are not finite."""
  if isinstance(value, dict):
    return [found for key, x in value.items() for found in not_finite(f"{path}/{key}", x)]
  if isinstance(value, list):
    return [found for i, x in enumerate(value) for found in not_finite(f"{path}/{i}", x)]
  return [path] if isinstance(value, int | float | np.ndarray | np.generic) and not np.isfinite(value).all() else []


@pytest.mark.parametrize(
  "method",
  [pytest.param(name, marks=() if name == "php" or not of.learns else pytest.mark.slow) for name, of in METHODS.items()],
)
def test_after_two_tasks_every_parameter_state_loss_and_score_is_finite(method, whole):
  folder, tasks, of = whole(method), tasks_of(method), METHODS[method]
  found = {"results": results(folder), "losses": logged(folder), "learned": learned(folder)}
  assert not_finite("", found) == []
  scores = found["results"]["matrix"][-1]
  assert len(scores) == len(tasks) and None not in scores
  assert bool(found["losses"]) == of.learns and bool(found["learned"]) == (of.learns or of.looks)


def test_what_is_not_finite_is_found():
  odd = {"a": [1, {"b": float("nan")}], "c": np.array([1.0, np.inf]), "d": [None, "x", True], "e": np.float32(1)}
  assert not_finite("", odd) == ["/a/1/b", "/c"]


@pytest.mark.parametrize(("method", "cut"), CASES)
def test_a_run_that_was_cut_ends_where_one_that_was_not_does(method, cut, whole, made, toybox, tmp_path, monkeypatch):
  config, folder, reference = config_of(method, toybox), tmp_path / "run", whole(method)
  event, count = CUTS[cut]
  event = event.replace("LAST", config.tasks[-1])
  with watched(monkeypatch, made, event, count), pytest.raises((signals.Stopped, Cut)):
    train.train_and_evaluate(config, folder)
  assert not (folder / "results.json").exists()
  with watched(monkeypatch, made, "never", 0):
    train.train_and_evaluate(config, folder)
  assert comparable(folder) == comparable(reference)
  small.assert_same_bits(learned(folder), learned(reference))


def test_a_kill_within_an_evaluation_loses_no_task_that_was_scored(whole, made, toybox, tmp_path, monkeypatch):
  """After the second of two tasks: the first is scored and saved, the kill comes while the second is."""
  config, folder, reference = config_of("php", toybox), tmp_path / "run", whole("php")
  with watched(monkeypatch, made, "never", 0, kill=("avs test", 1)), pytest.raises(Cut):
    train.train_and_evaluate(config, folder)
  meta = checkpoint.read_meta(checkpoints(folder)[0])
  assert [(row["after"], row["task"]) for row in meta["history"]["per_task"]] == 2 * [("ave", "ave")] + 2 * [("avs", "ave")]
  assert meta["learned"].keys() == {"ave", "avs"} and not {"task_ave", "task_avs", "live"} & set(meta["items"])
  evaluated = []
  with watched(monkeypatch, made, "never", 0, seen=evaluated):
    train.train_and_evaluate(config, folder)
  assert "ave test" not in evaluated and "avs test" in evaluated and "avs unseen" in evaluated
  assert comparable(folder) == comparable(reference)
  small.assert_same_bits(learned(folder), learned(reference))


def test_a_kill_before_the_first_checkpoint_is_finished_costs_only_itself(whole, made, toybox, tmp_path, monkeypatch, capsys):
  """Its files are there, its manifest is not; the run begins again, and behind that number."""
  config, folder, reference = config_of("php", toybox), tmp_path / "run", whole("php")
  with watched(monkeypatch, made, *CUTS["within an epoch"]), pytest.raises(signals.Stopped):
    train.train_and_evaluate(config, folder)
  [first] = checkpoints(folder)
  assert first.name == "1"
  (first / manifest.FILE).unlink()
  with watched(monkeypatch, made, "never", 0):
    train.train_and_evaluate(config, folder)
  assert "the step was not finished" in capsys.readouterr().err
  assert comparable(folder) == comparable(reference) and not first.exists()
  small.assert_same_bits(learned(folder), learned(reference))


@pytest.mark.slow
def test_a_damaged_optimizer_of_the_best_epoch_is_not_needed(whole, made, toybox, tmp_path, monkeypatch):
  """A later step reads the parameters of that epoch alone."""
  config, folder, reference = config_of("php", toybox), tmp_path / "run", whole("php")
  with watched(monkeypatch, made, *CUTS["after a better epoch"]), pytest.raises(signals.Stopped):
    train.train_and_evaluate(config, folder)
  newest = checkpoints(folder)[0]
  best = newest.parent / str(checkpoint.read_meta(newest)["best"]["saved"])
  assert best != newest and (best / "live").is_dir()
  shutil.rmtree(best / "live")
  with watched(monkeypatch, made, "never", 0):
    train.train_and_evaluate(config, folder)
  assert comparable(folder) == comparable(reference)
  small.assert_same_bits(learned(folder), learned(reference))


# -- tasks that are inferred ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["linear_probe", pytest.param("slda", marks=pytest.mark.slow)])
def inferred(request, made, toybox, tmp_path_factory):
  """(config, workdir of a whole run) of two groups of classes, whose ends pass over all clips for their centroids."""
  config, folder = small.config_of(request.param, "tiny+ave_classes"), tmp_path_factory.mktemp("inferred") / "run"
  config.data.root, config.eval_batch_size = str(toybox), 2
  with pytest.MonkeyPatch.context() as patch, watched(patch, made, "never", 0):
    train.train_and_evaluate(config, folder)
  return config, folder


def test_a_signal_in_the_pass_that_ends_a_task_is_heard_there(inferred, made, tmp_path, monkeypatch):
  (config, reference), folder, passes = inferred, tmp_path / "run", []
  features = train.queries.features

  def asked(opened: run.Run, name: str, prompted: bool):
    passes.append(name)
    opened.stop |= passes == ["ave_classes_1", "ave_classes_2"] or len(passes) == 3  # of slda: within its statistics, or behind
    return features(opened, name, prompted)

  with watched(monkeypatch, made, "never", 0), monkeypatch.context() as patched, pytest.raises(signals.Stopped):
    patched.setattr(train.queries, "features", asked)
    train.train_and_evaluate(config, folder)
  meta = checkpoint.read_meta(checkpoints(folder)[0])
  assert list(meta["learned"]) == ["ave_classes_1"], "the second task is not written before it has its centroids"
  with watched(monkeypatch, made, "never", 0):
    train.train_and_evaluate(config, folder)
  assert comparable(folder) == comparable(reference)
  small.assert_same_bits(learned(folder), learned(reference))


@pytest.mark.slow
def test_a_clip_that_cannot_be_read_there_counts_nothing_twice(inferred, made, tmp_path, monkeypatch):
  (config, reference), folder = inferred, tmp_path / "run"
  centroids, calls = train.routing.centroids, []

  def once(rows):
    calls.append(len(rows))
    if len(calls) == 2:
      raise DataError("this clip cannot be read")
    return centroids(rows)

  refused = pytest.raises(UserError, match="cannot be read")
  with watched(monkeypatch, made, "never", 0), monkeypatch.context() as patched, refused:
    patched.setattr(train.routing, "centroids", once)
    train.train_and_evaluate(config, folder)
  with watched(monkeypatch, made, "never", 0):
    train.train_and_evaluate(config, folder)
  assert comparable(folder) == comparable(reference)
  small.assert_same_bits(learned(folder), learned(reference))
