"""Clips that end the process which decodes them: damaged media make decoders crash or take all memory.

While a clip is made, a file in the journal names it. A process that dies leaves this file behind, so that the next one
knows whom to suspect; each suspect is then made once more in a process that has nothing else to do.
"""

import contextlib
import hashlib
import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from data_pipelines import records
from data_pipelines.processes import end_with_parent
from data_pipelines.schema import DataError

Clip = tuple[str, str]  # split, clip
_ENDING = ".in_flight"


@contextlib.contextmanager
def in_flight(folder: Path, split: str, clip: str) -> Iterator[None]:
  """Names a clip in the journal of a records folder until it is done; not while its process dies."""
  name = hashlib.sha256(records.to_bytes(f"{split}/{clip}")).hexdigest()[:16]  # not the pid: containers use the same again
  path = folder / records.JOURNAL / f".{name}{_ENDING}"
  path.write_text(json.dumps([split, clip]), encoding="utf-8")
  try:
    yield
  finally:
    path.unlink(missing_ok=True)


def suspects(folder: Path) -> list[Clip]:
  """The clips that dead processes left in flight, in order. Only for whoever holds the lock, while no worker runs."""
  found = []
  for path in (folder / records.JOURNAL).glob(f".*{_ENDING}"):
    if not path.stat().st_size:  # killed before it was written
      continue
    with records.expecting(path):
      split, clip = records.read_json(path)
      found.append((records.typed(split, str), records.typed(clip, str)))
  return sorted(found)


def forget(folder: Path) -> None:
  """Clears all suspects: the finished shards tell which clips were at fault."""
  for path in (folder / records.JOURNAL).glob(f".*{_ENDING}"):
    path.unlink()


def make_apart(make_one: Callable[[Clip], int], clips: Sequence[Clip]) -> tuple[list[int], dict[str, str]]:
  """Makes clips one after another in a process of their own.

  Args:
    make_one: makes a clip; picklable. What it raises says nothing here: whoever makes the clip in earnest meets it again.
    clips: split and clip of each.

  Returns:
    What `make_one` gave for those that it could make; and clip -> how it ended the process.

  Raises:
    DataError: the process cannot even begin.
  """
  made: list[int | None] = []
  killers, left = {}, list(clips)
  while left:
    found, code = _probe(make_one, left)
    made += found
    if len(found) >= len(left):
      break
    killers[left[len(found)][1]] = f"ends the process that decodes it ({_how(code)})"
    left = left[len(found) + 1 :]
  return [x for x in made if x is not None], killers


def _probe(make_one: Callable[[Clip], int], clips: Sequence[Clip]) -> tuple[list[int | None], int | None]:
  """What one process made before it ended (None: could not), and its exit code."""
  context = multiprocessing.get_context("spawn")
  told, tell = context.Pipe(duplex=False)
  process = context.Process(target=_make_all, args=(make_one, clips, tell), daemon=True)
  process.start()
  tell.close()
  heard = []
  try:
    with contextlib.suppress(EOFError):
      while True:
        heard.append(told.recv())
  except BaseException:  # Ctrl-C
    process.terminate()
    raise
  finally:
    process.join()
    told.close()
  if not heard:
    raise DataError(f"a process for {len(clips)} clips ended before it began ({_how(process.exitcode)})")
  return heard[1:], process.exitcode


def _make_all(make_one: Callable[[Clip], int], clips: Sequence[Clip], tell: Connection) -> None:
  """Tells that it begins, and what came of every clip."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and decides
  end_with_parent()
  tell.send(None)
  for clip in clips:
    made = None
    with contextlib.suppress(Exception):
      made = make_one(clip)
    tell.send(made)


def _how(code: int | None) -> str:
  if code is None or code >= 0:
    return f"exit code {code}"
  name = signal.Signals(-code).name
  return f"{name}, perhaps for want of memory" if -code == signal.SIGKILL else name
