"""Retrieval between clips (or images) and their captions, in both directions.

Similarity is the cosine. A rank counts from 0: the number of gallery items that are more similar, and of equally similar ones
with a smaller index, so that ties are decided the same way everywhere. With several captions per clip, recall takes the best of
them, and the average precision their ranks in ascending order (LAION-CLAP's evaluator does not sort them, and its value can
exceed 1). A score depends on the gallery: say its size beside it.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from phpjax.metrics import rows

RECALLS = (1, 5, 10, 50)
CUT = 10  # of the average precision
BLOCK = 512  # queries whose similarities are in memory at once


def statistics(
  query: np.ndarray,
  gallery: np.ndarray,
  query_owner: np.ndarray,
  gallery_owner: np.ndarray,
  *,
  mask: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """What a batch of queries contributes; the gallery is always the whole one.

  Args:
    query: embeddings [N, D], of any length.
    gallery: embeddings [G, D].
    query_owner, gallery_owner: int [N], [G]; an item answers the queries of the same owner.
    mask: [N], of the queries.

  Returns:
    {"rank": int [n] of the best right item, "precision": average precision at 10, float [n]}.

  Raises:
    ValueError: NaN, or a query that nothing in the gallery answers.
  """
  query, query_owner = rows.keep(mask, query, query_owner)
  gallery, gallery_owner = rows.keep(None, gallery, gallery_owner)
  rows.check_finite("queries", query)
  rows.check_finite("gallery", gallery)
  if len(lost := np.setdiff1d(query_owner, gallery_owner)):
    raise ValueError(f"the gallery holds nothing for {len(lost)} owners of queries, {lost[0]} among them")
  query, gallery = _unit(query), _unit(gallery)
  blocks = [slice(start, start + BLOCK) for start in range(0, len(query), BLOCK)]
  parts = [_ranked(query[b] @ gallery.T, query_owner[b, None] == gallery_owner) for b in blocks]
  return rows.join(parts or [{"rank": np.zeros(0, np.int64), "precision": np.zeros(0)}])


def _unit(embeddings: np.ndarray) -> np.ndarray:
  embeddings = np.asarray(embeddings, np.float64)
  return embeddings / np.maximum(np.linalg.norm(embeddings, axis=-1, keepdims=True), 1e-12)


def _ranked(similarity: np.ndarray, right: np.ndarray) -> dict[str, np.ndarray]:
  """Similarities [b, G] and which items are right, bool [b, G] -> the statistics of b queries."""
  order = np.argsort(-similarity, axis=-1, kind="stable")
  right = np.take_along_axis(right, order, axis=-1)  # from the most similar item on
  top, found = right[:, :CUT], right[:, :CUT].cumsum(-1)
  precision = (found / np.arange(1, top.shape[1] + 1) * top).sum(-1) / right.sum(-1)
  return {"rank": right.argmax(-1), "precision": precision}


def summarise(stats: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Statistics of all queries -> `R@1`, `R@5`, `R@10`, `R@50`, `mAP@10` in [0, 1]; `medR`, `meanR`, ranks that count from 1."""
  rank = stats["rank"]
  return {
    **{f"R@{k}": rows.mean(rank < k) for k in RECALLS},
    "medR": float(np.floor(np.median(rank)) + 1),
    "meanR": rows.mean(rank) + 1,
    f"mAP@{CUT}": rows.mean(stats["precision"]),
  }


def evaluate(items: np.ndarray, captions: np.ndarray, owner: np.ndarray) -> dict[str, float]:
  """Items [N, D], captions [M, D], the item of each caption int [M] -> the scores of both directions: `to_text/R@1`, ...,
  `from_text/R@1`, ...."""
  number = np.arange(len(items))
  found = {
    "to_text": statistics(items, captions, number, owner),
    "from_text": statistics(captions, items, owner, number),
  }
  return {f"{direction}/{name}": score for direction, stats in found.items() for name, score in summarise(stats).items()}


def recall_per_task(rank: np.ndarray, task: np.ndarray, recalls: Sequence[int] = (1, 5, 10)) -> np.ndarray:
  """LPI's recall: ranks in the union gallery [N], the task of each query int [N] -> [tasks, recalls], each task's own mean."""
  rank, task = rows.keep(None, rank, task)
  return np.array([[rows.mean(rank[task == t] < k) for k in recalls] for t in np.unique(task)])
