"""The methods without gradients against plain numpy: nearest class mean, streaming LDA, zero-shot; and what they refuse."""

import dataclasses
import io
import json
import types

import jax
import numpy as np
import pytest
import small
from command import tiny_toybox  # noqa: F401  fixture

from phpjax import bench, checks, compat, model, opening, partition, predict, progress, results, run, train
from phpjax.benchmarks import BENCHMARKS
from phpjax.encoders import Features, make_encoder
from phpjax.errors import UserError
from phpjax.methods import METHODS, NCM, SLDA, Sizes, TrainingClips, ZeroShot, make_method
from phpjax.methods.class_statistics import UNSEEN, Moments, standardisation
from phpjax.metrics import avvp

MADE = small.modules()
BACKBONE = small.backbone(MADE)
FROZEN = ("zero_shot", "ncm", "slda")
FAMILIES = ("ave_classes_N", "tux21_N")
CLIPS, T, C, E, WIDTH, PATCHES = 40, small.SECONDS, 3, 8, 16, 4
SHRINKAGE = 0.3


# -- the formulas, once more ---------------------------------------------------------------------------------------


def reference_inputs(rows, first):
  """Standardised by the first task's rows, as short as 1."""
  rows = rows.astype(np.float64)
  return (rows - rows[first].mean(0)) / (rows[first].std(0) + 1e-6) / np.sqrt(rows.shape[1])


def reference_means(inputs, labels, classes):
  return np.stack([inputs[labels == c].mean(0) for c in classes])


def reference_ncm(rows, labels, tasks, classes):
  """Cosine of rows of unit length to the means of `classes`, the first task standardising."""
  inputs = reference_inputs(rows, tasks == 0)
  inputs /= np.linalg.norm(inputs, axis=1, keepdims=True)
  means = reference_means(inputs, labels, classes)
  return inputs @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T


def reference_slda(rows, labels, tasks, classes, learned):
  """Scores of `classes` once the tasks up to `learned` are learned: the covariance is that of all of them."""
  inputs = reference_inputs(rows, tasks == 0)
  train = tasks <= learned
  means = reference_means(inputs, labels, np.arange(labels[train].max() + 1))
  centred = inputs[train] - means[labels[train]]
  covariance = (1 - SHRINKAGE) * centred.T @ centred / len(centred) + SHRINKAGE * np.eye(rows.shape[1]) * (centred**2).mean()
  weights = np.linalg.solve(covariance, means.T)
  return (inputs @ weights - (means.T * weights).sum(0) / 2)[:, classes]


# -- features of a task --------------------------------------------------------------------------------------------


def drawn(clips, seed):
  """{modality: Features} of clips with massive channels, as real encoders have them, and labels [clips, T]."""
  rng, features = np.random.default_rng(seed), {}
  labels = rng.integers(0, C, (clips, T)).astype(np.int32)
  labels.reshape(-1)[:C] = np.arange(C)
  for m, special in (("visual", 1), ("audio", 2)):
    shift = np.random.default_rng(7).normal(0, 5, E) + seed  # every task lies elsewhere
    toward = np.random.default_rng(8).normal(0, 1, (C, E))
    pooled = rng.normal(0, 1, (clips * T, E)) * np.linspace(0.1, 20, E) + shift + toward[labels.reshape(-1)]
    tokens = rng.normal(0, 1, (clips * T, special + PATCHES, WIDTH)) + np.linspace(-2, 2, WIDTH)
    features[m] = Features(pooled.astype(np.float32), tokens.astype(np.float32), num_special=special)
  return features, labels


def raw_rows(features, *, patch_mean=True):
  """What the docstring says a sample is, in float64."""
  parts = []
  for m in ("visual", "audio"):
    parts.append(features[m].pooled)
    if patch_mean:
      parts.append(features[m].tokens[:, features[m].num_special :].astype(np.float64).mean(1))
  return np.concatenate(parts, 1).astype(np.float64)


