"""The processes that make shards."""

import contextlib
import dataclasses
import functools
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import SimpleQueue
from pathlib import Path

from data_pipelines import DATASETS
from data_pipelines.encode import Encoding
from data_pipelines.prepare_folder import sweep
from data_pipelines.prepare_suspects import Clip, make_apart, suspects
from data_pipelines.processes import end_with_parent
from data_pipelines.schema import DataError
from data_pipelines.shards import Shard, ShardEntry, ShardMaker

# Split, clip, why it was left out ("" if it was not) -> whether to go on. A clip may be told of more than once.
Report = Callable[[str, str, str], bool]


@dataclasses.dataclass(frozen=True)
class Setup:
  """What a worker needs to make the same shards: key of DATASETS, root, records folder, encoding, `ShardMaker.killers`."""

  name: str
  root: str
  folder: str
  encoding: Encoding
  killers: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def maker(self) -> ShardMaker:
    return ShardMaker(DATASETS[self.name](self.root), Path(self.folder), self.encoding, self.killers)


def make_shards(
  maker: ShardMaker, shards: Sequence[Shard], setup: Setup, num_workers: int, report: Report
) -> Iterator[ShardEntry]:
  """Makes shards in `num_workers` processes and gives their entries as they are finished; `report` hears of every clip.

  Closed early, it finishes the shards that are begun. A clip that ends its worker is left out, and the work goes on; with one
  process, which is this one, the next run finds it out.

  Raises:
    DataError: a worker died, and not of one clip; and what a worker raises.
  """
  if num_workers == 1:
    for shard in shards:
      yield maker.make(shard, report)
    return
  left = {shard.file: shard for shard in shards}
  while left:
    try:
      with contextlib.closing(_make_shards(list(left.values()), setup, num_workers, report)) as results:
        for entry in results:
          del left[entry.file]
          yield entry
    except BrokenProcessPool as error:
      sweep(maker.folder)
      setup = with_killers(setup, maker, died=error)
      if not all([report(split, clip, setup.killers[clip]) for split, clip in suspects(maker.folder) if clip in setup.killers]):
        return


def with_killers(setup: Setup, maker: ShardMaker, died: BrokenProcessPool | None = None) -> Setup:
  """Looks among the clips that dead processes were at for those that killed them, and lets nobody decode these again.

  Raises:
    DataError: a worker of this run `died`, and none of the clips alone ends its process.
  """
  at = [(split, clip) for split, clip in suspects(maker.folder) if clip in maker.rows.get(split, {})]
  new = [(split, clip) for split, clip in at if clip not in setup.killers]
  found = make_apart(functools.partial(_size, setup), new)[1]
  if died is not None and not found:
    where = ", ".join(f"{split} clip {clip}" for split, clip in new) or "no clip"
    raise DataError(
      f"a worker died, perhaps for want of memory, while they were at {where}, of which none alone ends its process; "
      "run again to go on, with fewer --num_workers"
    ) from died
  maker.killers |= found
  return dataclasses.replace(setup, killers=dict(maker.killers))


def sizes(maker: ShardMaker, setup: Setup, clips: Sequence[Clip], num_workers: int) -> list[int]:
  """Bytes of the examples of some clips, without those that cannot be used; apart from this process if there may be others."""
  if num_workers > 1:
    return make_apart(functools.partial(_size, setup), clips)[0]  # one that kills leaves its name to `with_killers`
  return [len(example) for clip in clips if (example := maker.make_clip(*clip).example) is not None]


def _size(setup: Setup, clip: Clip) -> int | None:
  if not _apart:
    _apart.append(setup.maker())
  example = _apart[0].make_clip(*clip).example
  return None if example is None else len(example)


_apart: list[ShardMaker] = []  # in the process of `make_apart`


def _make_shards(shards: Sequence[Shard], setup: Setup, num_workers: int, report: Report) -> Iterator[ShardEntry]:
  """`make_shards` in one pool of workers; raises BrokenProcessPool when one dies."""
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
      pool.shutdown(cancel_futures=True)  # none may run on when somebody looks at what the dead ones left


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

  def report(self, *clip: str) -> bool:
    self._told.put(clip)
    return True


_worker: list[_Worker] = []


def _start(setup: Setup, told: SimpleQueue) -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and decides
  end_with_parent()
  _worker[:] = [_Worker(setup, told)]


def _make_one(shard: Shard) -> ShardEntry:
  (worker,) = _worker
  return worker.maker.make(shard, worker.report)
