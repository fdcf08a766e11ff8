"""AVVP (LLP): the ten official F-scores, and the numbers of the PHP release.

Tian et al., ECCV 2020 (https://arxiv.org/abs/2007.10558): F1 of each clip over its classes, mean over clips,
at segment level (seconds) and event level (runs of seconds), for audio A, visual V, audio-visual AV = A and
V, Type@AV = their mean, Event@AV = audio and visual counts pooled before the F. A clip with nothing predicted
and nothing present scores 1.0, so predicting nothing at all already reaches 14.5 % AV on the official test
set: compare with `trivial`.
"""

from collections.abc import Mapping

import numpy as np

from phpjax.metrics import rows

MAIN = "segment/Type@AV"
LEVELS = ("segment", "event")


def decide(segment_prob: np.ndarray, video_prob: np.ndarray, threshold: float = 0.5) -> np.ndarray:
  """HAN's rule, on where second AND clip reach 0.5: float [N, T, C] and [N, C] -> bool [N, T, C]."""
  segment_prob, video_prob = np.asarray(segment_prob), np.asarray(video_prob)
  rows.check_finite("AVVP segment probabilities", segment_prob)
  rows.check_finite("AVVP clip probabilities", video_prob)
  return (segment_prob >= threshold) & (video_prob >= threshold)[:, None, :]