def stream(features, labels, batch_size, order):
  """`features` of `end_task`: batches in an order; the last is padded with garbage."""

  def each(prompted):
    assert prompted is False, "frozen features have no prompts"
    for start in range(0, len(order), batch_size):
      rows = order[start : start + batch_size]
      mask = np.float32([1] * len(rows) + [0] * (batch_size - len(rows)))
      rows = np.concatenate([rows, np.zeros(batch_size - len(rows), int)])
      take = lambda x, rows=rows: x.reshape(-1, T, *x.shape[1:])[rows].reshape(-1, *x.shape[1:])
      yield jax.tree.map(take, features), {"mask": mask, "label": labels[rows]}

  return each


def clips_of(features):
  """What `end_task` gets, of which these methods ask for the features alone."""
  return TrainingClips(features, squared_gradients=None)


def named(name):
  return dataclasses.replace(small.task("ave"), name=name)


def learned(method, drawings, batch_size=CLIPS, seed=None):
  """State after the tasks with these features, in whatever order of clips."""
  state = {"shared": method.init_state({}), "tasks": {}}
  for i, (features, labels) in enumerate(drawings):
    task, order = named(f"task {i}"), np.arange(len(labels))
    if seed is not None:
      order = np.random.default_rng(seed + i).permutation(order)
    state["tasks"][task.name] = {"head": method.init_head_state(task), "method": {}}
    before = jax.device_get(state["tasks"])
    params, state = method.end_task({"tasks": {}}, state, task, clips_of(stream(features, labels, batch_size, order)))
    assert params == {"tasks": {}}
    for old in list(before)[:-1]:
      small.assert_same_bits(state["tasks"][old], before[old])
  return state


