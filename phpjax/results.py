"""results.json, the tables and figures of a finished run, and what a dry run prints."""

from __future__ import annotations

import functools
import importlib.metadata
import pathlib
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from data_pipelines import DataError, loader
from data_pipelines.views import Picked
from phpjax import distributed, figures, partition, queries, workdir
from phpjax.benchmarks import BENCHMARKS
from phpjax.errors import UserError
from phpjax.metrics import continual, rows
from phpjax.signals import Stopped

Tree = dict[str, Any]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "av")


def finish(run: Any) -> Tree:
  """Writes results.json and the figures of a run whose tasks are all learned."""
  final = assemble(run)
  draw(run, final)
  if not distributed.is_primary():
    return final
  path = run.folder / workdir.RESULTS
  workdir.write_json(path, final)  # last: it says that the run is finished
  if left_out := sum(len(clips) for splits in final["data"]["bad_clips"].values() for clips in splits.values()):
    run.progress.note(f"{left_out} clips could not be read and were left out: see data.bad_clips in {path}")
  run.progress.note(
    f"mean accuracy {final['mean_accuracy']:.3f}, forgetting {final['forgetting']:z.3f}; "
    f"see {path} and {run.folder / 'figures'}"
  )
  return final


def assemble(run: Any) -> Tree:
  """The content of results.json."""
  config, names, history = run.config, run.names, run.history
  summary = continual.summarise(history["matrix"])
  found = {name: trivial_of(run, name) for name in names}
  matrix_split, *others = run.evaluation_splits
  trivial = {name: splits[matrix_split]["scores"][BENCHMARKS[name].main] for name, splits in found.items()}
  return {
    "method": config.method.name,
    "joint": run.experiment.method.joint,  # then all rows of the matrix are those of one model, which learned all tasks at once
    "tasks": names,
    "metric": {name: BENCHMARKS[name].main for name in names},
    "matrix": history["matrix"],
    **inferred(history["per_task"], names, matrix_split),
    "unseen": history["unseen"],
    **{k: summary[k] for k in ("mean_accuracy", "forgetting", "bwt")},
    "summary": summary,
    "per_task": history["per_task"],
    "drift": history["drift"],
    **pooled(history, names, matrix_split, trivial),
    "trivial": trivial,
    "trivial_predictor": {name: splits[matrix_split] for name, splits in found.items()},
    "trivial_predictor_elsewhere": {name: {s: splits[s] for s in others if s in splits} for name, splits in found.items()},
    "parameters": parameters(run.experiment, run.params),
    "seed": config.seed,
    "steps": run.position.step,
    "skipped_steps": history["skipped"],
    "seconds": run.position.seconds + time.monotonic() - run.started,
    "peak_memory_bytes": peak_memory_bytes(),
    "data": data_summary(run),
    "weights": run.experiment.weights,
    "versions": versions(),
    "compat": config.method.compat,
    "task_id": config.task_id,
  }


def inferred(per_task: Sequence[Tree], names: Sequence[str], split: str) -> Tree:
  """Where tasks were inferred: {"routing", "oracle"}, matrices as `matrix`: the share of clips whose task was found, and the
  scores if the task were given."""
  rows = {(row["after"], row["task"]): row["scores"] for row in per_task if row["split"] == split}
  if not any("routing_accuracy" in scores for scores in rows.values()):
    return {}

  def matrix(pick: Callable[[Tree, str], float]) -> list[list[float | None]]:
    return [[pick(rows[after, name], name) if (after, name) in rows else None for name in names] for after in names]

  main = {name: BENCHMARKS[name].main for name in names}
  return {
    "routing": matrix(lambda scores, name: scores.get("routing_accuracy", 1.0)),  # one task is no choice
    "oracle": matrix(lambda scores, name: scores.get(f"oracle_{main[name]}", scores[main[name]])),
  }


def pooled(history: Tree, names: Sequence[str], split: str, trivial: Mapping[str, float]) -> Tree:
  """Where all tasks grow one label set: {"pooled"}, as `continual.pooled_accuracy` has it, over the scored clips of a split:
  "last" and "average" of the "curve" over tasks, and "last" of the trivial predictor."""
  if not all(BENCHMARKS[name].task.growing for name in names):
    return {}
  counts = [history["evaluated"][name][split]["scored_rows"] for name in names]
  curve = continual.pooled_accuracy(history["matrix"], counts).tolist()
  trivial_last = float(np.average([trivial[name] for name in names], weights=counts))
  return {"pooled": {"last": curve[-1], "average": float(np.mean(curve)), "curve": curve, "trivial": trivial_last}}


