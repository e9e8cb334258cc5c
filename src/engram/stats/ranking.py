"""Retrieval quality from a table of distances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engram.errors import EngramError

QUERIES = 512  # ranked at once


@dataclass(frozen=True)
class Ranking:
    """CMC@k by k, mean average precision, and the average precision of each query counted; all 0 to 1."""

    cmc: dict[int, float]
    map: float
    average_precision: Tensor


def cmc_map(
    dist: Tensor, q_labels: Tensor, g_labels: Tensor, *, ks: Sequence[int] = (1, 5), drop_self: bool | Tensor = False
) -> Ranking:
    """Rank the gallery by distance, dist [q, g], for each query; relevant are rows of its label.

    CMC@k: share of queries with a relevant row among the first k. Average precision: mean over relevant rows
    of (relevant so far / rank). Queries without a relevant row are left out; equal distances keep the
    gallery's order. `drop_self`: queries are the gallery, and row i is not ranked for query i; or numbers [q] of
    the rows that are not, -1 for none. Raises EngramError when no query has a relevant row. O(q g log g);
    memory O(g) for each of some queries at a time.
    """
    if dist.shape != (len(q_labels), len(g_labels)):
        raise EngramError(f"distances are {tuple(dist.shape)}, labels say {(len(q_labels), len(g_labels))}")
    own = drop_self if isinstance(drop_self, Tensor) else torch.arange(len(dist)) if drop_self else None
    found = [
        _ranked(dist[rows], q_labels[rows], g_labels, ks, None if own is None else own.to(dist.device)[rows])
        for rows in torch.arange(len(dist), device=dist.device).split(QUERIES)
    ]
    average = torch.cat([precision for precision, _ in found]) if found else torch.zeros(0)
    if not len(average):
        raise EngramError("no query has a relevant row in the gallery: there is nothing to rank")
    first = torch.cat([among for _, among in found]).double().mean(0)
    return Ranking(dict(zip(ks, first.tolist(), strict=True)), average.mean().item(), average)


def _ranked(
    dist: Tensor, q_labels: Tensor, g_labels: Tensor, ks: Sequence[int], own: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Average precision of each query that counts, [c], and whether a relevant row is among its first k, [c, ks]."""
    order = dist.argsort(dim=1, stable=True)
    hits = (q_labels.unsqueeze(1) == g_labels).gather(1, order)
    if own is not None:  # last in the ranking and irrelevant: it moves no other rank
        self_at = order == own.unsqueeze(1)
        hits = (hits & ~self_at).gather(1, self_at.int().argsort(dim=1, stable=True))
    hits = hits[hits.any(1)]
    rank = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    precision = hits.cumsum(1).double() / rank
    among = torch.stack([hits[:, :k].any(1) for k in ks], 1)
    return (precision * hits).sum(1) / hits.sum(1), among
