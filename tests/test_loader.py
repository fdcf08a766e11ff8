"""Order, resume, sharing over processes, padding and errors of the loader."""

import threading

import numpy as np
import pytest

from data_pipelines import loader
from data_pipelines.schema import DataError, MediaError


class Numbers:
  """Example i holds i; `bad` raises; remembers which rows were read."""

  def __init__(self, length: int, bad: int = -1, mask: bool = True) -> None:
    self.length, self.bad, self.mask = length, bad, mask
    self.read: list[int] = []
    self.lock = threading.Lock()

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
