"""What a run says while it works: bars on a terminal, plain lines elsewhere. All of it goes to stderr."""

import contextlib
import os
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table

LINE_EVERY_S = 5.0


class Unread:
  """A stream that may lose its reader, as by Ctrl-C in `... 2>&1 | tee log`: what nobody reads must not end a run."""

  def __init__(self, stream: TextIO) -> None:
    self._stream = stream

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    """As of the stream, but that a broken pipe is nothing."""
    with contextlib.suppress(BrokenPipeError):
      self._stream.write(text)
    return len(text)

  def flush(self) -> None:
    """Likewise."""
    with contextlib.suppress(BrokenPipeError):
      self._stream.flush()


class Progress:
  """Task, epoch, loss, examples/s and the time left of the task and of the whole run.

  ```
  with Progress() as progress:
    progress.start(1600)
    progress.task("ave", 0, 4, 400)
    progress.step(0, 10, 1, 3.2, 64.0)
    progress.evaluation("ave", 32, 128)
    progress.matrix(("ave", "avvp"), [[0.8]], {"ave": "segment_accuracy", "avvp": "segment/Type@AV"})
  ```
  Colours follow NO_COLOR. On a terminal, the bars vanish at the end and the lines stay.
  """

  def __init__(
    self,
    *,
    stream: TextIO | None = None,
    primary: bool = True,
    clock: Callable[[], float] = time.monotonic,
    on_progress: Callable[[], None] = lambda: None,
  ):
    """Opens the display.

    Args:
      stream: where to write; None is stderr.
      primary: False on all processes but the first: then nothing is written.
      clock: seconds, for tests.
      on_progress: called, as `beat`, whenever anything is told, in every process.
    """
    self.beat = on_progress
    self._stream = Unread(sys.stderr if stream is None else stream)
    self._primary, self._clock = primary, clock
    self._live = primary and self._stream.isatty() and os.environ.get("TERM") != "dumb"
    self._console = Console(file=self._stream, force_terminal=True, highlight=False) if self._live else None
    self._bars: Bars | None = None
    self._ids: dict[str, int] = {}
    self._started = self._last_line = clock()
    self._run_total = self._run_done = self._run_begin = 0.0
    self._cost = 1.0
    self._task, self._task_total, self._task_done = "", 0, 0
    self._epochs_told = 0
    self._last_step: float | None = None
    self._seconds_per_step: float | None = None

  def start(self, total_cost: float, done_cost: float = 0) -> None:
    """Begins the run: what the steps of all tasks cost together (steps times their `cost`), and what is done of it."""
    self._run_total = total_cost
    self._run_done = self._run_begin = done_cost
    self._started = self._clock()
    if self._live:
      self._bar("run", "all tasks", round(total_cost), round(done_cost))

  def task(
    self, name: str, index: int, num_tasks: int, total_steps: int, done_steps: int = 0, cost: float = 1.0, unit: str = "steps"
  ) -> None:
    """Begins a task: its place (from 0) among `num_tasks`, its steps (or `unit`), how many are done, and what one costs."""
    self.beat()
    self._cost = cost
    self._task = f"[{index + 1}/{num_tasks} {name}]"
    self._task_total, self._task_done = total_steps, done_steps
    self._epochs_told = -1
    self._last_step, self._seconds_per_step = None, None
    if self._live:
      self._bar("task", f"{index + 1}/{num_tasks} {name}", total_steps, done_steps)
    else:
      self._line(f"{self._task} {total_steps - done_steps} {unit} to do")

  def step(self, epoch: int, num_epochs: int, step: int, loss: float, examples_per_s: float) -> None:
    """Tells of a training step.

    Args:
      epoch: from 0.
      num_epochs: of this task.
      step: steps of this task done so far, this one included; may skip some.
      loss: of this step.
      examples_per_s: examples per second, over all devices.
    """
    text = f"epoch {epoch + 1}/{num_epochs}  loss {float(loss):.4g}  {float(examples_per_s):.1f} examples/s"
    self._advance(step, num_epochs, text, "step")

  def batch(self, done: int, examples_per_s: float) -> None:
    """Tells of a batch of training clips that are looked at without a step; `done`: such batches of this task so far."""
    self._advance(done, 1, f"{float(examples_per_s):.1f} examples/s", "batch")

  def _advance(self, step: int, num_epochs: int, text: str, unit: str) -> None:
    """The bars, or a line now and then."""
    self.beat()
    self._measure(step)
    left = self._time_left(step)
    if self._live:
      self._update("task", step, f"{text}  {left[0]} left")
      self._update("run", round(self._run_done), f"{left[1]} left")
      return
    epochs_done = step * num_epochs // self._task_total
    if self._epochs_told < 0:  # the first step of a task, or of what is left of it after a resume
      self._epochs_told = (step - 1) * num_epochs // self._task_total
    if epochs_done > self._epochs_told or self._due():
      self._epochs_told = epochs_done
      self._line(f"{self._task} {text}  {unit} {step}/{self._task_total}  left: {left[0]}, all tasks {left[1]}")

  def evaluation(self, name: str, done: int, total: int) -> None:
    """Tells that `done` of `total` examples of the set `name` are evaluated."""
    self.beat()
    if self._live:
      if "evaluation" not in self._ids:
        self._bar("evaluation", f"evaluate {name}", total, done)
      self._bars.update(self._ids["evaluation"], description=f"evaluate {name}", total=total)
      self._update("evaluation", done, "")
      if done >= total:
        self._bars.remove_task(self._ids.pop("evaluation"))
    elif self._due():
      self._line(f"evaluate {name}: {done}/{total}")

  def matrix(
    self,
    tasks: Sequence[str],
    matrix: Sequence[Sequence[float | None]],
    metric_names: Mapping[str, str],
    title: str = "accuracy matrix, percent",
  ) -> None:
    """Prints the accuracy matrix.

    Args:
      tasks: names, in order.
      matrix: a row per task learned so far: scores in [0, 1] on the tasks up to it, None or nothing after.
      metric_names: the score that each task's column shows.
      title: stands above it.
    """
    header, cells = matrix_cells(tasks, matrix, metric_names)
    if not self._live:
      for line in (title, *plain_table(header, cells)):
        self._line(line)
      return
    table = Table(title=title, title_justify="left")
    for column, name in enumerate(header):
      table.add_column(name.replace(" (", "\n("), justify="right" if column else "left")
    for row, line in enumerate(cells):
      learned = [f"[bold]{cell}[/bold]" if column == row + 1 else cell for column, cell in enumerate(line)]
      table.add_row(*learned)
    self._console.print(table)

  def note(self, text: str) -> None:
    """Prints one line."""
    self.beat()
    if self._live:
      self._console.print(text, markup=False, soft_wrap=True)
    else:
      self._line(text)

  def close(self) -> None:
    """Takes the bars away; may be called twice."""
    if self._bars is not None:
      self._bars.stop()
    self._bars, self._ids = None, {}

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
    self.close()

  def _measure(self, step: int) -> None:
    """Updates the seconds per step: a running mean over this task without the first step, which compiles."""
    now, steps = self._clock(), step - self._task_done
    if self._last_step is not None and steps > 0:
      new = (now - self._last_step) / steps
      old = new if self._seconds_per_step is None else self._seconds_per_step
      self._seconds_per_step = 0.9 * old + 0.1 * new
    self._run_done += steps * self._cost
    self._task_done, self._last_step = step, now

  def _time_left(self, step: int) -> tuple[str, str]:
    """Time left of the task, from its own speed, and of the run, from all that passed (evaluations too)."""
    task = None if self._seconds_per_step is None else self._seconds_per_step * (self._task_total - step)
    done = self._run_done - self._run_begin
    passed = self._clock() - self._started
    run = passed / done * (self._run_total - self._run_done) if done and task is not None else None
    return duration(task), duration(run)

  def _due(self) -> bool:
    return self._clock() - self._last_line >= LINE_EVERY_S

  def _line(self, text: str) -> None:
    self._last_line = self._clock()
    if self._primary:
      print(text, file=self._stream, flush=True)

  def _bar(self, key: str, description: str, total: int, done: int) -> None:
    """Begins the bar `key`, or begins it anew."""
    if self._bars is None:
      columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", markup=False),
      )
      # What a program prints to a stdout that goes elsewhere must not come out here.
      self._bars = Bars(*columns, console=self._console, transient=True, redirect_stdout=sys.stdout.isatty())
      self._bars.start()
    if key in self._ids:
      self._bars.remove_task(self._ids[key])
    self._ids[key] = self._bars.add_task(description, total=total, completed=done, text="")

  def _update(self, key: str, done: int, text: str) -> None:
    if key in self._ids:
      self._bars.update(self._ids[key], completed=done, text=text)


def duration(seconds: float | None) -> str:
  """Seconds -> "1:05" or "2:01:05"; "?" where it is not known."""
  if seconds is None:
    return "?"
  minutes, seconds = divmod(round(max(seconds, 0)), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def matrix_cells(
  tasks: Sequence[str], matrix: Sequence[Sequence[float | None]], metric_names: Mapping[str, str]
) -> tuple[list[str], list[list[str]]]:
  """An accuracy matrix as text: the header, and per learned task its scores in percent and their mean."""
  header = ["after", *(f"{task} ({metric_names[task]})" for task in tasks), "mean"]
  cells = []
  for k, row in enumerate(matrix):
    scores = [row[j] if j <= k else None for j in range(min(len(row), len(tasks)))]
    scores += [None] * (len(tasks) - len(scores))
    seen = [score for score in scores if score is not None]
    mean = sum(seen) / len(seen) if seen else None
    cells.append([tasks[k], *("-" if score is None else f"{100 * score:.1f}" for score in [*scores, mean])])
  return header, cells


def plain_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
  """Aligned lines: the first column to the left, the others to the right."""
  lines = [header, *cells]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return [
    "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))])
    for line in lines
  ]
