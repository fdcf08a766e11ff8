"""Puts the questions about one clip into one example, so that the clip is decoded and encoded once for all of them."""

import numpy as np

from data_pipelines.base import Source
from data_pipelines.schema import DataError, Example

PER_QUESTION = ("question", "label", "type")


class GroupedQuestions:
  """A source whose examples hold up to `size` questions about one clip.

  Examples of the wrapped source, with question int32 [Q, 14], label int32 [Q], type int32 [Q] and question_mask
  float32 [Q] (0: no such question). Questions keep the order of the file; `size` 1 is one question per example.
  """

  def __init__(self, source: Source, size: int) -> None:
    if size < 1:
      raise DataError(f"questions_per_clip must be at least 1, got {size}")
    self._source, self._size = source, size
    clips: dict[str, list[int]] = {}
    for index, record in enumerate(source.records):
      clips.setdefault(record.clip, []).append(index)
    self._groups = [rows[i:i + size] for rows in clips.values() for i in range(0, len(rows), size)]

  def __len__(self) -> int:
    return len(self._groups)

  @property
  def bad(self) -> list[tuple[str, str]]:
    """(id, reason) of the questions whose clip was left out."""
    return self._source.bad

  def __getitem__(self, index: int) -> Example:
    rows = [self._source[i] for i in self._groups[index]]
    filled = rows + [rows[0]] * (self._size - len(rows))
    example = {**rows[0], **{key: np.stack([row[key] for row in filled]) for key in PER_QUESTION}}
    return {**example, "question_mask": (np.arange(self._size) < len(rows)).astype(np.float32)}
