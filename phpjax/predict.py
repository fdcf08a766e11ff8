"""Opens a trained run and answers about a clip; `phpjax.load` in Python, this module on the command line.

  python -m phpjax.predict --workdir=runs/php_avqa_toybox --task=avqa --video=clip.mp4 --question="How many ... ?" --out=DIR

prints the prediction as JSON; with --out it also writes prediction.json and pictures. Tasks: ave, avvp, avs, avqa, ms3, as far
as the run has learned them.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import AxisType
from ml_collections import ConfigDict
from PIL import Image

from data_pipelines import DataError, Media, MediaError, arrays, limits, pictures, transforms
from data_pipelines import media as media_lib
from phpjax import checkpoint, cli, experiment, optimizer, sharding, values, workdir
from phpjax.answers import Answers
from phpjax.benchmarks import BENCHMARKS, TaskInfo
from phpjax.encoders import unit
from phpjax.errors import UserError
from phpjax.predictions import Prediction
from phpjax.steps import Steps

Tree = dict[str, Any]
Path = str | os.PathLike[str]
ASKING = tuple(name for name, benchmark in BENCHMARKS.items() if benchmark.asks)  # tasks that answer a question
CHUNK = 32  # pictures, seconds or texts encoded at once: bounds memory, and one shape means one compile


def open_step(folder: pathlib.Path, step: int) -> tuple[Tree, Tree]:
  """(meta, items) of a step, its finished tasks from those that hold them; every file is checked, also of what is not read."""
  meta = checkpoint.open_meta(folder, step)
  held = [(step, name) for name in meta["items"] if name != "live"]  # the optimizer of a task that was being learned
  for name, number in meta["learned"].items():
    held += [(number, item) for item in checkpoint.read_meta(folder / str(number))["items"] if item == f"task_{name}"]
  return meta, {name: checkpoint.load_numpy(folder / str(number), name) for number, name in held}


def load(folder: Path, step: int | None = None) -> Predictor:
  """Opens a run of phpjax.main; see `phpjax.load`."""
  folder = pathlib.Path(folder).expanduser()
  stored = workdir.read_json(folder / workdir.CONFIG)
  config = _config(stored, folder / workdir.CONFIG)
  meta, items = _open_step(folder / checkpoint.FOLDER, step)
  if changed := workdir.differing(stored, meta["config"]):
    raise UserError(f"{folder / workdir.CONFIG} was changed since the run: {', '.join(changed[:4])}; put the old values back")
  try:
    infos = {name: TaskInfo(**_tuples(info)) for name, info in meta["infos"].items()}
    built = experiment.build(config, infos)
    # One clip is one row: it cannot be split over devices, so the first one does it all.
    mesh = jax.make_mesh((1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 2, devices=jax.local_devices()[:1])
    # No effort: to compile takes hundreds of times longer than to run one clip.
    steps = Steps(built.modules, built.method, optimizer.settings(config.opt), mesh, compile_effort=0)
  except (AttributeError, KeyError, TypeError) as error:
    raise UserError(f"{folder} was written by another version of phpjax: {error}") from error
  if (now := built.weights) != meta["weights"]:
    raise UserError(
      f"{folder} was trained with other encoder weights ({meta['weights']}, now {now}): "
      f"put the old files back to where {folder / workdir.CONFIG} says (encoders.*.weights)"
    )
  params, state = _fill(built, meta["tasks"], items, folder)
  final = folder / workdir.RESULTS
  infer = config.task_id == "inferred" and set(meta["tasks"]) == set(meta["learned"])  # a half-learned task has no centroids
  return Predictor(built, steps, params, state, workdir.read_json(final) if final.is_file() else None, folder, infer)


def _config(stored: Tree, path: pathlib.Path) -> ConfigDict:
  """The config of a run, as data; raises UserError where nothing can be done with it."""
  try:
    config = ConfigDict(_tuples(stored))
    found = values.problems(config)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError(f"{path} is no config of a run ({error}): put the old file back") from error
  if found:
    raise UserError(f"{path} is damaged: {'; '.join(found)}")
  return config


def _open_step(folder: pathlib.Path, step: int | None) -> tuple[Tree, Tree]:
  """The wanted step, or the newest good one; raises UserError."""
  there = checkpoint.steps_of(folder)
  if not there:
    raise UserError(f"no checkpoint in {folder}: train first with python -m phpjax.main --workdir={folder.parent}")
  if step is None:
    if (found := checkpoint.newest_good(folder, there)) is None:
      raise UserError(f"no checkpoint in {folder} was finished: train on with the same command")
    return open_step(folder, found[0])
  if step not in there:
    raise UserError(f"no checkpoint {step} in {folder}; there are {there}")
  try:
    return open_step(folder, step)
  except UserError:
    raise
  except Exception as error:  # orbax and tensorstore report damage as plain exceptions of many types
    raise UserError(f"checkpoint {folder / str(step)} cannot be read ({error}); there are {there}") from error


def _tuples(value: Any) -> Any:
  """JSON has lists only; configs and task infos hold tuples."""
  if isinstance(value, dict):
    return {k: _tuples(v) for k, v in value.items()}
  return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _fill(built: experiment.Experiment, names: Sequence[str], items: Tree, folder: pathlib.Path) -> tuple[Tree, Tree]:
  """(params, state) as the experiment shapes them, with the stored arrays; nothing is initialised at random.

  Raises UserError when the stored paths or shapes are not those of this code.
  """

  params, state = built.init(abstract=True)
  for name in names:
    params, state = built.add_task(params, state, name, abstract=True)
  tasks = {f"task_{name}": {**params["tasks"][name], "state": state["tasks"][name]} for name in names}
  filled = {}
  for name, tree in {"shared": params["shared"], "state": state["shared"], **tasks}.items():
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    stored = {_key(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(items.get(name, {}))}
    expected = {_key(path): leaf.shape for path, leaf in paths}
    if other := sorted(k for k in stored.keys() | expected if k not in stored or np.shape(stored[k]) != expected.get(k)):
      raise UserError(f"{folder} was written by another version of phpjax: {name} holds other arrays, first {other[0]}")
    filled[name] = jax.tree.unflatten(structure, [stored[_key(path)] for path, _ in paths])
  encoders = {modality: encoder.params for modality, encoder in built.encoders.items()}
  states = {name: filled[f"task_{name}"].pop("state") for name in names}
  tasks = {name: filled[f"task_{name}"] for name in names}
  return {"encoders": encoders, "shared": filled["shared"], "tasks": tasks}, {"shared": filled["state"], "tasks": states}


def _key(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


class Predictor:
  """A trained run, ready to answer about clips.

  Attributes:
    tasks: names of the learned tasks, in their order (the last one may still have been in training).
    params: the whole tree {"encoders", "shared", "tasks"}.
    results: the content of results.json, None before the run has ended.
    config: the run's config.
    media: image size and sample rate of the encoders.
  """

  def __init__(
    self,
    built: experiment.Experiment,
    steps: Steps,
    params: Tree,
    state: Tree,
    final: Tree | None,
    folder: Path,
    infer: bool,
  ) -> None:
    self._experiment, self._steps, self._mesh = built, steps, steps.mesh
    self.params, self._state = sharding.put_replicated(params, self._mesh), sharding.put_replicated(state, self._mesh)
    self.results, self.folder, self.config, self.media = final, folder, built.config, built.media
    self.tasks = tuple(params["tasks"])
    constants = functools.cache(lambda name: sharding.put_replicated(built.constants[name], self._mesh))
    self._answers = Answers(built, steps, self._mesh, self.params, self._state, constants, infer)
    self._encode: dict[str, Callable[[Tree, jax.Array], jax.Array]] = {}

  def __repr__(self) -> str:
    return f"Predictor({self.config.method.name}, tasks {' '.join(self.tasks)}, from {self.folder})"

  def predict(
    self, task: str, *, video: Path | None = None, audio: Path | None = None, question: str | None = None
  ) -> Prediction:
    """Answers about one clip.

    Args:
      task: one of `tasks`.
      video: a file with pictures and sound, or a folder of numbered frames (then `audio` too). Clips shorter than the task's
        seconds hold their last frame and are silent after their end; of longer ones the first seconds are taken, for avqa
        seconds spread over the whole clip.
      audio: a sound file (or .npy at 32 kHz) in place of the video's own sound.
      question: for avqa.

    Raises:
      UserError: everything that is missing or wrong, in one line.
    """
    if found := problems(self.tasks, task, video, audio, question):
      raise UserError("; ".join(found))
    video, audio = (pathlib.Path(path).expanduser() if path else None for path in (video, audio))
    benchmark, info = BENCHMARKS[task], self._experiment.infos[task]
    batch: Tree = {"mask": np.ones(1, np.float32), **benchmark.question(question, info)}
    try:
      clip = read_clip(task, info.seconds, self.media, video, audio)
    except MediaError as error:
      hint = "; give its sound as audio=FILE" if "audio" in error.reason and audio is None else _mend(error)
      raise UserError(f"{error.path}: {error.reason}{hint}") from error
    except DataError as error:
      raise UserError(str(error)) from error
    scores = self._scores(task, {**batch, **{k: v[None] for k, v in clip.items()}})
    classes = self._answers.classes(task)
    return benchmark.prediction.of(scores, classes, task=task, video=str(video), visual=clip["visual"], question=question)

  def _scores(self, name: str, batch: Tree) -> Tree:
    """A batch of one clip -> the task's scores without the batch axis, by the very step that evaluates a run."""
    return {k: v[0] for k, v in jax.device_get(self._answers.of(name)(batch)).items()}

  def encode_image(self, images: Path | np.ndarray | Sequence[Path | np.ndarray]) -> np.ndarray:
    """Pictures (files, or uint8 [H, W, 3]) -> unit features in the joint space, float32 [E] for one, [N, E] for several."""
    one = isinstance(images, str | os.PathLike) or (isinstance(images, np.ndarray) and images.ndim == 3)
    rows = [self._picture(image) for image in ([images] if one else images)]
    features = self._features("visual", rows)
    return features[0] if one else features

  def _picture(self, image: Path | np.ndarray) -> np.ndarray:
    if isinstance(image, np.ndarray):
      if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise UserError(f"a picture must be a file or uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
      return transforms.resize_image(Image.fromarray(image), self.media.image_size, crop=self.media.crop)
    return _user(lambda: pictures.read_image(image, self.media))

  def encode_audio(self, sounds: Path | np.ndarray | Sequence[Path | np.ndarray]) -> np.ndarray:
    """Sounds -> unit features in the joint space, float32 [E] for one, [N, E] for several.

    A sound is a file or a wave [n] at `media.sample_rate_hz` (int16, or float in [-1, 1]); one that is longer than the
    encoder hears at once is cut, and the unit features of its pieces are averaged.
    """
    one = isinstance(sounds, str | os.PathLike) or (isinstance(sounds, np.ndarray) and sounds.ndim == 1)
    features = [self._features("audio", self._pieces(sound)).mean(0) for sound in ([sounds] if one else sounds)]
    features = [x / np.linalg.norm(x).clip(1e-6) for x in features]
    return features[0] if one else np.stack(features)

  def _pieces(self, sound: Path | np.ndarray) -> np.ndarray:
    """int16 [pieces, samples], the last one filled with silence."""
    wave = sound if isinstance(sound, np.ndarray) else _user(lambda: read_sound(sound, self.media.sample_rate_hz))
    if wave.ndim != 1 or not wave.size:
      raise UserError(f"a sound must be a file or samples [n], got an array {list(wave.shape)}")
    wave = wave if wave.dtype == np.int16 else transforms.to_int16(wave)
    length = round(self._experiment.encoders["audio"].module.seconds * self.media.sample_rate_hz)
    return np.pad(wave, (0, -len(wave) % length)).reshape(-1, length)

  def encode_text(self, texts: str | Sequence[str]) -> np.ndarray:
    """Texts -> unit features in the joint space, float32 [E] for one, [N, E] for several."""
    if "text" not in self._experiment.encoders:
      raise UserError(f"the run in {self.folder} has no text encoder")
    text, one = self._experiment.encoders["text"], isinstance(texts, str)
    try:
      ids = text.tokenizer([texts] if one else list(texts), text.module.context_length)
    except ValueError as error:
      raise UserError(str(error)) from error
    ids = np.pad(ids, [(0, 0), (0, text.module.context_length - ids.shape[1])])
    features = self._features("text", ids)
    return features[0] if one else features

  def _features(self, modality: str, rows: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """[N, ...] -> unit pooled features of the plain encoder, float32 [N, E], in chunks of one shape."""
    if modality not in self._encode:
      module = self._experiment.encoders[modality].module
      self._encode[modality] = jax.jit(lambda params, x: unit(module.apply({"params": params}, x).pooled))
    rows, parts = np.stack(list(rows)), []
    size = 1 if len(rows) == 1 else CHUNK
    for start in range(0, len(rows), size):
      part = rows[start : start + size]
      padded = np.pad(part, [(0, size - len(part))] + [(0, 0)] * (part.ndim - 1))
      parts.append(np.asarray(self._encode[modality](self.params["encoders"][modality], padded))[: len(part)])
    return np.concatenate(parts)


def _user(read: Callable[[], Any]) -> Any:
  """Runs a reader; what is wrong with a file becomes a UserError."""
  try:
    return read()
  except MediaError as error:
    raise UserError(f"{error.path}: {error.reason}{_mend(error)}") from error
  except DataError as error:
    raise UserError(str(error)) from error


def _mend(error: MediaError) -> str:
  """What to do about a file that is larger than a limit; that of a damaged one speaks of training."""
  return f"; {error.mend}" if limits.VARIABLE in error.mend else ""


def _texts(value: Any, path: pathlib.Path) -> Sequence[str]:
  """The tasks of a config; raises UserError."""
  if not isinstance(value, list | tuple) or not all(isinstance(x, str) for x in value):
    raise UserError(f"{path} is damaged: its tasks are {value!r:.80}, not names")
  return value


def problems(
  tasks: Sequence[str], task: str | None, video: Path | None, audio: Path | None, question: str | None, dashes: str = ""
) -> list[str]:
  """Everything that is missing or wrong among the arguments of a prediction, before anything is opened."""
  found, d = [], dashes
  if not task:
    found.append(f"{d}task is missing, one of {', '.join(tasks or BENCHMARKS.known())}")
  elif tasks and task not in tasks:
    found.append(f"{d}task={task} is not learned here; there are {', '.join(tasks)}")
  if not video:
    found.append(f"{d}video is missing")
  elif not (path := pathlib.Path(video).expanduser()).exists():
    found.append(f"{d}video={video}: no such file")
  elif path.is_dir() and not audio:
    found.append(f"{d}video={video} is a folder of frames: {d}audio is missing")
  if audio and not pathlib.Path(audio).expanduser().is_file():
    found.append(f"{d}audio={audio}: no such file")
  if task in ASKING and not (question or "").strip():
    found.append(f"{d}question is missing, {task} answers one")
  if task in BENCHMARKS and task not in ASKING and question is not None:
    found.append(f"{d}question is for {', '.join(ASKING)} only, not for {task}")
  return found


def read_clip(task: str, seconds: int, media: Media, video: Path, audio: Path | None) -> dict[str, np.ndarray]:
  """visual uint8 [T, H, W, 3] and audio int16 [T, S] of the seconds that the task's benchmark would show; raises MediaError."""
  spread = BENCHMARKS[task].dataset.spread
  if audio is None:
    clip = media_lib.decode_clip(video, media, seconds, spread=spread)
    return {"visual": clip.visual, "audio": clip.audio}
  wave = read_sound(audio, media.sample_rate_hz)
  if pathlib.Path(video).is_dir():
    starts = transforms.pick_seconds(len(wave) / media.sample_rate_hz, seconds, spread=spread)
    visual = pictures.read_frames(pathlib.Path(video), media, seconds)
  else:
    _, duration = media_lib.decode_video(video, [0.0], media)  # which seconds to show depends on the length
    starts = transforms.pick_seconds(duration, seconds, spread=spread)
    visual, _ = media_lib.decode_video(video, starts + 0.5, media)
  return {"visual": visual, "audio": transforms.cut_seconds(wave, media.sample_rate_hz, starts)}


def read_sound(path: Path, rate_hz: int) -> np.ndarray:
  """A sound file, or .npy at 32 kHz -> float32 [n] at `rate_hz`; raises MediaError."""
  read = arrays.read_npy_wave if pathlib.Path(path).suffix == ".npy" else media_lib.decode_audio
  return read(path, rate_hz)


# -- command line ----------------------------------------------------------------------------------------------

*_OTHERS, _LAST = BENCHMARKS
FLAGS = {
  "workdir": "Folder of a run of phpjax.main.",
  "task": f"{', '.join(_OTHERS)} or {_LAST}.",
  "video": "A clip, or a folder of numbered frames (then --audio too).",
  "audio": "A sound file in place of the video's own sound.",
  "question": f"For {', '.join(ASKING)}.",
  "out": "Folder for prediction.json and pictures; made if it does not exist.",
}


def main(argv: list[str]) -> None:
  """Checks the arguments, predicts, prints JSON."""
  own = flags.FlagValues()  # its own: those of a notebook or of another command stay as they are
  for name, text in FLAGS.items():
    flags.DEFINE_string(name, None, text, flag_values=own)
  rest, given = cli.parse_flags(argv, __doc__, own)[1:], own.flag_values_dict()
  found = [f"unexpected arguments {' '.join(rest)}: options start with --"] if rest else []
  tasks: Sequence[str] = ()
  if not given["workdir"]:
    found.append("--workdir is missing")
  elif not (path := pathlib.Path(given["workdir"]).expanduser() / workdir.CONFIG).is_file():
    found.append(f"--workdir={given['workdir']} is no run of phpjax.main: it has no {workdir.CONFIG}")
  else:
    tasks = _texts(workdir.read_json(path).get("tasks", ()), path)
  found += problems(tasks, given["task"], given["video"], given["audio"], given["question"], "--")
  out = pathlib.Path(given["out"]).expanduser() if given["out"] else None
  if out and out.exists() and not out.is_dir():
    found.append(f"--out={out} is a file, not a folder")
  if found:
    raise UserError("; ".join(found))
  cli.use_compile_cache()
  predictor = load(given["workdir"])
  prediction = predictor.predict(given["task"], video=given["video"], audio=given["audio"], question=given["question"])
  try:
    shown = prediction.save(out) if out else prediction.to_dict()
  except OSError as error:
    raise UserError(f"cannot write to --out={out}: {error}") from error
  print(json.dumps(shown, indent=1, ensure_ascii=False))


if __name__ == "__main__":
  sys.exit(cli.guarded(lambda: main(sys.argv)))
