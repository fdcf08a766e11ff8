"""The split between what learns and what does not: complete, lossless, and strict about names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import flat

from phpjax import partition


def make(prompts=(2, 3)):
  return {
    "encoders": {"visual": {"w": jnp.ones((2, 2))}, "audio": {"w": jnp.ones(3)}},
    "shared": {"adapters": {"a": jnp.ones(2), "b": jnp.zeros(1)}, "context": jnp.ones(4)},
    "tasks": {
      name: {"prompts": {"deep": jnp.full(prompts, i + 1.0)}, "head": {"kernel": jnp.full((2, 2 + i), float(i))}}
      for i, name in enumerate(("ave", "avs", "avqa"))
    },
  }


@pytest.mark.parametrize("uses", [(), ("adapters",), ("context",), ("adapters", "context")])
@pytest.mark.parametrize("task", ["ave", "avqa"])
def test_split_then_merge_gives_the_very_same_arrays(task, uses):
  params = make()
  trainable, frozen = partition.split(params, task, uses)
  assert set(trainable["shared"]) == set(uses) and set(frozen["shared"]) == {"adapters", "context"} - set(uses)
  assert trainable["task"] is params["tasks"][task]
  merged = partition.merge(params, trainable, task)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True))
  # together the two parts hold each leaf once, but for the other tasks'
  others = [x for name, tree in params["tasks"].items() if name != task for x in jax.tree.leaves(tree)]
  held = [id(x) for x in (*jax.tree.leaves(trainable), *jax.tree.leaves(frozen), *others)]
  assert sorted(held) == sorted(id(x) for x in jax.tree.leaves(params))


def test_merge_replaces_what_learned_and_nothing_else():
  params = make()
  trainable, _ = partition.split(params, "avs", ("adapters",))
  merged = partition.merge(params, jax.tree.map(lambda x: x + 7, trainable), "avs")
  before, after = flat(params), flat(merged)
  changed = {name for name in before if not np.array_equal(before[name], after[name])}
  assert changed == {"shared/adapters/a", "shared/adapters/b", "tasks/avs/prompts/deep", "tasks/avs/head/kernel"}
  assert list(merged["tasks"]) == ["ave", "avs", "avqa"], "the order of learning is kept"


def test_labels_cover_every_leaf():
  params = make()
  labels = partition.labels(params, "avs", ("context",))
  assert jax.tree.structure(labels) == jax.tree.structure(params)
  found = dict(zip(flat(params), jax.tree.leaves(labels), strict=True))
  assert set(found.values()) == set(partition.LABELS)
  live = {"shared/context": "shared", "tasks/avs/prompts/deep": "prompts", "tasks/avs/head/kernel": "head"}
  assert found == {name: live.get(name, "frozen") for name in found}


@pytest.mark.parametrize("uses", [(), ("adapters", "context")])
def test_live_labels_are_the_same_mask(uses):
  params = make()
  whole = partition.labels(params, "avqa", uses)
  trainable, _ = partition.split(params, "avqa", uses)
  live = partition.live_labels(trainable)
  assert live == {"shared": {k: whole["shared"][k] for k in uses}, "task": whole["tasks"]["avqa"]}


def test_unknown_names_raise():
  params = make()
  with pytest.raises(KeyError, match="adaptors"):
    partition.split(params, "ave", ("adaptors",))
  with pytest.raises(KeyError, match="avvp"):
    partition.split(params, "avvp", ())
  with pytest.raises(ValueError, match="teacher"):
    partition.labels({**params, "teacher": {}}, "ave", ())
  params["tasks"]["ave"]["tokens"] = jnp.ones(1)
  with pytest.raises(ValueError, match="tokens"):
    partition.labels(params, "ave", ())
  with pytest.raises(ValueError, match="tokens"):
    partition.live_labels(partition.split(params, "ave", ())[0])


@pytest.mark.parametrize(("task", "uses"), [("ave", ("adaptors",)), ("avvp", ())])
def test_labels_of_names_that_match_nothing_raise(task, uses):
  with pytest.raises(KeyError):
    partition.labels(make(), task, uses)


def test_past_is_the_other_tasks_in_order_padded_with_zeros():
  past = partition.stack_past(make(), "avs", 5)
  assert past["prompts"]["deep"].shape == (5, 2, 3) and past["valid"].tolist() == [1, 1, 0, 0, 0]
  assert past["prompts"]["deep"][:, 0, 0].tolist() == [1, 3, 0, 0, 0]


def test_past_keeps_its_shapes_when_a_task_is_added():
  params, shapes = make(), []
  for names in (["ave"], ["ave", "avs"], ["ave", "avs", "avqa"]):
    some = {**params, "tasks": {name: params["tasks"][name] for name in names}}
    past = partition.stack_past(some, names[-1], 3)
    assert past["valid"].sum() == len(names) - 1
    shapes.append(jax.tree.map(lambda x: (x.shape, x.dtype), past))
  assert shapes[0] == shapes[1] == shapes[2]


def test_past_of_a_method_without_prompts_is_none():
  params = make()
  for tree in params["tasks"].values():
    tree["prompts"] = {}
  assert partition.stack_past(params, "ave", 3) is None


def test_counts():
  tree = {"a": jnp.ones((3, 4)), "b": {"c": jnp.ones(2, jnp.bfloat16)}, "d": {}}
  assert partition.count(tree) == 14 and partition.num_bytes(tree) == 12 * 4 + 2 * 2
