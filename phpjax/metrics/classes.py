"""Class-incremental classification: accuracy over the classes of all tasks learned so far.

As in iCaRL (Rebuffi et al., CVPR 2017, https://arxiv.org/abs/1611.07725): the label set grows, the task is not given.
"""

from collections.abc import Mapping

import numpy as np

from phpjax.metrics import rows

MAIN = "accuracy"
WITHIN = "accuracy_within_task"  # a score that no other metric has


def statistics(
  scores: np.ndarray, label: np.ndarray, place: np.ndarray, *, mask: np.ndarray | None = None
) -> dict[str, np.ndarray]:
  """What a batch contributes.

  Args:
    scores: [N, K, C] of the C classes of each of K tasks; -inf where a task does not count.
    label: int [N], class within its own task.
    place: int [N], the place of that task among the K.
    mask: [N].

  Returns:
    {"hit": the class, "task_hit": the task of the best class, "within_hit": the class among those of its own task}, bool [n];
    a clip is a miss within its task too where the head of that task did not answer.
  """
  scores, label, place = rows.keep(mask, scores, label, place)
  rows.check_finite("class scores", scores)
  num_tasks, num_classes = scores.shape[1:]
  best = scores.reshape(len(scores), num_tasks * num_classes).argmax(-1)
  own = scores[np.arange(len(scores)), place]
  return {
    "hit": best == place * num_classes + label,
    "task_hit": best // num_classes == place,
    "within_hit": (own.argmax(-1) == label) & np.isfinite(own).any(-1),
  }


def summarise(stats: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Statistics of all clips -> `accuracy` over all classes, `task_accuracy`, `accuracy_within_task` (of the true task)."""
  return {
    MAIN: rows.mean(stats["hit"]),
    "task_accuracy": rows.mean(stats["task_hit"]),
    WITHIN: rows.mean(stats["within_hit"]),
  }


def evaluate(scores: np.ndarray, label: np.ndarray, place: np.ndarray, mask: np.ndarray | None = None) -> dict[str, float]:
  """Both at once; arguments as those of `statistics`."""
  return summarise(statistics(scores, label, place, mask=mask))


def trivial(
  label: np.ndarray, place: np.ndarray, own: np.ndarray, *, mask: np.ndarray | None = None
) -> tuple[str, dict[str, float]]:
  """The best predictor that gives all clips of all tasks the same class, chosen on the very labels it is scored on.

  No method is told the task, nor is it: on a task whose classes it never names it scores 0.

  Args:
    label: int [N], class within its task, of the clips of all tasks.
    place: int [N], the place of that task among the K.
    own: bool [N], the clips that are scored: those of one task.
    mask: [N].

  Returns:
    Its name ("class 2 of task 3 for the clips of all tasks") and its scores on those clips.
  """
  label, place, own = rows.keep(mask, label, place, own)
  found, counts = np.unique(np.stack([place, label]), axis=1, return_counts=True)
  task, best = found[:, counts.argmax()].tolist()
  scores = np.full((own.sum(), place.max() + 1, label.max() + 1), -np.inf)
  scores[:, task, best] = 0
  return f"class {best + 1} of task {task + 1} for the clips of all tasks", evaluate(scores, label[own], place[own])
