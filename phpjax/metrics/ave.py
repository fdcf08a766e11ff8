"""AVE: segment accuracy, background included as a class.

Tian et al., ECCV 2018 (https://arxiv.org/abs/1803.08842). Two score conventions lead to the same number: 29
scores per second (AVE-ECCV18, PHP) and two heads (CMBS, LAVISH, DG-SCT). Counts are accumulated: a mean over
batches is biased where the last batch is smaller. Always "background" already scores 17.8 % on the official
test set, and a perfect category without background 82.2 %, so both kinds of second are reported apart as
well.
"""

from collections.abc import Mapping

import numpy as np

from phpjax.metrics import rows

MAIN = "segment_accuracy"


def decide(scores: np.ndarray) -> np.ndarray:
  """Scores per second [N, T, C + 1], the last channel is background -> classes int [N, T]."""
  scores = np.asarray(scores)
  rows.check_finite("AVE scores", scores)
  return scores.argmax(-1)


def decide_two_heads(is_event_logits: np.ndarray, event_logits: np.ndarray) -> np.ndarray:
  """Relevance per second [N, T] and ONE category score vector per clip [N, C] -> classes int [N, T].

  A second is an event where sigmoid(relevance) > 0.5, strictly; all others are background, class C (CMBS,
  LAVISH).
  """
  is_event_logits, event_logits = np.asarray(is_event_logits), np.asarray(event_logits)
  rows.check_finite("AVE relevance logits", is_event_logits)
  rows.check_finite("AVE category logits", event_logits)
  return np.where(is_event_logits > 0, event_logits.argmax(-1)[:, None], event_logits.shape[-1])


def statistics(
  predicted: np.ndarray, label: np.ndarray, *, background: int, mask: np.ndarray | None = None
) -> dict[str, np.ndarray]:
  """What a batch contributes: predicted, label int [N, T], mask [N] -> {"hit", "background"} bool [n, T]."""
  predicted, label = rows.keep(mask, predicted, label)
  if predicted.shape != label.shape:
    raise ValueError(f"AVE predictions {predicted.shape} and labels {label.shape} differ in shape")
  return {"hit": predicted == label, "background": label == background}


def summarise(stats: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Statistics of all clips -> scores in [0, 1].

  Returns:
    `segment_accuracy`; `background_recall` (accuracy on background seconds) and `event_segment_accuracy`
    (accuracy on event seconds), each left out where the labels hold no such second.
  """
  hit, background = stats["hit"], stats["background"]
  scores = {MAIN: rows.mean(hit)}
  if background.any():
    scores["background_recall"] = rows.mean(hit[background])
  if not background.all():
    scores["event_segment_accuracy"] = rows.mean(hit[~background])
  return scores


def evaluate(scores: np.ndarray, label: np.ndarray, mask: np.ndarray | None = None) -> dict[str, float]:
  """Scores [N, T, C + 1], label int [N, T], mask [N] -> the scores of `summarise`."""
  scores, label = rows.keep(mask, scores, label)
  return summarise(statistics(decide(scores), label, background=scores.shape[-1] - 1))


def evaluate_two_heads(
  is_event_logits: np.ndarray, event_logits: np.ndarray, label: np.ndarray, mask: np.ndarray | None = None
) -> dict[str, float]:
  """Relevance [N, T], category scores [N, C], label int [N, T], mask [N] -> the scores of `summarise`."""
  is_event_logits, event_logits, label = rows.keep(mask, is_event_logits, event_logits, label)
  predicted = decide_two_heads(is_event_logits, event_logits)
  return summarise(statistics(predicted, label, background=event_logits.shape[-1]))


def trivial(label: np.ndarray, *, background: int, mask: np.ndarray | None = None) -> tuple[str, dict[str, float]]:
  """The best predictor that answers one class everywhere, chosen on the very labels it is scored on.

  Args:
    label: int [N, T].
    background: the index of the background class (the number of event classes).
    mask: [N].

  Returns:
    Its name ("background" or "class 3") and its scores.
  """
  (label,) = rows.keep(mask, label)
  counts = np.bincount(label.ravel(), minlength=background + 1)
  best = int(counts.argmax())
  name = "background" if best == background else f"class {best}"
  return name, summarise(statistics(np.full_like(label, best), label, background=background))