def segment_counts(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
  """Grids bool [N, T, C] -> true positive, false positive, false negative seconds, int [3, N, C]."""
  return np.stack([(predicted & truth).sum(1), (predicted & ~truth).sum(1), (~predicted & truth).sum(1)])


def event_counts(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
  """Grids bool [N, T, C] -> true positive, false positive, false negative runs, int [3, N, C].

  A predicted run is a true positive where some run of the truth overlaps it with IoU >= 0.5; a run of the
  truth is missed where no predicted run does. There is no one-to-one matching: two predicted runs may hit the
  same truth.
  """
  bounds = _intervals(predicted.shape[1])
  match = _overlap(bounds)
  predicted_runs, truth_runs = _runs(predicted, bounds), _runs(truth, bounds)
  hit = predicted_runs & (truth_runs.astype(np.float32) @ match > 0)
  found = truth_runs & (predicted_runs.astype(np.float32) @ match > 0)
  return np.stack([hit.sum(-1), (predicted_runs & ~hit).sum(-1), (truth_runs & ~found).sum(-1)])


def _intervals(seconds: int) -> np.ndarray:
  """All half-open intervals of a clip, int [K, 2]."""
  return np.array([(start, end) for start in range(seconds) for end in range(start + 1, seconds + 1)])


def _overlap(bounds: np.ndarray) -> np.ndarray:
  """Which pairs of intervals have IoU >= 0.5, float32 [K, K]; whole numbers, so that 0.5 is exact."""
  start, end = bounds[:, 0], bounds[:, 1]
  inner = np.minimum(end[:, None], end) - np.maximum(start[:, None], start)
  union = (end - start)[:, None] + (end - start) - inner
  return (2 * np.maximum(inner, 0) >= union).astype(np.float32)


def _runs(grid: np.ndarray, bounds: np.ndarray) -> np.ndarray:
  """Which intervals are maximal runs of ones: bool [N, T, C] -> bool [N, C, K]."""
  strips = np.pad(grid.transpose(0, 2, 1), ((0, 0), (0, 0), (1, 1)))  # a zero on either side of the clip
  total = np.concatenate([np.zeros_like(strips[..., :1], int), np.cumsum(strips, -1)], -1)
  start, end = bounds[:, 0] + 1, bounds[:, 1] + 1
  full = total[..., end] - total[..., start] == end - start
  return full & ~strips[..., start - 1] & ~strips[..., end]


def f_score(counts: np.ndarray) -> np.ndarray:
  """Counts [3, N, C] -> F1 per clip [N]: mean over classes predicted or present; 1.0 where there is none."""
  tp, fp, fn = counts.astype(np.float64)
  used = tp + fp + fn > 0
  per_class = np.divide(2 * tp, 2 * tp + fp + fn, out=np.zeros_like(tp), where=used)
  num_classes = used.sum(-1)
  return np.where(num_classes > 0, per_class.sum(-1) / np.maximum(num_classes, 1), 1.0)


def statistics(
  audio: np.ndarray, visual: np.ndarray, true_audio: np.ndarray, true_visual: np.ndarray, *, mask: np.ndarray | None = None
) -> dict[str, np.ndarray]:
  """F1 per clip.

  Args:
    audio, visual: predicted grids, bool or {0, 1}, [N, T, C].
    true_audio, true_visual: the dense labels, the same.
    mask: [N].

  Returns:
    {"segment": [n, 4], "event": [n, 4]}, columns audio, visual, audio-visual, pooled audio + visual.
  """
  grids = rows.keep(mask, audio, visual, true_audio, true_visual)
  if len({grid.shape for grid in grids}) != 1:
    raise ValueError(f"AVVP grids differ in shape: {[grid.shape for grid in grids]}")
  audio, visual, true_audio, true_visual = [grid > 0.5 for grid in grids]
  stats = {}
  for level, count in zip(LEVELS, (segment_counts, event_counts), strict=True):
    a, v = count(audio, true_audio), count(visual, true_visual)
    both = count(audio & visual, true_audio & true_visual)
    stats[level] = np.stack([f_score(a), f_score(v), f_score(both), f_score(a + v)], -1)
  return stats


def summarise(stats: Mapping[str, np.ndarray]) -> dict[str, float]:
  """F1 per clip -> `segment/A`, `/V`, `/AV`, `/Type@AV`, `/Event@AV` and five of `event/`, in [0, 1]."""
  scores = {}
  for level in LEVELS:
    audio, visual, both, pooled = [rows.mean(stats[level][:, column]) for column in range(4)]
    scores |= {
      f"{level}/A": audio,
      f"{level}/V": visual,
      f"{level}/AV": both,
      f"{level}/Type@AV": (audio + visual + both) / 3,
      f"{level}/Event@AV": pooled,
    }
  return scores


def evaluate(
  audio: np.ndarray, visual: np.ndarray, true_audio: np.ndarray, true_visual: np.ndarray, mask: np.ndarray | None = None
) -> dict[str, float]:
  """Four grids {0, 1} [N, T, C] and mask [N] -> the ten scores of `summarise`."""
  return summarise(statistics(audio, visual, true_audio, true_visual, mask=mask))


def php_top1(
  scores: np.ndarray, label: np.ndarray, mask: np.ndarray | None = None, *, per_label: bool = False
) -> dict[str, float]:
  """The number that the PHP release logs for LLP; not an AVVP score.

  Always "Speech" reaches 1373 / 2178 = 63.04 % on the official test set with `per_label`, 625 / 1200 without. The release
  itself counts 1373 / 2179 = 63.01 %: the clip LcFWKgFphXI_20_30 lists one label (Clapping) twice, which a multi-hot label
  cannot say.

  Args:
    scores: per second, [N, T, C].
    label: weak labels, {0, 1}, [N, C]; a clip without a label is not counted.
    mask: [N].
    per_label: count a clip once per label, as the release does, instead of once.

  Returns:
    `php_top1`: argmax of the mean score is the LOWEST active class; `any_label_accuracy`: it is any active
      one.
  """
  scores, label = rows.keep(mask, scores, label)
  rows.check_finite("AVVP scores", scores)
  label = label > 0.5
  labelled = label.any(-1)
  scores, label = scores[labelled], label[labelled]
  weight = label.sum(-1) if per_label else np.ones(len(label))
  predicted = scores.mean(1).argmax(-1)
  first = predicted == label.argmax(-1)
  hit = label[np.arange(len(label)), predicted]
  if not len(label):
    raise ValueError("no example to score")
  return {"php_top1": float(np.average(first, weights=weight)), "any_label_accuracy": float(np.average(hit, weights=weight))}


def released(fused: np.ndarray, label: np.ndarray) -> dict[str, float]:
  """The scores of PHP's release from scores of whole clips [N, C] and weak labels {0, 1} [N, C].

  Returns:
    `released_accuracy`: the best class is the lowest active one; `released_accuracy_repeated`: the same, a clip with k labels
      counted k times, as the release lists it (a label that is listed twice counts once: see `php_top1`);
      `any_label_accuracy`: the best class is any active one.
  """
  once, repeated = (php_top1(fused[:, None], label, per_label=per_label) for per_label in (False, True))
  return {
    "released_accuracy": once["php_top1"],
    "released_accuracy_repeated": repeated["php_top1"],
    "any_label_accuracy": once["any_label_accuracy"],
  }


def trivial_released(label: np.ndarray, mask: np.ndarray | None = None) -> tuple[int, dict[str, float]]:
  """The best predictor that says one class of all clips, under `released_accuracy_repeated` on the labels it is scored on.

  Args:
    label: weak labels, {0, 1}, [N, C].
    mask: [N].

  Returns:
    Its class and the scores of `released`.
  """
  (label,) = rows.keep(mask, label)
  always = [released(np.broadcast_to(scores, label.shape), label) for scores in np.eye(label.shape[1])]
  best = int(np.argmax([scores["released_accuracy_repeated"] for scores in always]))
  return best, always[best]


def trivial(true_audio: np.ndarray, true_visual: np.ndarray, mask: np.ndarray | None = None) -> tuple[str, dict[str, float]]:
  """The best constant predictor under `segment/Type@AV`, chosen on the very labels it is scored on.

  A constant predictor says the same set of classes in all seconds of all clips. Tried for each modality, in
  all
  pairs: nothing, every single class, the 2, 3, ... C most frequent classes.

  Args:
    true_audio, true_visual: dense labels, {0, 1}, [N, T, C].
    mask: [N].

  Returns:
    Its name ("audio: nothing, visual: class 3") and its ten scores.
  """
  true_audio, true_visual = [grid > 0.5 for grid in rows.keep(mask, true_audio, true_visual)]
  sets = {"audio": _constant_sets(true_audio), "visual": _constant_sets(true_visual)}
  pairs = sets["audio"][:, None] & sets["visual"]  # [K, K, C]
  both = _constant_score(pairs.reshape(-1, pairs.shape[-1]), true_audio & true_visual)
  audio, visual = _constant_score(sets["audio"], true_audio), _constant_score(sets["visual"], true_visual)
  type_av = (audio[:, None] + visual + both.reshape(pairs.shape[:2])) / 3
  chosen = dict(zip(sets, np.unravel_index(type_av.argmax(), type_av.shape), strict=True))
  said = {modality: sets[modality][index] for modality, index in chosen.items()}
  name = ", ".join(f"{modality}: {_set_name(classes)}" for modality, classes in said.items())
  audio, visual = [np.broadcast_to(said[m], true_audio.shape) for m in ("audio", "visual")]
  return name, evaluate(audio, visual, true_audio, true_visual)


def _constant_sets(truth: np.ndarray) -> np.ndarray:
  """Labels bool [N, T, C] -> the sets of classes that a constant predictor may say, bool [2 C, C]."""
  num_classes = truth.shape[-1]
  by_frequency = np.argsort(-truth.sum((0, 1)), kind="stable")
  frequent = np.tri(num_classes, dtype=bool)[1:][:, np.argsort(by_frequency)]  # the first 2, 3, ... C
  return np.concatenate([np.zeros((1, num_classes), bool), np.eye(num_classes, dtype=bool), frequent])


def _constant_score(sets: np.ndarray, truth: np.ndarray) -> np.ndarray:
  """Mean segment F of constant sets bool [K, C] on labels bool [N, T, C] -> [K], in closed form.

  A class said all T seconds and true in n of them has F = 2n / (n + T); a class not said has F = 0.
  """
  n = truth.sum(1).astype(np.float64)  # [N, C]
  said = sets.T.astype(np.float64)
  gained = (2 * n / (n + truth.shape[1])) @ said
  used = (n > 0).sum(-1, keepdims=True) + (n == 0) @ said
  return np.where(used > 0, gained / np.maximum(used, 1), 1.0).mean(0)


def _set_name(classes: np.ndarray) -> str:
  """Bool [C] -> "nothing", "class 3", "classes 0 4 7"."""
  indices = np.flatnonzero(classes)
  if not len(indices):
    return "nothing"
  return ("class " if len(indices) == 1 else "classes ") + " ".join(map(str, indices))
