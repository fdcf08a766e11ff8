"""Views of a source: grouped questions, labelled seconds, picked rows; and what a source knows of bad clips."""

import collections
import dataclasses
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import DataError, Media, MediaError, loader
from data_pipelines.base import ClipCache, Dataset
from data_pipelines.schema import Record
from data_pipelines.views import GroupedQuestions, LabelledSeconds, Picked

MEDIA = Media(image_size=2, sample_rate_hz=3)
SECONDS = 4


@dataclasses.dataclass(frozen=True)
class Row(Record):
  """Row `number` of the file; `masks` of its seconds are labelled."""

  number: int
  masks: int = 1


class MadeUp(Dataset):
  """Every number of a clip is that of its name, and in second t of the labels and media t more."""

  name = "made_up"
  seconds = SECONDS

  def __init__(self, clips: list[int], *, bad: tuple[int, ...] = (), masks: list[int] | None = None) -> None:
    self.root, self.bad = pathlib.Path("nowhere"), {str(clip) for clip in bad}
    masks = masks or [1] * len(clips)
    self.rows = [Row(f"{clip}/{i}", str(clip), i, k) for i, (clip, k) in enumerate(zip(clips, masks, strict=True))]
    self.decoded: collections.Counter[str] = collections.Counter()

  def records(self, split: str) -> list[Row]:
    return self.rows

  def decode_clip(self, record: Row, media: Media) -> dict:
    self.decoded[record.clip] += 1
    if record.clip in self.bad:
      raise MediaError(f"{record.clip}.mp4", "is cut off", "fetch it again")
    t = 10 * int(record.clip) + np.arange(SECONDS)
    frames = np.broadcast_to(t[:, None, None, None], (SECONDS, 2, 2, 3)).astype(np.uint8)
    return {"visual": frames, "audio": np.broadcast_to(t[:, None], (SECONDS, 3)).astype(np.int16)}

  def source(self, **options: object):
    return self.examples("train", MEDIA, cache=ClipCache(), **options)


class Questions(MadeUp):
  """Questions, answers and types hold 1 + the row's number."""

  def labels(self, record: Row) -> dict:
    number = record.number + 1
    return {"question": np.full(14, number, np.int32), "label": np.int32(number), "type": np.int32(number)}


class Masks(MadeUp):
  """Masks show the second that their frame shows."""

  def labels(self, record: Row) -> dict:
    t = (10 * int(record.clip) + np.arange(SECONDS))[:, None, None]
    labelled = (np.arange(SECONDS) < record.masks).astype(np.float32)
    return {"label": np.broadcast_to(t, (SECONDS, 2, 2)).astype(np.uint8), "label_mask": labelled, "class": np.int32(7)}


clip_lists = st.lists(st.integers(0, 5), min_size=1, max_size=20)  # the clip of each row; clips may lie scattered
sizes = st.integers(1, 6)


def asked(example: dict) -> list[int]:
  """The row numbers of an example's real questions."""
  return [int(label) - 1 for label, real in zip(example["label"], example["question_mask"], strict=True) if real]


