"""The progress display and the logs, written to memory and to a temporary folder."""

import contextlib
import io
import json
import os

import numpy as np
import pytest
from full_disk import SIZE, files_that_stay_small  # noqa: F401  fixture
from tensorboardX.proto.event_pb2 import Event, SessionLog

from phpjax import logs, progress
from phpjax.errors import UserError


class Clock:
  """Seconds that pass when told to."""

  def __init__(self) -> None:
    self.now = 0.0

  def __call__(self) -> float:
    return self.now


class Terminal(io.StringIO):
  def isatty(self) -> bool:
    return True


METRIC = {"ave": "segment_accuracy", "avvp": "segment/Type@AV"}


def train(display: progress.Progress, clock: Clock, seconds_per_step: float, *, first: int = 0) -> None:
  """One task of 40 steps, four epochs."""
  display.task("ave", 0, 2, 40, first)
  for step in range(first + 1, 41):
    clock.now += seconds_per_step
    display.step((step - 1) // 10, 4, step, 1 / step, 64.0)


def lines_of(seconds_per_step: float, first: int = 0) -> list[str]:
  stream, clock = io.StringIO(), Clock()
  with progress.Progress(stream=stream, clock=clock) as display:
    display.start(80, first)
    train(display, clock, seconds_per_step, first=first)
  return stream.getvalue().splitlines()


def test_fast_steps_give_one_line_per_epoch():
  lines = lines_of(0.1)
  assert len(lines) == 1 + 4
  assert lines[2] == "[1/2 ave] epoch 2/4  loss 0.05  64.0 examples/s  step 20/40  left: 0:02, all tasks 0:06"


def test_slow_steps_give_a_line_every_five_seconds():
  assert len(lines_of(2.0)) == pytest.approx(1 + 80 / 6 + 4, abs=4)
  assert len(lines_of(6.0)) == 1 + 40


def test_resumed_run_counts_only_its_own_steps():
  lines = lines_of(1.0, first=20)
  assert lines[0] == "[1/2 ave] 20 steps to do"
  assert lines[-1].endswith("step 40/40  left: 0:00, all tasks 0:40")


def test_the_first_step_is_not_taken_for_the_speed():
  stream, clock = io.StringIO(), Clock()
  display = progress.Progress(stream=stream, clock=clock)
  display.start(40)
  display.task("ave", 0, 1, 40)
  clock.now += 60  # compilation
  display.step(0, 4, 1, 1.0, 64.0)
  assert "left: ?, all tasks ?" in stream.getvalue()
  clock.now += 0.5
  display.step(0, 4, 10, 1.0, np.float32(64))
  clock.now += 5
  display.step(1, 4, 20, 1.0, 64.0)
  assert stream.getvalue().splitlines()[-1].split("left: ")[1].split(",")[0] == "0:02"


def test_matrix_in_plain_lines():
  stream = io.StringIO()
  progress.Progress(stream=stream).matrix(("ave", "avvp"), [[0.8], [0.7, 0.805]], METRIC)
  assert stream.getvalue().splitlines() == [
    "accuracy matrix, percent",
    "after  ave (segment_accuracy)  avvp (segment/Type@AV)  mean",
    "ave                      80.0                       -  80.0",
    "avvp                     70.0                    80.5  75.2",
  ]


def test_nulls_and_zero_shot_scores_above_the_diagonal_are_dashes():
  for ahead in (None, 0.3):
    assert progress.matrix_cells(("ave", "avvp"), [[0.8, ahead]], METRIC)[1] == [["ave", "80.0", "-", "80.0"]]


@pytest.mark.parametrize("no_color", [False, True])
def test_terminal_shows_bars_and_a_table(monkeypatch, no_color):
  monkeypatch.setenv("TERM", "xterm-256color")
  monkeypatch.setenv("COLUMNS", "100")
  monkeypatch.delenv("NO_COLOR", raising=False)
  if no_color:
    monkeypatch.setenv("NO_COLOR", "1")
  stream, clock = Terminal(), Clock()
  with progress.Progress(stream=stream, clock=clock) as display:
    display.start(80)
    train(display, clock, 1.0)
    display.evaluation("ave", 8, 8)
    display.matrix(("ave", "avvp"), [[0.8]], METRIC)
    display.note("wrote [bold]results.json")
  text = stream.getvalue()
  assert "1/2 ave" in text and "all tasks" in text and "│" in text and "80.0" in text
  assert "[bold]results.json" in text  # a file name is no markup
  assert ("\x1b[38" in text) != no_color


def test_a_reader_that_is_gone_ends_no_run():
  """As by Ctrl-C in `... 2>&1 | tee log`."""
  read, write = os.pipe()
  os.close(read)
  gone = os.fdopen(write, "w", buffering=1)
  with pytest.raises(BrokenPipeError):
    print("as it is", file=gone)
  told = progress.Progress(stream=gone)
  told.note("saving after this step")
  told.task("ave", 0, 1, 10)
  told.step(0, 1, 1, 0.5, 8.0)
  told.close()
  with contextlib.suppress(BrokenPipeError):  # what was not written is still in its buffer
    gone.close()


def test_other_processes_are_silent():
  stream, clock = Terminal(), Clock()
  with progress.Progress(stream=stream, clock=clock, primary=False) as display:
    display.start(80)
    train(display, clock, 10.0)
    display.matrix(("ave", "avvp"), [[0.8]], METRIC)
    display.note("done")
  assert stream.getvalue() == ""


@pytest.mark.parametrize("seconds, text", [(None, "?"), (0.4, "0:00"), (65, "1:05"), (7265, "2:01:05")])
def test_duration(seconds, text):
  assert progress.duration(seconds) == text


# Logs.


def write(log: logs.MetricsLog, step: int, loss: float = 0.5) -> None:
  log.step(
    step,
    task="ave",
    epoch=0,
    loss=loss,
    losses={"task": np.float32(loss)},
    lr={"head": 1e-3},
    examples_per_s=10,
    data_wait_s=0.0,
  )


def steps_in(folder) -> list[int]:
  return [json.loads(line)["step"] for line in (folder / logs.FILE).read_text().splitlines()]


def test_log_holds_the_promised_fields_at_once(tmp_path):
  with logs.MetricsLog(tmp_path / "new", resume_step=0) as log:
    write(log, 1)
    record = json.loads((tmp_path / "new" / logs.FILE).read_text())  # before it is closed
    log.evaluation(1, "ave", {"segment_accuracy": 0.5})
  assert list(record) == ["step", "task", "epoch", "loss", "losses", "lr", "examples_per_s", "data_wait_s"]
  assert record["losses"] == {"task": 0.5} and record["lr"] == {"head": 1e-3}
  assert list((tmp_path / "new" / logs.FOLDER).glob("events.out.tfevents.*"))


def test_resume_drops_what_will_be_written_again(tmp_path):
  with logs.MetricsLog(tmp_path, resume_step=0) as log:
    for step in range(1, 6):
      write(log, step)
  with open(tmp_path / logs.FILE, "a") as file:
    file.write('{"step": 6, "ta')  # killed in the middle of a line
  with logs.MetricsLog(tmp_path, resume_step=3) as log:
    write(log, 4)
  assert steps_in(tmp_path) == [1, 2, 3, 4]
  with logs.MetricsLog(tmp_path, resume_step=0):
    assert steps_in(tmp_path) == []


def test_numbers_that_are_not_finite_become_null(tmp_path):
  with logs.MetricsLog(tmp_path, resume_step=0) as log:
    write(log, 1, float("nan"))
  record = json.loads((tmp_path / logs.FILE).read_text())
  assert record["loss"] is None and record["losses"] == {"task": None}


def test_log_of_other_processes_touches_nothing(tmp_path):
  with logs.MetricsLog(tmp_path, resume_step=0, primary=False) as log:
    write(log, 1)
    log.evaluation(1, "ave", {"segment_accuracy": 0.5})
  assert not list(tmp_path.iterdir())


def test_a_full_disk_under_the_log_is_one_line_and_loses_no_line_before(tmp_path, small_files):
  log = logs.MetricsLog(tmp_path, resume_step=0)
  small_files()
  with pytest.raises(UserError) as error:
    for step in range(1, 1000):
      write(log, step)
  log.close()
  assert str(error.value) == (
    f"cannot write {tmp_path / logs.FILE}: File too large; free some space and run the same command again"
  )
  whole = (tmp_path / logs.FILE).read_text().splitlines()[:-1]
  assert [json.loads(line)["step"] for line in whole] == list(range(1, step)) and 0 <= SIZE - len("\n".join(whole)) < 300


def test_a_full_disk_under_the_log_is_one_line_when_it_is_opened(tmp_path):
  with logs.MetricsLog(tmp_path, resume_step=0) as log:
    write(log, 1)
  (tmp_path / f"{logs.FILE}.tmp").symlink_to("/dev/full")
  with pytest.raises(UserError, match=f"cannot write {tmp_path / logs.FILE}: No space left on device; free some space"):
    logs.MetricsLog(tmp_path, resume_step=1)
  assert steps_in(tmp_path) == [1]


def test_a_full_disk_under_the_events_costs_the_events_alone(tmp_path, small_files, capsys):
  """And blocks nothing, neither now nor at the end."""
  with logs.MetricsLog(tmp_path, resume_step=0) as log:
    small_files()
    log.evaluation(1, "ave", {f"score {n}": 0.5 for n in range(2000)})
    log.evaluation(1, "ave", {"score": 0.5})
    write(log, 1)
  assert steps_in(tmp_path) == [1]
  [line] = capsys.readouterr().err.splitlines()
  assert line.startswith(f"warning: cannot write {tmp_path / logs.FOLDER}: ") and "File too large" in line
  assert line.endswith("going on without events for TensorBoard")


def test_events_are_those_that_tensorboard_reads(tmp_path):
  """A second file hides what the first one holds of the steps after the one that the run went on from."""
  for resume_step in (0, 2):
    with logs.MetricsLog(tmp_path, resume_step=resume_step) as log:
      for step in range(resume_step + 1, 4):
        write(log, step)
    (tmp_path / logs.FOLDER).rename(tmp_path / f"{resume_step}")
    if resume_step == 0:
      (tmp_path / logs.FOLDER).mkdir()
  first, second = (events_of(tmp_path / name) for name in ("0", "2"))
  assert first[0].file_version == second[0].file_version == "brain.Event:2"
  assert [e.step for e in first if e.summary.value and e.summary.value[0].tag == "ave/loss"] == [1, 2, 3]
  assert [e.step for e in second if e.summary.value and e.summary.value[0].tag == "ave/lr/head"] == [3]
  assert [(e.step, e.session_log.status) for e in second if e.HasField("session_log")] == [(3, SessionLog.START)]
  assert not [e for e in first if e.HasField("session_log")] and all(e.wall_time > 1e9 for e in (*first, *second))


def events_of(folder) -> list[Event]:
  """Of the one file of a folder: records of a length, its checksum, the data and its checksum."""
  [path] = folder.iterdir()
  data, events = path.read_bytes(), []
  while data:
    size = int.from_bytes(data[:8], "little")
    events.append(Event.FromString(data[12 : 12 + size]))
    data = data[16 + size :]
  return events
