"""MUSIC-AVQA layout: clips with several objects, each sounding in one run, and balanced questions about them.

MUSIC-AVQA/json/avqa-{train,val,test,unseen}.json (the benchmark's fields), video/<id>.mp4, vocabulary.json.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.schema import SPLITS
from data_pipelines.toybox.clips import (
  CLIP_SECONDS,
  Clip,
  add_object,
  clip_rng,
  finish,
  interval,
  other_classes,
  write_lines,
  write_mp4,
)
from data_pipelines.toybox.library import Library
from data_pipelines.toybox.questions import TEMPLATES, facts, vocabulary
from data_pipelines.toybox.scene import Difficulty, Scene, Voice, sample_voice

FOLDER = "MUSIC-AVQA"
SETTINGS = Difficulty(lanes=True, scale=(0.3, 0.5), voiced=0.75)
NUM_OBJECTS = (0.2, 0.4, 0.4)
TWINS = 0.3
# Gains of the voices, a factor of 1.8 apart, dealt out at random: which of two is louder can be heard.
GAINS = (1.4, 0.78, 0.43, 0.24)
TOGETHER = 0.2
WHOLE_CLIP = 0.4
# Questions per clip; all of different types.
QUESTIONS = {"train": 4, "val": 5, "test": 5, "unseen": 5}
# The first clips of a split can be asked every type of question, so that the smallest split has all nine.
RICH_CLIPS = 2


@dataclasses.dataclass(frozen=True)
class Question:
  """One question about clip number `clip`: type, template, values of its slots, answer."""

  clip: int
  type: tuple[str, str]
  template: str
  values: tuple[str, ...]
  answer: str


def plan(seed: int, library: Library, split: str, index: int) -> Clip:
  """One to three objects in lanes (sometimes two of a kind), most sounding, and sometimes a voice outside."""
  rng = clip_rng(seed, FOLDER, split, index)
  rich = index < RICH_CLIPS
  class_id = library.classes[index % len(library.classes)]
  count = 3 if rich else 1 + int(rng.choice(3, p=NUM_OBJECTS))
  names = [class_id, *other_classes(rng, library, count - 1, class_id)]
  if count > 1 and rng.random() < TWINS and not rich:
    names[-1] = names[0]
  voiced = [rich or rng.random() < SETTINGS.voiced for _ in names]
  outside = rng.random() < SETTINGS.off_screen and not rich
  timelines = _timelines(rng, sum(voiced) + outside, rich)
  always = (True,) * CLIP_SECONDS
  left = iter(timelines)
  tracks = [
    add_object(rng, library, name, SETTINGS, always, next(left) if sounds else None)
    for name, sounds in zip(names, voiced, strict=True)
  ]
  off_screen = []
  if outside:
    (hidden,) = other_classes(rng, library, 1, *names)
    off_screen = [sample_voice(rng, library, hidden, SETTINGS.gain, next(left))]
  scene = _with_gains(rng, finish(rng, library, SETTINGS, tracks, off_screen, CLIP_SECONDS))
  number = 100000 * (1 + SPLITS.index(split)) + index
  return Clip(split, index, f"{number:08d}", class_id, scene)


def _timelines(rng: np.random.Generator, count: int, rich: bool) -> list[tuple[bool, ...]]:
  """One run per voice: all starting together, or each at its own second and the first perhaps to the end."""
  together = rng.random() < TOGETHER and not rich
  starts = np.full(count, rng.integers(6)) if together else rng.permutation(8)[:count]
  ends = [int(rng.integers(start + 2, CLIP_SECONDS + 1)) for start in starts]
  if count and rng.random() < WHOLE_CLIP:
    early = int(np.argmin(starts))
    starts[early], ends[early] = 0, CLIP_SECONDS
  return [interval(int(start), end, CLIP_SECONDS) for start, end in zip(starts, ends, strict=True)]


def _with_gains(rng: np.random.Generator, scene: Scene) -> Scene:
  """Deals the gains out to the voices."""
  order = iter(rng.permutation(len(scene.voices)))

  def regain(voice: Voice) -> Voice:
    return dataclasses.replace(voice, gain=GAINS[int(next(order))])

  objects = tuple(
    track if track.voice is None else dataclasses.replace(track, voice=regain(track.voice)) for track in scene.objects
  )
  return dataclasses.replace(scene, objects=objects, off_screen=tuple(regain(voice) for voice in scene.off_screen))


def candidates(clips: Sequence[Clip], library: Library) -> list[Question]:
  """Every question that can be asked about the clips."""
  found = []
  for number, clip in enumerate(clips):
    known = facts(clip.scene, library)
    for kind, templates in TEMPLATES.items():
      for template, ask in templates.items():
        found += [Question(number, kind, template, values, answer) for values, answer in ask(known)]
  return found


def choose(clips: Sequence[Clip], library: Library, rng: np.random.Generator, per_clip: int) -> list[Question]:
  """Takes `per_clip` questions of different types per clip; types, templates, answers as even as can be.

  Greedy: the type used least, in it the template used least, in it the answer the type has least of.
  """
  pools: dict[tuple[str, str], dict[str, dict[str, list[Question]]]] = {kind: {} for kind in TEMPLATES}
  every = candidates(clips, library)
  for i in rng.permutation(len(every)):
    q = every[i]
    pools[q.type].setdefault(q.template, {}).setdefault(q.answer, []).append(q)
  room = Counter({number: per_clip for number in range(len(clips))})
  asked: set[tuple[int, tuple[str, str]]] = set()
  used: Counter = Counter()
  chosen: list[Question] = []
  while True:
    for kind in list(pools):
      _prune(pools[kind], room, asked)
    open_kinds = [kind for kind in pools if pools[kind]]
    if not open_kinds:
      return sorted(chosen, key=lambda q: q.clip)
    # Scarce types first, so that the last free places are not taken by types that could go anywhere.
    kind = min(open_kinds, key=lambda k: (used[k], sum(len(a) for t in pools[k].values() for a in t.values())))
    template = min(pools[kind], key=lambda name: (used[kind, name], name))
    answer = min(pools[kind][template], key=lambda name: (used[kind, "=", name], used[kind, template, name], name))
    q = pools[kind][template][answer].pop()
    used.update([kind, (kind, template), (kind, "=", answer), (kind, template, answer)])
    room[q.clip] -= 1
    asked.add((q.clip, kind))
    chosen.append(q)


def _prune(
  pool: dict[str, dict[str, list[Question]]], room: Mapping[int, int], asked: set[tuple[int, tuple[str, str]]]
) -> None:
  """Drops the questions at the ends of the lists whose clip is full or has one of their type (for good)."""
  for template in list(pool):
    for answer in list(pool[template]):
      stack = pool[template][answer]
      while stack and (room[stack[-1].clip] == 0 or (stack[-1].clip, stack[-1].type) in asked):
        stack.pop()
      if not stack:
        del pool[template][answer]
    if not pool[template]:
      del pool[template]


def write_media(root: Path, clip: Clip, library: Library) -> None:
  """MUSIC-AVQA/video/<id>.mp4."""
  folder = root / FOLDER / "video"
  folder.mkdir(parents=True, exist_ok=True)
  write_mp4(folder / f"{clip.id}.mp4", clip.scene, library)


def entries(clips: Mapping[str, Sequence[Clip]], library: Library, seed: int) -> dict[str, list[dict]]:
  """Split -> json objects with the benchmark's field names (`anser` is how it spells it)."""
  found: dict[str, list[dict]] = {}
  number = 0
  for split, members in clips.items():
    rng = clip_rng(seed, f"{FOLDER}/questions", split, 0)
    found[split] = []
    for q in choose(members, library, rng, QUESTIONS[split]):
      found[split].append(
        {
          "video_id": members[q.clip].id,
          "question_id": number,
          "type": json.dumps(list(q.type)),
          "question_content": q.template,
          "templ_values": json.dumps(list(q.values)),
          "question_deleted": 0,
          "anser": q.answer,
        }
      )
      number += 1
  return found


def write_annotations(root: Path, clips: Mapping[str, Sequence[Clip]], library: Library, seed: int) -> None:
  """The json files and vocabulary.json."""
  folder = root / FOLDER
  for split, rows in entries(clips, library, seed).items():
    write_lines(folder / "json" / f"avqa-{split}.json", [json.dumps(rows, indent=1)])
  write_lines(folder / "vocabulary.json", [json.dumps(vocabulary(library), indent=1)])
