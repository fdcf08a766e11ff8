"""Joins a task's scores with its benchmark's metric and its trivial predictor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from phpjax.metrics import METRICS, ave, avqa, avs, avvp, rows
from phpjax.metrics.avqa import QUESTION_TYPES

Arrays = Mapping[str, np.ndarray]

__all__ = ["QUESTION_TYPES", "main_metric", "statistics", "summarise", "trivial", "trivial_labels"]


def main_metric(task: str) -> str:
  """The score that enters the accuracy matrix."""
  return METRICS[task].MAIN


def statistics(task: str, outputs: Arrays, batch: Arrays) -> dict[str, np.ndarray]:
  """One batch of scores and labels -> what its metric needs of every real clip."""
  mask = batch["mask"]
  if task == "ave":
    scores, label = rows.keep(mask, outputs["scores"], batch["label"])
    return ave.statistics(ave.decide(scores), label, background=scores.shape[-1] - 1)
  if task == "avvp":
    audio, visual = (avvp.decide(outputs[m], outputs["clip"]) for m in ("audio", "visual"))
    dense = batch["mask"] * batch["dense"]  # a clip without dense labels cannot be scored
    stats = avvp.statistics(audio, visual, batch["dense_audio"], batch["dense_visual"], mask=dense)
    fused, label = rows.keep(dense, outputs["audio"] + outputs["visual"], batch["label"])
    return {**stats, "fused": fused, "weak": label}
  if task == "avs":
    return avs.statistics(outputs["mask"], batch["label"], mask=mask, label_mask=batch["label_mask"])
  if task == "avqa":
    asked = (mask[:, None] * batch["question_mask"]).reshape(-1)
    return avqa.statistics(
      outputs["scores"].argmax(-1).reshape(-1), batch["label"].reshape(-1), batch["type"].reshape(-1), mask=asked
    )
  raise KeyError(f"no metric for task {task!r}")


def summarise(task: str, parts: Sequence[Arrays]) -> dict[str, float]:
  """Statistics of all batches -> every score of the benchmark, in [0, 1]."""
  stats = rows.join(parts)
  scores = METRICS[task].summarise(stats)
  if task == "avvp":
    scores |= avvp.php_top1(stats["fused"], stats["weak"])
  return scores


def trivial(task: str, train: Arrays, test: Arrays) -> tuple[str, dict[str, float]]:
  """The best predictor that never looks at a clip -> (its name, its scores); arrays as `trivial_labels` gives them."""
  if task == "ave":
    return ave.trivial(test["label"], background=int(test["num_classes"]) - 1)
  if task == "avvp":
    return avvp.trivial(test["dense_audio"], test["dense_visual"], test["dense"])
  if task == "avs":
    return avs.trivial(test["label"], train["mean_mask"], label_mask=test["label_mask"])
  if task == "avqa":
    return avqa.trivial(train["label"], train["type"], test["label"], test["type"])
  raise KeyError(f"no trivial predictor for task {task!r}")


def trivial_labels(task: str, examples: Sequence[dict[str, Any]], num_classes: int) -> dict[str, np.ndarray]:
  """The labels of a whole split, stacked."""
  if task == "avs":
    labelled = [(e["label"] * e["label_mask"][:, None, None]).sum(0) for e in examples]
    mean = np.sum(labelled, axis=0) / max(sum(e["label_mask"].sum() for e in examples), 1)
    return {"mean_mask": mean, **{k: np.stack([e[k] for e in examples]) for k in ("label", "label_mask")}}
  keys = {"ave": ("label",), "avvp": ("dense_audio", "dense_visual", "dense"), "avqa": ("label", "type")}[task]
  return {**{k: np.stack([e[k] for e in examples]) for k in keys}, "num_classes": np.int32(num_classes)}
