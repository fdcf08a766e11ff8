"""The question templates of MUSIC-AVQA, answered from the scene.

The wording is the benchmark's own (Li et al., CVPR 2022; its `instrument` is any object here). Two things are
left out because no scene could answer them: "Where is the performance?" and the slot value "lowest" (pitch).
What the words mean here, so that every answer is exact:
  left, middle, right: order of the paths, which stay in separate lanes; with two objects there is no middle.
  louder: at least LOUDER times the gain; more rhythmic: more strokes per second; longer: LONGER more seconds.
  first, second, ..., last: order of onsets among the objects; clips with a sound from outside are not asked.
  did not sound from beginning to end: made no sound at all.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from data_pipelines.schema import QUESTION_TYPES
from data_pipelines.toybox.library import Library
from data_pipelines.toybox.scene import Scene, Track, Voice

LOUDER = 1.5
LONGER = 2
NUMBERS = ("zero", "one", "two", "three", "four")
PLACES = {1: ("middle",), 2: ("left", "right"), 3: ("left", "middle", "right")}
ORDINALS = ("first", "second", "third", "fourth", "fifth")
SLOT_VALUES = {
  "<LR>": ("left", "middle", "right"),
  "<LRer>": ("leftest", "rightest"),
  "<LL>": ("loudest",),
  "<FL>": ("first", "last"),
  "<TH>": ORDINALS,
  "<BA>": ("before", "after"),
}

# (slot values, answer) of every question a template can ask about a clip.
Asked = Iterator[tuple[tuple[str, ...], str]]


@dataclasses.dataclass(frozen=True)
class Facts:
  """A scene as the questions see it.

  Attributes:
    objects: the tracks from left to right.
    places: "left", "middle", "right" of each.
    names: word of each object ("piano_keyboard").
    voices: every voice, off-screen ones last, with its word.
    off_screen: number of voices without a visible object.
    words: the words of all classes.
  """

  objects: tuple[Track, ...]
  places: tuple[str, ...]
  names: tuple[str, ...]
  voices: tuple[tuple[str, Voice], ...]
  off_screen: int
  words: tuple[str, ...]

  @property
  def heard(self) -> dict[str, Voice]:
    """Word -> voice, of the classes with exactly one voice."""
    words = [word for word, _ in self.voices]
    return {word: voice for word, voice in self.voices if words.count(word) == 1}

  @property
  def sounding(self) -> list[int]:
    """Positions of the objects that sound at some time."""
    return [i for i, track in enumerate(self.objects) if track.voice is not None]

  def unique(self, i: int) -> bool:
    """Whether no other visible object is of the class of object i."""
    return self.names.count(self.names[i]) == 1

  def onset(self, i: int) -> int:
    """First second in which object i sounds."""
    return self.objects[i].sounding.index(True)

  def in_order(self) -> list[int]:
    """Sounding objects by onset, if nothing sounds from outside and no two start together; else none."""
    found = sorted(self.sounding, key=self.onset)
    starts = [self.onset(i) for i in found]
    return found if not self.off_screen and len(set(starts)) == len(starts) else []


def word(class_id: str, library: Library) -> str:
  """Class as one word of a question or answer, like the benchmark's `acoustic_guitar`."""
  return library.label[class_id].replace(" ", "_")


def facts(scene: Scene, library: Library) -> Facts:
  """Reads off a scene what the questions ask about."""
  objects = tuple(sorted(scene.objects, key=lambda track: track.x0))
  return Facts(
    objects,
    PLACES[len(objects)],
    tuple(word(track.class_id, library) for track in objects),
    tuple((word(voice.class_id, library), voice) for voice in scene.voices),
    len(scene.off_screen),
    tuple(word(class_id, library) for class_id in library.classes),
  )


def _yes(truth: bool) -> str:
  return "yes" if truth else "no"


def _one(present: Callable[[Facts], set[str]]) -> Callable[[Facts], Asked]:
  def ask(f: Facts) -> Asked:
    for name in f.words:
      yield (name,), _yes(name in present(f))

  return ask


def _two(present: Callable[[Facts], set[str]]) -> Callable[[Facts], Asked]:
  """Pairs of which at least one is there."""

  def ask(f: Facts) -> Asked:
    there = present(f)
    for first in f.words:
      for second in f.words:
        if first != second and (first in there or second in there):
          yield (first, second), _yes(first in there and second in there)

  return ask


def _heard_words(f: Facts) -> set[str]:
  return {name for name, _ in f.voices}


def _seen_words(f: Facts) -> set[str]:
  return set(f.names)


def _louder(a: Voice, b: Voice) -> bool | None:
  if a.gain >= LOUDER * b.gain:
    return True
  return False if b.gain >= LOUDER * a.gain else None


