"""What a run writes down while it trains: metrics.jsonl and TensorBoard events, both in the workdir."""

import contextlib
import json
import math
import os
import pathlib
import types
from collections.abc import Iterator, Mapping
from typing import Any, Self

from phpjax import files
from phpjax.errors import writing
from phpjax.events import Events

FILE = "metrics.jsonl"
FOLDER = "tensorboard"


class MetricsLog:
  """Appends one line per logged step, and forgets the lines that a resumed run is about to write again.

  `step` counts the optimizer steps of the whole run, over all tasks. Every line is written at once, so that a killed
  run loses none. Numbers that are not finite are written as null (JSON has no NaN). All methods raise UserError when
  metrics.jsonl cannot be written; events for TensorBoard a run can do without.
  """

  def __init__(self, workdir: str | os.PathLike[str], *, resume_step: int, primary: bool = True):
    """Opens the log of `workdir`.

    Args:
      workdir: made if it is missing.
      resume_step: steps done so far; lines of later steps are dropped, 0 drops all.
      primary: False on all processes but the first: then nothing is read or written.
    """
    self._file = self._events = None
    if not primary:
      return
    workdir = pathlib.Path(workdir)
    self._path = workdir / FILE
    with writing(self._path):
      workdir.mkdir(parents=True, exist_ok=True)
      _drop_after(self._path, resume_step)
      # Unbuffered: what a full disk did not take must not come back when the file is closed.
      self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
    # TensorBoard hides what an earlier, longer run wrote at these steps.
    self._events = Events(workdir / FOLDER, purge_step=resume_step + 1 if (workdir / FOLDER).exists() else None)

  def step(
    self,
    step: int,
    *,
    task: str,
    epoch: int,
    loss: float,
    losses: Mapping[str, float],
    lr: float | Mapping[str, float],
    examples_per_s: float,
    data_wait_s: float,
  ) -> None:
    """Writes one training step.

    Args:
      step: steps done in the whole run, this one included.
      task: name of the task being learned.
      epoch: of that task, from 0.
      loss: what was minimised, a sum of `losses`.
      losses: its parts by name.
      lr: learning rate, or one per label of the optimizer (shared, prompts, head).
      examples_per_s: examples per second since the last reported step, logged or not, over all devices.
      data_wait_s: seconds that the host waited for the step's batch to be decoded.
    """
    if self._file is None:
      return
    numbers = {"loss": loss, "losses": losses, "lr": lr, "examples_per_s": examples_per_s, "data_wait_s": data_wait_s}
    numbers = {name: _number(value) for name, value in numbers.items()}
    line = json.dumps({"step": int(step), "task": task, "epoch": int(epoch), **numbers}, allow_nan=False)
    left = f"{line}\n".encode()
    with writing(self._path):
      while left:  # a disk that is about to be full takes a part
        left = left[self._file.write(left) :]
    for name, value in _flat(numbers):
      if value is not None:
        self._events.scalar(f"{task}/{name}", value, step)

  def evaluation(self, step: int, task: str, scores: Mapping[str, float], *, split: str = "test") -> None:
    """Adds the scores of one evaluation to TensorBoard, as SPLIT/TASK/SCORE; results.json has them too."""
    if self._events is None:
      return
    for score, value in scores.items():
      self._events.scalar(f"{split}/{task}/{score}", float(value), step)
    self._events.flush()

  def close(self) -> None:
    """Closes both files; may be called twice."""
    file, events = self._file, self._events
    self._file = self._events = None
    if events is not None:
      events.close()
    if file is not None:
      with writing(self._path):
        file.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
    self.close()


def _drop_after(path: pathlib.Path, step: int) -> None:
  """Keeps the lines of `path` up to `step`; a last line cut short by a kill goes too, and any that is damaged."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
    with contextlib.suppress(ValueError, RecursionError):  # a damaged line costs no other
      record = json.loads(line)
      done = record.get("step") if isinstance(record, dict) else None
      if isinstance(done, int) and done <= step:
        kept.append(line + "\n")
  files.write_whole(path, "".join(kept))


def _number(value: Any) -> Any:
  """A python float from any scalar, None where it is not finite; the same inside a mapping."""
  if isinstance(value, Mapping):
    return {name: _number(part) for name, part in value.items()}
  value = float(value)
  return value if math.isfinite(value) else None


def _flat(numbers: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
  """{"lr": {"head": 1}} -> ("lr/head", 1), one level deep."""
  for name, value in numbers.items():
    if isinstance(value, Mapping):
      yield from ((f"{name}/{part}", inner) for part, inner in value.items())
    else:
      yield name, value
