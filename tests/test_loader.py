"""Order, resume, sharing over processes, workers, augmentation, padding and errors of the loader."""

import functools
import multiprocessing
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading
import time

import fabricate
import numpy as np
import pytest

from data_pipelines import DATASETS, Media, loader, transforms
from data_pipelines.base import ClipCache
from data_pipelines.schema import DataError, MediaError
from data_pipelines.views import GroupedQuestions, LabelledSeconds

MEDIA = Media(image_size=16, sample_rate_hz=8000)


class Numbers:
  """Example i holds i; `bad` raises; remembers which rows were read."""

  def __init__(self, length: int, bad: int = -1, mask: bool = True) -> None:
    self.length, self.bad, self.mask = length, bad, mask
    self.read: list[int] = []
    self.lock = threading.Lock()

  def __getstate__(self) -> dict:
    return {**vars(self), "lock": None}

  def __setstate__(self, state: dict) -> None:
    vars(self).update(state, lock=threading.Lock())

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, index: int) -> dict:
    with self.lock:
      self.read.append(index)
    if index == self.bad:
      raise MediaError(f"{index}.mp4", "is cut off", "fetch it again")
    example = {"id": str(index), "value": np.full((2, 3), index + 1, np.int16), "label": np.int32(index + 1)}
    return {**example, "mask": np.float32(1)} if self.mask else example


def epoch(length: int = 23, **settings) -> list[dict]:
  return list(loader.batches(Numbers(length), **{"batch_size": 4, "seed": 7, "shuffle": True, **settings}))


def ids(batches: list[dict]) -> list[list[str]]:
  return [batch["id"] for batch in batches]


def test_batches_are_stacked_arrays():
  batch = epoch()[0]
  assert batch["value"].shape == (4, 2, 3) and batch["value"].dtype == np.int16
  assert batch["label"].shape == (4,) and batch["label"].dtype == np.int32
  assert batch["mask"].shape == (4,) and batch["mask"].dtype == np.float32
  assert isinstance(batch["id"], list)
  numbers = [int(name) + 1 for name in batch["id"]]
  assert numbers == batch["label"].tolist() == batch["value"][:, 0, 0].tolist()


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_example_exactly_once_and_the_rest_is_padding(shuffle):
  batches = epoch(shuffle=shuffle)
  assert len(batches) == loader.num_batches(Numbers(23), 4) == 6
  names, ordered = [name for batch in ids(batches) for name in batch], [str(i) for i in range(23)]
  assert sorted(names[:23], key=int) == ordered and names[23:] == [""]
  assert (names[:23] == ordered) != shuffle
  last = batches[-1]
  assert last["mask"].tolist() == [1, 1, 1, 0] and not last["value"][3].any() and last["label"][3] == 0
  assert all(batch["mask"].all() for batch in batches[:-1])


def test_order_is_a_function_of_seed_and_epoch_alone():
  assert ids(epoch()) == ids(epoch())
  assert ids(epoch(epoch=1)) != ids(epoch(epoch=0)) != ids(epoch(seed=8))
  assert ids(epoch(epoch=1)) == ids(epoch(epoch=1))


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_threads_do_not_change_the_order(num_threads):
  assert ids(epoch(num_threads=num_threads, prefetch=1)) == ids(epoch())


@pytest.mark.parametrize("process_count", [2, 4])
@pytest.mark.parametrize("length", [23, 5])  # of 5, the last batch leaves some processes nothing but padding
def test_processes_together_give_the_same_batches(length, process_count):
  parts = [epoch(length, process_index=i, process_count=process_count) for i in range(process_count)]
  whole = epoch(length)
  assert len(parts[0]) == len(whole)
  for k, batch in enumerate(whole):
    assert [name for part in parts for name in part[k]["id"]] == batch["id"]
    for key in ("value", "label", "mask"):
      np.testing.assert_array_equal(np.concatenate([part[k][key] for part in parts]), batch[key])


@pytest.mark.parametrize("start", [0, 2, 5, 6])
def test_start_resumes_exactly(start):
  assert ids(epoch(start=start)) == ids(epoch())[start:]


def test_resumed_epochs_do_not_read_what_is_done():
  source = Numbers(23)
  rest = list(loader.batches(source, batch_size=4, seed=7, shuffle=False, start=5, num_threads=0))
  assert ids(rest) == [["20", "21", "22", ""]]
  assert set(source.read) == {20, 21, 22, 0}  # 0 lends its shapes to the padding


