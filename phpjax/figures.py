"""Figures of a run: the accuracy matrix, scores over tasks, and examples of each task, truth beside
prediction.

All functions take plain numpy and text, write a png and return its path. They use matplotlib's objects, never
pyplot, so that no window opens and no state is shared. Colours are those of Okabe and Ito (2008), told apart
by colour-blind readers, and no meaning hangs on colour alone.

`results` is the content of results.json: `method`, `tasks`, `metric`, `matrix`, `trivial` ({task: score of
the best constant predictor}), `mean_accuracy`, `forgetting`, and `unseen` (a second matrix, or None). Scores
lie in [0, 1].
"""

import itertools
import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from phpjax.errors import writing

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW = (
  "#0072B2",
  "#E69F00",
  "#009E73",
  "#D55E00",
  "#CC79A7",
  "#56B4E9",
  "#F0E442",
)
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW)
MARKERS = "osD^vP*X"
INK, GREY, PALE = "#222222", "#777777", "#E8E8E8"
DPI = 150

Path = str | os.PathLike[str]
Example = Mapping[str, Any]


def accuracy_matrix(results: Mapping[str, Any], path: Path) -> pathlib.Path:
  """Heat map: a row per learned task, a column per task, percent; below it the trivial predictors' scores.

  The scores on the `unseen` set, where results hold them, stand in a second panel.
  """
  tasks, panels = results["tasks"], [(results["data"]["evaluation_split"], results["matrix"])]
  if results.get("unseen"):
    panels.append(("unseen objects", results["unseen"]))
  size = len(tasks)
  width = max(len(panels) * (1.15 * size + 1.4) + 0.3, 4.0)  # room for the title over a single task
  figure = Figure(figsize=(width, 0.62 * size + 2.3), layout="constrained")
  axes = figure.subplots(1, len(panels), squeeze=False)[0]
  for axis, (name, matrix) in zip(axes, panels, strict=True):
    _heat_map(axis, tasks, matrix, results["trivial"] if matrix is results["matrix"] else {})
    axis.set_title(name if len(panels) > 1 else "", fontsize=10, color=INK)
    axis.set_xticks(range(size), [f"{task}\n{results['metric'][task]}" for task in tasks], fontsize=8)
  axes[0].set_ylabel("after learning", fontsize=9)
  figure.suptitle(
    f"{results['method']}: score on each task, percent\n"
    f"mean {100 * results['mean_accuracy']:.1f}, forgetting {100 * results['forgetting']:z.1f}",
    fontsize=11,
    color=INK,
  )
  return save(figure, path)


def _heat_map(axis: Axes, tasks: Sequence[str], matrix: Sequence[Sequence[float | None]], trivial: Mapping[str, float]) -> None:
  """Draws the lower triangle and, half a row further down, the trivial scores."""
  colours = matplotlib.colormaps["viridis"]
  size = len(tasks)
  cells = [(i, j, row[j]) for i, row in enumerate(matrix) for j in range(min(i + 1, len(row)))]
  cells += [(size + 0.25, j, trivial[task]) for j, task in enumerate(tasks) if task in trivial]
  for y, x, score in cells:
    if score is None:  # a task without such a test set
      continue
    colour = colours(score)
    axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=2))
    axis.text(x, y, f"{100 * score:.1f}", ha="center", va="center", fontsize=11, color=_ink_on(colour))
  rows = [*enumerate(tasks), *([(size + 0.25, "trivial")] if trivial else [])]
  axis.set_yticks([y for y, _ in rows], [name for _, name in rows], fontsize=9)
  axis.set(xlim=(-0.5, size - 0.5), ylim=(size + 0.75, -0.5), aspect="auto")
  bare(axis)