def _rhythmic(a: Voice, b: Voice) -> bool | None:
  return None if a.repeats == b.repeats else a.repeats > b.repeats


def _longer(a: Voice, b: Voice) -> bool | None:
  more = sum(a.sounding) - sum(b.sounding)
  return None if abs(more) < LONGER else more > 0


def _compare_heard(rule: Callable[[Voice, Voice], bool | None]) -> Callable[[Facts], Asked]:
  def ask(f: Facts) -> Asked:
    heard = f.heard
    for first in heard:
      for second in heard:
        truth = rule(heard[first], heard[second]) if first != second else None
        if truth is not None:
          yield (first, second), _yes(truth)

  return ask


def _compare_seen(rule: Callable[[Voice, Voice], bool | None], named: bool) -> Callable[[Facts], Asked]:
  def ask(f: Facts) -> Asked:
    for i in f.sounding:
      for j in f.sounding:
        truth = rule(f.objects[i].voice, f.objects[j].voice) if i != j else None
        if truth is not None:
          where = (f.names[i], f.places[i], f.names[j], f.places[j]) if named else (f.places[i], f.places[j])
          yield where, _yes(truth)

  return ask


def _count(number: Callable[[Facts], int]) -> Callable[[Facts], Asked]:
  def ask(f: Facts) -> Asked:
    yield (), NUMBERS[number(f)]

  return ask


def _count_each(number: Callable[[Facts, str], int]) -> Callable[[Facts], Asked]:
  def ask(f: Facts) -> Asked:
    for name in f.words:
      yield (name,), NUMBERS[number(f, name)]

  return ask


def _sounding_count(f: Facts, name: str) -> int:
  return sum(f.names[i] == name for i in f.sounding)


def _neighbour(f: Facts) -> Asked:
  for i, name in enumerate(f.names):
    if f.unique(i):
      if i > 0:
        yield ("left", name), f.names[i - 1]
      if i + 1 < len(f.names):
        yield ("right", name), f.names[i + 1]


def _only(f: Facts) -> Asked:
  if len(f.names) == 1:
    yield (), f.names[0]


def _outermost(f: Facts) -> Asked:
  if len(f.names) > 1:
    yield ("leftest",), f.names[0]
    yield ("rightest",), f.names[-1]


def _always(f: Facts) -> Asked:
  for i, name in enumerate(f.names):
    if f.unique(i):
      yield (name,), _yes(all(f.objects[i].sounding))


def _from_inside(f: Facts) -> Asked:
  if bool(f.off_screen) != bool(f.sounding):
    yield (), _yes(bool(f.sounding))


def _same_time(f: Facts) -> Asked:
  for i in f.sounding:
    together = [
      j
      for j in f.sounding
      if j != i and any(a and b for a, b in zip(f.objects[i].sounding, f.objects[j].sounding, strict=True))
    ]
    if f.unique(i) and len(together) == 1:
      yield (f.names[i],), f.names[together[0]]


def _loudest(f: Facts) -> Asked:
  gains = sorted(((f.objects[i].voice.gain, i) for i in f.sounding), reverse=True)
  if len(f.objects) > 1 and gains and (len(gains) == 1 or gains[0][0] >= LOUDER * gains[1][0]):
    yield ("loudest",), f.places[gains[0][1]]


def _ends(f: Facts) -> list[tuple[str, int]]:
  order = f.in_order()
  return [("first", order[0]), ("last", order[-1])] if len(order) > 1 else []


def _end_at(f: Facts) -> Asked:
  for end, i in _ends(f):
    for place in f.places:
      yield (end, place), _yes(f.places[i] == place)


def _beside_end(f: Facts) -> Asked:
  for end, i in _ends(f):
    if i > 0:
      yield ("left", end), f.names[i - 1]
    if i + 1 < len(f.names):
      yield ("right", end), f.names[i + 1]


def _together(f: Facts) -> bool:
  return not f.off_screen and len(f.sounding) > 1 and len({f.onset(i) for i in f.sounding}) == 1


def _comes_in(f: Facts) -> Asked:
  if _together(f):
    yield ("first",), "simultaneously"
  order = f.in_order()
  for ordinal, i in zip(ORDINALS, order if len(order) > 1 else [], strict=False):
    yield (ordinal,), f.names[i]


def _where_end(f: Facts) -> Asked:
  if _together(f):
    yield ("first",), "simultaneously"
  for end, i in _ends(f):
    yield (end,), f.places[i]


def _before_after(f: Facts) -> Asked:
  order = f.in_order()
  for earlier, later in itertools.pairwise(order):
    if f.unique(later):
      yield ("before", f.names[later]), f.names[earlier]
    if f.unique(earlier):
      yield ("after", f.names[earlier]), f.names[later]