def test_decodes_only_a_few_batches_ahead():
  source = Numbers(4000)
  iterator = loader.batches(source, batch_size=4, seed=7, shuffle=True, num_threads=2, prefetch=2)
  next(iterator)
  assert len(source.read) < 100


def test_errors_of_the_source_arrive_as_they_are():
  for num_threads in (0, 2):
    with pytest.raises(MediaError) as caught:
      list(loader.batches(Numbers(23, bad=11), batch_size=4, seed=7, shuffle=True, num_threads=num_threads))
    assert str(caught.value) == "11.mp4: is cut off; fetch it again"


def test_sources_without_a_mask_get_one():
  last = list(loader.batches(Numbers(5, mask=False), batch_size=4, seed=7, shuffle=False))[-1]
  assert last["mask"].tolist() == [1, 0, 0, 0] and last["mask"].dtype == np.float32


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({"batch_size": 3, "process_count": 2}, "batch_size 3 does not divide by 2 processes"),
    ({"batch_size": 0}, "batch_size 0"),
    ({"process_index": 2, "process_count": 2}, "process_index 2"),
    ({"length": 0}, "no examples"),
  ],
)
def test_impossible_settings_are_one_clear_line(settings, words):
  with pytest.raises(DataError, match=words):
    epoch(**settings)


# Workers. Starting one takes seconds, so that each test looks at several things.


slow = pytest.mark.slow
ALL = [(2, 1), *(pytest.param(*counts, marks=slow) for counts in ((1, 1), (1, 2), (2, 2), (1, 4), (2, 4)))]


@pytest.mark.parametrize(("num_workers", "process_count"), ALL)
def test_workers_change_neither_order_nor_content_nor_resume(num_workers, process_count):
  """The rest of an epoch after three of six batches, drawn and augmented by the workers of every process."""
  settings = {"epoch": 2, "augment": shift, "process_count": process_count}
  whole = epoch(epoch=2, augment=shift)[3:]
  parts = [epoch(start=3, process_index=i, num_workers=num_workers, **settings) for i in range(process_count)]
  assert {len(part) for part in parts} == {len(whole)}
  for k, batch in enumerate(whole):
    assert [name for part in parts for name in part[k]["id"]] == batch["id"]
    for key in ("value", "label", "mask"):
      np.testing.assert_array_equal(np.concatenate([part[k][key] for part in parts]), batch[key])
  assert not multiprocessing.active_children(), "workers end with the epoch"


def test_more_workers_than_batches_and_none_left_to_do():
  assert ids(epoch(3, num_workers=2, shuffle=False)) == [["0", "1", "2", ""]]
  assert epoch(3, num_workers=1, start=1) == []


def test_errors_of_workers_arrive_as_they_are():
  with pytest.raises(MediaError) as caught:
    list(loader.batches(Numbers(23, bad=11), batch_size=4, seed=7, shuffle=True, num_workers=1))
  assert str(caught.value) == "11.mp4: is cut off; fetch it again" and caught.value.path == "11.mp4"
  assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_is_one_clear_line_and_signals_to_the_group_are_none():
  batches = loader.batches(Numbers(400), batch_size=4, seed=7, shuffle=False, num_workers=1, prefetch=1)
  next(batches)
  (worker,) = multiprocessing.active_children()
  for number in (signal.SIGINT, signal.SIGTERM):
    os.kill(worker.pid, number)
  assert [next(batches)["id"][0] for _ in range(9)] == [str(i) for i in range(4, 40, 4)]
  os.kill(worker.pid, signal.SIGKILL)
  with pytest.raises(DataError, match=r"decoding process ended unexpectedly.*num_workers 0"):
    list(batches)


def test_leaving_an_epoch_ends_its_workers():
  batches = loader.batches(Numbers(400), batch_size=4, seed=7, shuffle=False, num_workers=1)
  next(batches)
  batches.close()
  assert not multiprocessing.active_children()


