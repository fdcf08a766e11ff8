"""Other cuts of a source: several questions per clip, labelled seconds only, a few rows or arrays.

Those that a run trains on have `rows`, the source they are made of, and `bad`, what that one left out.
"""

from collections.abc import Sequence

import numpy as np

from data_pipelines.base import Source
from data_pipelines.loader import RandomAccess
from data_pipelines.schema import DataError, Example

PER_QUESTION = ("question", "label", "type")
PER_SECOND = ("visual", "audio", "label", "label_mask")


class Picked:
  """Some rows of a source with some of their arrays, beside id and mask: the others need not be kept once decoded."""

  def __init__(self, source: RandomAccess, keys: Sequence[str], indices: Sequence[int] | None = None) -> None:
    self._source, self._keys = source, ("id", "mask", *keys)
    self._indices = range(len(source)) if indices is None else indices

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> Example:
    example = self._source[self._indices[index]]
    return {key: example[key] for key in self._keys}


class LabelledSeconds:
  """A source of AVSBench examples cut to the leading seconds that carry a mask in any clip (S4 training: the first).

  Seconds do not see one another in the encoders, so the others would cost time and teach nothing.
  """

  def __init__(self, source: Source) -> None:
    self.rows = source
    self._seconds = max((record.masks for record in source.records), default=1)

  def __len__(self) -> int:
    return len(self.rows)

  @property
  def bad(self) -> list[tuple[str, str]]:
    """(id, reason) of the clips that were left out."""
    return self.rows.bad

  def found(self, index: int) -> str:
    """See `Source.found`."""
    return self.rows.found(index)

  def learn(self, index: int, reason: str) -> None:
    """See `Source.learn`."""
    self.rows.learn(index, reason)

  def __getitem__(self, index: int) -> Example:
    example = self.rows[index]
    return {key: value[: self._seconds] if key in PER_SECOND else value for key, value in example.items()}


class GroupedQuestions:
  """A source whose examples hold up to `size` questions about one clip.

  Examples of the wrapped source, with question int32 [Q, 14], label int32 [Q], type int32 [Q] and question_mask
  float32 [Q] (0: no such question). Questions keep the order of the file; `size` 1 is one question per example.
  """

  def __init__(self, source: Source, size: int) -> None:
    if size < 1:
      raise DataError(f"questions_per_clip must be at least 1, got {size}")
    self.rows, self._size = source, size
    clips: dict[str, list[int]] = {}
    for index, record in enumerate(source.records):
      clips.setdefault(record.clip, []).append(index)
    self._groups = [rows[i : i + size] for rows in clips.values() for i in range(0, len(rows), size)]

  def __len__(self) -> int:
    return len(self._groups)

  @property
  def bad(self) -> list[tuple[str, str]]:
    """(id, reason) of the questions whose clip was left out."""
    return self.rows.bad

  def found(self, index: int) -> str:
    """See `Source.found`; the questions of an example are on one clip."""
    return self.rows.found(self._groups[index][0])

  def learn(self, index: int, reason: str) -> None:
    """See `Source.learn`."""
    for row in self._groups[index]:
      self.rows.learn(row, reason)

  def __getitem__(self, index: int) -> Example:
    rows = [self.rows[i] for i in self._groups[index]]
    filled = rows + [rows[0]] * (self._size - len(rows))
    example = {**rows[0], **{key: np.stack([row[key] for row in filled]) for key in PER_QUESTION}}
    return {**example, "question_mask": (np.arange(self._size) < len(rows)).astype(np.float32)}
