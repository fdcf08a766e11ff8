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


def trivial(label: np.ndarray, *, num_classes: int, mask: np.ndarray | None = None) -> tuple[str, dict[str, float]]:
  """The best predictor that answers one class of the task everywhere, chosen on the very labels it is scored on.

  It is told the task, which no method is: among all classes of K tasks one class would be right for a K-th of this on average.

  Args:
    label: int [N], class within the task.
    num_classes: of the task.
    mask: [N].

  Returns:
    Its name ("class 2, told the task") and its scores.
  """
  (label,) = rows.keep(mask, label)
  best = int(np.bincount(label, minlength=num_classes).argmax())
  scores = np.zeros((len(label), 1, num_classes))
  scores[..., best] = 1
  return f"class {best}, told the task", evaluate(scores, label, np.zeros(len(label), int))
