"""Referring expressions: whether one of the k best boxes is the one that is meant.

The evaluators of MDETR, GLIP and LPI ask for a GENERALISED IoU of at least 0.5; the IoU, which the papers name, is a little
kinder. Both are given, under names that say which.
"""

from collections.abc import Mapping

import numpy as np

from phpjax.metrics import rows

FIRST = (1, 5, 10)
LEAST = 0.5


def overlaps(predicted: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
  """Boxes x1 y1 x2 y2 [..., 4], in pixels -> {"giou", "iou"} [...]; a box without area overlaps nothing."""
  predicted, truth = np.asarray(predicted, np.float64), np.asarray(truth, np.float64)
  area = lambda corner, opposite: np.prod(np.maximum(opposite - corner, 0), -1)
  inner = area(np.maximum(predicted[..., :2], truth[..., :2]), np.minimum(predicted[..., 2:], truth[..., 2:]))
  hull = area(np.minimum(predicted[..., :2], truth[..., :2]), np.maximum(predicted[..., 2:], truth[..., 2:]))
  union = area(predicted[..., :2], predicted[..., 2:]) + area(truth[..., :2], truth[..., 2:]) - inner
  iou = inner / np.maximum(union, 1e-12)
  return {"giou": iou - (hull - union) / np.maximum(hull, 1e-12), "iou": iou}


def statistics(
  boxes: np.ndarray, scores: np.ndarray, truth: np.ndarray, *, mask: np.ndarray | None = None
) -> dict[str, np.ndarray]:
  """What a batch contributes.

  Args:
    boxes: x1 y1 x2 y2 of K predicted boxes, [N, K, 4].
    scores: of the boxes, [N, K]; -inf where there is no box, which is a miss.
    truth: x y width height, as COCO has it, [N, 4].
    mask: [N].

  Returns:
    {"giou", "iou"}: bool [n, 3], whether one of the first 1, 5, 10 boxes overlaps the true one by at least 0.5.
  """
  boxes, scores, truth = rows.keep(mask, boxes, scores, truth)
  rows.check_finite("box scores", scores)
  order = np.argsort(-scores, axis=-1, kind="stable")
  boxes, there = np.take_along_axis(boxes, order[..., None], 1), np.take_along_axis(scores, order, 1) > -np.inf
  corners = np.concatenate([truth[:, :2], truth[:, :2] + truth[:, 2:]], -1)[:, None]
  hits = {name: (overlap >= LEAST) & there for name, overlap in overlaps(boxes, corners).items()}
  return {name: np.stack([hit[:, :k].any(-1) for k in FIRST], -1) for name, hit in hits.items()}


def summarise(stats: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Statistics of all expressions -> `giou/P@1`, `giou/P@5`, `giou/P@10` (official) and the same of `iou`, in [0, 1]."""
  return {f"{name}/P@{k}": rows.mean(stats[name][:, i]) for name in ("giou", "iou") for i, k in enumerate(FIRST)}


def evaluate(boxes: np.ndarray, scores: np.ndarray, truth: np.ndarray, mask: np.ndarray | None = None) -> dict[str, float]:
  """Boxes [N, K, 4], scores [N, K], truth [N, 4], mask [N] -> the scores of `summarise`."""
  return summarise(statistics(boxes, scores, truth, mask=mask))
