"""The traps of each benchmark's labels: empty and reversed spans, mistyped ids, weak labels that dense ones contradict."""

from collections.abc import Iterable

import numpy as np

from data_pipelines import ave, llp, music_avqa
from data_pipelines.base import Dataset
from data_pipelines.checks.findings import Context, Finding, distinct, plural
from data_pipelines.checks.labels import AS_PUBLISHED, Check, repeated
from data_pipelines.schema import DataError
from data_pipelines.tables import read_lines


def _defect(context: Context, name: str, where: str, noun: str, what: str, examples: Iterable[str]) -> list[Finding]:
  """A defect: a note if the published files have it just as often, or else a gap."""
  if not (examples := tuple(examples)):
    return []
  known = context.official and context.facts.defects.get(name) == len(examples)
  words = f"{plural(len(examples), noun)} {what}{f', {AS_PUBLISHED}' if known else ''}"
  return [Finding("note" if known else "gap", name.split(": ")[-1].replace(" ", "_"), where, words, examples=examples)]


def ave_events(dataset: Dataset, context: Context) -> list[Finding]:
  """AVE: spans that hold nothing, seconds of events, and split files that disagree with Annotations.txt."""
  if not isinstance(dataset, ave.AVE):
    return []
  rows = {(r.id, r.category, r.start, r.end): r for split in context.splits.values() for r in split}
  empty = [f"{r.id} {r.start}-{r.end}" for r in rows.values() if r.start >= r.end]
  found = _defect(context, "empty spans", "Set files", "row", "without any second: all background", empty)
  late = [f"{r.id} {r.start}-{r.end}" for r in rows.values() if r.end > dataset.seconds]
  found += _defect(context, "late spans", "Set files", "row", f"with an end after second {dataset.seconds}", late)
  for split, members in context.splits.items():
    facts = context.split_facts(split)
    seconds = sum(int((dataset.labels(r)["label"] < len(dataset.classes)).sum()) for r in members)
    if facts and facts.event_seconds and len(members) == facts.rows and seconds != facts.event_seconds:
      what = f"{seconds} seconds of events, official {facts.event_seconds}"
      found.append(Finding("gap", "event_seconds", split, what, context.labels_from))
  return found + _annotations_agree(dataset, context)


def _annotations_agree(dataset: ave.AVE, context: Context) -> list[Finding]:
  """Rows of the split files that Annotations.txt, or the one with domains, does not have, if it is there."""
  if not (path := dataset.find_file(*ave.ANNOTATIONS)):
    return []
  try:
    known = set(dataset.annotations())
  except DataError as error:
    return [Finding("gap", "annotations", path.name, str(error))]
  missing = [f"{split}: {r.id}" for split, rows in context.splits.items() for r in rows if r not in known]
  what = f"{plural(len(missing), 'row')} of the Set files not in it: one of them is damaged"
  return [Finding("gap", "annotations", path.name, what, context.labels_from, tuple(missing))] if missing else []


def llp_dense(dataset: Dataset, context: Context) -> list[Finding]:
  """LLP: the defects of the dense rows, one file after the other."""
  if not isinstance(dataset, llp.LLP) or context.damaged:
    return []
  clips = {record.id for rows in context.splits.values() for record in rows}
  found = []
  for kind in ("audio", "visual"):
    name = f"AVVP_eval_{kind}.csv"
    if not (path := dataset.find_file(name)):
      what = f"no {name}: nothing {'heard' if kind == 'audio' else 'seen'} can be scored"
      found.append(Finding("gap", "dense", str(dataset.label_root), what, context.labels_from))
      continue
    rows = [tuple(line.split("\t")) for line in read_lines(path) if line.strip() and not line.startswith("filename\t")]
    spans = [(f"{r[0]} {r[1]}-{r[2]}", int(r[1]), int(r[2])) for r in rows]
    twice = [f"{r[0]} {r[1]}-{r[2]} {r[3]}" for r in repeated(rows)]
    for defect, noun, what, examples in (
      ("empty spans", "span", "of no length, without effect", [text for text, start, end in spans if start == end]),
      ("reversed spans", "span", "ending before the beginning, without effect", [t for t, a, b in spans if a > b]),
      ("repeated rows", "row", "repeated, without effect", twice),
      ("ids of no split", "id", "of no split, mistyped", distinct({r[0] for r in rows} - clips)),
    ):
      found += _defect(context, f"{kind}: {defect}", name, noun, what, examples)
  return found


def llp_weak(dataset: Dataset, context: Context) -> list[Finding]:
  """LLP: weak labels against the dense ones of the same clips, labels listed twice, and the positive cells."""
  if not isinstance(dataset, llp.LLP):
    return []
  found = []
  for split, rows in context.splits.items():
    twice = [r.id for r in rows if len(set(r.weak)) < len(r.weak)]
    found += _defect(
      context, f"{split}: labels listed twice", split, "clip", "with a label listed twice, which counts once", twice
    )
    dense = [r for r in rows if r.dense]
    differ = [r.id for r in dense if set(r.weak) != {span[2] for span in r.audio + r.visual}]
    what = "with weak labels that are not the union of its dense ones"
    found += _defect(context, f"{split}: weak labels differ", split, "clip", what, differ)
    facts = context.split_facts(split)
    if facts and facts.cells and len(rows) == facts.rows and (cells := _cells(dataset, rows)) != facts.cells:
      what = "positive cells (audio, visual, both): {}, official {}".format(
        *(", ".join(map(str, x)) for x in (cells, facts.cells))
      )
      found.append(Finding("gap", "dense_cells", split, what, context.labels_from))
  return found


def _cells(dataset: llp.LLP, rows: list[llp.Parsing]) -> tuple[int, int, int]:
  """Positive cells of all clips: audio, visual, both at once."""
  total = np.zeros(3, int)
  for record in rows:
    labels = dataset.labels(record)
    audio, visual = labels["dense_audio"], labels["dense_visual"]
    total += [int(audio.sum()), int(visual.sum()), int((audio * visual).sum())]
  return tuple(total.tolist())


def avqa_versions(dataset: Dataset, context: Context) -> list[Finding]:
  """MUSIC-AVQA: splits of different versions beside one another."""
  if not isinstance(dataset, music_avqa.MusicAVQA):
    return []
  pairs = [(split, context.split_facts(split)) for split, rows in context.splits.items()]
  versions = {split: facts.variant or "json" for split, facts in pairs if facts and len(context.facts.splits[split]) > 1}
  if len(set(versions.values())) < 2:
    return []
  what = "versions differ: " + ", ".join(f"{split} is of {version}" for split, version in versions.items())
  return [Finding("gap", "versions", "splits", what, "take all files of one folder")]


CHECKS: tuple[Check, ...] = (ave_events, llp_dense, llp_weak, avqa_versions)
