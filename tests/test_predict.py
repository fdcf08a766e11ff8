"""`phpjax.load` and `python -m phpjax.predict`: they answer as the run's own evaluation does, and say what is wrong."""

import ast
import asyncio
import json
import pathlib
import shutil
import subprocess
import sys
import wave

import jax
import numpy as np
import pytest
from PIL import Image

import phpjax
from data_pipelines import DATASETS
from phpjax import cli, predict, predictions, workdir
from phpjax.benchmarks import BENCHMARKS, avqa
from phpjax.encoders import pretrained
from phpjax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
LEARNED = ("ave", "avvp", "avs", "avqa")  # the tiny run does not learn MS3
QUESTION = "How many musical instruments were heard throughout the video?"


@pytest.fixture(scope="module")
def predictor(tiny_run):
  return phpjax.load(tiny_run.workdir)


def ask(predictor, task: str, video, **more):
  return predictor.predict(task, video=video, question=QUESTION if task == "avqa" else None, **more)


def test_import_is_light():
  code = "import sys, phpjax; assert not {'jax', 'numpy', 'matplotlib'} & set(sys.modules); print(phpjax.__version__)"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert done.returncode == 0, done.stderr
  assert f'version = "{done.stdout.strip()}"' in (ROOT / "pyproject.toml").read_text()


def test_what_is_loaded(predictor, tiny_run):
  assert predictor.tasks == LEARNED
  assert predictor.results == tiny_run.results
  assert set(predictor.params) == {"encoders", "shared", "tasks"}
  assert predictor.config.data.root == str(tiny_run.data)
  assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(predictor.params))
  assert "php" in repr(predictor) and str(tiny_run.workdir) in repr(predictor)


@pytest.mark.parametrize("task", LEARNED)
def test_every_task_answers(predictor, tiny_run, task, tmp_path):
  prediction = ask(predictor, task, tiny_run.clip())
  assert task in repr(prediction) and len(repr(prediction).splitlines()) > 1
  assert prediction._repr_png_().startswith(b"\x89PNG")
  shown = prediction.save(tmp_path / "a" / "b")
  assert json.loads((tmp_path / "a" / "b" / "prediction.json").read_text()) == shown
  for name in shown["files"]:
    with Image.open(tmp_path / "a" / "b" / name) as image:
      assert min(image.size) >= predictor.media.image_size
  assert {k: v for k, v in shown.items() if k != "files"} == json.loads(json.dumps(prediction.to_dict()))


def scores_of_a_split(predictor, tiny_run, task: str) -> dict[str, float]:
  """The benchmark's scores over the test split, made of predictions on files, without the training code's loader."""
  dataset = BENCHMARKS[task].dataset(tiny_run.data)
  parts = []
  for record in dataset.records("test"):
    files, labels = dataset.clip_files(record), dataset.labels(record)
    said = predictor.predict(
      task, video=files[0], audio=files[1] if len(files) > 1 else None, question=record.text if task == "avqa" else None
    )
    batch = {k: np.asarray(v)[None] for k, v in labels.items()} | {"mask": np.ones(1, np.float32)}
    if task == "ave":
      outputs = {"scores": said.probabilities["event"][None]}
    elif task == "avqa":
      outputs = {"scores": np.eye(len(dataset.classes))[[[dataset.classes.index(said.answer)]]]}
      batch = {**batch, "label": batch["label"][None], "type": batch["type"][None], "question_mask": np.ones((1, 1))}
    parts.append(BENCHMARKS[task].statistics(outputs, batch))
  return BENCHMARKS[task].summarise(parts)


@pytest.mark.parametrize("task", ["ave", "avqa"])
def test_predictions_score_as_the_run_did(predictor, tiny_run, task):
  last = [row for row in tiny_run.results["per_task"] if row["task"] == task and row["split"] == "test"][-1]["scores"]
  assert scores_of_a_split(predictor, tiny_run, task) == pytest.approx(last, nan_ok=True)