def score_over_tasks(results: Mapping[str, Any], path: Path) -> pathlib.Path:
  """A line per task from when it is learned to the end, its trivial score dashed, and their mean."""
  tasks, matrix = results["tasks"], results["matrix"]
  figure = Figure(figsize=(1.3 * len(tasks) + 2.8, 4.2), layout="constrained")
  axis = figure.subplots()
  ends = []
  for j, task in enumerate(tasks[: len(matrix)]):
    colour, scores = PALETTE[j % len(PALETTE)], [100 * row[j] for row in matrix[j:]]
    steps = range(j, len(matrix))
    axis.plot(steps, scores, color=colour, marker=MARKERS[j % len(MARKERS)], linewidth=2, markersize=6)
    axis.plot(
      [j - 0.12, len(matrix) - 0.88], [100 * results["trivial"][task]] * 2, color=colour, linestyle=(0, (2, 2)), linewidth=1
    )
    ends.append((scores[-1], task, colour))
  means = [100 * np.mean(row[: k + 1]) for k, row in enumerate(matrix)]
  axis.plot(range(len(matrix)), means, color=INK, linewidth=3, alpha=0.35, zorder=1)
  ends.append((means[-1], "mean", GREY))
  axis.set(ylim=(0, 102), xlim=(-0.25, len(tasks) - 0.75), ylabel="score, percent", xlabel="after learning")
  axis.set_xticks(range(len(tasks)), tasks)
  for y, (value, name, colour) in zip(_spread([end[0] for end in ends], 5.0), ends, strict=True):
    axis.text(len(matrix) - 0.85, y, f"{name} {value:.1f}", color=colour, fontsize=9, va="center", fontweight="bold")
  axis.set_title(
    f"{results['method']}: scores while tasks are added (dashed: trivial predictor)", fontsize=10, loc="left", color=INK
  )
  axis.grid(axis="y", color=PALE, linewidth=0.8)
  axis.spines[["top", "right"]].set_visible(False)
  return save(figure, path)


def _spread(values: Sequence[float], gap: float) -> np.ndarray:
  """Places for labels: close to `values`, in their order, at least `gap` apart."""
  places = np.array(values, float)
  order = np.argsort(places, kind="stable")
  for _ in range(100):
    for low, high in itertools.pairwise(order):
      short = gap - (places[high] - places[low])
      if short > 1e-6:
        places[low] -= short / 2
        places[high] += short / 2
  return places


def ave_timelines(examples: Sequence[Example], classes: Sequence[str], path: Path) -> pathlib.Path:
  """AVE: per clip its frames, and the class of each second, truth above prediction; a cross marks a wrong
  second.

  Args:
    examples: each {"id": str, "visual": uint8 [T, H, W, 3], "label": int [T], "prediction": int [T]}; the
      class index len(classes) is background.
    classes: names of the event classes.
    path: the png to write.
  """
  names = [*classes, "background"]
  figure = Figure(figsize=(10, 1.95 * len(examples) + 0.3), layout="constrained")
  heights = [1.0, 0.75] * len(examples)
  panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
  said = np.concatenate([np.ravel(example[key]) for example in examples for key in ("label", "prediction")])
  seen = [c for c in dict.fromkeys(said.tolist()) if c != len(classes)]
  colour = {c: PALETTE[k % len(PALETTE)] for k, c in enumerate(seen)} | {len(classes): PALE}
  for strip, bars, example in zip(panels[::2], panels[1::2], examples, strict=True):
    frames(strip, example["visual"], example["id"])
    label, prediction = np.asarray(example["label"]), np.asarray(example["prediction"])
    for row, indices in enumerate((label, prediction)):
      for start, end in _runs(indices):
        c = int(indices[start])
        _bar(bars, start, end, row, colour[c], names[c])
    wrong = np.flatnonzero(label != prediction)
    bars.plot(wrong + 0.5, np.full(len(wrong), 1.62), "x", color=INK, markersize=5, markeredgewidth=1.4)
    bars.set(xlim=(0, len(label)), ylim=(1.75, -0.5))
    bars.set_yticks([0, 1], ["truth", "prediction"], fontsize=9)
    second_axis(bars, len(label))
  return save(figure, path)


def avvp_timelines(examples: Sequence[Example], classes: Sequence[str], path: Path) -> pathlib.Path:
  """AVVP: per clip its frames, then what is heard and what is seen: a row per class, truth filled, prediction
  outlined.

  Args:
    examples: each {"id": str, "visual": uint8 [T, H, W, 3], "truth": {"audio", "visual"}, "prediction": the
      same}, with grids {0, 1} [T, C].
    classes: names, C of them.
    path: the png to write.
  """
  rows = [_active(example) for example in examples]
  heights = [height for active in rows for height in (1.0, 0.3 + 0.3 * max(len(active), 1))]
  figure = Figure(figsize=(10, 1.05 * sum(heights) + 0.3), layout="constrained")
  panels = figure.subplots(2 * len(examples), 1, squeeze=False, height_ratios=heights)[:, 0]
  for strip, bars, example, active in zip(panels[::2], panels[1::2], examples, rows, strict=True):
    frames(strip, example["visual"], example["id"])
    for row, (modality, c) in enumerate(active):
      colour = BLUE if modality == "audio" else ORANGE
      for start, end in ones(example["truth"][modality][:, c]):
        bars.add_patch(Rectangle((start, row - 0.4), end - start, 0.4, facecolor=colour, edgecolor="white"))
      for start, end in ones(example["prediction"][modality][:, c]):
        bars.add_patch(
          Rectangle(
            (start + 0.03, row + 0.02),
            end - start - 0.06,
            0.34,
            facecolor="white",
            edgecolor=colour,
            hatch="////",
            linewidth=1.5,
          )
        )
    bars.set(ylim=(max(len(active), 1) - 0.5, -0.5))
    labels = [f"{'heard' if m == 'audio' else 'seen'}: {classes[c]}" for m, c in active]
    bars.set_yticks(range(len(active)), labels, fontsize=8)
    for y in range(1, len(active)):
      bars.axhline(y - 0.5, color=PALE, linewidth=0.8)
    second_axis(bars, len(example["visual"]))
  figure.suptitle("filled: truth, hatched: prediction", fontsize=9, color=GREY)
  return save(figure, path)


