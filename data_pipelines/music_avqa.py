"""MUSIC-AVQA, questions about music clips (Li et al., CVPR 2022): 14 question words in, one of 42 answers
out.

Files: `avqa-<split>.json`, a list of objects {video_id, question_id, type, question_content, templ_values, anser}, of
which `type` and `templ_values` are lists written as strings; `video/<video_id>.mp4`, or frames and waves.
"""

import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.base import ClipLayout, Dataset
from data_pipelines.schema import FETCH, QUESTION_TYPES, DataError, Example, Record, index_of
from data_pipelines.tables import MAX_TEXT, named_splits, read_json

PAD = "<pad>"
QUESTION_LENGTH = 14
# Order of first appearance over the train questions, as in the vocabularies published with DG-SCT: it fixes
# the label ids of existing checkpoints, and must not depend on having the train file.
# fmt: off
WORDS = (
  "<pad>", "How", "many", "instruments", "are", "sounding", "in", "the", "video", "What", "kind", "of", "instrument", "is",
  "leftest", "musical", "it", "did", "not", "sound", "from", "beginning", "to", "end", "Is", "on", "left", "louder", "than",
  "right", "guzheng", "types", "accordion", "always", "playing", "clarinet", "there", "a", "voiceover", "this", "cello",
  "violin", "flute", "pipa", "piano", "Which", "that", "sounds", "at", "same", "time", "as", "acoustic_guitar", "Where",
  "first", "electric_bass", "drum", "more", "rhythmic", "ukulele", "banjo", "saxophone", "trumpet", "erhu", "middle",
  "congas", "entire", "tuba", "bagpipe", "loudest", "comes", "xylophone", "bassoon", "suona", "second", "appeared",
  "performance", "rightest", "coming", "third", "last", "Are", "and", "makes", "before", "after", "lowest", "fourth",
  "longer", "fifth", "were", "heard", "throughout",
)
# fmt: on
ANSWERS = (
  "two",
  "cello",
  "congas",
  "zero",
  "no",
  "pipa",
  "six",
  "yes",
  "one",
  "four",
  "three",
  "seven",
  "five",
  "ukulele",
  "right",
  "piano",
  "left",
  "accordion",
  "clarinet",
  "guzheng",
  "more than ten",
  "nine",
  "indoor",
  "saxophone",
  "drum",
  "violin",
  "middle",
  "outdoor",
  "bagpipe",
  "bassoon",
  "acoustic_guitar",
  "banjo",
  "electric_bass",
  "ten",
  "eight",
  "flute",
  "simultaneously",
  "trumpet",
  "erhu",
  "xylophone",
  "tuba",
  "suona",
)
_ANNOTATIONS = ("json", "json_update", "update")  # folders of annotations, the first that is there is read
_ARCHIVES = ("MUSIC-AVQA", "MUCIS-AVQA")  # the published folder of real clips is misspelt
_SPLIT_FILE = re.compile(r"avqa-(\w+)\.json")
_TYPES = index_of(QUESTION_TYPES)
_REQUIRED = ("video_id", "question_id", "type", "question_content", "templ_values", "anser")


@dataclasses.dataclass(frozen=True)
class Question(Record):
  """A question in words, its tokens (unpadded), the answer and the type as indices."""

  text: str
  tokens: tuple[int, ...]
  answer: int
  type: int


