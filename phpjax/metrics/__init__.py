"""Scores of the benchmarks, in plain numpy: one module each, and `continual` for a sequence of tasks.

Every benchmark module has the same five names:

  MAIN              the score that goes into the accuracy matrix
  statistics(...)   one batch -> {name: [n, ...]}, padding rows dropped; `rows.join` joins those of all batches
  summarise(stats)  the statistics of a whole set -> {score: float in [0, 1]}
  evaluate(...)     both at once, from stacked arrays
  trivial(...)      the best predictor that never looks at a clip -> its name and its scores

`retrieval` and `grounding` score galleries and boxes, which no benchmark here has yet: they have no MAIN and no `trivial`.
"""

from phpjax.metrics import ave, avqa, avs, avvp, classes, continual, grounding, retrieval, rows

__all__ = ["ave", "avqa", "avs", "avvp", "classes", "continual", "grounding", "retrieval", "rows"]