def _active(example: Example) -> list[tuple[str, int]]:
  """The (modality, class) pairs that are true or predicted anywhere."""
  pairs = []
  for modality in ("audio", "visual"):
    some = np.asarray(example["truth"][modality]) + np.asarray(example["prediction"][modality]) > 0
    pairs += [(modality, int(c)) for c in np.flatnonzero(some.any(0))]
  return pairs


def avs_overlays(examples: Sequence[Example], path: Path) -> pathlib.Path:
  """AVS: per clip three rows of T frames: as they are, with the true mask, with the predicted mask and its
  IoU.

  Args:
    examples: each {"id": str, "visual": uint8 [T, H, W, 3], "label": {0, 1} [T, H, W], "prediction": the
      same, "iou": float [T]}.
    path: the png to write.
  """
  seconds = len(examples[0]["visual"])
  figure = Figure(figsize=(1.36 * seconds + 0.5, 4.75 * len(examples)), layout="constrained")
  figure.get_layout_engine().set(h_pad=0.02, w_pad=0.02, hspace=0, wspace=0)
  panels = figure.subplots(3 * len(examples), seconds, squeeze=False)
  for n, example in enumerate(examples):
    for t in range(seconds):
      frame, column = np.asarray(example["visual"][t]), panels[3 * n : 3 * n + 3, t]
      column[0].imshow(frame)
      column[1].imshow(overlay(frame, example["label"][t], BLUE))
      column[2].imshow(overlay(frame, example["prediction"][t], VERMILION))
      column[0].set_title(f"{t + 1} s", fontsize=8, color=GREY)
      column[2].set_xlabel(f"IoU {100 * float(example['iou'][t]):.0f}", fontsize=8, color=INK)
    for axis, name in zip(panels[3 * n : 3 * n + 3, 0], (example["id"], "truth", "prediction"), strict=True):
      axis.set_ylabel(textwrap.shorten(str(name), 18, placeholder="..."), fontsize=9)
  for axis in panels.flat:
    axis.set_xticks([])
    axis.set_yticks([])
    bare(axis)
  return save(figure, path)


def overlay(frame: np.ndarray, mask: np.ndarray, colour: str) -> np.ndarray:
  """Tints uint8 [H, W, 3] where the mask {0, 1} [H, W] is on, draws its rim, and fades the rest."""
  mask, tint = np.asarray(mask) > 0.5, 255 * np.array(to_rgb(colour))
  fade = 0.55 * frame + 0.45 * 255 * np.ones(3)
  image = np.where(mask[..., None], 0.45 * frame + 0.55 * tint, fade)
  padded = np.pad(mask, 1)
  inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
  image[mask & ~inner] = tint
  return image.astype(np.uint8)


def avqa_examples(examples: Sequence[Example], path: Path) -> pathlib.Path:
  """AVQA: per clip three of its frames, the question, the true answer, and the three most probable answers.

  Args:
    examples: each {"id": str, "visual": uint8 [T, H, W, 3], "type": str, "question": str, "answer": str,
      "top": [(answer, probability in [0, 1]), ...] most probable first}.
    path: the png to write.
  """
  figure = Figure(figsize=(10, 2.05 * len(examples)), layout="constrained")
  panels = figure.subplots(len(examples), 2, squeeze=False, width_ratios=[1.15, 1])
  for (strip, bars), example in zip(panels, examples, strict=True):
    visual = example["visual"]
    shown = np.linspace(0, len(visual) - 1, min(3, len(visual))).round().astype(int)
    frames(strip, visual[shown], example["id"])
    top = list(example["top"])[:3]
    for row, (answer, probability) in enumerate(top):
      right = answer == example["answer"]
      bars.barh(row, probability, height=0.62, color=BLUE if right else "#BBBBBB")
      bars.text(
        probability + 0.015,
        row,
        f"{answer}  {100 * probability:.0f} %" + ("  ✓" if right else ""),
        va="center",
        fontsize=9,
        color=INK,
        parse_math=False,
        fontweight="bold" if right else "normal",
      )
    bars.set(xlim=(0, 1.35), ylim=(2.6, -0.6))
    bars.set_xticks([])
    bars.set_yticks([])
    question = "\n".join(textwrap.wrap(example["question"], 52))
    bars.set_title(
      f"{question}\nanswer: {example['answer']}  ({example['type']})", fontsize=9, loc="left", color=INK, parse_math=False
    )
    bare(bars)
  return save(figure, path)