def test_events(predictor, tiny_run):
  said = ask(predictor, "ave", tiny_run.clip())
  assert said.probabilities["event"].sum(-1) == pytest.approx(np.ones(10), abs=1e-5)
  assert [list(second["event"]) for second in said.seconds] == [
    [said.classes[c]] for c in said.probabilities["event"].argmax(-1)
  ]
  assert sum(span["end_s"] - span["start_s"] for span in said.spans) == 10
  parsed = ask(predictor, "avvp", tiny_run.clip())
  assert set(parsed.probabilities) == {"audio", "visual"}
  assert all(p > 0.5 for second in parsed.seconds for named in second.values() for p in named.values())


def test_no_event_at_all():
  nothing = {m: np.zeros((10, 3), np.float32) for m in ("audio", "visual")} | {"clip": np.zeros(3, np.float32)}
  said = predictions.EventPrediction.of(
    nothing, ("a", "b", "c"), task="avvp", video="x.mp4", visual=np.zeros((10, 8, 8, 3), np.uint8)
  )
  assert said.spans == [] and "no event" in repr(said) and said._repr_png_()


def test_masks(predictor, tiny_run, tmp_path):
  said = ask(predictor, "avs", tiny_run.clip())
  size = predictor.media.image_size
  assert said.mask.shape == (5, size, size) and said.mask.dtype == np.uint8 and set(np.unique(said.mask)) <= {0, 1}
  assert said.overlay().shape == said.visual.shape and said.overlay().dtype == np.uint8
  said.save(tmp_path)
  for t in range(5):
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"mask_{t}.png")), 255 * said.mask[t])


def test_answers(predictor, tiny_run):
  said = ask(predictor, "avqa", tiny_run.clip())
  shares = [p for _, p in said.top]
  assert len(shares) == 5 and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1.001
  assert said.answer == said.top[0][0] == said.to_dict()["answer"]


def write_wave(path: pathlib.Path, samples: np.ndarray, rate_hz: int = 16_000) -> pathlib.Path:
  with wave.open(str(path), "wb") as file:
    file.setnchannels(1)
    file.setsampwidth(2)
    file.setframerate(rate_hz)
    file.writeframes((samples * 32767).astype("<i2").tobytes())
  return path


def test_audio_replaces_the_sound_track(predictor, tiny_run, tmp_path):
  noise = np.random.default_rng(0).uniform(-0.5, 0.5, 160_000).astype(np.float32)
  loud, own = write_wave(tmp_path / "noise.wav", noise), ask(predictor, "ave", tiny_run.clip())
  other = ask(predictor, "ave", tiny_run.clip(), audio=loud)
  np.testing.assert_array_equal(other.visual, own.visual)
  assert not np.allclose(other.probabilities["event"], own.probabilities["event"])
  same = ask(predictor, "ave", tiny_run.clip(), audio=tiny_run.clip())
  np.testing.assert_allclose(same.probabilities["event"], own.probabilities["event"], atol=1e-6)


def test_frames_in_a_folder(predictor, tiny_run):
  dataset = DATASETS["avsbench"](tiny_run.data)
  record = dataset.records("test")[0]
  frames, sound, _ = dataset.clip_files(record)  # and the true masks
  said = predictor.predict("avs", video=frames, audio=sound)
  np.testing.assert_array_equal(said.visual, dataset.decode_clip(record, predictor.media)["visual"])


def test_clip_is_cut_as_its_dataset_cuts_it(tiny_run, predictor):
  for task, benchmark in BENCHMARKS.items():
    dataset = benchmark.dataset(tiny_run.data)
    record = dataset.records("test")[0]
    files = dataset.clip_files(record)
    ours = predict.read_clip(task, dataset.seconds, predictor.media, files[0], files[1] if len(files) > 1 else None)
    theirs = dataset.decode_clip(record, predictor.media)
    for key in ("visual", "audio"):
      np.testing.assert_array_equal(ours[key], theirs[key])


# -- encoders --------------------------------------------------------------------------------------------------


