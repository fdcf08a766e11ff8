"""The comparison as one page that needs nothing else: no network, no scripts; light and dark, for screens, phones and paper."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from phpjax import comparison_tables
from phpjax.comparison import Setting
from phpjax.comparison_figures import EXPLAINED, Drawn
from phpjax.comparison_tables import Table, clean

# What the page may load: the pictures in it and its own style, so that no text that slipped through could do anything.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --ground: #ffffff; --faint: #5f6368; --line: #d9dce0; --stripe: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --ground: #16181b; --faint: #a2a7ad; --line: #3a3f45; --stripe: #1f2226; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 84rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { margin: .4rem 0; max-width: 60rem; }
.note { color: var(--faint); font-size: .85rem; }
.scroll { overflow-x: auto; margin: .4rem 0 .6rem; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .35rem .45rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { font-weight: 600; border-bottom: 2px solid var(--line); vertical-align: bottom; white-space: normal; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--ground); white-space: normal;
  min-width: 7.5rem; }
tbody th { font-weight: 600; overflow-wrap: anywhere; }
tbody tr:nth-child(even) > * { background: var(--stripe); }
.faint > * { color: var(--faint); font-weight: 400; font-style: italic; }
.words table { width: max-content; max-width: none; }
.words th, .words td { text-align: left; white-space: normal; max-width: 24rem; vertical-align: top; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; align-items: flex-start; margin: 1.4rem 0 .6rem; }
figure { margin: 0; flex: 1 1 20rem; max-width: 27rem; break-inside: avoid; }
figure img { width: 100%; height: auto; display: block; }
@media (max-width: 40rem) { body { padding: .8rem; } figure { max-width: none; } th:first-child { max-width: 9.5rem; } }
@media print {
  :root { color-scheme: light; --ink: #000; --ground: #fff; --faint: #444; --line: #bbb; --stripe: #fff; }
  body { font-size: 10pt; max-width: none; padding: 0; }
  .scroll { overflow: visible; } table { font-size: 6.5pt; } th, td { padding: .15rem .3rem; white-space: normal; }
  figure { flex: 0 0 31%; } tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
}
"""


def page(settings: Sequence[Setting], drawn: Sequence[Sequence[Drawn]], notes: Sequence[str]) -> str:
  """The page of these settings, the figures of each, and what a reader has to know."""
  runs = sum(len(group.runs) for setting in settings for group in setting.groups)
  rows = sum(len(setting.groups) for setting in settings)
  parts = [
    "<h1>Runs side by side</h1>",
    f"<p class=note>{_count(runs, 'run')} in {_count(rows, 'row')}. A row holds runs that differ in nothing but their seed; "
    "rows stand in one table where their scores may be compared.</p>",
    *([_notes(notes)] if notes else []),
    *(_section(setting, figures) for setting, figures in zip(settings, drawn, strict=True)),
    "<h2>Runs</h2>",
    comparison_tables.html_table(_runs(settings)),
  ]
  return (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>Runs side by side</title><style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
  )


def _section(setting: Setting, drawn: Sequence[Drawn]) -> str:
  """Tables and figures of a setting."""
  scores = comparison_tables.scores(setting)
  parts = [f"<h2>{html.escape(scores.title)}</h2>", comparison_tables.html_table(scores)]
  parts += [f"<div class=figures>{''.join(map(_figure, drawn))}</div>", f"<p class=note>{html.escape(EXPLAINED)}</p>"]
  if table := comparison_tables.unseen(setting):
    parts += ["<h3>Unseen objects</h3>", comparison_tables.html_table(table)]
  if table := comparison_tables.differences(setting):
    parts += ["<h3>Settings that differ between rows</h3>", comparison_tables.html_table(table)]
  return "\n".join(parts)


def _figure(drawn: Drawn) -> str:
  """A picture that follows the page's colours."""
  caption = html.escape(drawn.caption)
  light, dark = (f"data:image/svg+xml;base64,{base64.b64encode(image).decode()}" for image in (drawn.light, drawn.dark))
  return (
    f'<figure><picture><source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
    f'<img src="{light}" alt="{caption}"></picture></figure>'
  )


def _notes(notes: Sequence[str]) -> str:
  """What was left out and what is odd."""
  return "<h3>Take note</h3><ul class=note>" + "".join(f"<li>{html.escape(clean(note, 400))}</li>" for note in notes) + "</ul>"


def _runs(settings: Sequence[Setting]) -> Table:
  """Where the runs lie and what they ran with."""
  rows = []
  for group in (group for setting in settings for group in setting.groups):
    for run in group.runs:
      ran = ", ".join(f"{what} {run.versions[what]}" for what in ("phpjax", "jax", "backend") if what in run.versions)
      row = (group.label, str(run.seed), str(run.folder), ", ".join(run.tasks), "; ".join(run.weights.values()), ran)
      rows.append(tuple(map(clean, row)))
  return Table("", ("row", "seed", "workdir", "order", "encoders", "ran with"), tuple(rows), words=True)


def _count(number: int, what: str) -> str:
  return f"{number} {what}{'' if number == 1 else 's'}"