def trivial_of(run: Any, name: str) -> Tree:
  """{evaluation split: {"name", "scores"} of the best predictor that never looks at a clip}, found once in a run."""
  if name not in run.history["trivial"]:
    benchmark, info = BENCHMARKS[name], run.experiment.infos[name]
    train = benchmark.train_labels(labels_of(run, name, "train"))
    found = {
      split: benchmark.trivial(train, benchmark.test_labels(scored_labels(run, name, split)), info)
      for split in dict.fromkeys((run.selection_split(name), *run.evaluation_splits))
      if split in run.used_splits(name)
    }
    run.history["trivial"][name] = {split: {"name": which, "scores": scores} for split, (which, scores) in found.items()}
  return run.history["trivial"][name]


def statement(run: Any, name: str, split: str, scores: dict[str, float], scored: int) -> str:
  """The line that an evaluation prints: scores beside those of the trivial predictor, what was scored, and how.

  What was scored is kept for results.json.
  """
  benchmark, records = BENCHMARKS[name], run.datasets[name].records(split)
  clips, left_out = len({record.clip for record in records}), len(bad_clips(run, name, split))
  protocol = run.config.get("protocol", {}).get(name)
  told = benchmark.protocol_of(protocol)
  run.history["evaluated"].setdefault(name, {})[split] = {
    "protocol": told, "rows": len(records), "scored_rows": scored, "clips": clips, "left_out_clips": left_out,
  }  # fmt: skip
  trivial = trivial_of(run, name)[split]
  pairs = ((key, 100 * scores[key], 100 * trivial["scores"][key]) for key in benchmark.shown(protocol))
  more = {key: 100 * value for key, value in scores.items() if key == "routing_accuracy" or key.startswith("oracle_")}
  return (
    f"{name} {split}: "
    + ", ".join(f"{key} {ours:.1f} (trivial {theirs:.1f})" for key, ours, theirs in pairs)
    + "".join(f", {key} {value:.1f}" for key, value in more.items())
    + f" percent; {scored} of {len(records)} rows scored, {clips - left_out} of {clips} clips read; "
    + f"trivial predictor: {trivial['name']}; protocol: {told}"
  )


def scored_labels(run: Any, name: str, split: str) -> Iterator[Tree]:
  """What the trivial predictor of a task is chosen on: `labels_of` a split; of a growing label set, of all tasks of the run
  that have such a split, with the task's `place` and whether it is the `own` one."""
  if not BENCHMARKS[name].task.growing:
    yield from labels_of(run, name, split)
    return
  rivals = [other for other in run.names if BENCHMARKS[other].task.growing]
  for place, other in enumerate(rivals):
    if split in run.used_splits(other):
      yield from ({**row, "place": place, "own": other == name} for row in labels_of(run, other, split))


def labels_of(run: Any, name: str, split: str) -> Iterator[Tree]:
  """The label arrays of the rows of a split that were not left out, one by one; raises DataError if all of them were."""
  labels = decoded_labels(run, name, split) if BENCHMARKS[name].labels_are_media else written_labels(run, name, split)
  if (first := next(labels, None)) is None:
    raise DataError(f"no clip of {name} {split} can be read: --config.data.on_bad_clip=error says why")
  yield first
  yield from labels


def decoded_labels(run: Any, name: str, split: str) -> Iterator[Tree]:
  """Labels that are media, such as masks."""
  keys = BENCHMARKS[name].label_keys
  for batch in read(run, Picked(run.source(name, split), keys), f"{name} {split} (trivial predictor)"):
    if run.should_stop():
      raise Stopped
    yield from ({k: batch[k][i] for k in keys} for i in np.flatnonzero(batch["mask"]))


def written_labels(run: Any, name: str, split: str) -> Iterator[Tree]:
  """Labels that stand in the annotations; no media are read for them."""
  open_all(run, name, split)
  source = run.source(name, split).rows
  yield from (run.datasets[name].labels(record) for record in source.records if not source.reason(record))


def bad_clips(run: Any, name: str, split: str) -> list[str]:
  """The clips of a split that cannot be read and were left out, sorted."""
  open_all(run, name, split)
  source = run.source(name, split).rows
  return sorted({record.clip for record in source.records if source.reason(record)})


def open_all(run: Any, name: str, split: str) -> None:
  """Opens the clips of a split that this process has not opened yet, where bad ones are left out.

  There are none, but for a run that was continued or has several processes: each knows only of the clips it read.
  """
  source = run.source(name, split).rows
  if source.on_bad_clip == "skip" and (unopened := source.unopened()):
    for _ in read(run, Picked(source, (), unopened), f"{name} {split} (search for bad clips)"):
      if run.stop:  # which several processes agree upon elsewhere: each has other clips to open here
        raise Stopped