def test_encoders_give_unit_features(predictor, tiny_run, tmp_path):
  pictures = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
  many = predictor.encode_image(list(pictures))
  assert many.shape[0] == 3 and many.dtype == np.float32
  np.testing.assert_allclose(np.linalg.norm(many, axis=-1), 1, rtol=1e-5)
  Image.fromarray(pictures[1]).save(tmp_path / "one.png")
  np.testing.assert_allclose(predictor.encode_image(tmp_path / "one.png"), many[1], atol=1e-5)
  texts = predictor.encode_text(["a guitar", "a drum"])
  assert texts.shape == (2, many.shape[1])
  np.testing.assert_allclose(predictor.encode_text("a drum"), texts[1], atol=1e-5)
  sound = predictor.encode_audio(tiny_run.clip())
  assert sound.shape == (many.shape[1],) and np.linalg.norm(sound) == pytest.approx(1, rel=1e-5)
  assert predictor.encode_audio([np.zeros(500, np.int16), tiny_run.clip()])[1] == pytest.approx(sound, abs=1e-5)


def test_pictures_of_several_sizes_are_encoded_together(predictor):
  pictures = [np.random.default_rng(i).integers(0, 256, (size, size, 3), np.uint8) for i, size in enumerate((64, 80))]
  together = predictor.encode_image(pictures)
  for picture, features in zip(pictures, together, strict=True):
    np.testing.assert_allclose(predictor.encode_image(picture), features, atol=1e-5)
  np.testing.assert_array_equal(predictor.encode_image(tuple(pictures)), together)


def test_image_features_are_those_of_the_plain_encoder(predictor):
  size = predictor.media.image_size
  pixels = np.random.default_rng(1).integers(0, 256, (size, size, 3), dtype=np.uint8)
  encoder = predictor._experiment.encoders["visual"]
  plain = np.asarray(encoder.module.apply({"params": encoder.params}, pixels[None]).pooled)[0]
  np.testing.assert_allclose(predictor.encode_image(pixels), plain / np.linalg.norm(plain), atol=1e-5)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda p: p.encode_image("no.png"), "no.png: no such file"),
    (lambda p: p.encode_image(np.zeros((4, 4, 3))), "uint8"),
    (lambda p: p.encode_audio("no.wav"), "no.wav: no such file"),
    (lambda p: p.encode_audio(np.zeros(0)), "samples"),
    (lambda p: p.encode_text("word " * 100), "shorten"),
  ],
)
def test_encoders_name_what_is_wrong(predictor, call, message):
  with pytest.raises(UserError, match=message):
    call(predictor)


# -- questions -------------------------------------------------------------------------------------------------

WORDS = ("<pad>", "Is", "is", "the", "How", "many", "acoustic_guitar", "in", "video")


@pytest.mark.parametrize(
  ("question", "ids"),
  [
    ("Is the acoustic_guitar in the video?", [1, 3, 6, 7, 3, 8]),
    ("is THE video", [1, 3, 8]),  # a question begins with a capital
    ("How many is the?", [4, 5, 2, 3]),
    ("how Is", [4, 1]),
    ("is the Acoustic Guitar in?", [1, 3, 6, 7]),
  ],
)
def test_question_ids(question, ids):
  found = avqa.question_ids(question, WORDS)
  assert found.dtype == np.int32 and found.tolist() == ids + [0] * (14 - len(ids))


@pytest.mark.parametrize(
  ("question", "message"),
  [
    ("Is the acoustic_gitar?", "'acoustic_gitar' is not among the run's 8 words; did you mean 'acoustic_guitar'"),
    ("How many <Object>?", "slots"),
    ("is " * 15, "15 words"),
    ("Is <pad>", "slots"),
  ],
)
def test_a_wrong_question_is_one_clear_line(question, message):
  with pytest.raises(UserError, match=message) as error:
    avqa.question_ids(question, WORDS)
  assert "\n" not in str(error.value)


# -- what can be wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("arguments", "messages"),
  [
    ({"task": "ave"}, ["video is missing"]),
    ({"task": "retrieval", "video": "no.mp4"}, ["task=retrieval", "ave, avvp, avs, avqa", "video=no.mp4: no such file"]),
    ({"task": "avqa", "video": "no.mp4", "audio": "no.wav"}, ["no.mp4", "audio=no.wav", "question is missing"]),
    ({"task": "ave", "video": __file__, "question": "Is it?"}, ["question is for avqa only"]),
    ({"task": "ave", "video": __file__}, ["cannot be decoded"]),
    ({"task": "avs", "video": str(ROOT)}, ["folder of frames"]),
  ],
)
def test_wrong_arguments_are_named_together(predictor, arguments, messages):
  with pytest.raises(UserError) as error:
    predictor.predict(**arguments)
  assert all(message in str(error.value) for message in messages) and "\n" not in str(error.value)


