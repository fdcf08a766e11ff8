"""What a finished run writes: bad clips, labels for the trivial predictor, figures that fail, versions, planned memory."""

import functools
import json
import pathlib
import shutil
import types

import fabricate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from ml_collections import ConfigDict

import phpjax
from data_pipelines import DATASETS, DataError, Media
from data_pipelines.base import ClipCache
from phpjax import figures, results
from phpjax.benchmarks import BENCHMARKS

MEDIA = Media(image_size=16, sample_rate_hz=8000)
EVALUATED = ("test", "unseen")


class Told:
  """A display that remembers."""

  def __init__(self) -> None:
    self.notes, self.evaluations = [], []

  def note(self, text: str) -> None:
    self.notes.append(text)

  def evaluation(self, name: str, done: int, total: int) -> None:
    self.evaluations.append((name, done, total))


class FakeRun:
  """What phpjax.results reads of a run; a new one is a process that has read nothing yet."""

  def __init__(
    self,
    root: pathlib.Path,
    folder: pathlib.Path,
    *,
    policy: str = "skip",
    eval_batch_size: int = 2,
    names: tuple[str, ...] = tuple(BENCHMARKS),
    **changes: int,
  ) -> None:
    self.names, self.folder, self.progress = list(names), folder, Told()
    views = {"questions_per_clip": 2, "labelled_seconds_only": True}
    data = {"num_threads": 2, "toybox": "", "evaluation_split": "test", **views, **changes}
    fields = {"task_id": "given", "eval_batch_size": eval_batch_size, "data": data, "protocol": {"avvp": "released"}}
    self.config = ConfigDict(fields)
    self.datasets = {name: BENCHMARKS[name].open(root, self.config.data) for name in names}
    self.stop, self.should_stop = False, lambda: False
    self.history, self.learned = {"trivial": {}, "evaluated": {}, "validation": {}}, {}
    self.evaluation_splits, self.decoded, self.data_identity = EVALUATED, [], {"ave train": "2 rows, 0123456789ab"}
    infos = {name: BENCHMARKS[name].describe(name, data) for name, data in self.datasets.items()}
    self.experiment = types.SimpleNamespace(infos=infos, method=types.SimpleNamespace(frozen=False, needs_query=False))
    self.source = functools.cache(functools.partial(self._source, policy))
    for dataset in self.datasets.values():
      dataset.decode_clip = functools.partial(self._decode, dataset.decode_clip)

  def _source(self, policy: str, name: str, split: str):
    source = self.datasets[name].examples(split, MEDIA, on_bad_clip=policy, cache=ClipCache())
    return BENCHMARKS[name].view(source, split, self.config.data)

  def _decode(self, decode, record, media):
    self.decoded.append(record.clip)
    return decode(record, media)

  def selection_split(self, name: str) -> str | None:
    return "val" if name in self.history["validation"] else None

  def num_epochs(self, name: str) -> int:
    return 3

  def used_splits(self, name: str) -> list[str]:
    return [split for split in ("train", *EVALUATED) if split in self.datasets[name].splits()]

  def read_all(self) -> None:
    """What learning and evaluating everything reads."""
    for name in self.datasets:
      for split in self.used_splits(name):
        source = self.source(name, split)
        [source[i] for i in range(len(source))]

  def predictor(self, name: str):
    return lambda batch: {"scores": jnp.asarray(batch["label"]) * batch["mask"][:, None].astype(np.int32)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A data root with all benchmarks."""
  root = tmp_path_factory.mktemp("whole")
  for name, dataset in DATASETS.items():
    fabricate.MAKERS[name](root / dataset.folders[0])
  names = "xyz"  # two more clips of AVS, so that one may be bad
  s4 = root / "AVSBench" / "Single-source" / "s4_data"
  rows = [f"{name},0,dog_barking,train" for name in names]
  with (s4.parent / "s4_meta_data.csv").open("a") as file:
    file.write("\n".join(rows) + "\n")
  for kind in ("visual_frames", "gt_masks"):
    for name in names:
      folder = s4 / kind / "train" / "dog_barking"
      shutil.copytree(folder / "train_clip_0", folder / name)
      for path in (folder / name).iterdir():
        path.rename(path.with_name(path.name.replace("train_clip_0", name)))
  for name in names:
    wave = s4 / "audio_wav" / "train" / "dog_barking" / "train_clip_0.wav"
    shutil.copy(wave, wave.with_name(f"{name}.wav"))
  return root


BAD = {
  "ave": {"train": ["-bbbbbbbbb_"], "test": [], "unseen": []},
  "avvp": {"train": [], "test": ["-bbbbbbbbb__10_20"]},
  "avs": {"train": ["y"], "test": []},
  "avqa": {"train": ["00000001"], "test": []},
  "ms3": {"train": [], "test": []},
}


@pytest.fixture(scope="module")
def damaged(whole, tmp_path_factory):
  """The same with one bad clip in each."""
  root = tmp_path_factory.mktemp("damaged") / "data"
  shutil.copytree(whole, root)
  for path in ("AVE/-bbbbbbbbb_.mp4", "LLP/video/-bbbbbbbbb_.mp4", "MUSIC-AVQA/video/00000001.mp4",
               "AVSBench/Single-source/s4_data/gt_masks/train/dog_barking/y/y_1.png"):  # fmt: skip
    (root / path).write_bytes(b"")
  return root


# -- bad clips ---------------------------------------------------------------------------------------------------


def test_bad_clips_are_listed_by_task_and_split(damaged, tmp_path):
  run = FakeRun(damaged, tmp_path)
  run.read_all()
  before = len(run.decoded)
  assert results.data_summary(run)["bad_clips"] == BAD
  assert len(run.decoded) == before and not run.progress.evaluations, "what is known is not read again"


@pytest.mark.parametrize("seen", [(), (("ave", 1), ("avqa", 0))])
def test_a_continued_run_lists_the_same(damaged, tmp_path, seen):
  run = FakeRun(damaged, tmp_path)
  for name, index in seen:
    run.source(name, "train")[index]
  assert results.data_summary(run)["bad_clips"] == BAD
  assert ("ave test (search for bad clips)", 1, 1) in run.progress.evaluations
  assert set(run.decoded) == {r.clip for d in run.datasets.values() for s in ("train", *EVALUATED) if s in d.splits()
                              for r in d.records(s)}, "val is not touched"  # fmt: skip


def test_where_bad_clips_stop_a_run_nothing_is_opened_to_find_them(whole, tmp_path):
  run = FakeRun(whole, tmp_path, policy="error")
  found = results.data_summary(run)["bad_clips"]
  assert found == {name: {split: [] for split in splits} for name, splits in BAD.items()} and run.decoded == []


# -- what an evaluation says -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
def test_an_evaluation_says_what_it_scored_and_what_a_trivial_predictor_reaches(damaged, tmp_path, name):
  run, split = FakeRun(damaged, tmp_path), "train" if name != "avvp" else "test"
  run.evaluation_splits = (split,)
  trivial = results.trivial_of(run, name)[split]
  scores = {score: 0.25 for score in trivial["scores"]}
  line = results.statement(run, name, split, scores, 1)
  reached = 100 * trivial["scores"][BENCHMARKS[name].main]
  assert line.startswith(f"{name} {split}: {BENCHMARKS[name].main} 25.0 (trivial {reached:.1f})") and "\n" not in line
  assert f"; trivial predictor: {trivial['name']}; protocol: " in line
  records = run.datasets[name].records(split)
  clips, bad = len({record.clip for record in records}), len(BAD[name][split])
  assert bad == (name != "ms3") and f"; 1 of {len(records)} rows scored, {clips - bad} of {clips} clips read; " in line
  assert ("released, F of each clip" in line) == ("released_accuracy_repeated 25.0" in line) == (name == "avvp")
  [kept] = results.data_summary(run)["evaluated"][name].values()
  protocol = line.split("protocol: ")[1]
  assert kept == {"protocol": protocol, "rows": len(records), "scored_rows": 1, "clips": clips, "left_out_clips": bad}


def test_trivial_predictors_are_found_once_and_on_every_evaluated_split(whole, tmp_path, monkeypatch):
  run = FakeRun(whole, tmp_path)
  found = {name: results.trivial_of(run, name) for name in BENCHMARKS}
  assert {name: set(splits) for name, splits in found.items()} == {
    name: set(BAD[name]) - {"train"} for name in BENCHMARKS
  }  # fmt: skip
  monkeypatch.setattr(results, "labels_of", None)
  assert {name: results.trivial_of(run, name) for name in BENCHMARKS} == found
  for name, splits in found.items():
    for split in splits.values():
      assert set(BENCHMARKS[name].shown("released")) <= set(split["scores"]) and split["name"]


@pytest.fixture
def classes(tmp_path):
  """A run of Tux-21 on fabricated stamps: 6 classes in 3 tasks, of which it learns the second and the first."""
  for at, name in enumerate(("clothes", "food/fruit", "household", "sports", "town", "space/planets")):
    fabricate.make_tux21(tmp_path / "stamps", classes=(name,), pictures=8 + 4 * (at % 4))
  names, changes = ("tux21_2", "tux21_1"), {"num_class_tasks": 3, "class_seed": 0}
  return FakeRun(tmp_path, tmp_path, policy="error", names=names, **changes)


def test_the_trivial_predictor_of_a_growing_label_set_is_one_class_for_all_tasks_of_the_run(classes):
  rows = {name: [data.class_of(record) for record in data.records("test")] for name, data in classes.datasets.items()}
  assert list(map(len, rows.values())) == [5, 9] and rows["tux21_1"].count("sports") == 5, "which is most of all 14"
  assert classes.datasets["tux21_1"].classes == ("household", "sports")
  found = {name: results.trivial_of(classes, name)["test"] for name in classes.names}
  assert {one["name"] for one in found.values()} == {"class 2 of task 2 for the clips of all tasks"}
  assert {name: one["scores"]["accuracy"] for name, one in found.items()} == {"tux21_2": 0, "tux21_1": 5 / 9}


def test_a_growing_label_set_is_scored_over_all_clips_too(classes):
  """7 of 10 clips in the end: 2 of 5 and 5 of 5; the weights are the rows that were scored."""
  evaluated = {name: {"test": {"scored_rows": 5}, "unseen": {"scored_rows": 99}} for name in classes.names}
  history = {"evaluated": evaluated, "matrix": [[0.8, None], [0.4, 1.0]]}
  found = results.pooled(history, classes.names, "test", {"tux21_2": 0.0, "tux21_1": 0.6})
  assert found == {"pooled": {"last": 0.7, "average": 0.75, "curve": [0.8, 0.7], "trivial": 0.3}}
  evaluated["tux21_1"]["test"]["scored_rows"] = 15
  found = results.pooled(history, classes.names, "test", {"tux21_2": 0.0, "tux21_1": 0.6})
  assert found["pooled"]["curve"] == pytest.approx([0.8, 17 / 20]) and found["pooled"]["trivial"] == pytest.approx(9 / 20)
  assert results.pooled(history, ["tux21_2", "ave"], "test", {}) == {}, "they share no label set"


def test_which_split_chose_the_model_is_said(whole, tmp_path):
  run = FakeRun(whole, tmp_path)
  run.learned, run.history["validation"] = {"ave": 1, "avs": 2, "avvp": 3}, {"ave": [0.2, 0.5, 0.5], "avs": [0.5, 0.2, 0.4]}
  found = results.data_summary(run)
  assert found["evaluation_split"] == "test" and found["identity"] == run.data_identity
  assert found["model_selection"] == {
    "ave": {"split": "val", "epoch": 3, "epochs": 3, "scores": [0.2, 0.5, 0.5]},  # the later one of equals
    "avs": {"split": "val", "epoch": 1, "epochs": 3, "scores": [0.5, 0.2, 0.4]},
    "avvp": {"split": None, "epoch": 3, "epochs": 3, "scores": []},
  }
  said = results.selection_of(run)
  assert said == "epoch chosen on val (ave, avs); no split chose it, the last of a fixed number of epochs counts (avvp)"


# -- labels of the trivial predictor -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
def test_labels_are_those_of_the_rows_that_the_method_sees(damaged, tmp_path, name):
  """For questions, those of the rows of the file; for all others those of the examples."""
  for split in ("train", "test"):
    run = FakeRun(damaged, tmp_path)
    found = list(results.labels_of(run, name, split))
    source = run.source(name, split) if BENCHMARKS[name].labels_are_media else run.source(name, split).rows
    seen = [example for example in (source[i] for i in range(len(source))) if example["mask"]]
    assert len(found) == len(seen) == len(source) - len([r for r in source.rows.records if r.clip in BAD[name][split]])
    for one, example in zip(found, seen, strict=True):
      assert set(one) <= set(example) - {"visual", "audio"} and "label" in one
      for key, value in one.items():
        np.testing.assert_array_equal(value, example[key])
    gathered = BENCHMARKS[name].test_labels(iter(found))
    assert set(gathered) == set(BENCHMARKS[name].label_keys) and {len(x) for x in gathered.values()} == {len(found)}


def test_masks_are_read_with_progress_and_let_their_clips_go(whole, tmp_path):
  run = FakeRun(whole, tmp_path)
  found = list(results.labels_of(run, "avs", "train"))
  assert run.progress.evaluations == [("avs train (trivial predictor)", done, 2) for done in (1, 2)]
  for row in found:
    assert set(row) == {"label", "label_mask"} and row["label"].shape == (1, 16, 16)
    held = row["label"] if row["label"].base is None else row["label"].base
    assert held.nbytes <= 2 * row["label"].nbytes, "of a batch of two no more than the masks is kept"


def test_other_labels_touch_no_media(whole, tmp_path):
  run = FakeRun(whole, tmp_path, policy="error")
  for name in ("ave", "avvp", "avqa"):
    assert len(list(results.labels_of(run, name, "train"))) == len(run.datasets[name].records("train"))
  assert run.decoded == []


def test_a_split_without_any_good_clip_is_one_clear_line(whole, tmp_path):
  root = tmp_path / "data"
  shutil.copytree(whole, root)
  (root / "AVE/ccccccccccc.mp4").unlink()
  with pytest.raises(DataError, match="no clip of ave test can be read"):
    next(results.labels_of(FakeRun(root, tmp_path), "ave", "test"))


# -- the end of a run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eval_batch_size", [1, 2, 4])
def test_examples_do_not_depend_on_the_batch_size(whole, tmp_path, eval_batch_size):
  run = FakeRun(whole, tmp_path, eval_batch_size=eval_batch_size)
  run.evaluation_splits = ("train",)
  found = results.examples(run, "avqa", 3)
  assert [row["id"] for row in found] == ["00000001/1", "va000002/3"]
  for row in found:
    np.testing.assert_array_equal(row["outputs"]["scores"], row["label"])


def test_bad_clips_are_no_examples(damaged, tmp_path):
  run = FakeRun(damaged, tmp_path)
  run.evaluation_splits = ("train",)
  assert [row["id"] for row in results.examples(run, "ave", 3)] == [fabricate.CLIP_IDS[0]]


@pytest.fixture
def ending(whole, tmp_path, monkeypatch):
  """(run, its final results, names of the figures that were drawn): figures draw nothing, results hold what `finish` reads."""
  drawn, run = [], FakeRun(whole, tmp_path)
  final = {"mean_accuracy": 0.5, "forgetting": 0.25, "data": {"bad_clips": {"ave": {"train": ["a", "b"], "test": ["c"]}}}}
  monkeypatch.setattr(results, "assemble", lambda run: final)
  monkeypatch.setattr(results, "examples", lambda run, name, count: [])
  for name in ("accuracy_matrix", "score_over_tasks", "ave_timelines", "avvp_timelines", "avs_overlays", "avqa_examples"):
    monkeypatch.setattr(figures, name, lambda *arguments: drawn.append(pathlib.Path(arguments[-1]).name))
  return run, final, drawn


def test_a_figure_that_fails_is_told_and_loses_nothing_else(ending, monkeypatch):
  run, final, drawn = ending

  def fail(*arguments):
    raise RuntimeError("no font\nfound")

  monkeypatch.setattr(figures, "avs_overlays", fail)
  monkeypatch.setattr(figures, "accuracy_matrix", fail)
  assert results.finish(run) == final == json.loads((run.folder / "results.json").read_text())
  assert drawn == ["score_over_tasks.png", "ave_timelines.png", "avvp_timelines.png", "avqa_examples.png"]
  failed = [note for note in run.progress.notes if "not drawn" in note]
  names = ("accuracy_matrix", "avs_overlays", "ms3_overlays")
  assert failed == [f"figure {name} is not drawn: RuntimeError: no font found" for name in names]


def test_results_are_written_last_and_bad_clips_are_counted(ending, monkeypatch):
  run, _, drawn = ending
  there = []
  monkeypatch.setattr(figures, "avqa_examples", lambda *_: there.append((run.folder / "results.json").exists()))
  results.finish(run)
  assert there == [False] and len(drawn) == 6
  [note] = [note for note in run.progress.notes if "left out" in note]
  assert note.startswith("3 clips") and "\n" not in note and str(run.folder / "results.json") in note


def test_an_interrupt_while_drawing_is_no_failed_figure(ending, monkeypatch):
  run, _, _ = ending

  def stop(*arguments):
    raise KeyboardInterrupt

  monkeypatch.setattr(figures, "ave_timelines", stop)
  with pytest.raises(KeyboardInterrupt):
    results.finish(run)
  assert not (run.folder / "results.json").exists()


def php_on(*names):
  """(experiment, parameters) of PHP, whose parts for class texts only event tasks use."""
  made, tasks = small.modules(), {name: small.task(name) for name in names}
  method = small.php(made)
  return types.SimpleNamespace(method=method, tasks=tasks), small.params_of(method, tasks, made)


def test_shared_parameters_that_no_task_uses_are_counted_apart():
  (experiment, params), (event, both) = php_on("avs"), php_on("avs", "ave")
  size = {key: sum(x.size for x in jax.tree.leaves(tree)) for key, tree in params["shared"].items()}
  found, whole = results.parameters(experiment, params), results.parameters(event, both)
  assert found["shared"] == size["adapters"] > 0 and found["unused"] == sum(size.values()) - size["adapters"] > 0
  learned = found["shared"] + found["per_task"]["avs"]
  assert found["trainable_fraction"] == pytest.approx(learned / (learned + found["frozen"]))
  assert whole["shared"] == sum(size.values()) and "unused" not in whole


@pytest.mark.parametrize("names", [("avs",), ("avs", "ave")])
def test_a_dry_run_counts_them_apart_too(names):
  experiment, params = php_on(*names)
  data = dict.fromkeys(names, types.SimpleNamespace(splits=tuple))
  trained = {"stages": (), "num_epochs": lambda name: 1}
  run = types.SimpleNamespace(config="", experiment=experiment, datasets=data, params=params, names=names, **trained)
  lines = [line for line in results.dry_run(run, lambda run, name: None).splitlines() if line.startswith("  used by no task")]
  unused = results.parameters(experiment, params).get("unused")
  assert [line.split()[-1] for line in lines] == ([f"{unused:,d}"] if unused else []) and bool(unused) == (len(names) == 1)


def test_versions_of_what_is_not_installed_are_none(monkeypatch):
  monkeypatch.setattr(results, "PACKAGES", ("numpy", "no-such-package"))
  found = results.versions()
  assert found["phpjax"] == phpjax.__version__ and found["numpy"] == np.__version__ and found["no-such-package"] is None


def test_donated_buffers_are_planned_once():
  x = jax.ShapeDtypeStruct((1000,), np.float32)
  kept, donated = (jax.jit(lambda x: x + 1, donate_argnums=d).lower(x).compile() for d in ((), (0,)))
  assert results.planned_bytes(kept) - results.planned_bytes(donated) == 4000
  assert results.planned_bytes(donated) >= 4000
