"""Text to token ids, through the `tokenizers` library and the weight folder's own tokenizer.json."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
import tokenizers


class Tokenizer:
  """Wraps a tokenizer.json whose post-processor adds the start and end tokens."""

  def __init__(self, path: str | pathlib.Path):
    path = pathlib.Path(path)
    if not path.is_file():
      raise ValueError(f"no tokenizer at {path}: the weight folder of a text encoder must hold tokenizer.json")
    self._tokenizer = tokenizers.Tokenizer.from_file(str(path))

  def __call__(self, texts: Sequence[str], context_length: int) -> np.ndarray:
    """Texts -> int32 [B, L], zero-padded to the longest of them (causal towers need no more).

    Raises ValueError for a text longer than `context_length`.
    """
    rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
    longest = max(len(row) for row in rows)
    if longest > context_length:
      text = texts[max(range(len(rows)), key=lambda i: len(rows[i]))]
      raise ValueError(f"{text!r} has {longest} tokens, the text encoder takes {context_length}: shorten it")
    return np.asarray([row + [0] * (longest - len(row)) for row in rows], np.int32)


def word_tokenizer(words: Sequence[str], vocabulary_size: int) -> tokenizers.Tokenizer:
  """A word-level tokenizer: 0 padding, 1 unknown, then `words`; the last two ids are start and end of text.

  Raises ValueError when the words do not fit.
  """
  if len(words) + 4 > vocabulary_size:
    raise ValueError(f"{len(words)} words do not fit a vocabulary of {vocabulary_size}")
  start, end = vocabulary_size - 2, vocabulary_size - 1  # the end token must be the largest id: CLIP finds it by argmax
  table = {"<pad>": 0, "<unk>": 1, **{word: i + 2 for i, word in enumerate(words)}, "<start>": start, "<end>": end}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="<unk>"))
  made.normalizer = tokenizers.normalizers.Sequence(
    [tokenizers.normalizers.Replace("_", " "), tokenizers.normalizers.Lowercase()]
  )
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single="<start> $A <end>", special_tokens=[("<start>", start), ("<end>", end)]
  )
  return made
