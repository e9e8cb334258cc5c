"""Retrieval quality from a table of distances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engram.errors import EngramError


@dataclass(frozen=True)
class Ranking:
    """CMC@k by k, mean average precision, and the average precision of each query counted; all 0 to 1."""

    cmc: dict[int, float]
    map: float
    average_precision: Tensor


def cmc_map(
    dist: Tensor, q_labels: Tensor, g_labels: Tensor, *, ks: Sequence[int] = (1, 5), drop_self: bool = False
) -> Ranking:
    """Rank the gallery by distance, dist [q, g], for each query; relevant are rows of its label.

    CMC@k: share of queries with a relevant row among the first k. Average precision: mean over relevant rows
    of (relevant so far / rank). Queries without a relevant row are left out; equal distances keep the
    gallery's order. `drop_self`: queries are the gallery, and row i is not ranked for query i. Raises
    EngramError when no query has a relevant row. O(q g log g).
    """
    if dist.shape != (len(q_labels), len(g_labels)):
        raise EngramError(f"distances are {tuple(dist.shape)}, labels say {(len(q_labels), len(g_labels))}")
    relevant = q_labels.unsqueeze(1) == g_labels
    order = dist.argsort(dim=1, stable=True)
    if drop_self:  # last in the ranking and irrelevant: it moves no other rank
        own = order == torch.arange(len(order), device=order.device).unsqueeze(1)
        order = order.gather(1, own.int().argsort(dim=1, stable=True))
        relevant = relevant.clone().fill_diagonal_(False)
    hits = relevant.gather(1, order)
    hits = hits[hits.any(1)]
    if not len(hits):
        raise EngramError("no query has a relevant row in the gallery: there is nothing to rank")
    rank = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    precision = hits.cumsum(1).double() / rank
    average = (precision * hits).sum(1) / hits.sum(1)
    cmc = {k: hits[:, :k].any(1).double().mean().item() for k in ks}
    return Ranking(cmc, average.mean().item(), average)
