"""The processes that make shards."""

import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.queues import SimpleQueue
from pathlib import Path

from data_pipelines import DATASETS
from data_pipelines.encode import Encoding
from data_pipelines.shards import Shard, ShardEntry, ShardMaker

Report = Callable[[str, str, str], None]  # split, clip, why it was left out ("" if it was not)


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a worker needs to make the same shards: key of DATASETS, root, records folder, encoding."""

  name: str
  root: str
  folder: str
  encoding: Encoding

  def maker(self) -> ShardMaker:
    return ShardMaker(DATASETS[self.name](self.root), Path(self.folder), self.encoding)


def make_shards(
  maker: ShardMaker, shards: Sequence[Shard], setup: Setup, num_workers: int, report: Report
) -> Iterator[ShardEntry]:
  """Makes shards in `num_workers` processes and gives their entries as they are finished; `report` hears of every clip.

  Closed early, it finishes the shards that are begun. Raises what a worker raises.
  """
  if num_workers == 1:
    for shard in shards:
      yield maker.make(shard, report)
    return
  context = multiprocessing.get_context("spawn")  # a fork would copy threads and locks in mid-flight
  told = context.SimpleQueue()
  with ProcessPoolExecutor(min(num_workers, len(shards)), context, _start, (setup, told)) as pool:
    waiting = {pool.submit(_make_one, shard) for shard in shards}
    try:
      yield from _results(waiting, told, report)
    except KeyboardInterrupt:
      for process in multiprocessing.active_children():
        process.terminate()  # a shard that is half made counts for nothing
      raise
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


def _results(waiting: set[Future[ShardEntry]], told: SimpleQueue, report: Report) -> Iterator[ShardEntry]:
  """The results as they come; left early, it waits for those that are begun."""
  try:
    while waiting:
      done, waiting = _wait(waiting, told, report)
      for future in done:
        yield future.result()
  except (GeneratorExit, Exception):
    waiting = {future for future in waiting if not future.cancel()}
    while waiting:
      waiting = _wait(waiting, told, report)[1]
    raise


def _wait(waiting: set[Future], told: SimpleQueue, report: Report) -> tuple[set[Future], set[Future]]:
  """Waits a moment, reports the clips done since -> futures done, and not done.

  Nobody may wait for a worker without emptying the queue: a full pipe would hold the worker up for ever.
  """
  found = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
  while not told.empty():
    report(*told.get())
  return found.done, found.not_done


class _Worker:
  """What a process keeps between shards."""

  def __init__(self, setup: Setup, told: SimpleQueue) -> None:
    self.maker, self._told = setup.maker(), told

  def report(self, *clip: str) -> None:
    self._told.put(clip)


_worker: list[_Worker] = []


def _start(setup: Setup, told: SimpleQueue) -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and decides
  threading.Thread(target=_end_with_parent, daemon=True).start()
  _worker[:] = [_Worker(setup, told)]


def _end_with_parent() -> None:
  """A parent that was killed cannot end its workers, and the next run must not meet them."""
  parent = multiprocessing.parent_process()
  if parent is not None:
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _make_one(shard: Shard) -> ShardEntry:
  (worker,) = _worker
  return worker.maker.make(shard, worker.report)
