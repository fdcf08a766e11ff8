"""Text to token ids, through the `tokenizers` library and the weight folder's own tokenizer.json."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import numpy as np
import tokenizers

FILE = "tokenizer.json"


class Tokenizer:
  """Wraps a tokenizer.json whose post-processor adds the start and end tokens; `pad_id` fills up shorter texts."""

  def __init__(self, path: str | pathlib.Path, pad_id: int = 0):
    path = pathlib.Path(path)
    if not path.is_file():
      raise ValueError(f"no tokenizer at {path}: the weight folder of a text encoder must hold {FILE}")
    self._tokenizer, self._pad_id = read_json(path), pad_id
    self._tokenizer.no_padding()  # files of sentence-transformers pad and cut to 128 tokens
    self._tokenizer.no_truncation()

  def __call__(self, texts: Sequence[str], context_length: int) -> np.ndarray:
    """Texts -> int32 [B, L], padded to the longest of them.

    Raises ValueError for a text longer than `context_length`.
    """
    rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
    longest = max(len(row) for row in rows)
    if longest > context_length:
      text = texts[max(range(len(rows)), key=lambda i: len(rows[i]))]
      raise ValueError(f"{text!r} has {longest} tokens, the text encoder takes {context_length}: shorten it")
    return np.asarray([row + [self._pad_id] * (longest - len(row)) for row in rows], np.int32)


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


def read_json(path: pathlib.Path) -> tokenizers.Tokenizer:
  """Opens a tokenizer.json; raises ValueError."""
  try:
    return tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises bare Exception
    raise ValueError(f"{path} is not a readable tokenizer ({error})") from error


def from_files(place: pathlib.Path) -> tokenizers.Tokenizer:
  """A published tokenizer: tokenizer.json, or vocab.json with merges.txt (CLIP, RoBERTa), or vocab.txt (BERT).

  `place` is the folder, or tokenizer.json itself. Raises ValueError that names what is missing.
  """
  if place.is_file():
    return read_json(place)
  if (place / FILE).is_file():
    return read_json(place / FILE)
  vocabulary, merges = place / "vocab.json", place / "merges.txt"
  if vocabulary.is_file() and merges.is_file():
    return byte_pair_tokenizer(vocabulary, merges)
  if (place / "vocab.txt").is_file():
    return tokenizers.implementations.BertWordPieceTokenizer(str(place / "vocab.txt"), lowercase=True)._tokenizer
  if vocabulary.is_file() or merges.is_file():
    raise ValueError(f"no {merges.name if vocabulary.is_file() else vocabulary.name} in {place}, which its neighbour needs")
  raise ValueError(f"no {FILE}, no vocab.json with merges.txt and no vocab.txt in {place}")


def byte_pair_tokenizer(vocabulary: pathlib.Path, merges: pathlib.Path) -> tokenizers.Tokenizer:
  """CLIP's (its vocabulary ends in <|endoftext|>) or RoBERTa's tokenizer from the files that came before tokenizer.json."""
  try:
    table = json.loads(vocabulary.read_text(encoding="utf-8"))
    if not isinstance(table, dict) or not all(isinstance(i, int) for i in table.values()):
      raise ValueError("it holds no numbers of words")
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{vocabulary} is not a readable vocabulary ({error})") from error
  pairs = [tuple(line.split()) for line in merges.read_text(encoding="utf-8").splitlines()[1:] if len(line.split()) == 2]
  if "<|endoftext|>" not in table:
    made = tokenizers.Tokenizer(tokenizers.models.BPE(table, pairs, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = tokenizers.processors.RobertaProcessing(
      ("</s>", table["</s>"]), ("<s>", table["<s>"]), add_prefix_space=False
    )
    return made
  made = tokenizers.Tokenizer(
    tokenizers.models.BPE(table, pairs, unk_token="<|endoftext|>", end_of_word_suffix="</w>", continuing_subword_prefix="")
  )
  normalizers, split = tokenizers.normalizers, tokenizers.pre_tokenizers
  made.normalizer = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
  )
  words = tokenizers.Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
  made.pre_tokenizer = split.Sequence(
    [split.Split(words, behavior="removed", invert=True), split.ByteLevel(add_prefix_space=False, use_regex=False)]
  )
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single="<|startoftext|> $A <|endoftext|>",
    special_tokens=[(word, table[word]) for word in ("<|startoftext|>", "<|endoftext|>")],
  )
  return made
