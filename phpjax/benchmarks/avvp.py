"""AVVP: what is heard and what is seen in each second, learned from labels of whole clips (the LLP dataset)."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np

import data_pipelines
from phpjax import figures, metrics, predictions, tasks
from phpjax.benchmarks.base import Arrays, Benchmark, TaskInfo, Tree
from phpjax.metrics import rows


class AVVP(Benchmark):
  """Audio-visual video parsing; scored on the clips that have dense labels (per second and modality) only."""

  dataset = data_pipelines.LLP
  task = tasks.AVVP
  metric = metrics.avvp
  prediction = predictions.EventPrediction
  label_keys = ("dense_audio", "dense_visual", "dense", "label")
  protocols = ("official", "released")
  scoring = "F of each clip with labels per second"
  also_shown = ("segment/Event@AV", "event/Type@AV", "event/Event@AV")
  official = (10, 25, 0)
  figure = "avvp_timelines"

  def unusable(self, split: str, records: Sequence[data_pipelines.Record]) -> str:
    """A split without any dense label."""
    if any(record.dense for record in records):
      return ""
    return (
      f"no clip of the split {split} has labels per second; AVVP is scored on those: "
      "put AVVP_eval_audio.csv and AVVP_eval_visual.csv beside the split files"
    )

  def statistics(self, outputs: Arrays, batch: Arrays) -> dict[str, np.ndarray]:
    """Grids of what is said against dense labels, and what PHP's release counts."""
    audio, visual = (self.metric.decide(outputs[m], outputs["clip"]) for m in ("audio", "visual"))
    dense = batch["mask"] * batch["dense"]  # a clip without dense labels cannot be scored
    stats = self.metric.statistics(audio, visual, batch["dense_audio"], batch["dense_visual"], mask=dense)
    fused, label = rows.keep(dense, outputs["fused"], batch["label"])
    return {**stats, "fused": fused, "weak": label}

  def shown(self, protocol: str | None) -> tuple[str, ...]:
    """Where PHP's release is followed, its own number too: top-1 of whole clips, a clip counted once per label."""
    return (*super().shown(protocol), *(("released_accuracy_repeated",) if protocol == "released" else ()))

  def summarise(self, parts: Sequence[Arrays]) -> dict[str, float]:
    """The ten official scores and those of PHP's release."""
    stats = rows.join(parts)
    return {**self.metric.summarise(stats), **self.metric.released(stats["fused"], stats["weak"])}

  def trivial(self, train: Arrays, test: Arrays, info: TaskInfo) -> tuple[str, dict[str, float]]:
    """The same classes in all seconds; under the scores of PHP's release, the same class for all clips."""
    del train
    name, scores = self.metric.trivial(test["dense_audio"], test["dense_visual"], test["dense"])
    best, released = self.metric.trivial_released(test["label"], test["dense"])
    return f"{name}; released: always {info.classes[best]}", {**scores, **released}

  def draw(self, examples: Sequence[Tree], info: TaskInfo, path: pathlib.Path) -> None:
    """Time lines of what is heard and seen."""
    figures.avvp_timelines([self.example(row) for row in examples], info.classes, path)

  def example(self, row: Tree) -> Tree:
    """For `figures.avvp_timelines`."""
    outputs = row["outputs"]
    said = {m: self.metric.decide(outputs[m][None], outputs["clip"][None])[0] for m in ("audio", "visual")}
    return {"id": row["id"], "visual": row["visual"], "truth": {m: row[f"dense_{m}"] for m in said}, "prediction": said}
