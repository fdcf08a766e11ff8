"""The toybox's layouts: every annotation is the truth of its scene, and nothing is too easy."""

import csv
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import AVSBenchMS3
from data_pipelines.schema import QUESTION_TYPES
from data_pipelines.toybox import questions, write_ave, write_avqa, write_llp
from data_pipelines.toybox.clips import least_shown
from data_pipelines.toybox.compose import DEFAULT_SIZES, TINY_SIZES, compose, plan_all
from data_pipelines.toybox.library import load_library
from data_pipelines.toybox.render import render_frame, sounding_mask
from data_pipelines.toybox.scene import Scene

SEED = 3


@pytest.fixture(scope="module")
def library():
  return load_library()


@pytest.fixture(scope="module")
def unseen_library():
  return load_library(("test",))


@pytest.fixture(scope="module")
def plans():
  return plan_all(SEED, TINY_SIZES)


@pytest.fixture(scope="module")
def many_plans():
  return plan_all(SEED, DEFAULT_SIZES)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
  return compose(tmp_path_factory.mktemp("data") / "toybox", seed=SEED, sizes=TINY_SIZES, workers=1, progress=lambda *_: None)


def library_of(split: str, library, unseen_library):
  return unseen_library if split == "unseen" else library


def test_ave_rows_are_the_truth(root, plans, library):
  folder = root / "AVE"
  assert (folder / "categories.txt").read_text().splitlines() == [library.label[c] for c in library.classes]
  header, *rows = (folder / "Annotations.txt").read_text().splitlines()
  assert header == "Category&VideoID&Quality&StartTime&EndTime"
  sets = {split: (folder / f"{split}Set.txt").read_text().splitlines() for split in plans["AVE"]}
  assert rows == [line for lines in sets.values() for line in lines]
  for split, clips in plans["AVE"].items():
    for line, clip in zip(sets[split], clips, strict=True):
      category, video, quality, start, end = line.split("&")
      assert (category, video, quality) == (library.label[clip.class_id], clip.id, "good") and len(video) == 11
      assert (folder / f"{video}.mp4").is_file()
      for t in range(10):
        voices = [track for track in clip.scene.objects if track.visible[t] and track.sounding[t]]
        assert [track.class_id for track in voices] == ([clip.class_id] if int(start) <= t < int(end) else [])
        assert all(voice.class_id != clip.class_id for voice in clip.scene.off_screen)


def test_ave_background_share(many_plans, library):
  for clips in many_plans["AVE"].values():
    spans = [[int(x) for x in write_ave.row(clip, library).split("&")[3:]] for clip in clips]
    assert 0.2 < 1 - np.mean([end - start for start, end in spans]) / 10 < 0.4


def test_llp_rows_are_the_truth(root, plans, library):
  folder = root / "LLP"
  names = (folder / "categories.txt").read_text().splitlines()
  grids = {}
  for kind in ("audio", "visual"):
    with open(folder / f"AVVP_eval_{kind}.csv", newline="") as file:
      for row in csv.DictReader(file, delimiter="\t"):
        grid = grids.setdefault((kind, row["filename"]), np.zeros((len(names), 10), bool))
        grid[names.index(row["event_labels"]), int(row["onset"]) : int(row["offset"])] = True
  for split, clips in plans["LLP"].items():
    table = "AVVP_train.csv" if split == "train" else f"AVVP_{split}_pd.csv"
    with open(folder / table, newline="") as file:
      weak = {row["filename"]: row["event_labels"].split(",") for row in csv.DictReader(file, delimiter="\t")}
    assert list(weak) == [f"{clip.id}_0_10" for clip in clips]
    for clip in clips:
      assert (folder / "video" / f"{clip.id}.mp4").is_file()
      scene, number = clip.scene, {c: i for i, c in enumerate(library.classes)}
      truth = {kind: np.zeros((len(names), 10), bool) for kind in ("audio", "visual")}
      for voice in scene.voices:
        truth["audio"][number[voice.class_id]] |= np.array(voice.sounding)
      for track in scene.objects:
        truth["visual"][number[track.class_id]] |= np.array(track.visible)
      present = (truth["audio"] | truth["visual"]).any(1)
      assert weak[f"{clip.id}_0_10"] == [name for name, there in zip(names, present, strict=True) if there]
      for kind in truth:
        found = grids.pop((kind, f"{clip.id}_0_10"), None)
        assert found is None if split == "train" else np.array_equal(found, truth[kind])
  assert not grids