ORPHANS = """
import os, signal, multiprocessing, sys
from data_pipelines import loader
import test_loader
if __name__ == "__main__":
  next(batches := loader.batches(test_loader.Numbers(400), batch_size=4, seed=0, shuffle=False, num_workers=1))
  print(multiprocessing.active_children()[0].pid, flush=True)
  os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_parent_that_is_killed_leaves_no_workers(tmp_path):
  (tmp_path / "orphans.py").write_text(ORPHANS)
  here = pathlib.Path(__file__).resolve().parent
  paths = os.pathsep.join([str(here), str(here.parent)])
  done = subprocess.run(
    [sys.executable, tmp_path / "orphans.py"], env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, timeout=60
  )
  pid, end = int(done.stdout), time.monotonic() + 20
  while is_alive(pid) and time.monotonic() < end:
    time.sleep(0.1)
  assert not is_alive(pid)


def is_alive(pid: int) -> bool:
  """Whether a process runs; one that has ended and was not fetched by anybody does not."""
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  state = pathlib.Path(f"/proc/{pid}/stat")
  return not (state.is_file() and state.read_text().rsplit(")", 1)[1].split()[0] == "Z")


# What workers find out about clips.


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
  """A data root with a clip of AVE and one of MUSIC-AVQA that cannot be read."""
  root = tmp_path_factory.mktemp("damaged")
  for name, dataset in DATASETS.items():
    fabricate.MAKERS[name](root / dataset.folders[0])
  (root / "AVE" / f"{fabricate.CLIP_IDS[0]}.mp4").write_bytes(b"")
  (root / "MUSIC-AVQA/video/00000001.mp4").unlink()
  return root


def opened(root, name: str):
  return DATASETS[name](root).examples("train", MEDIA, on_bad_clip="skip", cache=ClipCache())


@pytest.mark.parametrize("name", DATASETS)
def test_sources_survive_pickling_without_their_clips(damaged, name):
  source = opened(damaged, name)
  before = [source[i] for i in range(len(source))]
  copy = pickle.loads(pickle.dumps(source))
  assert copy.bad == source.bad and copy.ids == source.ids and copy._cache.num_bytes == 0 < source._cache.max_bytes
  for one, other in zip(before, (copy[i] for i in range(len(copy))), strict=True):
    assert one.keys() == other.keys()
    for key in one:
      np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.parametrize(("name", "view"), [("ave", lambda x: x), ("music_avqa", functools.partial(GroupedQuestions, size=2))])
def test_what_workers_leave_out_is_known_here(damaged, name, view):
  read = {}
  for num_workers in (0, 1):
    source = view(opened(damaged, name))
    batches = list(loader.batches(source, batch_size=2, seed=0, shuffle=True, num_workers=num_workers))
    assert all(set(batch) == set(source[0]) for batch in batches)
    read[num_workers] = [(batch["id"], batch["mask"].tolist()) for batch in batches]
    read[num_workers] += [source.bad, source.rows.unopened()]
  assert read[0] == read[1] and read[0][-2] and read[0][-1] == []
  assert "00000001.mp4" in str(read[1][-2]) or fabricate.CLIP_IDS[0] in str(read[1][-2])


def test_nothing_but_padding_has_nothing_to_tell(damaged):
  sharing = {"process_index": 1, "process_count": 2, "num_workers": 1}
  (batch,) = loader.batches(opened(damaged, "ave"), batch_size=8, seed=0, shuffle=True, **sharing)
  assert batch["id"] == [""] * 4 and not batch["mask"].any()


def test_labelled_seconds_pass_on_what_workers_found(damaged):
  source = LabelledSeconds(opened(damaged, "avsbench"))
  source.learn(0, "")
  assert source.rows.unopened() == [] and source.bad == []
  source.learn(0, "it is broken")
  source.learn(0, "")  # another row of a clip that cannot be read
  assert source.bad == [(source.rows.ids[0], "it is broken")]


# Augmentation.


def shift(example: dict, rng: np.random.Generator) -> dict:
  return {**example, "label": np.int32(rng.integers(1, 1 << 30))}


def labels(batches: list[dict]) -> dict[str, int]:
  return {name: int(label) for batch in batches for name, label in zip(batch["id"], batch["label"], strict=True) if name}


def test_augmentation_is_a_function_of_seed_epoch_and_example_alone():
  drawn = labels(epoch(augment=shift))
  assert len(set(drawn.values())) == 23, "every example has a generator of its own"
  assert labels(epoch(augment=shift, num_threads=0)) == drawn == labels(epoch(augment=shift, shuffle=False, batch_size=5))
  assert labels(epoch(augment=shift, epoch=1)).keys() == drawn.keys()
  others = [labels(epoch(augment=shift, **other)) for other in ({"epoch": 1}, {"seed": 8})]
  assert all(not set(drawn.values()) & set(other.values()) for other in others)


def test_padding_and_what_was_left_out_is_not_augmented():
  last = epoch(augment=shift)[-1]
  assert last["label"][3] == 0 and last["mask"][3] == 0

  class LeftOut(Numbers):
    def __getitem__(self, index: int) -> dict:
      example = super().__getitem__(index)
      return {**example, "label": np.int32(0), "mask": np.float32(0)} if index == 2 else example

  batches = loader.batches(LeftOut(5), batch_size=5, seed=7, shuffle=False, augment=shift)
  assert next(batches)["label"].astype(bool).tolist() == [True, True, False, True, True]


def test_flip_mirrors_half_of_the_clips_as_a_whole():
  rng = np.random.default_rng(0)
  example = {
    "id": "a",
    "visual": rng.integers(0, 256, (5, 4, 6, 3), np.uint8),
    "label": rng.integers(0, 2, (5, 4, 6), np.uint8),
  }
  mirrored = {"id": "a", "visual": example["visual"][:, :, ::-1], "label": example["label"][:, :, ::-1]}
  count = 0
  for seed in range(200):
    found = transforms.flip(example, np.random.default_rng(seed), keys=("visual", "label"))
    turned = bool((found["visual"] != example["visual"]).any())
    count += turned
    for key, value in (mirrored if turned else example).items():
      np.testing.assert_array_equal(found[key], value)
    assert found["label"].flags.c_contiguous and not (turned and np.shares_memory(found["visual"], example["visual"]))
  assert 70 < count < 130
  only = transforms.flip(example, np.random.default_rng(0), keys=())
  np.testing.assert_array_equal(only["visual"], example["visual"])


# Memory and speed.


# Reads an AVE of JPEG frames and npy waves; arguments: its data root, epochs, workers.
MEMORY = """
import resource, sys
from data_pipelines import AVE, Media, loader
from data_pipelines.base import ClipCache