def read(run: Any, source: loader.RandomAccess, title: str) -> Iterator[Tree]:
  """All batches of a source in its order, the same in every process, decoded by threads and with progress."""
  size = run.config.eval_batch_size
  batches = loader.batches(source, batch_size=size, seed=0, shuffle=False, num_threads=run.config.data.num_threads)
  total = loader.num_batches(source, size)
  for done, batch in enumerate(batches, start=1):
    yield batch
    run.progress.evaluation(title, done, total)


def parameters(experiment: Any, params: Tree) -> Tree:
  """Counts of scalars: frozen (encoders), shared (what a task of the run uses; the rest, if any, is "unused"), per_task and the
  share of all that is trainable, also as if there were no heads."""
  frozen, unused = partition.count(params["encoders"]), unused_scalars(experiment, params)
  shared = partition.count(params["shared"]) - unused
  per_task = {name: partition.count(tree) for name, tree in params["tasks"].items()}
  share = lambda learned: learned / (frozen + learned)
  return {
    "frozen": frozen,
    "shared": shared,
    **({"unused": unused} if unused else {}),
    "per_task": per_task,
    "trainable_fraction": share(shared + sum(per_task.values())),
    "trainable_fraction_without_heads": share(shared + sum(partition.count(t["prompts"]) for t in params["tasks"].values())),
  }


def unused_scalars(experiment: Any, params: Tree) -> int:
  """Those of the shared parameters that no task of the run uses."""
  used = {key for task in experiment.tasks.values() for key in experiment.method.uses(task)}
  return partition.count({key: tree for key, tree in params["shared"].items() if key not in used})


def data_summary(run: Any) -> Tree:
  """What was read (digests of ids and classes), counts, missing and left out clips per split, which split chose the model."""
  config = run.config.data
  counts = {name: {split: len(data.records(split)) for split in data.splits()} for name, data in run.datasets.items()}
  coverage = {name: {split: data.coverage(split) for split in data.splits()} for name, data in run.datasets.items()}
  missing = {name: {split: len(c["missing"]) for split, c in splits.items()} for name, splits in coverage.items()}
  used = {name: run.used_splits(name) for name in run.datasets}
  return {
    "name": f"toybox-{config.toybox}" if config.toybox else "user",
    "identity": run.data_identity,
    "counts": counts,
    "missing_clips": missing,
    "bad_clips": {name: {split: bad_clips(run, name, split) for split in splits} for name, splits in used.items()},
    "evaluated": run.history["evaluated"],
    "evaluation_split": config.evaluation_split,
    "model_selection": selection(run),
  }


def selection(run: Any) -> Tree:
  """{learned task: the split that chose its epoch (None: the last one counts), that epoch, from 1, of how many (0: of none, no
  epoch is trained), and the main score of each on that split, of tasks that are learned at once the mean}."""
  found = {}
  for name in run.learned:
    scores = run.history["validation"].get(name, [])
    epoch = max(range(len(scores)), key=lambda i: (scores[i], i)) + 1 if scores else run.num_epochs(name)
    found[name] = {"split": run.selection_split(name), "epoch": epoch, "epochs": run.num_epochs(name), "scores": scores}
  return found


def selection_of(run: Any) -> str:
  """The same in a few words."""
  found, chosen = selection(run), dict[str, list[str]]()
  none = "no epoch is trained, there is none to choose"
  for name, how in found.items():
    by = f"epoch chosen on {how['split']}" if how["split"] else "no split chose it, the last of a fixed number of epochs counts"
    chosen.setdefault(by if how["epochs"] else none, []).append(name)
  if list(chosen) == [none]:
    return none
  return "; ".join(f"{by} ({', '.join(names)})" for by, names in chosen.items())


def versions() -> Tree:
  """Python, the platform, the devices and the packages that decide numbers; None for a package that is not installed."""
  return {
    "python": platform.python_version(),
    "platform": platform.platform(),
    "backend": jax.default_backend(),
    "devices": jax.device_count(),
    "phpjax": sys.modules[__package__].__version__,  # a clone that runs in place is not installed
    **{name: version(name) for name in PACKAGES},
  }