class MusicAVQA(Dataset):
  """Examples add question int32 [14] (0 = padding), label int32 () and type int32 () (index into
  QUESTION_TYPES).

  The annotations exist twice: `json`, which published numbers mostly use, and the corrected `json_update` (or `update`). Where
  both lie side by side `json` is read. To read the other, name its folder as the root (for a run: --config.data.root=
  DIR/MUSIC-AVQA/json_update, if this is its only benchmark; else move `json` aside): clips are found in the folders above it.
  Questions of equal id are all read.

  Attributes:
    vocabulary: {"words": [...], "answers": [...]}, the root's vocabulary.json or the official lists.
    classes: the answers.
  """

  name = "music_avqa"
  folders = ("MUSIC-AVQA", "AVQA")
  label_files = tuple(
    f"{folder}{kind}avqa-*.json" for kind in ("", *(f"{name}/" for name in _ANNOTATIONS)) for folder in ("", "data/", "labels/")
  )
  layout = ClipLayout(
    video=("video", "", "videos", *(f"{name}-videos-{kind}" for kind in ("Real", "Synthetic") for name in _ARCHIVES)),
    frames=("frames",),
    wave=("wave", "audio_wave", "audio"),
  )
  spread = True

  def __init__(self, root: Path | str) -> None:
    super().__init__(root)
    if self.root == self.label_root and self.root.name in _ANNOTATIONS:
      self.root = self._media_root(self.root)
    self.vocabulary = self._read_vocabulary()
    self.classes = tuple(self.vocabulary["answers"])
    self._words, self._answers = index_of(tuple(self.vocabulary["words"])), index_of(self.classes)
    self._files = named_splits(sorted(self.label_root.glob("avqa-*.json")), _SPLIT_FILE)

  def _media_root(self, annotations: Path) -> Path:
    """The nearest folder above a folder of annotations that holds media, else the one around it."""
    places = [place for kind in dataclasses.astuple(self.layout) for place in kind if place]
    above = (annotations.parent, annotations.parent.parent)
    return next((folder for folder in above if any((folder / place).is_dir() for place in places)), above[0])

  def _read_vocabulary(self) -> dict[str, list[str]]:
    if not (path := self.find_file("vocabulary.json")):
      return {"words": list(WORDS), "answers": list(ANSWERS)}
    found = read_json(path)
    lists = [found.get(key) for key in ("words", "answers")] if isinstance(found, dict) else []
    if not lists or not all(_are_names(x) for x in lists):
      raise DataError(f'{path}: expected {{"words": [...], "answers": [...]}}, each name once')
    if lists[0][0] != PAD:
      raise DataError(f"{path}: the first of the words must be {PAD!r}, it is the padding")
    return {"words": lists[0], "answers": lists[1]}

  def splits(self) -> tuple[str, ...]:
    return tuple(self._files)

  def _read(self, split: str) -> list[Question]:
    path = self._files[split]
    rows = read_json(path)
    if not isinstance(rows, list):
      raise DataError(f"{path}: expected a list of questions; {FETCH}")
    return [self._row(row, f"{path}: question {i + 1}") for i, row in enumerate(rows)]

  def _row(self, row: dict[str, Any], where: str) -> Question:
    if missing := [key for key in _REQUIRED if not isinstance(row, dict) or key not in row]:
      raise DataError(f"{where}: no field {', '.join(missing)}; {FETCH}")
    where = f"{where} (question_id {row['question_id']!s:.80})"
    for key in ("video_id", "question_id"):
      if not isinstance(row[key], (str, int)):
        raise DataError(f"{where}: {key} must be text or a number, got {row[key]!r:.80}; {FETCH}")
    if not (name := f"{row['video_id']}/{row['question_id']}").isprintable():  # JSON can spell what no terminal takes
      raise DataError(f"{where}: {name!r} names no clip and question; {FETCH}")
    for key in ("question_content", "anser"):
      if not isinstance(row[key], str):
        raise DataError(f"{where}: {key} must be text, got {row[key]!r:.80}; {FETCH}")
    kind = tuple(_parse_names(row["type"], where))
    if kind not in _TYPES:
      raise DataError(f"{where}: unknown question type {row['type']!r:.80}; the benchmark has nine")
    if row["anser"] not in self._answers:
      raise DataError(f"{where}: answer {row['anser']!r:.80} is not in the vocabulary; add it to vocabulary.json")
    words = question_words(row["question_content"], _parse_names(row["templ_values"], where), where)
    return Question(
      name,
      str(row["video_id"]),
      " ".join(words) + "?",
      self.tokens(words, where),
      self._answers[row["anser"]],
      _TYPES[kind],
    )

  def tokens(self, words: list[str], where: str = "question") -> tuple[int, ...]:
    """Words of a question -> their indices; raises DataError naming a word outside the vocabulary."""
    for word in words:
      if word not in self._words:
        raise DataError(f"{where}: word {word!r} is not in the vocabulary; add it to vocabulary.json")
    if len(words) > QUESTION_LENGTH:
      raise DataError(f"{where}: {len(words)} words, a question has at most {QUESTION_LENGTH}")
    return tuple(self._words[word] for word in words)

  def labels(self, record: Question) -> Example:
    return {"question": _padded(record.tokens), "label": np.int32(record.answer), "type": np.int32(record.type)}


def question_words(content: str, values: list[str], where: str) -> list[str]:
  """The words of a question without its mark, every slot such as `<Object>` filled by the next of `values`.

  Raises:
    DataError: the numbers of slots and values differ.
  """
  words = content.rstrip().rstrip("?\uff1f").split()  # one template ends in a full-width mark
  slots = sum("<" in word for word in words)
  if slots != len(values):
    raise DataError(f"{where}: {slots} slots in {content!r} but {len(values)} templ_values; {FETCH}")
  filling = iter(values)
  return [next(filling) if "<" in word else word for word in words]


def _are_names(found: Any) -> bool:
  """Whether a value is a list of texts, each once."""
  return isinstance(found, list) and bool(found) and all(isinstance(x, str) for x in found) and len(set(found)) == len(found)


def _padded(tokens: tuple[int, ...]) -> np.ndarray:
  return np.array(tokens + (0,) * (QUESTION_LENGTH - len(tokens)), np.int32)


def _parse_names(text: Any, where: str) -> list[str]:
  """A list of names written as a string, in JSON or Python spelling; nothing in it is ever run."""
  for parse in (json.loads, ast.literal_eval) if not isinstance(text, str) or len(text) <= MAX_TEXT else ():
    try:
      value = parse(text) if isinstance(text, str) else text
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: thousands of brackets
      continue
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
      return value
  raise DataError(f"{where}: {text!r:.80} is not a list of names; {FETCH}")
