"""TensorBoard's events of a run."""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

FLUSH_S = 60.0


class Events:
  """Writes scalars into a folder for TensorBoard, in the thread that calls.

  tensorboardX's SummaryWriter hands them to a thread of its own. A full disk ends that thread, and then its queue, which nobody
  empties any more, blocks the run for good. Here what cannot be written is told in one line and costs no more than the events.
  """

  def __init__(self, folder: pathlib.Path, *, purge_step: int | None):
    """Begins a new file.

    Args:
      folder: made if it is missing.
      purge_step: TensorBoard hides what earlier files hold of this step and later ones; None hides nothing.
    """
    self._folder, self._writer, self._flushed = folder, None, time.monotonic()
    with self._or_without():
      folder.mkdir(parents=True, exist_ok=True)
      name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
      self._writer = RecordWriter(str(folder / name))
    self._add(file_version="brain.Event:2")
    if purge_step is not None:
      self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))

  def scalar(self, tag: str, value: float, step: int) -> None:
    """Adds one number."""
    self._add(step=step, summary=scalar(tag, value))
    if time.monotonic() - self._flushed > FLUSH_S:
      self.flush()

  def flush(self) -> None:
    """Until all is on the disk."""
    self._flushed = time.monotonic()
    with self._or_without():
      if self._writer is not None:
        self._writer.flush()

  def close(self) -> None:
    """Ends the file; may be called twice."""
    with self._or_without():
      if self._writer is not None:
        self._writer.close()
    self._writer = None

  def _add(self, **fields: Any) -> None:
    with self._or_without():
      if self._writer is not None:
        self._writer.write(Event(wall_time=time.time(), **fields).SerializeToString())

  @contextlib.contextmanager
  def _or_without(self) -> Iterator[None]:
    """What fails inside is told, and nothing is written any more."""
    try:
      yield
    except OSError as error:
      print(f"warning: cannot write {self._folder}: {error}; going on without events for TensorBoard", file=sys.stderr)
      writer, self._writer = self._writer, None
      if writer is not None:
        with contextlib.suppress(OSError):  # the same again, for what is still in memory
          writer.close()
