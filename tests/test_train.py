"""What `phpjax.train` and `phpjax.run` do around a run, without training one."""

import contextlib
import copy
import types

import numpy as np
import pytest
from command import tiny_toybox  # noqa: F401  fixture

from configs import linear_probe
from data_pipelines import DataError
from phpjax import opening, run, sharding, train, workdir

STALE = {"ave": {"test": {"name": "of the clips that were there", "scores": {"segment_accuracy": 0.5}}}}


def test_evaluating_again_scores_the_trivial_predictor_on_the_clips_of_now(tmp_path, monkeypatch):
  """Both are scored on the clips that can be read, which may be others than when the run trained."""
  history = {**run.new_history(), "matrix": [[0.5]], "per_task": [{"after": "ave"}], "trivial": STALE, "evaluated": STALE}
  before = copy.deepcopy(history)
  fake = types.SimpleNamespace(history=history, names=["ave"], learned={"ave": 1}, live=None, params={"tasks": {"ave": {}}})
  fake.state = fake.params

  def scored(at, index: int) -> None:
    assert index == 0 and at.history["trivial"] == at.history["evaluated"] == {} and at.history["per_task"] == []
    at.history["trivial"]["ave"] = at.history["evaluated"]["ave"] = {"test": "now"}

  monkeypatch.setattr(train, "open_run", lambda config, folder: contextlib.nullcontext(fake))
  monkeypatch.setattr(train.resume, "restore", lambda found: True)
  monkeypatch.setattr(train.results, "selection", lambda found: {})
  monkeypatch.setattr(train, "evaluate_seen", scored)
  workdir.write_json(tmp_path / workdir.CONFIG, {})
  train.evaluate_again(None, tmp_path)
  found = workdir.read_json(tmp_path / "evaluation.json")
  assert found["trivial"] == found["evaluated"] == {"ave": {"test": "now"}}
  assert history == before, "what the checkpoint says of its training stays"


@pytest.mark.parametrize("number", [0, 1])
def test_a_clip_that_one_of_several_processes_cannot_read_is_told_with_what_is_lost(monkeypatch, number):
  """Where all can, or there is one, what was learned is saved."""
  saved = []
  fake = types.SimpleNamespace(checkpoints=types.SimpleNamespace(wait=lambda: None), stop=False)
  monkeypatch.setattr(train.resume, "save", saved.append)
  monkeypatch.setattr(train.jax, "process_count", lambda: 1 + number)
  with pytest.raises(DataError) as error, train.saved_if_stopped(fake):
    raise DataError("clip.mp4 cannot be read")
  told = "what came after the newest checkpoint is not saved: the same command continues there"
  assert str(error.value).startswith("clip.mp4 cannot be read") and str(error.value).endswith(told) == bool(number)
  assert len(saved) == 1 - number


@pytest.mark.parametrize(
  ("num_class_tasks", "tasks", "told"),
  [
    (21, None, ["tasks: 7 of the 21 groups of classes of tux21 (data.num_class_tasks), the others are not learned"]),
    (
      7,
      ("tux21_3", "ave"),
      ["tasks: 1 of the 7 groups of classes of tux21 (data.num_class_tasks), the others are not learned"],
    ),
    (7, None, []),
    (21, ("ave", "avs"), []),
  ],
)
def test_classes_that_no_task_learns_are_told_at_the_start(num_class_tasks, tasks, told):
  config, said = linear_probe.get_config("tux21"), []
  config.data.num_class_tasks, config.tasks = num_class_tasks, tasks or config.tasks
  method = types.SimpleNamespace(notes=lambda tasks: ["what the method says"])
  progress = types.SimpleNamespace(note=said.append, start=lambda total, done: None)
  experiment = types.SimpleNamespace(method=method, tasks={})
  fake = types.SimpleNamespace(
    config=config, position=run.Position(), stages=[], learned={}, live=None, experiment=experiment, progress=progress
  )
  train.announce(fake, found=False)
  assert said == [*told, "what the method says"]


OUTSIDE = {
  "encoders": lambda p, s: ({**p, "encoders": {**p["encoders"], "visual": {"w": p["encoders"]["visual"]["w"] + 0}}}, s),
  "tasks/ave/head": lambda p, s: ({**p, "tasks": {**p["tasks"], "ave": {**p["tasks"]["ave"], "head": np.ones(2)}}}, s),
  "tasks/ave/prompts": lambda p, s: ({**p, "tasks": {**p["tasks"], "ave": {"head": p["tasks"]["ave"]["head"]}}}, s),
  "state/tasks/ave": lambda p, s: (p, {**s, "tasks": {**s["tasks"], "ave": {"mean": np.zeros(2)}}}),
}


@pytest.mark.parametrize("path", [None, *OUTSIDE])
def test_a_method_that_changes_what_it_has_not_learned_is_named_and_nothing_is_saved(monkeypatch, path):
  task = lambda: {"prompts": np.zeros(2), "head": np.ones(2)}
  params = {"encoders": {"visual": {"w": np.ones(2)}}, "shared": {"a": np.ones(1)}, "tasks": {"ave": task(), "avs": task()}}
  state = {"shared": {"n": np.ones(1)}, "tasks": {"ave": {"mean": np.zeros(2)}, "avs": {"mean": np.zeros(2)}}}

  class Careless:
    def end_task(self, params, state, task, clips):
      own = {"head": np.zeros(2), "prompts": np.zeros(2)}
      params = {**params, "shared": {"a": np.zeros(1)}, "tasks": {**params["tasks"], "avs": own}}
      state = {"shared": {"n": np.zeros(1)}, "tasks": {**state["tasks"], "avs": {"mean": np.ones(2)}}}
      return OUTSIDE[path](params, state) if path else (params, state)

  made, saved = types.SimpleNamespace(method=Careless(), tasks={"ave": None, "avs": None}), []
  fake = types.SimpleNamespace(experiment=made, params=params, state=state, best=None, live=None, anchors={})
  fake.absorb, fake.features = lambda: None, lambda name, prompted: iter(())
  fake.members, fake.mesh = lambda name: [name], sharding.make_mesh((-1, 1))
  monkeypatch.setattr(train, "anchor_of", lambda run, name: {})
  monkeypatch.setattr(train.resume, "save", lambda run, learned: saved.append(learned))
  with pytest.raises(RuntimeError, match=f"Careless.end_task, after avs, .*{path}") if path else contextlib.nullcontext():
    train.finish_task(fake, "avs", fake.features)
  assert saved == ([] if path else [["avs"]])


@pytest.mark.parametrize(("num_workers", "share"), [(0, 1), (1, 1), (4, 4)])
def test_workers_share_the_memory_for_clips(toybox, num_workers, share):
  """Each holds a cache of its own."""
  config = linear_probe.get_config("tiny")
  config.tasks, config.data.root = ("ave",), str(toybox)
  config.data.cache_gb, config.data.num_workers = 0.4, num_workers
  with opening.open_run(config, None) as opened:
    assert opened.clips.max_bytes == int(0.4e9 / share)