def scores_of(method, state, name, features):
  """`start` and `predict` as the engine calls them, jitted -> AVE's scores [B * T, C]."""
  task = named(name)

  @jax.jit
  def call(state, features):
    of_task = {"shared": state["shared"], "task": state["tasks"][name]}
    how = {"query": None, "mask": None, "rng": None, "train": False}
    context = method.start(task, {}, {}, of_task, None, {}, **how)
    batch = {"mask": np.ones(len(features["visual"].pooled) // T)}
    own = of_task["task"]["head"]
    return method.predict(task, {}, {}, own, features, context, {}, batch, rng=None, train=False)[0]

  outputs = call(state, features)
  return np.asarray(task.scores(outputs)["scores"]).reshape(-1, C)


@pytest.fixture(scope="module")
def drawings():
  """Two tasks, their joined rows, labels (0..2, then 3..5) and tasks."""
  made = [drawn(CLIPS, 0), drawn(CLIPS + 5, 1)]
  rows = np.concatenate([raw_rows(f) for f, _ in made])
  labels = np.concatenate([y.reshape(-1) + C * i for i, (_, y) in enumerate(made)])
  tasks = np.concatenate([np.full(y.size, i) for i, (_, y) in enumerate(made)])
  return made, rows, labels, tasks


def test_nearest_class_mean_by_hand(drawings):
  made, rows, labels, tasks = drawings
  state, method = learned(NCM(BACKBONE), made, 7), NCM(BACKBONE)
  for i, (features, _) in enumerate(made):
    expected = reference_ncm(rows, labels, tasks, range(C * i, C * i + C))[tasks == i]
    found = scores_of(method, state, f"task {i}", features)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found).max() <= 1 + 1e-6 and (found.argmax(1) == labels[tasks == i] - C * i).mean() > 0.4


def test_streaming_lda_by_hand(drawings):
  made, rows, labels, tasks = drawings
  method, tolerance = SLDA(BACKBONE), {"rtol": 1e-4, "atol": 1e-4}
  after_one, after_two = learned(method, made[:1], 7), learned(method, made, 7)
  old = scores_of(method, after_one, "task 0", made[0][0])
  np.testing.assert_allclose(old, reference_slda(rows, labels, tasks, range(C), 0)[tasks == 0], **tolerance)
  for i, (features, _) in enumerate(made):
    expected = reference_slda(rows, labels, tasks, range(C * i, C * i + C), 1)[tasks == i]
    np.testing.assert_allclose(scores_of(method, after_two, f"task {i}", features), expected, **tolerance)
  assert np.abs(scores_of(method, after_two, "task 0", made[0][0]) - old).max() > 1e-2, "the covariance has grown"
  assert (old.argmax(1) == labels[tasks == 0]).mean() > 0.5


@pytest.mark.parametrize("cls", [NCM, SLDA])
def test_batches_and_their_order_do_not_matter(cls, drawings):
  made, *_ = drawings
  whole = small.flat(learned(cls(BACKBONE), made))
  for batch_size, seed in ((1, 0), (7, 1), (64, 2)):
    parts = small.flat(learned(cls(BACKBONE), made, batch_size, seed))
    assert set(parts) == set(whole)
    for path, x in whole.items():
      np.testing.assert_allclose(parts[path], x, rtol=1e-5, atol=1e-5 * np.abs(x).max(), err_msg=path)


@pytest.mark.parametrize(("options", "width"), [({}, 48), ({"patch_mean": False}, 16), ({"modalities": ("audio",)}, 24)])
def test_a_sample_is_what_the_options_say(options, width):
  features, _ = drawn(4, 3)
  method, task = NCM(BACKBONE, **options), small.task("ave")
  assert method.width == width == method.init_state({})["mean"].size
  found = method.samples(task, features, {"mask": np.ones(4)})
  expected = raw_rows(features, patch_mean=options.get("patch_mean", True))
  np.testing.assert_allclose(found, expected[:, 24:] if "modalities" in options else expected, rtol=1e-5, atol=1e-5)
  clips = types.SimpleNamespace(samples="clips")  # a task of whole clips: the mean over their seconds
  found = method.samples(clips, features, {"mask": np.ones(4)})
  np.testing.assert_allclose(found, np.asarray(method.samples(task, features, {"mask": np.ones(4)})).reshape(4, T, -1).mean(1))


def test_a_task_of_whole_clips_needs_a_label_for_each(drawings):
  (features, _), *_ = drawings[0]
  labels = np.arange(CLIPS, dtype=np.int32) % C
  task = types.SimpleNamespace(name="task", num_classes=C, samples="clips")
  state = {"shared": NCM(BACKBONE).init_state({}), "tasks": {"task": {"head": {}, "method": {}}}}
  _, state = NCM(BACKBONE).end_task({}, state, task, clips_of(stream(features, labels, 7, np.arange(CLIPS))))
  rows = raw_rows(features).reshape(CLIPS, T, -1).mean(1)
  inputs = reference_inputs(rows, slice(None))
  inputs /= np.linalg.norm(inputs, axis=1, keepdims=True)
  own = state["tasks"]["task"]["head"]
  np.testing.assert_allclose(own["means"], reference_means(inputs, labels, range(C)), atol=1e-6)
  assert own["counts"].tolist() == np.bincount(labels).tolist() and state["shared"]["count"] == CLIPS


def test_a_class_without_a_sample_is_never_chosen(drawings):
  (features, labels), *_ = drawings[0]
  without = np.where(labels == 1, 2, labels)
  for cls in (NCM, SLDA):
    scores = scores_of(cls(BACKBONE), learned(cls(BACKBONE), [(features, without)]), "task 0", features)
    assert np.all(scores[:, 1] == UNSEEN) and np.isfinite(scores).all() and set(scores.argmax(1)) == {0, 2}


def test_one_sample_per_class_leaves_the_nearest_mean():
  """There is no scatter then, and a covariance of nothing must not end in NaN."""
  features, labels = drawn(2, 5)
  labels = np.int32([[0, 1], [2, 2]])
  state = learned(SLDA(BACKBONE), [(features, labels)])
  assert np.isfinite(np.concatenate([x.reshape(-1) for x in small.flat(state).values()])).all()
  assert scores_of(SLDA(BACKBONE), state, "task 0", features).argmax(1)[:2].tolist() == [0, 1]


def test_padding_and_labels_outside_are_not_counted():
  moments = Moments.none(2, 3, products=True)
  rows, nan = np.ones((2, 3), np.float32), np.full((1, 3), np.nan, np.float32)
  moments.add(np.concatenate([rows, nan]), np.array([0, 1, 99]), np.float32([1, 1, 0]))
  assert moments.counts.tolist() == [1, 1] and np.isfinite(moments.products).all() and np.allclose(moments.scatter, 0)
  with pytest.raises(IndexError):
    moments.add(rows, np.array([0, 2]), np.ones(2))
  found = standardisation([(np.concatenate([rows, nan]), np.zeros(3), np.float32([1, 1, 0]))])
  assert found["mean"].tolist() == [1, 1, 1] and np.allclose(found["std"], 1e-6)


# -- zero-shot -----------------------------------------------------------------------------------------------------


def zero_shot_outputs(name, protocol="official"):
  """-> (outputs by forward, class_features and predict; cosines at the temperatures [B, T, C or C + 1] by hand; task)."""
  task = small.task(name, **({"protocol": protocol} if name == "avvp" else {}))
  method, constants, batch = ZeroShot(BACKBONE), small.class_constants(name), small.inputs(2)
  if protocol == "released":
    constants = {k: v[:C] for k, v in constants.items()}
  params = small.params_of(method, {name: task}, MADE)
  trainable, frozen = partition.split(params, name, method.uses(task))
  assert jax.tree.leaves(trainable) == []

  @jax.jit
  def call(frozen, constants, batch):
    features, context, _ = model.forward(MADE, method, task, trainable, frozen, {}, None, batch, rng=None, train=False)
    classes = method.class_features(MADE, trainable, frozen, constants)
    return features, method.predict(task, trainable, frozen, {}, features, context, classes, batch, rng=None, train=False)[0]

  features, outputs = call(frozen, constants, batch)
  texts = {"visual": MADE["text"].apply({"params": params["encoders"]["text"]}, constants["class_ids"]).pooled}
  texts["audio"], logits = constants["audio_text"], {}
  unit = lambda x: np.asarray(x, np.float64) / np.linalg.norm(np.asarray(x, np.float64), axis=-1, keepdims=True)
  for m in ("visual", "audio"):
    cosine = unit(features[m].pooled) @ unit(texts[m]).T
    logits[m] = (np.exp(params["encoders"][m]["logit_scale"]) * cosine).reshape(2, T, -1)
  return outputs, logits, task


def test_zero_shot_sums_both_modalities_on_ave():
  outputs, logits, task = zero_shot_outputs("ave")
  scores = task.scores(outputs)["scores"]
  assert scores.shape == (2, T, C), "background is one of AVE's classes"
  np.testing.assert_allclose(scores, logits["visual"] + logits["audio"], rtol=1e-4, atol=1e-4)


def test_zero_shot_says_what_has_its_share_of_the_softmax_on_avvp():
  outputs, logits, task = zero_shot_outputs("avvp")
  found = jax.device_get(task.scores(outputs))
  for m in ("visual", "audio"):
    share = np.exp(logits[m] - logits[m].max(-1, keepdims=True))
    share = (share / share.sum(-1, keepdims=True))[..., :-1]  # without background, which stands last
    np.testing.assert_allclose(outputs[m], np.exp(-1) * np.log(share) + 0.5, rtol=1e-4, atol=1e-4)
    above, clear = share > np.exp(-np.e / 2), np.abs(share - np.exp(-np.e / 2)) > 1e-3
    assert share.shape == (2, T, C) and np.array_equal((found[m] >= 0.5)[clear], above[clear])
    assert not (avvp.decide(found[m], found["clip"]) & ~above & clear).any()
    assert above.any() and not above.all()


def test_zero_shot_has_no_background_where_the_protocol_has_none():
  outputs, logits, _ = zero_shot_outputs("avvp", "released")
  np.testing.assert_allclose(outputs["audio"], logits["audio"], rtol=1e-4, atol=1e-4)


def listening(asked):
  """A text tower that remembers what it was asked."""
  return types.SimpleNamespace(
    tokenizer=lambda texts, length: asked.append(list(texts)) or np.ones((len(texts), 4), np.int32), params={},
    module=types.SimpleNamespace(apply=lambda params, ids: Features(ids[:, :1], ids), context_length=9),
  )  # fmt: skip


def test_its_texts_are_fixed_and_its_own():
  asked, texts = [], ZeroShot(BACKBONE).templates()
  small.task("ave", classes=("Church_bell", "b", "background")).constants({"text": listening(asked)}, **texts)
  assert asked[0] == ["a photo of a Church bell.", "a photo of a b.", "a photo of a background."]
  assert asked[1][0] == "This is a sound of Church_bell."
  of_classes, asked[:] = small.task("ave_classes_1", classes=("Church_bell", "b", "c")), []
  assert of_classes.constants({"text": listening(asked)}) == {} == of_classes.constants({}, **texts) and not asked
  made = of_classes.constants({"text": listening(asked)}, **texts)
  assert {key: x.shape for key, x in made.items()} == {"visual_text": (3, 1), "audio_text": (3, 1)}
  assert [words[0] for words in asked] == ["a photo of a Church bell.", "This is a sound of Church_bell."]


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "fit"), [("zero_shot", ["ave", "avvp"]), ("ncm", ["ave"]), ("slda", ["ave"]), ("aper", ["ave"])]
)
def test_tasks_that_mean_nothing_are_refused_in_one_line(name, fit):
  config = small.config_of(name)
  assert list(config.tasks) == fit == [n for n, benchmark in BENCHMARKS.items() if not METHODS[name].refuses(benchmark.task)]
  assert checks.problems(compat.resolve(config)) == []
  config.tasks = tuple(BENCHMARKS)
  [line] = checks.problems(compat.resolve(config))
  gone = ", ".join(n for n in BENCHMARKS if n not in fit)
  assert line.startswith(f"method {name} cannot learn {gone}: ") and line.endswith(f"can learn {', '.join([*fit, *FAMILIES])}")
  assert "\n" not in line
  with pytest.raises(UserError, match="cannot learn"), opening.open_run(config, None):
    pass


