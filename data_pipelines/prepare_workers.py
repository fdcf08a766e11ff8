"""The processes that make shards, and the bar that shows how far they are."""

import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

from data_pipelines import DATASETS
from data_pipelines.encode import Encoding
from data_pipelines.shards import Shard, ShardEntry, ShardMaker


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a worker needs to make the same shards: key of DATASETS, root, records folder, encoding."""

  name: str
  root: str
  folder: str
  encoding: Encoding

  def maker(self) -> ShardMaker:
    return ShardMaker(DATASETS[self.name](self.root), Path(self.folder), self.encoding)


class Progress:
  """A bar on stderr with the rate and the time left; a line now and then where stderr is no terminal."""

  def __init__(self, total: int) -> None:
    self._total, self._start = total, time.monotonic()
    self._shown = self._start
    self._terminal = sys.stderr.isatty()
    self._every_s = 0.2 if self._terminal else 10.0

  def show(self, done: int) -> None:
    """Called as often as one likes."""
    now = time.monotonic()
    if now - self._shown >= self._every_s and done:
      self._shown = now
      self._print(done, now - self._start)

  def _print(self, done: int, spent_s: float) -> None:
    rate = done / max(spent_s, 1e-9)
    text = f"{done}/{self._total} clips, {rate:.1f} clips/s, {_duration((self._total - done) / rate)} left"
    if self._terminal:
      full = 30 * done // max(self._total, 1)
      print(f"\r\033[K[{'#' * full}{'-' * (30 - full)}] {text}", end="", file=sys.stderr, flush=True)
    else:
      print(f"prepare: {text}", file=sys.stderr, flush=True)

  def clear(self) -> None:
    """Makes room for another line."""
    if self._terminal:
      print("\r\033[K", end="", file=sys.stderr)

  def finish(self) -> None:
    self.clear()
    spent_s = time.monotonic() - self._start
    print(f"prepare: {self._total} clips in {_duration(spent_s)}", file=sys.stderr)


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}"


def make_shards(
  maker: ShardMaker, shards: Sequence[Shard], setup: Setup, num_workers: int, progress: Progress
) -> Iterator[ShardEntry]:
  """Makes shards in `num_workers` processes and gives their entries as they are finished.

  Closed early, it finishes the shards that are begun. Raises what a worker raises.
  """
  if num_workers == 1:
    yield from _make_here(maker, shards, progress)
    return
  context = multiprocessing.get_context("spawn")  # a fork would copy threads and locks in mid-flight
  counter = context.Value("q", 0)
  with ProcessPoolExecutor(min(num_workers, len(shards)), context, _start, (setup, counter)) as pool:
    waiting: set[Future[ShardEntry]] = {pool.submit(_make_one, shard) for shard in shards}
    try:
      while waiting:
        done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
        progress.show(counter.value)
        for future in done:
          yield future.result()
    except KeyboardInterrupt:
      for process in multiprocessing.active_children():
        process.terminate()  # a shard that is half made counts for nothing
      raise
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


def _make_here(maker: ShardMaker, shards: Sequence[Shard], progress: Progress) -> Iterator[ShardEntry]:
  done = 0

  def tick() -> None:
    nonlocal done
    done += 1
    progress.show(done)

  for shard in shards:
    yield maker.make(shard, tick)


class _Worker:
  """What a process keeps between shards."""

  def __init__(self, setup: Setup, counter: Synchronized) -> None:
    self.maker, self._counter = setup.maker(), counter

  def tick(self) -> None:
    with self._counter.get_lock():
      self._counter.value += 1


_worker: list[_Worker] = []


def _start(setup: Setup, counter: Synchronized) -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and decides
  threading.Thread(target=_end_with_parent, daemon=True).start()
  _worker[:] = [_Worker(setup, counter)]


def _end_with_parent() -> None:
  """A parent that was killed cannot end its workers, and the next run must not meet them."""
  parent = multiprocessing.parent_process()
  if parent is not None:
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _make_one(shard: Shard) -> ShardEntry:
  (worker,) = _worker
  return worker.maker.make(shard, worker.tick)
