"""MUSIC-AVQA: answer accuracy by question type, by modality and overall.

Li et al., CVPR 2022 (https://arxiv.org/abs/2203.14072). All sample-weighted: a modality pools its questions
and the overall number is correct / total, not a mean of means. The type travels with the sample (the PHP
release reads it from the file in another order than it evaluates, so most of its questions are booked under a
wrong type).
"""

from collections.abc import Mapping

import numpy as np

from phpjax.metrics import rows

MAIN = "accuracy"
MODALITIES = ("Audio", "Visual", "Audio-Visual")
QUESTION_TYPES = (
  ("Audio", "Counting"),
  ("Audio", "Comparative"),
  ("Visual", "Counting"),
  ("Visual", "Location"),
  ("Audio-Visual", "Existential"),
  ("Audio-Visual", "Counting"),
  ("Audio-Visual", "Location"),
  ("Audio-Visual", "Comparative"),
  ("Audio-Visual", "Temporal"),
)


def statistics(
  predicted: np.ndarray, label: np.ndarray, question_type: np.ndarray, *, mask: np.ndarray | None = None
) -> dict[str, np.ndarray]:
  """What one batch contributes.

  Args:
    predicted, label: answer indices, int [N].
    question_type: indices into QUESTION_TYPES, int [N].
    mask: [N].

  Returns:
    {"hit": bool [n], "type": int [n]}.
  """
  predicted, label, question_type = rows.keep(mask, predicted, label, question_type)
  if question_type.size and not 0 <= question_type.min() <= question_type.max() < len(QUESTION_TYPES):
    raise ValueError(
      f"question types must lie in 0 to {len(QUESTION_TYPES) - 1}, found {question_type.min()} to {question_type.max()}"
    )
  return {"hit": predicted == label, "type": question_type}


def summarise(stats: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Statistics of all questions -> `accuracy`, `Audio`, `Audio/Counting`, ..., `Audio-Visual/Temporal`, in
  [0, 1].

  A type or modality that no question has is left out.
  """
  hit, question_type = stats["hit"], stats["type"]
  scores = {MAIN: rows.mean(hit)}
  for modality in MODALITIES:
    own = [index for index, (name, _) in enumerate(QUESTION_TYPES) if name == modality]
    asked = np.isin(question_type, own)
    if not asked.any():
      continue
    scores[modality] = rows.mean(hit[asked])
    for index in own:
      if (question_type == index).any():
        scores["/".join(QUESTION_TYPES[index])] = rows.mean(hit[question_type == index])
  return scores


def evaluate(
  scores: np.ndarray, label: np.ndarray, question_type: np.ndarray, mask: np.ndarray | None = None
) -> dict[str, float]:
  """Answer scores [N, A], label int [N], question_type int [N], mask [N] -> the scores of `summarise`."""
  scores, label, question_type = rows.keep(mask, scores, label, question_type)
  rows.check_finite("AVQA scores", scores)
  return summarise(statistics(scores.argmax(-1), label, question_type))


def trivial(
  train_label: np.ndarray, train_type: np.ndarray, label: np.ndarray, question_type: np.ndarray, mask: np.ndarray | None = None
) -> tuple[str, dict[str, float]]:
  """The predictor that gives, for each question type, the answer most frequent in training; it sees no clip.

  A type that training lacks gets the most frequent answer of all.

  Args:
    train_label, train_type: int [M], without padding.
    label, question_type: int [N], of the set that is scored.
    mask: [N].

  Returns:
    Its name and its scores.
  """
  train_label, train_type = rows.keep(None, train_label, train_type)
  if not len(train_label):
    raise ValueError("no training question to count answers of")
  answer = np.full(len(QUESTION_TYPES), np.bincount(train_label).argmax())
  for index in np.unique(train_type):
    answer[index] = np.bincount(train_label[train_type == index]).argmax()
  return "majority answer per question type", summarise(
    statistics(answer[np.asarray(question_type)], label, question_type, mask=mask)
  )
