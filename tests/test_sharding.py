"""Where arrays lie, on the two devices of the tests, and what is said when they do not fit."""

import itertools
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from phpjax import sharding
from phpjax.errors import UserError


@pytest.mark.parametrize(("shape", "sizes"), [((-1, 1), (2, 1)), ((1, -1), (1, 2)), ((2, 1), (2, 1)), ((1, 2), (1, 2))])
def test_a_mesh_takes_all_devices(shape, sizes):
  mesh = sharding.make_mesh(shape)
  assert mesh.axis_names == ("data", "fsdp") and mesh.devices.shape == sizes
  assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("shape", [(-1, -1), (3, 1), (1, 1), (-1, 3), (0, 2), (-2, 1), (2,), (-1, 1, 1)])
def test_a_mesh_that_does_not_fit_says_so(shape):
  with pytest.raises(UserError, match="mesh="):
    sharding.make_mesh(shape)


def test_a_batch_is_split_and_parameters_are_not():
  mesh = sharding.make_mesh((-1, 1))
  batch = {"visual": np.arange(24.0).reshape(4, 6), "mask": np.ones(4), "id": ["a", "b", "c", "d"]}
  rows = sharding.put_batch(batch, mesh, ("visual", "mask"))
  assert set(rows) == {"visual", "mask"}
  shards = sorted(rows["visual"].addressable_shards, key=lambda s: s.index[0].start or 0)
  assert [s.data.shape for s in shards] == [(2, 6), (2, 6)] and len({s.device for s in shards}) == 2
  np.testing.assert_array_equal(np.concatenate([s.data for s in shards]), batch["visual"])
  asked = sharding.put_batch({**batch, "query": {"visual": (np.arange(16.0).reshape(8, 2),)}}, mesh, ("mask",))
  assert set(asked) == {"mask", "query"}, "a tree of rows goes with the others"
  assert sorted(s.data.shape for s in asked["query"]["visual"][0].addressable_shards) == [(4, 2), (4, 2)]
  tree = sharding.put_replicated({"a": {"b": np.arange(3)}}, mesh)
  assert [s.data.shape for s in tree["a"]["b"].addressable_shards] == [(3,), (3,)]
  assert tree["a"]["b"].sharding.is_fully_replicated and len(tree["a"]["b"].sharding.device_set) == jax.device_count()


def numbered(count: int, fetched: list[int], wait_s: float = 0.0, error: Exception | None = None):
  """Batches that hold their number, each noted when it is asked for; `error` comes behind them."""
  for number in range(count):
    fetched.append(number)
    time.sleep(wait_s)
    yield {"visual": np.full((2, 3), number), "id": ["a", str(number)]}
  if error is not None:
    raise error


@pytest.mark.parametrize("count", [0, 1, 5])
def test_one_batch_is_put_ahead_and_no_more(count):
  fetched, mesh = [], sharding.make_mesh((-1, 1))
  done = -1
  for done, (batch, rows, _) in enumerate(sharding.put_ahead(numbered(count, fetched), mesh, ("visual",))):
    assert batch["id"] == ["a", str(done)] and set(rows) == {"visual"}
    np.testing.assert_array_equal(rows["visual"], batch["visual"])
    assert rows["visual"].sharding == sharding.over_batch(mesh)
    assert fetched == list(range(min(done + 2, count)))
  assert done == count - 1


def test_the_wait_is_that_for_the_batch_itself():
  ahead = sharding.put_ahead(numbered(2, [], wait_s=0.05), sharding.make_mesh((-1, 1)), ("visual",))
  waited = []
  for _, _, waited_s in ahead:
    waited.append(waited_s)
    time.sleep(0.2)  # a step
  assert all(0.05 <= wait_s < 0.2 for wait_s in waited)


def test_an_error_comes_behind_the_batches_before_it():
  ahead = sharding.put_ahead(numbered(3, [], error=OSError("no more")), sharding.make_mesh((-1, 1)), ("visual",))
  assert [batch["id"][1] for batch, _, _ in itertools.islice(ahead, 3)] == ["0", "1", "2"]
  with pytest.raises(OSError, match="no more"):
    next(ahead)


def test_a_batch_size_that_does_not_divide_names_the_neighbours():
  assert sharding.check_batch_size(8, 2) is None
  assert "--config.batch_size=4 or 6" in sharding.check_batch_size(5, 2)
  assert sharding.check_batch_size(1, 4, "eval_batch_size").endswith("--config.eval_batch_size=4")
  assert sharding.check_batch_size(0, 2) and sharding.check_batch_size(-2, 2)
