"""Reads what `data_pipelines.prepare` wrote, in the place of the media files.

Labels, questions and splits come from the copied label files, so that the readers of the raw benchmarks read prepared
ones too.
"""

import io
import re
import threading
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import media as media_lib
from data_pipelines import pictures, records, transforms
from data_pipelines.schema import DataError, Example, Media, MediaError, brief
from data_pipelines.tables import is_name

_VERSION = re.compile(r"\d+\.\d+\.\d+")
COPY = "copy the folder again, or run data_pipelines.prepare again: it makes what is damaged anew"
AGAIN = "run data_pipelines.prepare again, or let on_bad_clip='skip' leave it out"


def open_store(root: Path, name: str, *, spread: bool) -> "PreparedStore | None":
  """The prepared records of dataset `name` below its folder, None if it has none; raises DataError if they are not complete."""
  folder = records.records_folder(root, name)
  if folder.is_dir():
    return PreparedStore(folder, spread=spread)
  others = sorted(p.name for p in folder.parent.iterdir() if _VERSION.fullmatch(p.name)) if folder.parent.is_dir() else []
  if others:
    which = f"records of version {', '.join(others)}, not {records.VERSION}"
    raise DataError(f"{folder.parent}: holds {which}; run data_pipelines.prepare on the raw media again")
  return None


class PreparedStore:
  """The clips of all splits by their keys; threads may share it, and it can be pickled.

  Attributes:
    folder: the TFDS directory.
    settings: what `prepare` was run with.
    shards: objects of file, split, size, sha256 and clips, as in the manifest.
  """

  def __init__(self, folder: Path, *, spread: bool) -> None:
    """Reads the manifest, no record; `spread` as in the reader. Raises DataError."""
    if (manifest := records.read_json(folder / records.MANIFEST)) is None:
      raise DataError(f"{folder}: is not complete; run the same data_pipelines.prepare again, it goes on where it stopped")
    self.folder, self._spread = folder, spread
    with records.expecting(folder / records.MANIFEST):
      self.settings, self.shards = manifest["settings"], [_shard(x) for x in records.typed(manifest["shards"], list)]
      self._reasons = {records.typed(x["clip"], str): str(x["reason"]) for x in manifest["left_out"]}
      self._stored_hz, self._places = records.typed(self.settings["sample_rate_hz"], int, 1), _places(self.shards)
      for name in records.typed(self.settings["labels"], dict):
        if not all(is_name(part) for part in name.split("/")):
          raise TypeError(f"{name!r:.80} is no path inside the dataset folder")
    self._sources: dict[str, records.SplitReader] = {}
    self._lock = threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_sources")}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state, _lock=threading.Lock(), _sources={})

  def __contains__(self, key: Hashable) -> bool:
    return records.clip_text(key) in self._places

  def shard_of(self, key: Hashable) -> tuple[str, str]:
    """Split and file that a clip which the records contain is read from."""
    split, _, file = self._places[records.clip_text(key)]
    return split, file

  def closed(self, split: str) -> str:
    """Why no clip of a split can be read, "" if they can."""
    try:
      self._source(split)
    except MediaError as error:
      return f"{error.path}: {error.reason}"
    return ""

  def reason(self, key: Hashable) -> str:
    """Why a clip is not in the records."""
    return self._reasons.get(records.clip_text(key), "not in the label files that were prepared")

  def damage(self, shard: dict[str, Any], *, hashed: bool) -> str:
    """What is wrong with the file of a shard, "" if nothing is; its content is read only if `hashed`."""
    path = self.folder / shard["file"]
    if not path.is_file():
      return "is missing"
    if (size := path.stat().st_size) != shard["size"]:
      return f"is {'cut off' if size < shard['size'] else 'of another run'}: {size} bytes of {shard['size']}"
    if hashed and records.file_sha256(path) != shard["sha256"]:
      return "is damaged or of another run: other bytes than the manifest's sha256"
    return ""

  def decode_clip(self, key: Hashable, media: Media, zeros: Example) -> Example:
    """What the reader's `decode_clip` gives for the raw clip; raises MediaError.

    Args:
      key: `Dataset.clip_key` of the row.
      media: image size and sample rate.
      zeros: arrays of the result's shapes: visual [T, H, W, 3], audio [T, S], and label [T, H, W] for masks.
    """
    clip = records.clip_text(key)
    example, where = self._read(clip), f"{self.folder}: clip {clip!r}"
    result = {"visual": _pictures(example["frames"], media, where), "audio": self._audio(example["audio"], media)}
    if "label" in zeros:
      result["label"] = zeros["label"].copy()
      for label, mask in zip(result["label"], example["masks"], strict=False):
        label[:] = pictures.read_mask(_Named(mask, where), media)
    for name, array in result.items():
      if array.shape != zeros[name].shape:
        raise DataError(f"{where}: its {name} is {array.shape}, not {zeros[name].shape}; {AGAIN}")
    return result

  def _read(self, clip: str) -> dict[str, Any]:
    """The encoded example of a clip."""
    if clip not in self._places:
      raise MediaError(self.folder, f"clip {clip!r} was left out ({self.reason(clip)})", f"mend it and {AGAIN}")
    split, position, _ = self._places[clip]
    source = self._source(split)
    try:
      example = source[position]
    except Exception as error:  # damaged bytes fail in every way that array_record, protobuf and TFDS do
      raise MediaError(self.folder, f"clip {clip!r} cannot be read ({brief(error)})", AGAIN) from error
    if example["clip"] != records.to_bytes(clip):
      raise MediaError(self.folder, f"another clip stands where the manifest has {clip!r}", AGAIN)
    return example

  def _source(self, split: str) -> records.SplitReader:
    """The records of a split, opened when first asked for."""
    with self._lock:
      if split not in self._sources:
        shards = [shard for shard in self.shards if shard["split"] == split]
        for shard in shards:
          if words := self.damage(shard, hashed=False):
            raise MediaError(self.folder / shard["file"], words, COPY)
        try:
          self._sources[split] = records.SplitReader({self.folder / x["file"]: len(x["clips"]) for x in shards if x["clips"]})
        except Exception as error:  # as in `_read`
          raise MediaError(self.folder, f"cannot be opened ({brief(error)})", COPY) from error
      return self._sources[split]

  def _audio(self, samples: np.ndarray, media: Media) -> np.ndarray:
    """Stored int16 [T * S] -> int16 [T, sample_rate_hz].

    Consecutive seconds are resampled as one wave, as the raw clip is; seconds spread over a longer clip one by one,
    because what stands before and after each is not its own.
    """
    stored_hz, rate_hz = self._stored_hz, media.sample_rate_hz
    if len(samples) % stored_hz:
      raise DataError(f"{self.folder}: {len(samples)} samples are no whole seconds of {stored_hz} Hz; {AGAIN}")
    seconds = samples.reshape(-1, stored_hz)
    if rate_hz == stored_hz:
      return seconds.copy()  # what was read from a file belongs to the record
    waves = seconds if self._spread else samples[None]
    wave = np.concatenate([media_lib.resample(x.astype(np.float32) / 32768, stored_hz, rate_hz) for x in waves])
    return transforms.cut_seconds(wave, rate_hz, np.arange(len(seconds)))


