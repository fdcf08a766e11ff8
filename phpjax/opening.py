"""Opens a run: builds its objects from a config, holds its workdir, and closes all of it again."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Iterator

from ml_collections import ConfigDict

from data_pipelines import DataError
from data_pipelines.base import ClipCache
from phpjax import checkpoint, checks, compat, distributed, experiment, lease, optimizer, sharding, signals, watchdog, workdir
from phpjax.benchmarks import BENCHMARKS
from phpjax.errors import UserError
from phpjax.joint import JointRun
from phpjax.logs import MetricsLog
from phpjax.progress import Progress
from phpjax.run import Run
from phpjax.steps import Steps


@contextlib.contextmanager
def open_run(config: ConfigDict, folder: pathlib.Path | None) -> Iterator[Run]:
  """Builds everything and closes it again; without a folder nothing is written (dry run).

  Raises UserError when another run holds the workdir (see phpjax/lease.py).
  """
  config = compat.resolve(config)  # in Python; the command line has done it
  mesh, started = sharding.make_mesh(tuple(config.mesh)), time.monotonic()
  primary = distributed.is_primary()
  with (
    lease.held(folder if primary else None) as held,
    watchdog.watching(config.watchdog_minutes, folder) as dog,
    Progress(primary=primary, on_progress=dog.beat) as progress,
    signals.at_end(progress.close),
  ):
    if folder is not None and (folder / workdir.CONFIG).is_file():
      workdir.claim(folder, config, primary=primary)  # before anything slow
    datasets = experiment.open_datasets(config, lambda done, total: progress.evaluation("composing the toybox", done, total))
    if found := checks.unusable(datasets, config):
      raise UserError("; ".join(found))
    infos = {name: BENCHMARKS[name].describe(name, data) for name, data in datasets.items()}
    built = experiment.build(config, infos, sharding.replicated(mesh))
    identity = experiment.data_identity(config, datasets, infos)
    distributed.check_equal({"encoder weights": built.weights, "data": identity})
    checkpoints = None
    if folder is not None:
      workdir.claim(folder, config, primary=distributed.is_primary())
      checkpoints = checkpoint.Checkpoints(folder)
    mute = MetricsLog("", resume_step=0, primary=False)  # training opens the real one: it knows which steps count
    params, state = built.init()
    params = {k: sharding.put_replicated(v, mesh) for k, v in params.items()}
    steps = Steps(built.modules, built.method, optimizer.settings(config.opt), mesh, compile_effort=config.compile_effort)
    clips = ClipCache(int(config.data.cache_gb * 1e9 / max(config.data.num_workers, 1)))  # each worker has one of this size
    run = (JointRun if built.method.joint else Run)(
      experiment=built,
      datasets=datasets,
      steps=steps,
      mesh=mesh,
      folder=folder,
      checkpoints=checkpoints,
      log=mute,
      progress=progress,
      params=params,
      state=state,
      data_identity=identity,
      clips=clips,
      started=started,
      held=held,
    )
    with closing(run):
      yield run


@contextlib.contextmanager
def closing(run: Run) -> Iterator[None]:
  """Closes what a run writes to, and makes bad data the user's."""
  try:
    yield
  except DataError as error:
    raise UserError(str(error)) from error
  finally:
    try:
      run.log.close()
    finally:
      if run.checkpoints is not None:
        run.checkpoints.close()