def test_llp_sight_and_sound_differ(many_plans, library):
  clips = many_plans["LLP"]["test"]
  rows = [write_llp.dense(clip, library) for clip in clips]
  assert all(row["audio"] and row["visual"] for row in rows)
  assert np.mean([row["audio"] != row["visual"] for row in rows]) > 0.9
  whole = [(start, end) == (0, 10) for row in rows for start, end, _ in row["visual"]]
  assert 0.2 < np.mean(whole) < 0.6


def test_avs_tree_and_masks(root, plans, library, unseen_library):
  folder = root / "AVSBench" / "Single-source"
  with open(folder / "s4_meta_data.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  clips = [clip for members in plans["AVSBench"].values() for clip in members]
  assert [(r["name"], r["split"], r["start_time"]) for r in rows] == [(c.id, c.split, "0") for c in clips]
  for row, clip in zip(rows, clips, strict=True):
    of = library_of(clip.split, library, unseen_library)
    place = Path(clip.split, row["category"])
    masks = folder / "s4_data" / "gt_masks" / place / clip.id
    seconds = 1 if clip.split == "train" else 5
    assert sorted(p.name for p in masks.iterdir()) == [f"{clip.id}_{k + 1}.png" for k in range(seconds)]
    assert (folder / "s4_data" / "audio_wav" / place / f"{clip.id}.wav").is_file()
    for k in range(5):
      rgb, alphas = render_frame(clip.scene, of, k + 0.5, 224)
      frame = Image.open(folder / "s4_data" / "visual_frames" / place / clip.id / f"{clip.id}_{k + 1}.png")
      assert frame.mode == "RGB" and np.array_equal(np.asarray(frame), rgb)
      if k < seconds:
        mask = Image.open(masks / f"{clip.id}_{k + 1}.png")
        expected = np.zeros((224, 224), bool)
        for track, alpha in zip(clip.scene.objects, alphas, strict=True):
          expected |= (alpha >= 128) & track.sounding[k]
        assert mask.mode == "1" and np.array_equal(np.asarray(mask), expected)
        assert np.array_equal(expected, sounding_mask(clip.scene, alphas, k))


def test_ms3_tree_and_masks(root, plans, library, unseen_library):
  folder = root / "AVSBench" / "Multi-sources"
  clips = [clip for members in plans["AVSBench-MS3"].values() for clip in members]
  lines = (folder / "ms3_meta_data.csv").read_text().splitlines()
  assert lines == ["video_id,split", *(f"{clip.id},{clip.split}" for clip in clips)]
  empty = []
  for clip in clips:
    of, data = library_of(clip.split, library, unseen_library), folder / "ms3_data"
    assert (data / "audio_wav" / clip.split / f"{clip.id}.wav").is_file()
    for k in range(5):
      rgb, alphas = render_frame(clip.scene, of, k + 0.5, 224)
      frame = Image.open(data / "visual_frames" / clip.id / f"{clip.id}.mp4_{k + 1}.png")
      assert frame.mode == "RGB" and np.array_equal(np.asarray(frame), rgb)
      mask = Image.open(data / "gt_masks" / clip.split / clip.id / f"{clip.id}_{k + 1}.png")
      heard = [alpha >= 128 for track, alpha in zip(clip.scene.objects, alphas, strict=True) if track.sounding[k]]
      assert mask.mode == "P" and np.array_equal(np.asarray(mask), 255 * np.any([*heard, 0 * rgb[..., 0]], axis=0))
      empty.append(not heard)
  assert any(empty) and not all(empty)
  read = AVSBenchMS3(root)
  assert [(record.clip, record.split) for split in read.splits() for record in read.records(split)] == [
    (clip.id, clip.split) for clip in clips
  ]


def test_ms3_has_up_to_two_sounds_and_none_from_outside(many_plans):
  clips = [clip for members in many_plans["AVSBench-MS3"].values() for clip in members]
  voices = [[track.sounding for track in clip.scene.objects if any(track.sounding)] for clip in clips]
  assert all(len(clip.scene.voices) == len(found) for clip, found in zip(clips, voices, strict=True))
  assert {len(found) for found in voices} == {1, 2} and 0.4 < np.mean([len(found) == 2 for found in voices]) < 0.8
  sounding = np.array([np.sum(found, axis=0) for found in voices])  # [clips, 5]
  assert [0.05 < (sounding == count).mean() < 0.65 for count in (0, 1, 2)] == [True] * 3


def test_avs_needs_listening(many_plans):
  for clips in many_plans["AVSBench"].values():
    assert all(len(clip.scene.voices) == 1 and clip.scene.voices[0].sounding[0] for clip in clips)
    assert all(clip.scene.voices[0].class_id == clip.class_id for clip in clips)
    assert np.mean([len(clip.scene.objects) > 1 for clip in clips]) > 0.65
    assert np.mean([not s for clip in clips for s in clip.scene.voices[0].sounding]) < 0.06


def test_no_visible_object_is_hidden(many_plans, library, unseen_library):
  for splits in many_plans.values():
    for split in ("test", "unseen"):
      of = library_of(split, library, unseen_library)
      shares = [least_shown(clip.scene, of) for clip in splits[split][:30]]
      assert min(shares) >= 0.35 and max(shares) == 1


def test_avqa_json(root, plans):
  folder = root / "MUSIC-AVQA"
  vocabulary = json.loads((folder / "vocabulary.json").read_text())
  words, answers = vocabulary["words"], vocabulary["answers"]
  assert words[0] == "<pad>" and len(set(words)) == len(words) and len(set(answers)) == len(answers)
  numbers = []
  for split, clips in plans["MUSIC-AVQA"].items():
    rows = json.loads((folder / "json" / f"avqa-{split}.json").read_text())
    numbers += [row["question_id"] for row in rows]
    assert {tuple(json.loads(row["type"])) for row in rows} == set(QUESTION_TYPES)
    assert {row["video_id"] for row in rows} == {clip.id for clip in clips}
    for row in rows:
      assert list(row) == [
        "video_id",
        "question_id",
        "type",
        "question_content",
        "templ_values",
        "question_deleted",
        "anser",
      ]
      values = json.loads(row["templ_values"])
      assert row["question_content"].count("<") == len(values)
      tokens = questions.tokens(row["question_content"], tuple(values))
      assert len(tokens) <= 14 and set(tokens) <= set(words) and row["anser"] in answers
      assert (folder / "video" / f"{row['video_id']}.mp4").is_file()
  assert len(set(numbers)) == len(numbers)


def answer_again(scene: Scene, library, template: str, values: list[str]) -> str:
  """Answers some templates by other means than `questions.py`: plain loops over the scene."""
  name = {c: library.label[c].replace(" ", "_") for c in library.classes}
  tracks = sorted(scene.objects, key=lambda track: track.centre(0.5)[0])
  seen = [name[track.class_id] for track in tracks]
  heard = [name[voice.class_id] for voice in scene.voices]
  count = ["zero", "one", "two", "three", "four"]
  sides = {1: ["middle"], 2: ["left", "right"], 3: ["left", "middle", "right"]}[len(tracks)]
  gain = {side: track.voice.gain for side, track in zip(sides, tracks, strict=True) if track.voice}
  starts = {i: min(t for t in range(10) if track.sounding[t]) for i, track in enumerate(tracks) if any(track.sounding)}
  answers = {
    "How many musical instruments were heard throughout the video?": lambda: count[len(heard)],
    "Is there a <Object> sound?": lambda: "yes" if values[0] in heard else "no",
    "Are there <Object> and <Object> sound? ": lambda: "yes" if set(values) <= set(heard) else "no",
    "How many <Object> are in the entire video?": lambda: count[seen.count(values[0])],
    "How many types of musical instruments appeared in the entire video?": lambda: count[len(set(seen))],
    "What is the instrument on the <LR> of <Object>?": lambda: seen[
      seen.index(values[1]) + {"left": -1, "right": 1}[values[0]]
    ],
    "What kind of musical instrument is it?": lambda: seen[0],
    "Is there a voiceover?": lambda: "yes" if scene.off_screen else "no",
    "How many instruments are sounding in the video?": lambda: count[len(starts)],
    "Where is the <LL> instrument?": lambda: max(gain, key=gain.get),
    "Is the instrument on the <LR> louder than the instrument on the <LR>?": lambda: (
      "yes" if gain[values[0]] > gain[values[1]] else "no"
    ),
    "What is the <TH> instrument that comes in?": lambda: (
      "simultaneously"
      if len(set(starts.values())) == 1
      else seen[sorted(starts, key=starts.get)[questions.ORDINALS.index(values[0])]]
    ),
    "Where is the <FL> sounding instrument?": lambda: (
      "simultaneously"
      if len(set(starts.values())) == 1
      else sides[sorted(starts, key=starts.get)[{"first": 0, "last": -1}[values[0]]]]
    ),
  }
  return answers[template]() if template in answers else ""


def test_avqa_answers_are_the_truth(many_plans, library):
  checked = Counter()
  for split, rows in write_avqa.entries(many_plans["MUSIC-AVQA"], library, SEED).items():
    scenes = {clip.id: clip.scene for clip in many_plans["MUSIC-AVQA"][split]}
    for row in rows:
      again = answer_again(scenes[row["video_id"]], library, row["question_content"], json.loads(row["templ_values"]))
      assert again in ("", row["anser"]), row
      checked[row["question_content"]] += bool(again)
  assert sum(count > 0 for count in checked.values()) == 13
  assert len(checked) == sum(len(templates) for templates in questions.TEMPLATES.values()) == 32


def test_avqa_objects_stay_in_their_order(many_plans):
  for clips in many_plans["MUSIC-AVQA"].values():
    for clip in clips:
      tracks = sorted(clip.scene.objects, key=lambda track: track.x0)
      for progress in np.linspace(0, 1, 11):
        across = [track.centre(progress)[0] for track in tracks]
        assert np.all(np.diff(across) > 0.15)


def test_avqa_answers_are_balanced(many_plans, library):
  entries = write_avqa.entries(many_plans["MUSIC-AVQA"], library, SEED)
  assert all(Counter(r["video_id"] for r in entries["train"])[clip.id] == 4 for clip in many_plans["MUSIC-AVQA"]["train"])
  for rows in entries.values():
    trivial = 0
    for kind in QUESTION_TYPES:
      answers = Counter(row["anser"] for row in rows if tuple(json.loads(row["type"])) == kind)
      trivial += max(answers.values())
      assert max(answers.values()) / sum(answers.values()) < 0.65, kind
      assert sum(answers.values()) > 0.05 * len(rows)
    assert trivial / len(rows) < 0.4


@pytest.mark.parametrize("seed", range(5))
def test_tiny_splits_have_all_nine_types(seed, library):
  clips = {"MUSIC-AVQA": TINY_SIZES["MUSIC-AVQA"]}
  for rows in write_avqa.entries(plan_all(seed, clips)["MUSIC-AVQA"], library, seed).values():
    assert {tuple(json.loads(row["type"])) for row in rows} == set(QUESTION_TYPES)


def test_the_questions_are_the_benchmarks_own():
  beside = Path(__file__).resolve().parents[2] / "shared" / "annotations"
  folder = Path(os.environ.get("PHPJAX_ANNOTATIONS", beside)) / "music_avqa"
  if not folder.is_dir():
    pytest.skip("the real MUSIC-AVQA annotations are not beside the repository")
  real = {
    (tuple(json.loads(row["type"])), row["question_content"]) for row in json.loads((folder / "avqa-test.json").read_text())
  }
  ours = {(kind, template) for kind, templates in questions.TEMPLATES.items() for template in templates}
  assert real - ours == {(("Visual", "Location"), "Where is the performance?")} and ours <= real
