"""Checks of Tux-21: how many pictures, captions, classes and pairs there are, what is silent, and what lacks its other half.

Its splits follow from the captions that are there, so that one lost file may move others to the other split.
"""

from data_pipelines.base import Dataset
from data_pipelines.checks.findings import Context, Finding, distinct, plural
from data_pipelines.checks.labels import AS_PUBLISHED, Check
from data_pipelines.tuxpaint import CATEGORIES, Stamp, TuxPaint

# Of tuxpaint-stamps-default 2022.06.04-1.
PUBLISHED = {"pictures": 362, "captions": 331, "classes": 21, "picture-and-speech pairs": 3012, "without any speech": 12}
TEST_PICTURES = (97, 89, 92, 96, 94)  # of seeds 0 to 4
UNPICTURED = {"seasonal/christmas/gift", "seasonal/christmas/gift2"}


def _rows(dataset: TuxPaint) -> list[Stamp]:
  return [record for split in dataset.splits() for record in dataset.records(split)]


def counts(dataset: Dataset, context: Context) -> list[Finding]:
  """The numbers of the protocol: a note if they are the published ones or of stamps of one's own, or else a gap."""
  if not isinstance(dataset, TuxPaint) or context.damaged:
    return []
  rows, pairs = _rows(dataset), sum(len(dataset.pairs(split)) for split in dataset.splits())
  captions, unspoken = len({record.caption for record in rows}), sum(not record.spoken for record in rows)
  found = dict(zip(PUBLISHED, (len(rows), captions, len(dataset.classes), pairs, unspoken), strict=True))
  tests = tuple(len(TuxPaint(dataset.root, seed).records("test")) for seed in range(len(TEST_PICTURES)))
  words = ", ".join(f"{count} {name}" for name, count in found.items())
  words += f"; for testing with seeds 0 to {len(tests) - 1}: {' '.join(map(str, tests))}"
  if not context.official:
    return [Finding("note", "stamps", "all splits", words)]
  changes = [f"{count} {name}, official {PUBLISHED[name]}" for name, count in found.items() if count != PUBLISHED[name]]
  if tests != TEST_PICTURES:
    changes.append(f"for testing {' '.join(map(str, tests))}, official {' '.join(map(str, TEST_PICTURES))}")
  if not changes:
    return [Finding("note", "stamps", "all splits", f"{words}, {AS_PUBLISHED}")]
  lost = tuple(f"class {name}" for name in CATEGORIES if name not in dataset.classes)
  return [Finding("gap", "stamps", "all splits", "; ".join(changes), context.labels_from, lost)]


def halves(dataset: Dataset, context: Context) -> list[Finding]:
  """Pictures without a caption, which belong to no row, and captions whose picture is not there."""
  if not isinstance(dataset, TuxPaint):
    return []
  found = []
  for names, one, other, mend in (
    (dataset.uncaptioned, "picture", "caption", "put <name>.txt beside each, or take the pictures out"),
    (dataset.unpictured, "caption", "picture", "put <name>.png beside each, or take the captions out"),
  ):
    known = context.official and one == "caption" and set(names) == UNPICTURED
    if names:
      what = f"{plural(len(names), one)} without a {other}" + (f", {AS_PUBLISHED}" if known else ": left out")
      mend = "" if known else context.labels_from if context.official else mend
      found.append(Finding("note" if known else "gap", "halves", str(dataset.root), what, mend, distinct(names)))
  return found


def silent(dataset: Dataset, context: Context) -> list[Finding]:
  """Pictures that nobody speaks of; how many there are of the published ones, `counts` tells."""
  if not isinstance(dataset, TuxPaint) or not (clips := [record.clip for record in _rows(dataset) if not record.spoken]):
    return []
  what = f"{plural(len(clips), 'picture')} without a spoken caption: shown in silence"
  return [Finding("note", "silent", "all splits", what, examples=distinct(clips))]


CHECKS: tuple[Check, ...] = (counts, halves, silent)