@pytest.mark.parametrize(
  ("modality", "encoder"), [("visual", "dinov2_s14"), ("audio", "whisper_tiny"), ("audio", "ast_base"), ("text", "minilm_l6")]
)
def test_encoders_without_a_text_space_cannot_do_zero_shot(modality, encoder):
  other = dataclasses.replace(BACKBONE, **{modality: Sizes.of(make_encoder(encoder))})
  with pytest.raises(ValueError, match=f"method zero_shot compares .* share no space with text: {modality}"):
    make_method("zero_shot", other)
  for name in ("ncm", "slda"):
    make_method(name, other)


@pytest.mark.parametrize(
  ("name", "options", "words"),
  [
    ("slda", {"shrinkage": 0.0}, "shrinkage=0.0 must be above 0"),
    ("slda", {"shrinkage": 1.5}, "at most 1"),
    ("ncm", {"modalities": ()}, "names some of visual, audio"),
    ("ncm", {"modalities": ("visual", "visual")}, "each once"),
    ("slda", {"modalities": ("text",)}, "names some of visual, audio"),
    ("zero_shot", {"visual_text": "a photo"}, "visual_text needs one {}"),
  ],
)
def test_options_that_cannot_work_are_refused(name, options, words):
  with pytest.raises(ValueError, match=words):
    make_method(name, BACKBONE, **options)


