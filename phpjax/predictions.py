"""What a prediction about one clip looks like: numbers, text, JSON and a picture of each kind."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
from typing import Any, ClassVar

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from phpjax import figures
from phpjax.metrics import avvp

Tree = dict[str, Any]
TOP = 5  # answers shown
ROW_NAMES = {"event": "{}", "audio": "heard: {}", "visual": "seen: {}"}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Prediction:
  """What all kinds share; a notebook shows it as a picture, `print` as text.

  Attributes:
    task: name of the task.
    video: the clip.
    visual: the frames that were looked at, uint8 [T, H, W, 3].
  """

  task: str
  video: str
  visual: np.ndarray
  FILE: ClassVar[str] = "figure.png"

  @classmethod
  def of(cls, scores: Tree, classes: tuple[str, ...], *, question: str | None = None, **clip: Any) -> Prediction:
    """From a task's scores of one clip, and its class names."""
    raise NotImplementedError

  def to_dict(self) -> Tree:
    """Plain JSON types."""
    raise NotImplementedError

  def lines(self) -> list[str]:
    """The prediction in words."""
    raise NotImplementedError

  def figure(self) -> Figure:
    """A matplotlib figure, not tied to any window."""
    raise NotImplementedError

  def __repr__(self) -> str:
    return "\n  ".join([f"{type(self).__name__} ({self.task}, {self.video})", *self.lines()])

  def _repr_png_(self) -> bytes:
    """For notebooks."""
    buffer = io.BytesIO()
    self.figure().savefig(buffer, format="png", dpi=100, facecolor="white")
    return buffer.getvalue()

  def save(self, folder: pathlib.Path) -> Tree:
    """Writes prediction.json and the pictures -> the JSON, which names them; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = {**self.to_dict(), "files": self._pictures(folder)}
    (folder / "prediction.json").write_text(json.dumps(shown, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return shown

  def _pictures(self, folder: pathlib.Path) -> list[str]:
    """Writes them -> their names."""
    figures.save(self.figure(), folder / self.FILE)
    return [self.FILE]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class EventPrediction(Prediction):
  """AVE: the event of each second; AVVP: what is heard and what is seen in each second.

  Attributes:
    classes: the C class names (AVE: the last one is background).
    probabilities: {"event": float32 [T, C]} for AVE, {"audio", "visual"} for AVVP.
    active: bool [T, C] of the same keys: the decision that the benchmark scores.
  """

  classes: tuple[str, ...]
  probabilities: dict[str, np.ndarray]
  active: dict[str, np.ndarray]

  @classmethod
  def of(cls, scores: Tree, classes: tuple[str, ...], *, question: str | None = None, **clip: Any) -> EventPrediction:
    """AVE: the most probable class of a second; AVVP: the rule of its benchmark."""
    if "scores" in scores:
      probabilities = {"event": softmax(scores["scores"])}
      active = {"event": np.eye(len(classes), dtype=bool)[scores["scores"].argmax(-1)]}
    else:
      probabilities = {m: scores[m] for m in ("audio", "visual")}
      active = {m: avvp.decide(p[None], scores["clip"][None])[0] for m, p in probabilities.items()}
    return cls(**clip, classes=classes, probabilities=probabilities, active=active)

  @property
  def seconds(self) -> list[dict[str, dict[str, float]]]:
    """Per second {"event" | "audio" | "visual": {class: probability}}, active classes only."""

    def named(m: str, t: int) -> dict[str, float]:
      return {self.classes[c]: _number(self.probabilities[m][t, c]) for c in np.flatnonzero(self.active[m][t])}

    return [{m: named(m, t) for m in self.active} for t in range(len(self.visual))]

  @property
  def spans(self) -> list[Tree]:
    """Runs of active seconds [start_s, end_s) with their mean probability, in the order of time."""
    found = [
      {
        "kind": m,
        "class": self.classes[c],
        "start_s": start,
        "end_s": end,
        "probability": _number(self.probabilities[m][start:end, c].mean()),
      }
      for m, on in self.active.items()
      for c in np.flatnonzero(on.any(0))
      for start, end in figures.ones(on[:, c])
    ]
    return sorted(found, key=lambda span: (span["start_s"], span["kind"], span["class"]))

  def to_dict(self) -> Tree:
    """Seconds and spans."""
    return {"task": self.task, "video": self.video, "spans": self.spans, "seconds": self.seconds}

  def lines(self) -> list[str]:
    """A line per span."""
    return [
      f"{s['start_s']:2d}-{s['end_s']:<2d} s  {ROW_NAMES[s['kind']].format(s['class'])}  {s['probability']:.2f}"
      for s in self.spans
    ] or ["no event"]

  def figure(self) -> Figure:
    """The frames, and a row per class with its spans."""
    rows = list(dict.fromkeys((s["kind"], s["class"]) for s in self.spans)) or [("event", "no event")]
    figure = Figure(figsize=(10, 1.5 + 0.34 * len(rows)), layout="constrained")
    strip, bars = figure.subplots(2, 1, height_ratios=[1.0, 0.3 + 0.3 * len(rows)])
    figures.frames(strip, self.visual, f"{self.task}: {pathlib.Path(self.video).name}")
    for span in self.spans:
      row, start, width = rows.index((span["kind"], span["class"])), span["start_s"], span["end_s"] - span["start_s"]
      colour = figures.GREY if span["class"] == "background" else figures.ORANGE if span["kind"] == "visual" else figures.BLUE
      bars.add_patch(Rectangle((start, row - 0.38), width, 0.76, facecolor=colour, edgecolor="white"))
      bars.text(start + width / 2, row, f"{span['probability']:.2f}", ha="center", va="center", fontsize=8, color="white")
    bars.set(ylim=(len(rows) - 0.5, -0.5))
    bars.set_yticks(range(len(rows)), [ROW_NAMES[kind].format(name) for kind, name in rows], fontsize=8, parse_math=False)
    figures.second_axis(bars, len(self.visual))
    return figure


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MaskPrediction(Prediction):
  """AVS: the pixels of what sounds.

  Attributes:
    probability: float32 [T, H, W], at the encoders' image size.
  """

  probability: np.ndarray
  FILE: ClassVar[str] = "overlay.png"

  @classmethod
  def of(cls, scores: Tree, classes: tuple[str, ...], *, question: str | None = None, **clip: Any) -> MaskPrediction:
    """From logits [T, H, W]."""
    return cls(**clip, probability=(1 / (1 + np.exp(-scores["mask"].astype(np.float64)))).astype(np.float32))

  @property
  def mask(self) -> np.ndarray:
    """uint8 {0, 1} [T, H, W]."""
    return (self.probability > 0.5).astype(np.uint8)

  def overlay(self) -> np.ndarray:
    """uint8 [T, H, W, 3]: the frames, tinted where the mask is on and faded elsewhere."""
    pairs = zip(self.visual, self.mask, strict=True)
    return np.stack([figures.overlay(frame, mask, figures.VERMILION) for frame, mask in pairs])

  def to_dict(self) -> Tree:
    """The masks themselves are pictures; here the share of each second's pixels that they cover."""
    return {
      "task": self.task,
      "video": self.video,
      "image_size": list(self.visual.shape[1:3]),
      "mask_share": [_number(mask.mean()) for mask in self.mask],
    }

  def lines(self) -> list[str]:
    """A line per second."""
    return [f"{t:2d} s  {100 * share:.0f} % of the picture sounds" for t, share in enumerate(self.to_dict()["mask_share"])]

  def figure(self) -> Figure:
    """The frames above the frames with their masks."""
    figure = Figure(figsize=(2 * len(self.visual), 4.4), layout="constrained")
    for axis, images, title in zip(
      figure.subplots(2, 1),
      (self.visual, self.overlay()),
      (f"{self.task}: {pathlib.Path(self.video).name}", "what sounds"),
      strict=True,
    ):
      figures.frames(axis, images, title)
    return figure

  def _pictures(self, folder: pathlib.Path) -> list[str]:
    names = [f"mask_{t}.png" for t in range(len(self.mask))]
    for name, mask in zip(names, self.mask, strict=True):
      Image.fromarray(255 * mask).save(folder / name)
    return [*super()._pictures(folder), *names]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AnswerPrediction(Prediction):
  """AVQA: the answer to a question.

  Attributes:
    question: as asked.
    top: the five most probable (answer, probability), best first.
  """

  question: str
  top: tuple[tuple[str, float], ...]

  @classmethod
  def of(cls, scores: Tree, classes: tuple[str, ...], *, question: str | None = None, **clip: Any) -> AnswerPrediction:
    """From logits [1, answers]."""
    share = softmax(scores["scores"][0])
    best = np.argsort(-share, kind="stable")[:TOP]
    return cls(**clip, question=question or "", top=tuple((classes[i], _number(share[i])) for i in best))

  @property
  def answer(self) -> str:
    """The most probable one."""
    return self.top[0][0]

  def to_dict(self) -> Tree:
    """Question, answer and the most probable answers."""
    return {
      "task": self.task,
      "video": self.video,
      "question": self.question,
      "answer": self.answer,
      "top": [{"answer": answer, "probability": p} for answer, p in self.top],
    }

  def lines(self) -> list[str]:
    """The question and the answers."""
    return [self.question, *(f"{p:.2f}  {answer}" for answer, p in self.top)]

  def figure(self) -> Figure:
    """Three frames, and a bar per answer."""
    return ranked(self, self.question)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ClassPrediction(Prediction):
  """Class-incremental tasks: the class of a clip, among those of all tasks learned so far.

  Attributes:
    top: the five most probable (class, probability), best first.
  """

  top: tuple[tuple[str, float], ...]

  @classmethod
  def of(cls, scores: Tree, classes: tuple[str, ...], *, question: str | None = None, **clip: Any) -> ClassPrediction:
    """From scores [K, C] of K tasks, -inf where one does not count; `classes` are those of all of them, task after task."""
    share = softmax(scores["scores"].reshape(-1))
    best = [i for i in np.argsort(-share, kind="stable")[:TOP] if share[i] > 0]
    return cls(**clip, top=tuple((classes[i], _number(share[i])) for i in best))

  @property
  def label(self) -> str:
    """The most probable class."""
    return self.top[0][0]

  def to_dict(self) -> Tree:
    """The class and the most probable ones."""
    top = [{"class": name, "probability": p} for name, p in self.top]
    return {"task": self.task, "video": self.video, "class": self.label, "top": top}

  def lines(self) -> list[str]:
    """A line per class."""
    return [f"{p:.2f}  {name}" for name, p in self.top]

  def figure(self) -> Figure:
    """Three frames, and a bar per class."""
    return ranked(self, "class")


