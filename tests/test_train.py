"""What `phpjax.train` and `phpjax.run` do around a run, without training one."""

import contextlib
import copy
import types

import pytest
from command import tiny_toybox  # noqa: F401  fixture

from configs import linear_probe
from phpjax import run, train, workdir
from data_pipelines import DataError

STALE = {"ave": {"test": {"name": "of the clips that were there", "scores": {"segment_accuracy": 0.5}}}}


def test_evaluating_again_scores_the_trivial_predictor_on_the_clips_of_now(tmp_path, monkeypatch):
  """Both are scored on the clips that can be read, which may be others than when the run trained."""
  history = {**run.new_history(), "matrix": [[0.5]], "per_task": [{"after": "ave"}], "trivial": STALE, "evaluated": STALE}
  before = copy.deepcopy(history)
  fake = types.SimpleNamespace(history=history, names=["ave"], learned={"ave": 1}, live=None)

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


@pytest.mark.parametrize(("num_workers", "share"), [(0, 1), (1, 1), (4, 4)])
def test_workers_share_the_memory_for_clips(toybox, num_workers, share):
  """Each holds a cache of its own."""
  config = linear_probe.get_config("tiny")
  config.tasks, config.data.root = ("ave",), str(toybox)
  config.data.cache_gb, config.data.num_workers = 0.4, num_workers
  with run.open_run(config, None) as opened:
    assert opened.clips.max_bytes == int(0.4e9 / share)
