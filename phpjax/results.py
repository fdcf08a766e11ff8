"""results.json, the tables and figures of a finished run, and what a dry run prints."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from data_pipelines import loader
from phpjax import figures, partition, scoring, workdir
from phpjax.metrics import avs, avvp, continual

Tree = dict[str, Any]
PACKAGES = ("phpjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "av")
FIGURE_ROWS = {"ave": 3, "avvp": 3, "avs": 2, "avqa": 3}


def finish(run: Any) -> Tree:
  """Writes results.json and the figures of a run whose tasks are all learned."""
  final = assemble(run)
  draw(run, final)
  workdir.write_json(run.folder / workdir.RESULTS, final)  # last: it says that the run is finished
  run.progress.note(
    f"mean accuracy {final['mean_accuracy']:.3f}, forgetting {final['forgetting']:.3f}; "
    f"see {run.folder / workdir.RESULTS} and {run.folder / 'figures'}"
  )
  return final


def assemble(run: Any) -> Tree:
  """The content of results.json."""
  config, names, history = run.config, run.names, run.history
  summary = continual.summarise(history["matrix"])
  trivial = {name: trivial_scores(run, name) for name in names}
  return {
    "method": config.method.name,
    "tasks": names,
    "metric": {name: scoring.main_metric(name) for name in names},
    "matrix": history["matrix"],
    "unseen": history["unseen"],
    **{k: summary[k] for k in ("mean_accuracy", "forgetting", "bwt")},
    "summary": summary,
    "per_task": history["per_task"],
    "trivial": {name: scores[scoring.main_metric(name)] for name, (_, scores) in trivial.items()},
    "trivial_predictor": {name: {"name": which, "scores": scores} for name, (which, scores) in trivial.items()},
    "parameters": parameters(run.experiment, run.params),
    "seed": config.seed,
    "steps": run.position.step,
    "skipped_steps": history["skipped"],
    "seconds": run.position.seconds + time.monotonic() - run.started,
    "peak_memory_bytes": peak_memory_bytes(),
    "data": data_summary(run),
    "weights": weights(run.experiment),
    "versions": versions(),
    "compat": config.method.compat,
    "task_id": config.task_id,
  }


def trivial_scores(run: Any, name: str) -> tuple[str, dict[str, float]]:
  """The best predictor that never looks at a clip, on the split of the accuracy matrix."""
  num_classes = run.experiment.tasks[name].num_classes
  splits = ("train", run.evaluation_splits[0])
  return scoring.trivial(name, *(scoring.trivial_labels(name, labels_of(run, name, split), num_classes) for split in splits))


def labels_of(run: Any, name: str, split: str) -> list[Tree]:
  """The label arrays of a split; masks are media, all other labels are read without touching any."""
  if name == "avs":
    source = run.source(name, split)
    return [source[i] for i in range(len(source))]
  return [run.datasets[name].labels(record) for record in run.datasets[name].records(split)]


def parameters(experiment: Any, params: Tree) -> Tree:
  """Counts of scalars: frozen (encoders), shared, per_task and the share of all that is trainable."""
  frozen, shared = partition.count(params["encoders"]), partition.count(params["shared"])
  per_task = {name: partition.count(tree) for name, tree in params["tasks"].items()}
  learned = shared + sum(per_task.values())
  return {"frozen": frozen, "shared": shared, "per_task": per_task, "trainable_fraction": learned / (frozen + learned)}


def data_summary(run: Any) -> Tree:
  """Counts and missing clips per split, and which split chose the model."""
  config = run.config.data
  counts = {name: {split: len(data.records(split)) for split in data.splits()} for name, data in run.datasets.items()}
  coverage = {name: {split: data.coverage(split) for split in data.splits()} for name, data in run.datasets.items()}
  missing = {name: {split: len(c["missing"]) for split, c in splits.items()} for name, splits in coverage.items()}
  return {
    "name": f"toybox-{config.toybox}" if config.toybox else "user",
    "counts": counts,
    "missing_clips": missing,
    "evaluation_split": config.evaluation_split,
    "model_selection": "none: the last epoch",
  }


def weights(experiment: Any) -> Tree:
  """{modality: name and sha256 of the encoder}."""
  return {m: {"name": e.name, "sha256": e.sha256} for m, e in experiment.encoders.items()}


def versions() -> Tree:
  """Python, the platform, the devices and the packages that decide numbers."""
  found = {name: importlib.metadata.version(name) for name in PACKAGES}
  return {
    "python": platform.python_version(),
    "platform": platform.platform(),
    "backend": jax.default_backend(),
    "devices": jax.device_count(),
    **found,
  }


def peak_memory_bytes() -> int:
  """Largest resident size of this process so far."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


# -- figures ---------------------------------------------------------------------------------------------------