def ranked(prediction: AnswerPrediction | ClassPrediction, title: str) -> Figure:
  """Three frames of the clip, and a bar for each of its `top`."""
  figure = Figure(figsize=(10, 2.4), layout="constrained")
  strip, bars = figure.subplots(1, 2, width_ratios=[1.15, 1])
  shown = np.unique(np.linspace(0, len(prediction.visual) - 1, 3).round().astype(int))
  figures.frames(strip, prediction.visual[shown], pathlib.Path(prediction.video).name)
  for row, (answer, p) in enumerate(prediction.top):
    bars.barh(row, p, height=0.62, color=figures.BLUE if row == 0 else "#BBBBBB")
    bars.text(p + 0.015, row, f"{answer}  {100 * p:.0f} %", va="center", fontsize=9, color=figures.INK, parse_math=False)
  bars.set(xlim=(0, 1.35), ylim=(len(prediction.top) - 0.4, -0.6), xticks=[], yticks=[])
  bars.set_title(title, fontsize=9, loc="left", color=figures.INK, parse_math=False, wrap=True)
  figures.bare(bars)
  return figure


def softmax(scores: np.ndarray) -> np.ndarray:
  """Along the last axis, float32."""
  share = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True))
  return (share / share.sum(-1, keepdims=True)).astype(np.float32)


def _number(x: Any) -> float:
  """Four decimals are all that a probability says."""
  return round(float(x), 4)
