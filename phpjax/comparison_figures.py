"""Figures of a comparison, for a page: small ones that flow, as SVG with a transparent ground, for light and for dark pages.

Colours and markers as in phpjax/figures.py; a row has the same one in all figures of a page. Texts are drawn as they are, never
as mathematics.
"""

from __future__ import annotations

import io
import itertools
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from phpjax import figures
from phpjax.comparison import Group, Setting, Stat, trivial_stat
from phpjax.comparison_tables import clean
from phpjax.finished import Finished

EXPLAINED = (
  "Figures: percent, mean over seeds; bars and shades: sample standard deviation; small dots below: single seeds; dashed: "
  "trivial predictor, or no forgetting."
)
WIDTH = 4.6  # inches: a phone's width in CSS pixels
LABEL = 24  # characters of a row's name in a line
SHADED = 5  # curves whose deviations can be told apart


INK, PALE = figures.INK, "#D5D5D5"
PALETTE = figures.PALETTE[:-1]  # yellow cannot be seen on white
# What the colours become on a dark page, where deep ones cannot be told from the ground.
ON_DARK = {
  INK: "#E6E6E6", PALE: "#4A4A4A", figures.BLUE: "#5B9BFF", figures.SKY: "#9BE1FF", figures.GREEN: "#2FC79A",
  figures.VERMILION: "#FF6B5E",
}  # fmt: skip


class Drawn(NamedTuple):
  """What a figure shows, in words, and how it looks on a light and on a dark page."""

  caption: str
  light: bytes
  dark: bytes


def draw(setting: Setting) -> list[Drawn]:
  """The last score of each task, their mean, forgetting, and mean accuracy while tasks are added."""
  task_stat = lambda task: lambda group: group.score(task)
  task_of = lambda task: lambda run: run.final["matrix"].get(task)
  panels = [(f"{task} ({setting.metric[task]})", task_stat(task), task_of(task), task) for task in setting.tasks]
  panels.append(("mean over tasks", lambda group: group.number("mean_accuracy"), lambda run: run.numbers["mean_accuracy"], ""))
  found = []
  for title, of_group, of_run, task in panels:
    lines = [trivial_stat(seeds, "matrix", setting.tasks, task).mean for _, seeds in setting.trivial]
    found.append(_both(f"{title}, percent after the last task", dots, setting.groups, title, of_group, of_run, lines))
  if len(setting.tasks) > 1:
    of_run = lambda run: run.numbers["forgetting"]
    of_group = lambda group: group.number("forgetting")
    found.append(_both("forgetting, percent", dots, setting.groups, "forgetting", of_group, of_run, [0.0]))
    if any(group.curve() for group in setting.groups):
      found.append(_both("mean accuracy over the tasks learned so far, percent", curves, setting.groups))
  return found


def _both(caption: str, function: Callable[..., Figure], *arguments: object) -> Drawn:
  light = svg(function(*arguments))
  return Drawn(clean(caption, 300), light, on_dark(light))


def dots(
  groups: Sequence[Group],
  title: str,
  of_group: Callable[[Group], Stat],
  of_run: Callable[[Finished], float | None],
  lines: Sequence[float | None],
) -> Figure:
  """A line per row: mean, standard deviation and single seeds, all in percent; dashed lines stand for `lines`."""
  figure = Figure(figsize=(WIDTH, 0.36 * len(groups) + 0.85), layout="constrained")
  axis = figure.subplots()
  for line in lines:
    if line is not None:
      axis.axvline(100 * line, color=INK, linewidth=1, linestyle=(0, (3, 3)), alpha=0.6)
  for y, group in enumerate(groups):
    stat, colour, marker = of_group(group), *style_of(y)
    if stat.mean is None:
      continue
    seeds = [100 * value for value in map(of_run, group.runs) if value is not None]
    if len(seeds) > 1:
      axis.plot(seeds, [y + 0.27] * len(seeds), ".", color=colour, markersize=5, alpha=0.8)
    spread = None if stat.std is None else 100 * stat.std
    axis.errorbar(100 * stat.mean, y, xerr=spread, color=colour, marker=marker, markersize=6, capsize=3)
  axis.set(ylim=(len(groups) - 0.5, -0.5))
  axis.set_yticks(range(len(groups)), ["\n".join(_wrapped(group.label)) for group in groups], fontsize=8.5)
  axis.margins(x=0.08)
  axis.set_title(clean(title, 60), fontsize=10, loc="left", color=INK)
  axis.grid(axis="x", color=PALE, linewidth=0.7)
  _dress(axis)
  axis.tick_params(axis="y", length=0)
  return figure