def test_encoders_that_are_missing_or_of_other_sizes_are_named():
  with pytest.raises(ValueError, match="there is no encoder for audio"):
    make_method("ncm", dataclasses.replace(BACKBONE, audio=None))
  with pytest.raises(ValueError, match="needs encoders for text"):
    make_method("zero_shot", dataclasses.replace(BACKBONE, text=None))
  with pytest.raises(ValueError, match="audio features of size 12 with class texts of size 8"):
    make_method("zero_shot", dataclasses.replace(BACKBONE, audio=dataclasses.replace(BACKBONE.audio, embed_dim=12)))


@pytest.mark.parametrize("name", FROZEN)
def test_there_is_no_step_to_measure(name):
  with pytest.raises(UserError, match=f"method {name} takes no training step"):
    bench.measure_steps(small.config_of(name), [], {"only": None})


# -- runs ----------------------------------------------------------------------------------------------------------


def test_a_pass_tells_its_batches_and_the_time_left():
  now, out = [0.0], io.StringIO()
  with progress.Progress(stream=out, clock=lambda: now[0]) as display:
    display.start(40)
    display.task("ave", 0, 2, 20, unit="batches")
    for done in range(1, 21):
      now[0] += 6
      display.batch(done, 5.0)
  lines = out.getvalue().splitlines()
  assert lines[0] == "[1/2 ave] 20 batches to do" and len(lines) == 21
  assert lines[10] == "[1/2 ave] 5.0 examples/s  batch 10/20  left: 1:00, all tasks 3:00"


