"""AVQA: questions about a clip, each with one answer out of a closed list (MUSIC-AVQA)."""

from __future__ import annotations

import difflib
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

import data_pipelines
from data_pipelines.loader import RandomAccess
from data_pipelines.music_avqa import QUESTION_LENGTH, question_words
from data_pipelines.views import GroupedQuestions
from phpjax import figures, metrics, predictions, tasks
from phpjax.benchmarks.base import Arrays, Benchmark, TaskInfo, Tree
from phpjax.errors import UserError


class AVQA(Benchmark):
  """Audio-visual question answering; an example is a clip with several of its questions."""

  dataset = data_pipelines.MusicAVQA
  task = tasks.AVQA
  metric = metrics.avqa
  prediction = predictions.AnswerPrediction
  label_keys = ("label", "type")
  asks = True
  mirrored = ()  # questions ask for left and right
  scoring = "accuracy over all questions"
  official = (10, 42, 93)
  figure = "avqa_examples"

  def describe(self, name: str, dataset: data_pipelines.Dataset) -> TaskInfo:
    """Classes are answers; and the words that questions are made of."""
    return TaskInfo(name, dataset.seconds, tuple(dataset.classes), tuple(dataset.vocabulary["words"]))

  def view(self, source: data_pipelines.Source, split: str, data: Any) -> RandomAccess:
    """Questions about one clip share its pass through the encoders (`data.questions_per_clip`)."""
    del split
    return GroupedQuestions(source, data.questions_per_clip)

  def task_options(self, info: TaskInfo, modules: Tree) -> Tree:
    """The vocabulary of questions."""
    del modules
    return {"num_words": len(info.words)}

  def question(self, question: str | None, info: TaskInfo) -> Tree:
    """One question about one clip."""
    ids = question_ids(question or "", info.words)
    return {"question": ids[None, None], "question_mask": np.ones((1, 1), np.float32)}

  def statistics(self, outputs: Arrays, batch: Arrays) -> dict[str, np.ndarray]:
    """The most probable answer of each real question against the true one."""
    flat = lambda x: x.reshape(-1)
    asked = flat(batch["mask"][:, None] * batch["question_mask"])
    return self.metric.statistics(flat(outputs["scores"].argmax(-1)), flat(batch["label"]), flat(batch["type"]), mask=asked)

  def trivial(self, train: Arrays, test: Arrays, info: TaskInfo) -> tuple[str, dict[str, float]]:
    """The most frequent answer of each type of question."""
    del info
    return self.metric.trivial(train["label"], train["type"], test["label"], test["type"])

  def draw(self, examples: Sequence[Tree], info: TaskInfo, path: pathlib.Path) -> None:
    """Questions with their most probable answers."""
    figures.avqa_examples([self.example(row, info) for row in examples], path)

  def example(self, row: Tree, info: TaskInfo) -> Tree:
    """For `figures.avqa_examples`: the first question about the clip."""
    scores = row["outputs"]["scores"][0]
    share = np.exp(scores - scores.max())
    share /= share.sum()
    return {
      "id": row["id"],
      "visual": row["visual"],
      "type": "/".join(self.metric.QUESTION_TYPES[int(row["type"][0])]),
      "question": " ".join(info.words[i] for i in row["question"][0] if i) + "?",
      "answer": info.classes[int(row["label"][0])],
      "top": [(info.classes[i], float(share[i])) for i in np.argsort(-share)[:3]],
    }


def question_ids(question: str, words: Sequence[str]) -> np.ndarray:
  """A question -> word indices int32 [14], 0 for padding; raises UserError naming a word outside the vocabulary.

  Case may be mixed up (a question starts with a capital, "Is" and "is" are two words); "acoustic guitar" is acoustic_guitar.
  """
  for word in (word for word in words if "_" in word):
    question = re.sub(rf"\b{re.escape(word.replace('_', ' '))}\b", word, question, flags=re.IGNORECASE)
  table, lower = {word: i for i, word in enumerate(words)}, {word.lower(): i for i, word in reversed(list(enumerate(words)))}
  try:
    asked = question_words(question, [], repr(question))
  except data_pipelines.DataError as error:
    raise UserError(str(error)) from error
  if len(asked) > QUESTION_LENGTH:
    raise UserError(f"question={question!r} has {len(asked)} words, more than the {QUESTION_LENGTH} that a question may have")
  ids = np.zeros(QUESTION_LENGTH, np.int32)
  for place, word in enumerate(asked):
    spelled = word[:1].upper() + word[1:] if place == 0 and word[:1].upper() + word[1:] in table else word
    index = table.get(spelled, lower.get(word.lower()))
    if index is None:
      close = difflib.get_close_matches(word, words[1:], n=1)
      raise UserError(
        f"question={question!r}: the word {word!r} is not among the run's {len(words) - 1} words"
        + (f"; did you mean {close[0]!r}?" if close else "")
      )
    ids[place] = index
  return ids
