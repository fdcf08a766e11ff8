"""The layout of prepared records, which `prepare` writes and `prepared` reads.

Below a dataset folder, in records/<name>/1.0.0/, a TFDS directory:

  dataset_info.json, features.json                   TFDS's own metadata
  <name>-<split>.array_record-00000-of-00012         shards, one example a clip of the split
  manifest.json                                      settings, counts, clips left out, shards with their clips; written last
  journal/                                           one file a finished shard: its sha256, each clip's files with theirs

No file holds a time or a path outside the dataset folder, so that the same input gives the same bytes; but for
journal/*.stamps, which say when the media were touched last, so that they need not be hashed again. They may be deleted.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines import limits
from data_pipelines.schema import DataError, Example

if TYPE_CHECKING:
  from tensorflow_datasets.core.features import FeaturesDict

VERSION = "1.0.0"
MANIFEST = "manifest.json"
JOURNAL = "journal"
STAMPS = ".stamps"
# JPEG and sound do not compress further, and a group of one record is what random access needs.
WRITER_OPTIONS = "group_size:1,uncompressed"


def records_folder(root: Path, name: str) -> Path:
  """Where the records of dataset `name` lie below its dataset folder."""
  return root / "records" / name / VERSION


def shard_name(name: str, split: str, index: int, count: int) -> str:
  """The name TFDS looks for."""
  return f"{name}-{split}.array_record-{index:05d}-of-{count:05d}"


def clip_text(key: Hashable) -> str:
  """A clip key of a reader as one text."""
  return "/".join(map(str, key)) if isinstance(key, tuple) else str(key)


def to_bytes(text: str) -> bytes:
  """UTF-8; names of files that are no UTF-8 keep their bytes."""
  return text.encode("utf-8", "surrogateescape")


def file_sha256(path: Path) -> str:
  """Of the file's content, in hex."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def dump_json(value: Any) -> str:
  """The same text for equal values."""
  return json.dumps(value, indent=1, sort_keys=True) + "\n"


def read_json(path: Path) -> Any:
  """The value of a file that this package wrote; None if there is none; raises DataError if it is damaged."""
  try:
    return json.loads(limits.read_label_bytes(path))
  except FileNotFoundError:
    return None
  except DataError:
    raise
  except (ValueError, RecursionError) as error:
    raise DataError(f"{path}: is damaged ({error}); delete it and run data_pipelines.prepare again") from error


@contextlib.contextmanager
def expecting(path: Path) -> Iterator[None]:
  """Around code that takes a value of `read_json` apart: what does not fit is a DataError."""
  try:
    yield
  except DataError:
    raise
  except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
    reason = f"has no {error}" if isinstance(error, KeyError) else str(error)
    raise DataError(f"{path}: is damaged ({reason}); delete it and run data_pipelines.prepare again") from error


def typed(value: Any, kind: type, least: int | None = None) -> Any:
  """A value of `read_json` that must be of a type, and at least `least`; raises TypeError."""
  if not isinstance(value, kind) or (least is not None and value < least):
    raise TypeError(f"{value!r:.80} stands where {kind.__name__} should{'' if least is None else f' of at least {least}'}")
  return value


def partial_path(path: Path) -> Path:
  """The name of a file while this process writes it; TFDS does not see it."""
  return path.with_name(f".{path.name}.{os.getpid()}.partial")


def write_atomic(path: Path, content: bytes) -> None:
  """Writes a file in one rename; leaves one of the same content alone."""
  if path.is_file() and path.read_bytes() == content:
    return
  partial = partial_path(path)
  with partial.open("wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  partial.rename(path)


def media_features() -> dict[str, Any]:
  """The TFDS features of an example that do not depend on the dataset, see `build_features`."""
  import tensorflow_datasets as tfds

  texts = lambda: tfds.features.Sequence(tfds.features.Text())
  return {
    "clip": tfds.features.Text(),
    "ids": texts(),
    "frames": texts(),
    "masks": texts(),
    "audio": _bytes_of((None,), np.int16),
    "duration_s": np.float32,
  }


def _bytes_of(shape: tuple[int | None, ...], dtype: Any) -> Any:
  import tensorflow_datasets as tfds

  return tfds.features.Tensor(shape=shape, dtype=dtype, encoding=tfds.features.Encoding.BYTES)


def build_features(labels: Example) -> "FeaturesDict":
  """The TFDS features of an example, for a dataset whose rows have these label arrays.

  clip text; ids [R] of the annotation rows that share the clip; frames [T] encoded jpg or png; masks of the first of
  them, encoded png; audio int16 [T * S]; duration_s of the video file, T where the clip is stored as pictures; labels:
  the arrays of the rows, [R, ...].
  """
  import tensorflow_datasets as tfds

  arrays = {key: _bytes_of((None, *value.shape), value.dtype) for key, value in labels.items()}
  return tfds.features.FeaturesDict({**media_features(), "labels": arrays})


@dataclasses.dataclass(frozen=True)
class _Whole:
  """A whole file, in the words of ArrayRecord."""

  filename: str
  take: int
  examples_in_shard: int
  skip: int = 0


class SplitReader:
  """The media of the examples in some shards of one split, by their place in the split; all but the labels.

  It opens the shards by the names it is given and knows the features: TFDS's own metadata would name classes to be imported and
  files to be read, and what a folder from elsewhere holds is data, never code.
  """

  def __init__(self, shards: Mapping[Path, int]) -> None:
    """Takes the files and how many records each holds; raises RuntimeError and ValueError, as ArrayRecord does."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    self._features = tfds.features.FeaturesDict(media_features())
    # The numbers are told, so that each file is opened when it is needed: one that is damaged keeps nobody from the others.
    self._source = ArrayRecordDataSource([_Whole(os.fspath(path), count, count) for path, count in shards.items()])

  def __getitem__(self, position: int) -> dict[str, Any]:
    """An encoded example; raises RuntimeError, ValueError and protobuf's DecodeError for a damaged one."""
    return self._features.deserialize_example_np(self._source[position])


class Serializer:
  """Examples -> bytes, by the TFDS feature spec.

  TFDS's own `serialize_example` orders the map of a protocol buffer by chance, so the same example would not give the
  same bytes.
  """

  def __init__(self, features: "FeaturesDict") -> None:
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    self._features, self._serializer = features, ExampleSerializer(features.get_serialized_info())

  def __call__(self, example: Example) -> bytes:
    proto = self._serializer.get_tf_example(self._features.encode_example(example))
    return proto.SerializeToString(deterministic=True)


def write_metadata(folder: Path, name: str, features: "FeaturesDict", splits: dict[str, tuple[list[int], int]]) -> None:
  """dataset_info.json and features.json; `splits`: examples in each shard, and bytes, of each split."""
  import tensorflow_datasets as tfds

  identity = tfds.core.dataset_info.DatasetIdentity(name, tfds.core.Version(VERSION), str(folder), "data_pipelines")
  info = tfds.core.DatasetInfo(
    builder=identity, description=f"{name}: clips written by data_pipelines.prepare", features=features, disable_shuffling=True
  )
  info.set_file_format("array_record")
  found = [tfds.core.SplitInfo(name=s, shard_lengths=lengths, num_bytes=size) for s, (lengths, size) in splits.items()]
  info.set_splits(tfds.core.SplitDict(found))
  with tempfile.TemporaryDirectory() as written:  # TFDS would write anew what is there already
    info.write_to_directory(written)
    for path in Path(written).iterdir():
      write_atomic(folder / path.name, path.read_bytes())