def draw(run: Any, final: Tree) -> None:
  """figures/*.png: the matrix, the curves, and examples of every task under the final parameters."""
  folder = run.folder / "figures"
  figures.accuracy_matrix(final, folder / "accuracy_matrix.png")
  figures.score_over_tasks(final, folder / "score_over_tasks.png")
  for name in run.names:
    rows = examples(run, name, FIGURE_ROWS[name])
    info = run.experiment.infos[name]
    if name == "ave":
      figures.ave_timelines([ave_example(row) for row in rows], info.classes[:-1], folder / "ave_timelines.png")
    elif name == "avvp":
      figures.avvp_timelines([avvp_example(row) for row in rows], info.classes, folder / "avvp_timelines.png")
    elif name == "avs":
      figures.avs_overlays([avs_example(row) for row in rows], folder / "avs_overlays.png")
    elif name == "avqa":
      figures.avqa_examples([avqa_example(row, run) for row in rows], folder / "avqa_examples.png")


def examples(run: Any, name: str, count: int) -> list[Tree]:
  """Clips spread over the split of the matrix, with the final prediction under "outputs"."""
  source = run.source(name, run.evaluation_splits[0])
  chosen = [source[int(i)] for i in np.unique(np.linspace(0, len(source) - 1, count).round())]
  [batch] = list(loader.batches(chosen, batch_size=run.config.eval_batch_size, seed=0, shuffle=False, num_threads=0))
  outputs = jax.device_get(run.predictor(name)(batch))
  return [{**row, "outputs": {k: v[i] for k, v in outputs.items()}} for i, row in enumerate(chosen)]


def ave_example(row: Tree) -> Tree:
  """For `figures.ave_timelines`."""
  return {"id": row["id"], "visual": row["visual"], "label": row["label"], "prediction": row["outputs"]["scores"].argmax(-1)}


def avvp_example(row: Tree) -> Tree:
  """For `figures.avvp_timelines`."""
  outputs = row["outputs"]
  said = {m: avvp.decide(outputs[m][None], outputs["clip"][None])[0] for m in ("audio", "visual")}
  return {"id": row["id"], "visual": row["visual"], "truth": {m: row[f"dense_{m}"] for m in said}, "prediction": said}


def avs_example(row: Tree) -> Tree:
  """For `figures.avs_overlays`."""
  logits = row["outputs"]["mask"]
  return {
    "id": row["id"],
    "visual": row["visual"],
    "label": row["label"],
    "prediction": (logits > 0).astype(np.uint8),
    "iou": avs.frame_iou(logits > 0, row["label"] > 0),
  }


def avqa_example(row: Tree, run: Any) -> Tree:
  """For `figures.avqa_examples`."""
  info, scores = run.experiment.infos["avqa"], row["outputs"]["scores"][0]  # the first question about the clip
  share = np.exp(scores - scores.max())
  share /= share.sum()
  top = [(info.classes[i], float(share[i])) for i in np.argsort(-share)[:3]]
  kind = "/".join(scoring.QUESTION_TYPES[int(row["type"][0])])
  question = " ".join(info.words[i] for i in row["question"][0] if i) + "?"
  return {
    "id": row["id"],
    "visual": row["visual"],
    "type": kind,
    "question": question,
    "answer": info.classes[int(row["label"][0])],
    "top": top,
  }


# -- dry run ---------------------------------------------------------------------------------------------------


def dry_run(run: Any, begin: Callable[[Any, str], None]) -> str:
  """The resolved config, data counts, a parameter table and a memory estimate, as text; `begin` starts a task of the run."""
  experiment = run.experiment
  lines = [str(run.config), "data:"]
  for name, data in run.datasets.items():
    lines.append(f"  {name:6s} " + "  ".join(f"{split} {len(data.records(split))}" for split in data.splits()))
  lines += ["", f"{'parameters':22s}{'frozen':>14s}{'shared':>12s}{'of this task':>14s}{'trainable':>12s}"]
  frozen, planned = partition.count(run.params["encoders"]), {}
  for name in run.names:
    begin(run, name)
    live, _ = partition.split(run.params, name, experiment.method.uses(experiment.tasks[name]))
    shared, own = partition.count(live["shared"]), partition.count(live["task"])
    lines.append(f"  {name:20s}{frozen:14,d}{shared:12,d}{own:14,d}{(shared + own) / (frozen + shared + own):12.2%}")
    plan = run.lower_train(name).compile().memory_analysis()
    planned[name] = plan.temp_size_in_bytes + plan.argument_size_in_bytes + plan.output_size_in_bytes
  largest = max(planned, key=planned.get)
  lines += [
    "",
    f"memory of a training step per device: {planned[largest] / 2**30:.2f} GiB (largest: {largest}), of which encoders "
    f"{partition.num_bytes(run.params['encoders']) / 2**30:.2f} GiB; batch_size {run.config.batch_size}",
  ]
  return "\n".join(lines)