def class_examples(examples: Sequence[Example], path: Path) -> pathlib.Path:
  """Class-incremental tasks: three frames of each clip, its true class, and what was said where that is wrong.

  Args:
    examples: each {"id": str, "visual": uint8 [T, H, W, 3], "truth": str, "prediction": str}.
    path: the png to write.
  """
  shown = max(min(3, len(example["visual"])) for example in examples)
  figure = Figure(
    figsize=(0.4 + 2.0 * shown, 2.6 * len(examples)), layout="constrained"
  )  # a picture stays about as wide as high
  for axis, example in zip(figure.subplots(len(examples), 1, squeeze=False)[:, 0], examples, strict=True):
    visual, right = example["visual"], example["prediction"] == example["truth"]
    frames(axis, visual[np.unique(np.linspace(0, len(visual) - 1, 3).round().astype(int))], example["id"])
    said = "found" if right else f"said: {example['prediction']}"
    axis.set_xlabel(f"{example['truth']}  ({said})", fontsize=9, color=INK if right else VERMILION, parse_math=False)
  return save(figure, path)


def frames(axis: Axes, visual: np.ndarray, title: str) -> None:
  """Shows the frames uint8 [T, H, W, 3] side by side, a white line between them, one unit of x each."""
  visual = np.asarray(visual)
  seconds, height = visual.shape[:2]
  framed = np.pad(visual, ((0, 0), (0, 0), (height // 40 + 1,) * 2, (0, 0)), constant_values=255)
  axis.imshow(np.concatenate(list(framed), axis=1), extent=(0, seconds, 1, 0), aspect="auto")
  axis.set_title(textwrap.shorten(str(title), 60, placeholder="..."), fontsize=9, loc="left", color=GREY, parse_math=False)
  axis.set_xticks([])
  axis.set_yticks([])
  bare(axis)


def _bar(axis: Axes, start: int, end: int, row: int, colour: str, name: str) -> None:
  """A labelled bar over the seconds [start, end)."""
  corner, room = (start, row - 0.4), 12 * (end - start)  # twelve letters fit into a second
  axis.add_patch(Rectangle(corner, end - start, 0.8, facecolor=colour, edgecolor="white", linewidth=1.5))
  text = name if len(name) <= room else name[: room - 1] + "…"
  axis.text((start + end) / 2, row, text, ha="center", va="center", fontsize=8, color=_ink_on(to_rgb(colour)), parse_math=False)


def _ink_on(colour: Sequence[float]) -> str:
  """White on dark colours (red, green, blue, each in [0, 1]), dark on light ones."""
  return "white" if np.dot(colour[:3], (0.3, 0.59, 0.11)) < 0.5 else INK


def second_axis(axis: Axes, seconds: int) -> None:
  """An axis of seconds without a frame."""
  axis.set_xlim(0, seconds)
  axis.set_xticks(range(seconds + 1), [f"{t} s" if t == seconds else str(t) for t in range(seconds + 1)], fontsize=7)
  bare(axis)
  axis.tick_params(axis="x", labelcolor=GREY)


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
  """Maximal runs of one value, half-open."""
  cuts = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
  return list(itertools.pairwise(cuts))


def ones(values: np.ndarray) -> list[tuple[int, int]]:
  """Maximal runs of ones, half-open."""
  on = np.asarray(values) > 0.5
  return [(start, end) for start, end in _runs(on.astype(int)) if on[start]]


def bare(axis: Axes) -> None:
  """No frame, no tick marks."""
  axis.spines[:].set_visible(False)
  axis.tick_params(length=0, colors=INK)


def save(figure: Figure, path: Path) -> pathlib.Path:
  """Writes a figure -> its path; raises UserError when it cannot be written."""
  path = pathlib.Path(path)
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor="white")
  return path
