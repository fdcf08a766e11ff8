"""AVSBench: mean IoU and F of the sounding objects' masks.

Zhou et al., ECCV 2022 (https://arxiv.org/abs/2207.05042). Both official scores depend on how clips are
grouped into batches, F strongly (it takes the best of 255 thresholds per batch). So frames are first reduced
to statistics, and the groups are formed afterwards, from the clips in their order: one clip per group
(`miou`, `f`: ours, and PHP's), four (`miou_batch4`, `f_batch4`: the official test script). The loader's batch
size changes nothing.
"""

from collections.abc import Mapping

import numpy as np

from phpjax.metrics import rows

MAIN = "miou"
NUM_THRESHOLDS = 255
BETA_SQUARED = 0.3
LEVELS = tuple(level / 20 for level in range(1, 20))  # of the mean mask's maximum, for constant masks


def _sigmoid(logits: np.ndarray) -> np.ndarray:
  """In float32, as the official code: a logit of 1e-9 gives 0.5 and so is not above 0.5."""
  logits = np.asarray(logits, np.float32)
  small = np.exp(-np.abs(logits))
  return np.where(logits >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)


def frame_iou(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
  """Masks bool [..., H, W] -> IoU [...]; where the truth is empty, the share of pixels rightly off."""
  inner, union = (predicted & truth).sum((-2, -1)), (predicted | truth).sum((-2, -1))
  pixels = truth.shape[-2] * truth.shape[-1]
  empty = ~truth.any((-2, -1))
  # With an empty truth the union is what is predicted, so the rest is what is rightly off.
  return np.where(empty, (pixels - union) / (pixels + 1e-7), inner / (union + 1e-7))


def frame_f_curve(probability: np.ndarray, truth: np.ndarray) -> np.ndarray:
  """F at the 255 thresholds i / 254 of one frame: float32 [H, W], bool [H, W] -> [255]."""
  thresholds = np.linspace(0, 1 - 1e-10, NUM_THRESHOLDS).astype(np.float32)
  # passed[p] = how many thresholds pixel p reaches; counting pixels from the top gives all 255 masks at once.
  passed = np.searchsorted(thresholds, probability.ravel(), side="right")
  truth = truth.ravel()
  tp, positive = _at_least(passed[truth]), _at_least(passed)
  precision, recall = tp / (positive + 1e-20), tp / (truth.sum() + 1e-20)
  below = BETA_SQUARED * precision + recall
  return np.divide((1 + BETA_SQUARED) * precision * recall, below, out=np.zeros_like(below), where=below > 0)


def _at_least(passed: np.ndarray) -> np.ndarray:
  """How many of the whole numbers [P] are at least 1, 2, ... 255 -> float64 [255]."""
  return np.bincount(passed, minlength=NUM_THRESHOLDS + 1)[::-1].cumsum()[::-1][1:].astype(np.float64)


def statistics(
  logits: np.ndarray, label: np.ndarray, *, mask: np.ndarray | None = None, label_mask: np.ndarray | None = None
) -> dict[str, np.ndarray]:
  """Reduces masks to numbers, so that a test set need not be held in memory.

  Args:
    logits: [N, T, H, W].
    label: {0, 1}, [N, T, H, W].
    mask: [N], 0 for padding.
    label_mask: [N, T], 0 for frames without a label; None if all have one.

  Returns:
    {"iou": [n, T], "f": [n, T, 255], "labelled": bool [n, T], "present": bool [n, T] (the truth is not
    empty)}.
  """
  label_mask = np.ones(np.shape(label)[:2]) if label_mask is None else label_mask
  logits, label, label_mask = rows.keep(mask, logits, label, label_mask)
  if logits.shape != label.shape:
    raise ValueError(f"AVS logits {logits.shape} and labels {label.shape} differ in shape")
  rows.check_finite("AVS logits", logits)
  probability, truth = _sigmoid(logits), label > 0.5
  f = np.zeros((*label.shape[:2], NUM_THRESHOLDS))
  for index in np.ndindex(*label.shape[:2]):
    f[index] = frame_f_curve(probability[index], truth[index])
  return {"iou": frame_iou(probability > 0.5, truth), "f": f, "labelled": label_mask > 0.5, "present": truth.any((-2, -1))}


def summarise(stats: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Statistics of all clips in test order -> `miou`, `f`, `miou_batch4`, `f_batch4`, each in [0, 1]."""
  used = stats["labelled"].any(-1)
  if not used.any():
    raise ValueError("no example to score")
  stats = {name: value[used] for name, value in stats.items()}
  (miou, f), (miou_batch4, f_batch4) = grouped(stats, 1), grouped(stats, 4)
  return {"miou": miou, "f": f, "miou_batch4": miou_batch4, "f_batch4": f_batch4}


def grouped(stats: Mapping[str, np.ndarray], size: int) -> tuple[float, float]:
  """(mIoU, F) as a script gives them whose batches hold `size` clips: means over batches, a smaller last one counts as much."""
  groups = [{name: value[start : start + size] for name, value in stats.items()} for start in range(0, len(stats["iou"]), size)]
  return rows.mean([group["iou"][group["labelled"]].mean() for group in groups]), rows.mean([_group_f(g) for g in groups])


def _group_f(group: Mapping[str, np.ndarray]) -> float:
  """Best threshold of the mean curve over the frames with an object; 0 where there is none."""
  counted = group["labelled"] & group["present"]
  return float(group["f"][counted].mean(0).max()) if counted.any() else 0.0


def evaluate(
  logits: np.ndarray, label: np.ndarray, mask: np.ndarray | None = None, label_mask: np.ndarray | None = None
) -> dict[str, float]:
  """Logits [N, T, H, W], label {0, 1} the same, mask [N], label_mask [N, T] -> the scores of `summarise`."""
  return summarise(statistics(logits, label, mask=mask, label_mask=label_mask))


def trivial(
  label: np.ndarray, mean_mask: np.ndarray, mask: np.ndarray | None = None, label_mask: np.ndarray | None = None
) -> tuple[str, dict[str, float]]:
  """The best constant mask under `miou`, chosen on the very labels it is scored on.

  Tried: nothing, everything, and the mean training mask cut at twenty levels.

  Args:
    label: {0, 1}, [N, T, H, W].
    mean_mask: mean of the training masks, [H, W].
    mask: [N].
    label_mask: [N, T].

  Returns:
    Its name ("nothing", "everything", "mean mask above 0.35 of its maximum") and its scores.
  """
  label_mask = np.ones(np.shape(label)[:2]) if label_mask is None else label_mask
  label, label_mask = rows.keep(mask, label, label_mask)
  candidates = {"nothing": np.zeros(mean_mask.shape, bool), "everything": np.ones(mean_mask.shape, bool)}
  for level in LEVELS:
    candidates[f"mean mask above {level:g} of its maximum"] = mean_mask > level * mean_mask.max()
  iou = _constant_iou(np.stack(list(candidates.values())), label > 0.5)  # [K, N, T]
  counted = label_mask > 0.5
  per_clip = (iou * counted).sum(-1)[:, counted.any(-1)] / counted.sum(-1)[counted.any(-1)]
  name = list(candidates)[int(per_clip.mean(-1).argmax())]
  logits = np.where(candidates[name], np.float32(10), np.float32(-10))
  return name, _constant_scores(logits, label, label_mask)


def _constant_iou(masks: np.ndarray, truth: np.ndarray) -> np.ndarray:
  """Masks bool [K, H, W], truth bool [N, T, H, W] -> IoU [K, N, T], clip by clip to spare memory."""
  flat = masks.reshape(len(masks), -1).astype(np.float32)
  area, pixels = flat.sum(-1, dtype=np.float64), flat.shape[-1]
  iou = np.zeros((len(masks), *truth.shape[:2]))
  for n, clip in enumerate(truth):
    clip = clip.reshape(len(clip), -1).astype(np.float32)
    inner, size = (flat @ clip.T).astype(np.float64), clip.sum(-1, dtype=np.float64)
    union = area[:, None] + size - inner
    iou[:, n] = np.where(size == 0, (pixels - union) / (pixels + 1e-7), inner / (union + 1e-7))
  return iou


def _constant_scores(logits: np.ndarray, label: np.ndarray, label_mask: np.ndarray) -> dict[str, float]:
  """Scores of one mask [H, W] said for every frame of label [N, T, H, W], clip by clip to spare memory."""
  parts = [
    statistics(np.broadcast_to(logits, clip.shape)[None], clip[None], label_mask=counted[None])
    for clip, counted in zip(label, label_mask, strict=True)
  ]
  return summarise(rows.join(parts))