def _which_of_kind(f: Facts) -> Asked:
  order = f.in_order()
  for name in sorted(set(f.names)):
    same = [i for i in order if f.names[i] == name]
    if len(same) > 1:
      yield (name, "first"), f.places[same[0]]
      yield (name, "last"), f.places[same[-1]]


TEMPLATES: dict[tuple[str, str], dict[str, Callable[[Facts], Asked]]] = {
  ("Audio", "Counting"): {
    "How many musical instruments were heard throughout the video?": _count(lambda f: len(f.voices)),
    "Is there a <Object> sound?": _one(_heard_words),
    "Are there <Object> and <Object> sound? ": _two(_heard_words),
  },
  ("Audio", "Comparative"): {
    "Is the <Object> louder than the <Object>?": _compare_heard(_louder),
    "Is the <Object> more rhythmic than the <Object>?": _compare_heard(_rhythmic),
    "Is the <Object> playing longer than the <Object>?": _compare_heard(_longer),
  },
  ("Visual", "Counting"): {
    "Is there a <Object> in the entire video?": _one(_seen_words),
    "Are there <Object> and <Object> instruments in the video?": _two(_seen_words),
    "How many <Object> are in the entire video?": _count_each(lambda f, name: f.names.count(name)),
    "How many types of musical instruments appeared in the entire video?": _count(lambda f: len(set(f.names))),
  },
  ("Visual", "Location"): {
    "What is the instrument on the <LR> of <Object>?": _neighbour,
    "What kind of musical instrument is it?": _only,
    "What kind of instrument is the <LRer> instrument? ": _outermost,
  },
  ("Audio-Visual", "Existential"): {
    "Is there a voiceover?": lambda f: iter([((), _yes(f.off_screen > 0))]),
    "Is the <Object> in the video always playing?": _always,
    "Is this sound from the instrument in the video?": _from_inside,
  },
  ("Audio-Visual", "Counting"): {
    "How many sounding <Object> in the video\uff1f": _count_each(_sounding_count),
    "How many instruments are sounding in the video?": _count(lambda f: len(f.sounding)),
    "How many instruments in the video did not sound from beginning to end?": _count(
      lambda f: len(f.objects) - len(f.sounding)
    ),
    "How many types of musical instruments sound in the video?": _count(lambda f: len({f.names[i] for i in f.sounding})),
  },
  ("Audio-Visual", "Location"): {
    "Which is the musical instrument that sounds at the same time as the <Object>?": _same_time,
    "Where is the <LL> instrument?": _loudest,
    "Is the <FL> sound coming from the <LR> instrument?": _end_at,
    "What is the <LR> instrument of the <FL> sounding instrument?": _beside_end,
  },
  ("Audio-Visual", "Comparative"): {
    "Is the instrument on the <LR> more rhythmic than the instrument on the <LR>?": _compare_seen(_rhythmic, False),
    "Is the instrument on the <LR> louder than the instrument on the <LR>?": _compare_seen(_louder, False),
    "Is the <Object> on the <LR> more rhythmic than the <Object> on the <LR>?": _compare_seen(_rhythmic, True),
    "Is the <Object> on the <LR> louder than the <Object> on the <LR>?": _compare_seen(_louder, True),
  },
  ("Audio-Visual", "Temporal"): {
    "What is the <TH> instrument that comes in?": _comes_in,
    "Where is the <FL> sounding instrument?": _where_end,
    "Which instrument makes sounds <BA> the <Object>?": _before_after,
    "Which <Object> makes the sound <FL>?": _which_of_kind,
  },
}
if tuple(TEMPLATES) != QUESTION_TYPES:
  raise ImportError("toybox: the templates do not follow the order of schema.QUESTION_TYPES")


def tokens(template: str, values: tuple[str, ...]) -> list[str]:
  """Words of a question as the benchmark splits it: without the last sign, slots filled from `values`."""
  words = template.rstrip()[:-1].split(" ")
  left = iter(values)
  return [next(left) if "<" in item else item for item in words]


def vocabulary(library: Library) -> dict[str, list[str]]:
  """{"words", "answers"}: everything the templates can ask and answer, whatever the clips are."""
  names = [word(class_id, library) for class_id in library.classes]
  words = ["<pad>"]
  for templates in TEMPLATES.values():
    for template in templates:
      words += [item for item in template.rstrip()[:-1].split(" ") if "<" not in item]
  for values in SLOT_VALUES.values():
    words += values
  answers = ["yes", "no", *NUMBERS, "left", "middle", "right", "simultaneously", *names]
  return {"words": list(dict.fromkeys(words + names)), "answers": answers}
