"""Class-incremental parts of a dataset: the hash rule, and what a part shows of the whole."""

import hashlib

import fabricate
import numpy as np
import pytest

from data_pipelines import AVE, DataError, Media
from data_pipelines.parts import ClassPart, class_groups

CLASSES = tuple(f"class {i}" for i in range(6))


@pytest.mark.parametrize("seed", [0, 3])
def test_groups_follow_the_published_rule_and_hold_every_class_once(seed):
  order = sorted(CLASSES, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())
  assert class_groups(CLASSES, 3, seed) == (tuple(order[:2]), tuple(order[2:4]), tuple(order[4:]))
  assert class_groups(CLASSES[::-1], 3, seed) == class_groups(CLASSES, 3, seed), "the order of the list does not count"


def test_groups_differ_between_seeds():
  assert len({class_groups(CLASSES, 3, seed) for seed in range(5)}) > 1


@pytest.mark.parametrize("count", [0, 4, 7])
def test_classes_that_make_no_equal_groups_are_refused(count):
  with pytest.raises(DataError, match=r"6 classes do not make .* they make 2, 3, 6"):
    class_groups(CLASSES, count, 0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  root = tmp_path_factory.mktemp("parts")
  fabricate.MAKERS["ave"](root / "AVE")
  return AVE(root)


def test_parts_share_the_rows_of_the_whole(whole):
  group = tuple(dict.fromkeys(whole.class_of(record) for split in whole.splits() for record in whole.records(split)))
  parts = [ClassPart(whole, (name,)) for name in group]
  for split in whole.splits():
    rows = [record for part in parts if split in part.splits() for record in part.records(split)]
    assert sorted(r.id for r in rows) == sorted(r.id for r in whole.records(split))
  for part, name in zip(parts, group, strict=True):
    assert part.classes == (name,) and all(part.records(split) for split in part.splits())
    assert {whole.class_of(r) for split in part.splits() for r in part.records(split)} == {name}


def test_an_example_has_the_place_of_its_class_in_the_group(whole):
  name = whole.class_of(whole.records("train")[0])
  others = tuple(other for other in whole.classes if other != name)[:2]
  part = ClassPart(whole, (*others, name))
  media = Media(image_size=8, sample_rate_hz=4000)
  index = next(i for i, record in enumerate(part.records("train")) if whole.class_of(record) == name)
  example = part.examples("train", media)[index]
  assert example["label"].dtype == np.int32 and example["label"].shape == () and example["label"] == 2
  plain = next(whole.decode(r, media) for r in whole.records("train") if r.id == example["id"])
  assert all(np.array_equal(example[key], plain[key]) for key in ("visual", "audio")) and example["mask"] == 1
  assert part.zeros(part.records("train")[index], media)["mask"] == 0
  assert part.coverage("train")["missing"] == [], "media are those of the whole"
