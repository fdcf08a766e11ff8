"""Prepared records in the place of media: shards that are lost or damaged, clips left out, labels changed since.

Lengths and masks are those of the raw media, which `data_pipelines.prepare` took as they were: they are not looked at again.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data_pipelines import records
from data_pipelines.base import Dataset
from data_pipelines.checks.findings import ClipState, Context, Finding, plural
from data_pipelines.known import NEEDED
from data_pipelines.prepared import COPY, PreparedStore
from data_pipelines.schema import DataError, Record, printable


def open_records(dataset: Dataset, context: Context) -> None:
  """Sets `context.prepared`, or `refused` if what `data_pipelines.prepare` made cannot be used at all."""
  try:
    context.prepared = dataset.prepared
  except DataError as error:
    context.refused = str(error)


def inspect_shards(context: Context, workers: int) -> None:
  """Sets `context.shards` and `closed`: shards are looked at by size, and unless nothing is to be decoded by content."""
  store, hashed = context.prepared, context.decode != "none"
  with ThreadPoolExecutor(workers) as pool:
    found = list(pool.map(lambda shard: _damage(store, shard, hashed), store.shards))
  context.shards = {shard["file"]: words for shard, words in zip(store.shards, found, strict=True) if words}
  splits = dict.fromkeys(shard["split"] for shard in store.shards if shard["clips"])
  context.closed = {split: words for split in splits if (words := store.closed(split))}


def _damage(store: PreparedStore, shard: dict[str, Any], hashed: bool) -> str:
  try:
    return store.damage(shard, hashed=hashed)
  except OSError as error:
    return f"cannot be read ({error.strerror})"


def look_up(dataset: Dataset, record: Record, context: Context) -> ClipState:
  """The state of a clip as far as its shard tells."""
  key, store = dataset.clip_key(record), context.prepared
  if key not in store:
    return ClipState(problem="missing", detail=printable(f"{record.clip}: left out ({store.reason(key)})"))
  split, file = store.shard_of(key)
  state = ClipState((store.folder / file,))
  if words := context.closed.get(split):
    state.problem, state.detail = "unreadable", f"{printable(record.clip)}: {printable(words)}"
  return state


def prepared_records(dataset: Dataset, context: Context) -> list[Finding]:
  """What is wrong with the records as a whole, and with each shard."""
  if context.refused:
    return [Finding("fatal", "records", str(dataset.root), context.refused)]
  if (store := context.prepared) is None:
    return []
  found = []
  for split, words in context.closed.items():
    what = f"no clip can be read: {printable(words)}"
    found.append(Finding("fatal" if split in NEEDED else "gap", "records", split, what, COPY))
  found += [Finding("gap", "shards", str(store.folder / file), words, COPY) for file, words in context.shards.items()]
  return [*found, *_strays(store), *_metadata(store), *_changed_labels(dataset, store)]


def _metadata(store: PreparedStore) -> Iterator[Finding]:
  """Files that only TFDS reads: this package knows what they say."""
  for name in ("dataset_info.json", "features.json"):
    try:
      words = "" if isinstance(records.read_json(store.folder / name), dict) else "is missing or no JSON object"
    except DataError:
      words = "is damaged"
    if words:
      yield Finding("gap", "records", str(store.folder / name), f"{words}: TFDS cannot open these records", COPY)


def _strays(store: PreparedStore) -> Iterator[Finding]:
  """Shards that the manifest does not have."""
  known = {shard["file"] for shard in store.shards}
  names = sorted(name for name in os.listdir(store.folder) if ".array_record-" in name and not name.startswith("."))
  if strays := tuple(printable(name) for name in names if name not in known):
    what = f"{plural(len(strays), 'shard')} of another run: not in the manifest and not read"
    yield Finding("gap", "shards", str(store.folder), what, "remove them", strays)


def _changed_labels(dataset: Dataset, store: PreparedStore) -> Iterator[Finding]:
  """Label files that are not those the records were made with."""
  for name, digest in store.settings["labels"].items():
    path = dataset.root / name
    words = "is not there" if not path.is_file() else "" if records.file_sha256(path) == digest else "was changed"
    if words:
      mend = "copy it from the raw root, or run data_pipelines.prepare again with --overwrite"
      yield Finding("gap", "records", str(path), f"{words}: the records were made with another one", mend)