def curves(groups: Sequence[Group]) -> Figure:
  """Mean accuracy after 1, 2, ... tasks, a line per row, its name below."""
  shown = [(at, group, curve) for at, group in enumerate(groups) if (curve := group.curve())]
  names = [_wrapped(group.label, 2 * LABEL) for _, group, _ in shown]
  figure = Figure(figsize=(WIDTH, 2.7 + 0.19 * sum(map(len, names))), layout="constrained")
  axis = figure.subplots()
  handles = []
  for at, _, curve in shown:
    colour, marker = style_of(at)
    steps, means = np.arange(1, len(curve) + 1), np.array([100 * stat.mean for stat in curve])
    spread = np.array([100 * (stat.std or 0.0) for stat in curve])
    if len(shown) <= SHADED:
      axis.fill_between(steps, means - spread, means + spread, color=colour, alpha=0.15, linewidth=0)
    style = ("-", "--", "-.", ":")[at // len(PALETTE) % 4]
    handles += axis.plot(steps, means, color=colour, marker=marker, markersize=5, linewidth=1.8, linestyle=style)
  axis.set_xticks(range(1, 1 + max(len(curve) for _, _, curve in shown)))
  axis.set_xlabel("tasks learned", fontsize=9, color=INK)
  axis.set_title("mean accuracy over the tasks learned, percent", fontsize=10, loc="left", color=INK)
  axis.grid(axis="y", color=PALE, linewidth=0.7)
  _dress(axis)
  _legend(figure, handles, ["\n".join(name) for name in names])
  return figure


def _legend(figure: Figure, handles: Sequence[Line2D], names: Sequence[str]) -> None:
  legend = figure.legend(handles, names, loc="outside lower left", fontsize=8.5, frameon=False, labelcolor=INK)
  for text in legend.get_texts():
    text.set_parse_math(False)


def style_of(row: int) -> tuple[str, str]:
  """Colour and marker of a row; after all colours are taken they come again with other markers."""
  turn, at = divmod(row, len(PALETTE))
  return PALETTE[at], figures.MARKERS[(at + turn) % len(figures.MARKERS)]


def _wrapped(label: str, width: int = LABEL) -> list[str]:
  """A name in at most two lines."""
  lines = textwrap.wrap(clean(label), width) or ["?"]
  return lines if len(lines) <= 2 else [lines[0], textwrap.shorten(" ".join(lines[1:]), width, placeholder="...")]


def _dress(axis: Axes) -> None:
  """No frame but at the left and below, and no text taken for mathematics."""
  axis.set_facecolor("none")
  axis.spines[["top", "right"]].set_visible(False)
  axis.spines[["left", "bottom"]].set_color(PALE)
  axis.tick_params(colors=INK, labelsize=8.5)
  for text in itertools.chain(axis.get_xticklabels(), axis.get_yticklabels(), [axis.title, axis._left_title]):
    text.set_parse_math(False)


def on_dark(image: bytes) -> bytes:
  """The same drawing in the colours of a dark page."""
  colours = {light.lower().encode(): dark.lower().encode() for light, dark in ON_DARK.items()}
  return re.sub(rb"#[0-9a-f]{6}", lambda match: colours.get(match[0], match[0]), image)


def svg(figure: Figure) -> bytes:
  """The figure, its letters as outlines, so that it looks the same everywhere; the same figure gives the same bytes."""
  out = io.BytesIO()
  with matplotlib.rc_context({"svg.hashsalt": "phpjax", "svg.fonttype": "path"}):
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
  return out.getvalue()