def version(package: str) -> str | None:
  """The installed version of a package."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def peak_memory_bytes() -> int:
  """Largest resident size so far, of this process or of one that composed clips for it."""
  peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
  return peak if sys.platform == "darwin" else peak * 1024


# -- figures ---------------------------------------------------------------------------------------------------


def draw(run: Any, final: Tree) -> None:
  """figures/*.png: the matrix, the curves, and examples of every task under the final parameters.

  What goes wrong with a figure is told in one line: a run of hours must not lose its results to a picture. Raises UserError
  when one cannot be written.
  """
  drawings: dict[str, Callable[[pathlib.Path], Any]] = {
    "accuracy_matrix": lambda path: distributed.is_primary() and figures.accuracy_matrix(final, path),
    "score_over_tasks": lambda path: distributed.is_primary() and figures.score_over_tasks(final, path),
    **{BENCHMARKS[name].figure: functools.partial(draw_examples, run, name) for name in run.names},
  }
  for name, make in drawings.items():
    try:  # every process: examples are predicted by all of them
      make(run.folder / "figures" / f"{name}.png")
    except UserError:  # a full disk, say; all is saved, and the same command draws them
      raise
    except Exception as error:
      run.progress.note(f"figure {name} is not drawn: {type(error).__name__}: {' '.join(str(error).split())}")


def draw_examples(run: Any, name: str, path: pathlib.Path) -> None:
  """Examples of a task, truth beside prediction."""
  benchmark = BENCHMARKS[name]
  shown = examples(run, name, benchmark.figure_rows)
  if distributed.is_primary():
    benchmark.draw(shown, run.experiment.infos[name], path)


def examples(run: Any, name: str, count: int) -> list[Tree]:
  """Clips spread over the split of the matrix, with the final prediction under "outputs"; bad ones are left out."""
  source, predict = run.source(name, run.evaluation_splits[0]), run.predictor(name)
  spread = (source[int(i)] for i in np.unique(np.linspace(0, len(source) - 1, count).round()))
  chosen = [example for example in spread if example["mask"]]
  place = {"process_index": jax.process_index(), "process_count": jax.process_count()}
  batches = loader.batches(chosen, batch_size=run.config.eval_batch_size, seed=0, shuffle=False, num_threads=0, **place)
  batches = queries.added(run, name, run.evaluation_splits[0], batches, infer=True)  # as when it was scored: no other compile
  outputs = rows.join(distributed.gather([jax.device_get(predict(batch)) for batch in batches]))
  return [{**row, "outputs": {k: v[i] for k, v in outputs.items()}} for i, row in enumerate(chosen)]


# -- dry run ---------------------------------------------------------------------------------------------------


def dry_run(run: Any, begin: Callable[[Any, str], None]) -> str:
  """The resolved config, data counts, a parameter table and a memory estimate, as text; `begin` starts a stage of the run."""
  experiment = run.experiment
  lines = [str(run.config), "data:"]
  for name, data in run.datasets.items():
    lines.append(f"  {name:6s} " + "  ".join(f"{split} {len(data.records(split))}" for split in data.splits()))
  columns = f"{'parameters':22s}{'frozen':>14s}{'shared':>12s}{'of this task':>14s}{'trainable':>12s}{'without head':>14s}"
  lines += ["", columns]
  frozen, planned = partition.count(run.params["encoders"]), {}
  for name in run.names:
    begin(run, name)
    live, _ = partition.split(run.params, name, experiment.method.uses(experiment.tasks[name]) if run.num_epochs(name) else ())
    shared, own = partition.count(live["shared"]), partition.count(live["task"])
    share = lambda learned: learned / (frozen + learned)
    bare = shared + partition.count(live["task"]["prompts"])
    lines.append(f"  {name:20s}{frozen:14,d}{shared:12,d}{own:14,d}{share(shared + own):12.2%}{share(bare):14.2%}")
  if unused := unused_scalars(experiment, run.params):
    lines.append(f"  {'used by no task':20s}{'':14s}{unused:12,d}")
  for stage in filter(run.num_epochs, run.stages):
    begin(run, stage)
    planned[stage] = planned_bytes(run.lower_train(stage).compile())
  encoders = f"encoders {partition.num_bytes(run.params['encoders']) / 2**30:.2f} GiB"
  if not planned:
    return "\n".join([*lines, "", f"memory: {encoders}; no training step is taken"])
  largest = max(planned, key=planned.get)
  lines += [
    "",
    f"memory of a training step per device: {planned[largest] / 2**30:.2f} GiB (largest: {largest}), of which {encoders}; "
    f"batch_size {run.config.batch_size}",
  ]
  return "\n".join(lines)


def planned_bytes(compiled: jax.stages.Compiled) -> int:
  """What the compiler plans to hold at once; donated buffers stand among the arguments and again among the outputs."""
  plan = compiled.memory_analysis()
  held = plan.temp_size_in_bytes + plan.argument_size_in_bytes + plan.output_size_in_bytes
  return held - plan.alias_size_in_bytes