def _shard(value: Any) -> dict[str, Any]:
  """One of the manifest's shards; raises KeyError and TypeError if it is none, or of a file that lies elsewhere."""
  if not is_name(file := records.typed(value["file"], str)):
    raise TypeError(f"{file!r:.80} is no name of a shard")
  clips = [records.typed(clip, str) for clip in records.typed(value["clips"], list)]
  split, sha256 = records.typed(value["split"], str), records.typed(value["sha256"], str)
  return {"file": file, "split": split, "size": records.typed(value["size"], int, 0), "sha256": sha256, "clips": clips}


def _places(shards: Sequence[dict[str, Any]]) -> dict[str, tuple[str, int, str]]:
  """Clip -> split, position in it, file. Of a clip that several splits share, which each of them holds, the last copy."""
  places: dict[str, tuple[str, int, str]] = {}
  counts: dict[str, int] = {}
  for shard in shards:
    first = counts.get(shard["split"], 0)
    places.update({clip: (shard["split"], first + i, shard["file"]) for i, clip in enumerate(shard["clips"])})
    counts[shard["split"]] = first + len(shard["clips"])
  return places


class _Named(io.BytesIO):
  """An encoded picture that says where it came from in error messages."""

  def __init__(self, content: bytes, where: str) -> None:
    super().__init__(content)
    self._where = where

  def __str__(self) -> str:
    return self._where


def _pictures(frames: Sequence[bytes], media: Media, where: str) -> np.ndarray:
  """Encoded frames -> uint8 [T, H, W, 3]; one shown twice is decoded once."""
  done = {frame: pictures.read_image(_Named(frame, where), media) for frame in dict.fromkeys(frames)}
  return np.stack([done[frame] for frame in frames])