@pytest.mark.parametrize(("limit", "words"), [("frames=1", "set PHPJAX_LIMITS=frames=2"), ("frame=1", "is no NAME=NUMBER")])
def test_limits_of_files_are_named_with_how_to_raise_them(predictor, tiny_run, monkeypatch, limit, words):
  monkeypatch.setenv("PHPJAX_LIMITS", limit)
  with pytest.raises(UserError) as error:
    predictor.predict("ave", video=tiny_run.clip())
  assert words in str(error.value) and "\n" not in str(error.value)


def test_a_workdir_that_is_none(tiny_run, tmp_path):
  with pytest.raises(UserError, match=r"config\.json.*workdir of phpjax\.main"):
    phpjax.load(tmp_path)
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(UserError, match=r"config\.json is no config of a run"):
    phpjax.load(tmp_path)
  shutil.copy(tiny_run.workdir / "config.json", tmp_path)
  with pytest.raises(UserError, match=r"no checkpoint.*phpjax\.main"):
    phpjax.load(tmp_path)


@pytest.fixture
def copied(tiny_run, tmp_path):
  return shutil.copytree(tiny_run.workdir, tmp_path / "run")


def step_folders(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Newest first."""
  return sorted((p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: -int(p.name))


def damage(folder: pathlib.Path) -> None:
  """Inverts the largest file; single bytes may lie where orbax keeps nothing that it still reads."""
  path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  path.write_bytes(path.read_bytes().translate(bytes(range(255, -1, -1))))


def opened(workdir: pathlib.Path, step: int | None = None) -> dict:
  """The items that `phpjax.load` would read; building the encoders would take most of the time."""
  return predict._open_step(workdir / "checkpoints", step)[1]


@pytest.mark.parametrize("item", ["shared", "meta"])
def test_a_damaged_item_falls_back_to_the_step_before(copied, item, capfd):
  newest, older = step_folders(copied)[:2]
  shutil.rmtree(newest / item) if item == "meta" else damage(newest / item)
  assert "task_avqa" in opened(copied)
  assert str(newest) in capfd.readouterr().err
  with pytest.raises(UserError, match=f"{newest.name} cannot be read"):
    opened(copied, int(newest.name))
  assert opened(copied, int(older.name))


def test_without_a_task_that_is_damaged_those_before_it_are_there(copied, capfd):
  """Each finished task is written once; the checkpoint that holds it stays, and what came later needs it."""
  newest = step_folders(copied)[0]
  older = next(folder for folder in step_folders(copied) if (folder / "task_avqa").is_dir())
  damage(older / "task_avqa")
  found = opened(copied)
  assert {name for name in found if name.startswith("task_")} == {"task_ave", "task_avvp", "task_avs"}
  warnings = capfd.readouterr().err.splitlines()
  passed_over = step_folders(copied).index(older) + 1  # itself, and all that came later and need it
  assert (
    len(warnings) == passed_over >= 2
    and all(str(older / "task_avqa") in line for line in warnings)
    and str(newest) in warnings[0]
  )


def test_steps_that_are_not_there(copied):
  with pytest.raises(UserError, match=r"no checkpoint 999.*there are"):
    phpjax.load(copied, step=999)
  for folder in step_folders(copied):
    damage(folder / "shared")
  with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
    phpjax.load(copied)


def test_a_run_that_is_still_going(copied):
  """There are no results yet, and nothing of it is touched."""
  (copied / "results.json").unlink()
  shutil.rmtree(copied / "figures")
  (copied / "checkpoints" / "99.orbax-checkpoint-tmp-1").mkdir()  # it is saving right now
  older = step_folders(copied)[1]
  before = sorted(copied.rglob("*"))
  loaded = phpjax.load(copied, step=int(older.name))
  assert loaded.results is None and loaded.tasks[-1] == "avqa"
  assert sorted(copied.rglob("*")) == before


def change(workdir: pathlib.Path, **fields) -> None:
  path = workdir / "config.json"
  config = json.loads(path.read_text())
  for name, value in fields.items():
    *parents, last = name.split("__")
    node = config
    for parent in parents:
      node = node[parent]
    node[last] = value
  path.write_text(json.dumps(config))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"encoders__visual__weights": "/nowhere"}, "no weights for the encoder"),
    ({"method__name": "linear_probe"}, r"config\.json was changed since the run: method\.name; put the old values back"),
    ({"method__num_latents": 8, "seed": 5}, r"was changed since the run: method\.num_latents, seed; put"),
    ({"opt": {}}, r"config\.json is damaged: --config has no opt\.shared"),
  ],
)
def test_a_run_of_something_else(copied, fields, message):
  change(copied, **fields)
  with pytest.raises(UserError, match=message):
    phpjax.load(copied)


@pytest.mark.parametrize(
  ("fields", "message"),
  [({"method__name": "linear_probe"}, "no option|unknown"), ({"method__num_latents": 8}, "other arrays, first")],
)
def test_a_run_of_other_code(copied, monkeypatch, fields, message):
  change(copied, **fields)
  monkeypatch.setattr(workdir, "differing", lambda there, now: [])  # the config is the run's own, the code has changed
  with pytest.raises(UserError, match=message):
    phpjax.load(copied)


def test_other_encoder_weights(tiny_run, monkeypatch):
  monkeypatch.setattr(pretrained, "identity", lambda name, weights, seed=0: "of another file")
  with pytest.raises(UserError, match="other encoder weights"):
    phpjax.load(tiny_run.workdir)


# -- notebook and command line ---------------------------------------------------------------------------------


def test_loads_inside_a_running_event_loop(tiny_run):
  async def cell():  # orbax runs its own
    return opened(tiny_run.workdir)

  assert "task_ave" in asyncio.run(cell())


def test_notebook(tiny_run, monkeypatch):
  notebook = json.loads((ROOT / "notebooks" / "load_and_predict.ipynb").read_text())
  cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
  assert cells and not any(cell["outputs"] or cell["execution_count"] for cell in cells)
  source = "\n".join("".join(cell["source"]) for cell in cells)
  assert "../runs/php_avqa_toybox" in source
  monkeypatch.chdir(ROOT / "notebooks")
  names: dict = {}
  exec(compile(ast.parse(source.replace("../runs/php_avqa_toybox", str(tiny_run.workdir))), "notebook", "exec"), names)
  assert names["predictor"].tasks


def command(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-m", "phpjax.predict", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
  )


def test_command(tiny_run, tmp_path):
  done = command(
    f"--workdir={tiny_run.workdir}", "--task=avqa", f"--video={tiny_run.clip()}", f"--question={QUESTION}", f"--out={tmp_path}"
  )
  assert done.returncode == 0, done.stderr
  said = json.loads(done.stdout)
  assert said["question"] == QUESTION and len(said["top"]) == 5
  assert said == json.loads((tmp_path / "prediction.json").read_text())
  assert (tmp_path / "figure.png").is_file()


def run_main(capsys, *arguments: str) -> tuple[int, str]:
  """The command in this process -> (exit code, stderr)."""
  code = cli.guarded(lambda: predict.main(["predict", *arguments]))
  return code, capsys.readouterr().err


@pytest.mark.parametrize(
  ("arguments", "messages"),
  [
    ([], ["--workdir is missing", "--task is missing", "--video is missing"]),
    (["--workdir=/nowhere", "--task=avqa"], ["--workdir=/nowhere is no run", "--video is missing", "--question is missing"]),
    (["--taks=ave"], ["taks", "task"]),
    (["clip.mp4"], ["unexpected arguments clip.mp4", "--workdir is missing"]),
    ([f"--out={__file__}"], ["is a file"]),
  ],
)
def test_command_names_everything_that_is_missing(capsys, arguments, messages):
  code, said = run_main(capsys, *arguments)
  assert code == 2 and said.startswith("error: ") and said.count("\n") == 1
  assert all(message in said for message in messages)


def test_command_help(capsys):
  with pytest.raises(SystemExit) as stopped:
    predict.main(["predict", "--help"])
  assert stopped.value.code == 0
  said = capsys.readouterr().out
  assert all(f"--{name}" in said for name in ("workdir", "task", "video", "audio", "question", "out"))