if __name__ == "__main__":
  root, epochs, num_workers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
  cache = ClipCache(4_000_000)  # of 48 clips of 0.8 MB
  source, peaks = AVE(root).examples("train", Media(128, 8000), cache=cache), []
  for epoch in range(epochs):
    read = loader.batches(source, batch_size=4, seed=0, shuffle=True, epoch=epoch, num_workers=num_workers, num_threads=2)
    assert sum(batch["visual"].shape == (4, 10, 128, 128, 3) and batch["visual"].any() for batch in read) == 12
    assert num_workers or 3_000_000 < cache.num_bytes <= 4_000_000
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
    peaks.append(peak + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // (1024 if sys.platform == "darwin" else 1))
  print(*peaks)
"""
CLIPS = 48


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> pathlib.Path:
  """A data root with an AVE of CLIPS clips as JPEG frames and npy waves, all in the split train."""
  root = tmp_path_factory.mktemp("pictures")
  names = [f"clip_{i:06d}" for i in range(CLIPS)]
  fabricate.write_lines(root / "AVE/trainSet.txt", [f"Mandolin&{name}&good&0&10" for name in names])
  fabricate.write_pack(root / "AVE", names, "frames", "wave")
  return root


@slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_memory_stays_flat_over_three_epochs_of_media(tmp_path, pictures, num_workers):
  """Kilobytes at the end of each epoch; an epoch holds 31 MB, so that batches or clips that are kept would show."""
  (tmp_path / "memory.py").write_text(MEMORY)
  root = pathlib.Path(__file__).resolve().parents[1]
  command = [sys.executable, tmp_path / "memory.py", pictures, "3", str(num_workers)]
  done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=60)
  assert done.returncode == 0, done.stderr
  first, _, third = map(int, done.stdout.split())
  assert third - first < 15_000


def test_throughput_counts_what_was_read():
  found = loader.throughput(Numbers(23), batch_size=4, num_threads=1)
  assert set(found) == {"first_batch_s", "examples_per_s"} and min(found.values()) > 0
  with pytest.raises(DataError, match="fewer than two batches of 23"):
    loader.throughput(Numbers(23), batch_size=23)
