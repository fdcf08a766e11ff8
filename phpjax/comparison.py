"""Which finished runs repeat one another, which may stand in one table, and what the numbers of the repetitions say.

A row (`Group`) holds runs that differ in nothing but their seed: same method, options, order of tasks, settings and encoder
weights. A table (`Setting`) holds the rows whose scores may be compared: same clips, same split, same metrics. What a seed
makes of the data (`finished.DATA_SEEDS`) is the same for all runs or of each run's own seed; these are two settings.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from phpjax.finished import DATA_SEEDS, OF_A_SEED, Finished

NAMED = ("method.name", "method.compat", "tasks", *OF_A_SEED)  # stand in a row's name or above the table
SHOWN = 2  # settings that a row's name holds; all of them stand below the table
OWN, WEIGHTS = "of each seed's own", "weights of "


class Stat(NamedTuple):
  """Mean and sample standard deviation of `n` numbers; None where there are too few of them (one, two)."""

  mean: float | None
  std: float | None
  n: int


def stat_of(values: Iterable[float | None]) -> Stat:
  """The statistics of some numbers; None and what is not finite are left out."""
  there = [value for value in values if value is not None and math.isfinite(value)]
  mean = float(np.mean(there)) if there else None
  return Stat(mean, float(np.std(there, ddof=1)) if len(there) > 1 else None, len(there))


@dataclasses.dataclass(frozen=True)
class Group:
  """The repetitions of a run: one for each seed, in the order of their seeds."""

  label: str
  runs: tuple[Finished, ...]

  @property
  def seeds(self) -> tuple[int, ...]:
    """Of the runs."""
    return tuple(run.seed for run in self.runs)

  def stat(self, of: Callable[[Finished], float | None]) -> Stat:
    """Over the runs."""
    return stat_of(map(of, self.runs))

  def score(self, task: str, kind: str = "matrix") -> Stat:
    """The last score of a task; kind: "matrix" or "unseen"."""
    return self.stat(lambda run: run.final.get(kind, {}).get(task))

  def number(self, name: str) -> Stat:
    """One of NUMBERS."""
    return self.stat(lambda run: run.numbers[name])

  def mean_score(self, kind: str = "matrix") -> Stat:
    """The mean over tasks, where all of them have a score."""
    return self.stat(lambda run: _mean_of(run.final.get(kind, {}), run.tasks))

  def curve(self) -> list[Stat]:
    """Mean accuracy after 1, 2, ... tasks; empty where a run does not tell it."""
    curves = [run.curve for run in self.runs]
    return [] if any(curve is None for curve in curves) else [stat_of(at) for at in zip(*curves, strict=True)]


@dataclasses.dataclass(frozen=True)
class Setting:
  """Rows whose scores may be compared.

  Attributes:
    title: the data, the split and the encoders where all rows share them.
    tasks: of all rows, in the order of the first row that has each.
    groups: the rows.
    trivial: (label, [{"matrix" or "unseen": {task: score}} of each data seed]) of the best predictor that never looks.
    differing: {setting: [its text in each row]} of those that are not the same in all rows, the names of the rows apart.
  """

  title: str
  tasks: tuple[str, ...]
  groups: tuple[Group, ...]
  trivial: tuple[tuple[str, list[dict[str, dict[str, float]]]], ...]
  differing: dict[str, list[str]]

  @property
  def metric(self) -> dict[str, str]:
    """{task: its metric}."""
    return {task: str(run.results["metric"][task]) for group in self.groups for run in group.runs for task in run.tasks}


def _mean_of(scores: Mapping[str, float], tasks: Sequence[str]) -> float | None:
  return float(np.mean([scores[task] for task in tasks])) if tasks and all(task in scores for task in tasks) else None


def trivial_stat(seeds: Sequence[Mapping[str, Mapping[str, float]]], kind: str, tasks: Sequence[str], task: str = "") -> Stat:
  """Of the trivial predictor over data seeds, on a task, or the mean over all tasks."""
  found = [scores.get(kind, {}) for scores in seeds]
  return stat_of(scores.get(task) if task else _mean_of(scores, tasks) for scores in found)


# -- which belong together ---------------------------------------------------------------------------------------


def compare(runs: Sequence[Finished]) -> tuple[list[Setting], list[str]]:
  """Settings in the order of their first runs, and what a reader has to know, one line each."""
  notes = [f"{run.folder}: {note}" for run in runs for note in run.notes]
  whose = {what: _whose(runs, what) for what in DATA_SEEDS}
  places: list[tuple[dict[str, Any], list[Finished]]] = []
  for run in runs:
    place = {**run.place, **{what: found[run.folder] for what, found in whose.items() if run.folder in found}}
    fits = (at for at in places if all(at[0].get(what, value) == value for what, value in place.items()))
    if (at := next(fits, None)) is None:
      places.append((place, [run]))
    else:
      at[0].update(place)
      at[1].append(run)
  settings = []
  for number, (place, members) in enumerate(places):
    groups, left_out = _groups(members)
    notes += left_out
    others = [other for other, _ in places[:number] + places[number + 1 :]]
    settings.append(_setting(_title(place, others), groups))
  notes += [note for setting in settings for group in setting.groups for note in _odd_group(group)]
  return settings, notes


def _whose(runs: Sequence[Finished], what: str) -> dict[Any, str]:
  """{folder: whose that part of a run's data is}, of the runs that have it: of one fixed seed, or of each seed's own.

  A run whose two seeds are equal could be either: the other runs decide, first those that it repeats.
  """
  drawn = {run.folder: run.data_seeds[what] for run in runs if what in run.data_seeds}
  those = [run for run in runs if run.folder in drawn]
  fixed = {drawn[run.folder] for run in those if drawn[run.folder] != run.seed}
  equal = [run for run in those if drawn[run.folder] == run.seed]
  seeds = {run.identity: set[int]() for run in equal}
  for run in equal:
    seeds[run.identity].add(run.seed)
  several = {identity for identity, found in seeds.items() if len(found) > 1}
  found = {}
  for run in those:
    own = drawn[run.folder] == run.seed and (run.identity in several or (several and run.seed not in fixed))
    found[run.folder] = OWN if own else f"of seed {drawn[run.folder]}"
  return found


def _groups(runs: Sequence[Finished]) -> tuple[list[list[Finished]], list[str]]:
  """Repetitions together, each seed once, and a line for each run that is left out for it."""
  groups: dict[str, dict[int, Finished]] = {}
  notes = []
  for run in runs:
    first = groups.setdefault(run.identity, {}).setdefault(run.seed, run)
    if first is not run:
      notes.append(f"{run.folder} is left out: same settings and seed as {first.folder}")
  return [[found[seed] for seed in sorted(found)] for found in groups.values()], notes


def _title(place: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
  """What a table is about: the data and the split, and what tells it from the other tables."""
  shown = {"data": "", **{what: f"{what} " for what in DATA_SEEDS}, "evaluated on": "evaluated on "}
  parts = [f"{words}{place[what]}" for what, words in shown.items() if what in place]
  differs = lambda what: any(other.get(what, place[what]) != place[what] for other in others)
  differ = [what for what in place if what not in shown and differs(what)]
  parts += [f"{what} {place[what]}" for what in differ[:SHOWN]]
  parts += [f"{len(differ) - SHOWN} more differences"] if len(differ) > SHOWN else []
  return ", ".join(parts) or "data unknown"


def _odd_group(group: Group) -> list[str]:
  """What is not the same in runs that count as repetitions, though it does not decide their results on paper."""
  notes = []
  for what in ("phpjax", "jax", "jaxlib", "backend", "devices"):
    found = {run.versions.get(what, "an unknown one"): run.seed for run in group.runs}
    if len(found) > 1:
      notes.append(f"{group.label}: its seeds ran with several {what}: {', '.join(found)}")
  return notes


# -- one table ---------------------------------------------------------------------------------------------------


def _setting(title: str, found: Sequence[Sequence[Finished]]) -> Setting:
  """A table of these rows."""
  fields = [_fields(runs[0]) for runs in found]
  groups = [Group(label, tuple(runs)) for label, runs in zip(_labels(found, fields), found, strict=True)]
  tasks = tuple(dict.fromkeys(task for group in groups for task in group.runs[0].tasks))
  differing = {field: [row.get(field, "") for row in fields] for field in _differing(fields, [run[0].method for run in found])}
  return Setting(title, tasks, tuple(groups), _trivial(groups), differing)


def _fields(run: Finished) -> dict[str, str]:
  """{setting: its text} of all that decides a result and does not stand in a row's name."""
  fields = {field: str(value) for field, value in run.settings.items() if field not in NAMED}
  return {**fields, **{f"{WEIGHTS}{name}": text for name, text in run.weights.items()}}


def _differing(rows: Sequence[Mapping[str, str]], methods: Sequence[str]) -> list[str]:
  """The fields that are not the same in all rows; a method's options only between rows of that method. Of a run without a
  config.json only the weights are known."""
  found, known = [], [any(not field.startswith(WEIGHTS) for field in row) for row in rows]
  for field in dict.fromkeys(field for row in rows for field in row):
    kinds = {method if field.startswith("method.") else "" for method in methods}
    asked = [i for i in range(len(rows)) if known[i] or field.startswith(WEIGHTS)]
    if any(len({rows[i].get(field) for i in asked if kind in ("", methods[i])}) > 1 for kind in kinds):
      found.append(field)
  return found


def _labels(groups: Sequence[Sequence[Finished]], fields: Sequence[Mapping[str, str]]) -> list[str]:
  """A name for each row: the method, what is not the paper's, another order than the first row's; of rows that would have the
  same name, all but the one with the most seeds add in what they differ from it."""
  first = groups[0][0].tasks
  names = []
  for runs in groups:
    run = runs[0]
    parts = [run.method, *([run.compat] if run.compat not in ("", "paper") else [])]
    names.append(", ".join(parts + ([f"order {'-'.join(run.tasks)}"] if run.tasks != first else [])))
  labels = list(names)
  for name in dict.fromkeys(names):
    same = [i for i, other in enumerate(names) if other == name]
    usual = max(same, key=lambda i: len(groups[i]))
    for i in (i for i in same if i != usual):
      differ = _differing([fields[usual], fields[i]], [groups[usual][0].method] * 2)
      parts = [f"{field.removeprefix('method.')}={fields[i].get(field, '')}" for field in differ[:SHOWN]]
      parts += [f"{len(differ) - SHOWN} more"] if len(differ) > SHOWN else []
      labels[i] = ", ".join([name, *parts])
  counts = {label: itertools.count(1) for label in labels if labels.count(label) > 1}
  return [f"{label} #{next(counts[label])}" if label in counts else label for label in labels]


def _trivial(groups: Sequence[Group]) -> tuple[tuple[str, list[dict[str, dict[str, float]]]], ...]:
  """The trivial predictors' scores, once for each seed of the data; apart where rows have other ones on the same data."""
  kinds: dict[str, dict[tuple[int, ...], dict[str, dict[str, float]]]] = {}  # by the first row that each is of
  for group in groups:
    mine = {tuple(run.data_seeds.values()): run.trivial for run in group.runs}
    fits = (seeds for seeds in kinds.values() if all(_agree(seeds.get(seed, {}), scores) for seed, scores in mine.items()))
    if (seeds := next(fits, None)) is None:
      seeds = kinds[group.label] = {}
    for seed, scores in mine.items():
      seeds[seed] = {kind: {**seeds.get(seed, {}).get(kind, {}), **found} for kind, found in scores.items()}
  name = lambda label: "trivial" if len(kinds) == 1 else f"trivial, as for {label}"
  return tuple((name(label), list(seeds.values())) for label, seeds in kinds.items())


def _agree(there: Mapping[str, Mapping[str, float]], here: Mapping[str, Mapping[str, float]]) -> bool:
  """Whether no score on the same set differs."""
  pairs = ((there.get(kind, {}).get(task, score), score) for kind, found in here.items() for task, score in found.items())
  return all(abs(a - b) < 1e-9 for a, b in pairs)