# -- grouped questions -------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(clip_lists, sizes)
def test_every_question_appears_once_with_its_clip_and_in_the_order_of_the_file(clips, size):
  data = Questions(clips)
  view = GroupedQuestions(data.source(), size)
  groups = [view[i] for i in range(len(view))]
  assert sorted(row for group in groups for row in asked(group)) == list(range(len(clips)))
  for clip in set(clips):
    there = [i for i, c in enumerate(clips) if c == clip]
    assert [row for group in groups for row in asked(group) if clips[row] == clip] == there
    assert sum(clip == clips[asked(group)[0]] for group in groups) == -(-len(there) // size), "no group is wasted"
  firsts = [clips[asked(group)[0]] for group in groups]
  assert list(dict.fromkeys(firsts)) == list(dict.fromkeys(clips)), "clips keep their order too"
  for group in groups:
    assert {clips[row] for row in asked(group)} == {int(group["visual"].flat[0]) // 10}
    assert group["id"] == data.rows[asked(group)[0]].id and group["mask"] == 1


@settings(deadline=None)
@given(clip_lists, sizes)
def test_questions_of_a_group_are_padded_behind_a_mask(clips, size):
  view = GroupedQuestions(Questions(clips).source(), size)
  for i in range(len(view)):
    group = view[i]
    assert {k: (group[k].dtype, group[k].shape) for k in ("question", "label", "type", "question_mask")} == {
      "question": (np.int32, (size, 14)), "label": (np.int32, (size,)), "type": (np.int32, (size,)),
      "question_mask": (np.float32, (size,)),
    }  # fmt: skip
    count = len(asked(group))
    assert count >= 1 and group["question_mask"].tolist() == [1] * count + [0] * (size - count)
    np.testing.assert_array_equal(group["label"], group["type"])
    np.testing.assert_array_equal(group["question"], np.repeat(group["label"][:, None], 14, 1))
    assert (group["label"][count:] == group["label"][0]).all(), "padding is a real question, so that nothing is out of range"


@settings(deadline=None, max_examples=25)
@given(clip_lists, sizes, st.integers(1, 5), st.booleans())
def test_batches_of_groups_ask_every_question_once(clips, size, batch_size, shuffle):
  view = GroupedQuestions(Questions(clips).source(), size)
  found = []
  for batch in loader.batches(view, batch_size=batch_size, seed=3, shuffle=shuffle, num_threads=0):
    real = batch["mask"][:, None] * batch["question_mask"] > 0
    found += (batch["label"][real] - 1).tolist()
  assert sorted(found) == list(range(len(clips)))


@settings(deadline=None)
@given(clip_lists, sizes, st.sets(st.integers(0, 5), max_size=3))
def test_a_bad_clip_takes_all_its_questions_along_and_no_others(clips, size, bad):
  data = Questions(clips, bad=tuple(bad))
  view = GroupedQuestions(data.source(on_bad_clip="skip"), size)
  groups = [view[i] for i in range(len(view))]
  assert sorted(row for g in groups if g["mask"] for row in asked(g)) == [i for i, c in enumerate(clips) if c not in bad]
  assert not any(g[k].any() for g in groups if not g["mask"] for k in ("visual", "audio", "question", "label", "type"))
  assert [name for name, _ in view.bad] == [row.id for row in data.rows if int(row.clip) in bad]
  assert all(data.decoded[str(clip)] == 1 for clip in set(clips)), "asked once for all questions about it"


def test_one_question_per_example_keeps_the_rows_of_a_sorted_file():
  view = GroupedQuestions(Questions([0, 0, 1, 2, 2]).source(), 1)
  assert [asked(view[i]) for i in range(len(view))] == [[0], [1], [2], [3], [4]]


def test_groups_of_nothing_are_refused():
  with pytest.raises(DataError, match="questions_per_clip must be at least 1, got 0"):
    GroupedQuestions(Questions([0]).source(), 0)


# -- labelled seconds --------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(1, SECONDS), min_size=1, max_size=8))
def test_labelled_seconds_keep_frames_sound_and_masks_aligned(masks):
  source = Masks(list(range(len(masks))), masks=masks).source()
  view, kept = LabelledSeconds(source), max(masks)
  assert len(view) == len(source)
  for i, labelled in enumerate(masks):
    whole, cut = source[i], view[i]
    assert cut.keys() == whole.keys() and (cut["id"], cut["mask"], cut["class"]) == (whole["id"], 1, 7)
    for key in ("visual", "audio", "label", "label_mask"):
      np.testing.assert_array_equal(cut[key], whole[key][:kept])
    shown = [int(second.flat[0]) for second in cut["visual"]]
    assert shown == [10 * i + t for t in range(kept)]
    assert shown == [int(second[0]) for second in cut["audio"]] == [int(second.flat[0]) for second in cut["label"]]
    assert cut["label_mask"].sum() == labelled == whole["label_mask"].sum(), "no label is lost"


def test_labelled_seconds_of_a_bad_clip_have_the_shape_of_the_others():
  view = LabelledSeconds(Masks([0, 1], bad=(0,), masks=[2, 1]).source(on_bad_clip="skip"))
  left_out, whole = view[0], view[1]
  assert left_out["mask"] == 0 and left_out["id"] == "0/0" and [name for name, _ in view.bad] == ["0/0"]
  for key in whole.keys() - {"id"}:
    assert left_out[key].shape == whole[key].shape and not left_out[key].any()


# -- picked rows, and what a source knows ------------------------------------------------------------------------


@settings(deadline=None)
@given(clip_lists, st.data())
def test_picked_rows_and_arrays(clips, data):
  source = Questions(clips).source()
  indices = data.draw(st.none() | st.lists(st.integers(0, len(clips) - 1), max_size=8))
  view = Picked(source, ("label",), indices)
  assert len(view) == len(clips if indices is None else indices)
  assert [int(view[i]["label"]) - 1 for i in range(len(view))] == (list(range(len(clips))) if indices is None else indices)
  assert all(set(view[i]) == {"id", "mask", "label"} for i in range(len(view)))


def test_a_view_names_the_source_it_is_made_of():
  source = Questions([0, 1]).source()
  assert source.rows is source is GroupedQuestions(source, 2).rows is LabelledSeconds(source).rows


@settings(deadline=None)
@given(clip_lists, st.sets(st.integers(0, 5), max_size=3), st.data())
def test_a_source_knows_the_clips_that_were_asked_for(clips, bad, data):
  source = Questions(clips, bad=tuple(bad)).source(on_bad_clip="skip")
  read = data.draw(st.lists(st.integers(0, len(clips) - 1), max_size=8))
  for index in read:
    assert source[index]["mask"] == (clips[index] not in bad)
  seen = {clips[i] for i in read}
  assert [clips[i] for i in source.unopened()] == [c for c in dict.fromkeys(clips) if c not in seen]
  for row in source.records:
    assert bool(source.reason(row)) == (int(row.clip) in seen & bad)
  assert [name for name, _ in source.bad] == [source.ids[i] for i in sorted(set(read)) if clips[i] in bad]
  for index in source.unopened():
    source[index]
  assert source.unopened() == [] and {int(r.clip) for r in source.records if source.reason(r)} == bad & set(clips)


def test_a_clip_that_breaks_later_is_left_out_from_then_on():
  data = Questions([0, 0, 1])
  source = data.examples("train", MEDIA, on_bad_clip="skip", cache=ClipCache(0))  # nothing is kept
  assert source[0]["mask"] == 1
  data.bad.add("0")
  assert [source[i]["mask"] for i in (1, 0, 2)] == [0, 0, 1] and data.decoded["0"] == 2
  data.bad.clear()
  assert source[0]["mask"] == 0, "a row is not in and out by turns"