@pytest.mark.slow
def test_classes_that_come_in_groups_are_found_by_their_texts_and_no_training_clip_is_looked_at(toybox, tmp_path, monkeypatch):
  monkeypatch.setattr(train.queries, "features", lambda *args: pytest.fail("a training clip is looked at"))
  monkeypatch.setattr(train.results, "draw", lambda *args: None)
  config = small.config_of("zero_shot", "tiny+ave_classes")
  config.data.root = str(toybox)
  assert checks.problems(compat.resolve(config)) == [] and config.task_id == "inferred"
  final = train.train_and_evaluate(config, tmp_path / "run")
  assert final["tasks"] == ["ave_classes_1", "ave_classes_2"] and final["steps"] == 0 and "routing" not in final
  assert np.isfinite([x for row in final["matrix"] for x in row if x is not None]).all()
  opened = predict.load(tmp_path / "run")
  told = opened.predict("ave_classes_1", video=sorted((toybox / "AVE").glob("*.mp4"))[0]).to_dict()
  assert np.isfinite([x for x in jax.tree.leaves(told) if isinstance(x, float)]).all()


def test_encoders_of_tux21_share_no_space_with_its_class_names():
  lines = checks.problems(compat.resolve(small.config_of("zero_shot", "tux21")))
  assert [line for line in lines if line.startswith("method zero_shot")] == [
    "method zero_shot compares features with class texts, and these encoders share no space with text: visual, audio, text"
  ]


@pytest.fixture
def twice(monkeypatch, toybox):
  """SLDA on AVE, and on AVE again as if it were another task."""
  monkeypatch.setitem(BENCHMARKS, "later", BENCHMARKS["ave"])
  config = small.config_of("slda")
  config.tasks, config.data.root = ("ave", "later"), str(toybox)
  return config


def test_a_later_task_changes_the_covariance_and_no_part_of_an_older_one(twice, toybox, tmp_path, capsys):
  final = train.train_and_evaluate(twice, tmp_path / "run")
  assert final["steps"] == 0 and final["parameters"]["shared"] == 0 and set(final["parameters"]["per_task"].values()) == {0}
  nothing = {"split": None, "epoch": 0, "epochs": 0, "scores": []}
  assert final["data"]["model_selection"] == {"ave": nothing, "later": nothing}
  assert "model: no epoch is trained, there is none to choose" in capsys.readouterr().err
  assert final["matrix"][0][1] is None and all(0 <= x <= 1 for x in final["matrix"][1])
  assert final == json.loads((tmp_path / "run" / "results.json").read_text())
  folder = tmp_path / "run" / "checkpoints"
  steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
  first, last = (predict.open_step(folder, step)[1] for step in (steps[0], steps[-1]))
  small.assert_same_bits(first["task_ave"], last["task_ave"])
  assert first["state"]["count"] * 2 == last["state"]["count"] == 2 * 4 * 10
  np.testing.assert_allclose(last["state"]["scatter"], 2 * first["state"]["scatter"], rtol=1e-4, atol=1e-4)
  small.assert_same_bits(first["state"]["mean"], last["state"]["mean"])
  small.assert_same_bits(*(last[f"task_{name}"]["state"]["head"] for name in ("later", "ave")))
  opened = predict.load(tmp_path / "run")
  clip = sorted((toybox / "AVE").glob("*.mp4"))[0]
  assert len(opened.predict("ave", video=clip).to_dict()["seconds"]) == 10


@pytest.mark.parametrize("name", FROZEN)
def test_a_dry_run_counts_no_parameter(name, toybox):
  config = small.config_of(name)
  config.data.root = str(toybox)
  with opening.open_run(config, None) as opened:
    shown = results.dry_run(opened, run.begin).splitlines()
  [row] = [line.split() for line in shown if line.startswith("  ave ") and "%" in line]
  assert row[2:] == ["0", "0", "0.00%", "0.00%"] and shown[-1].endswith("no training step is taken")


def test_the_other_methods_refuse_nothing():
  for name in set(METHODS) - set(FROZEN):
    assert METHODS[name].learns
    assert name == "aper" or not any(METHODS[name].refuses(b.task) for b in BENCHMARKS.values())
