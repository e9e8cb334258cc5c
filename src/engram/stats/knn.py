"""Exact nearest neighbours by blocked matrix products, and the votes of neighbours."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from engram.errors import EngramError

Metric = Literal["cosine", "l2", "dot"]


def nearest(
    q: Tensor, bank: Tensor, k: int, *, metric: Metric = "cosine", block: int = 1024, drop_self: bool = False
) -> tuple[Tensor, Tensor]:
    """Values and indices, both [m, k], of the k rows of bank [n, d] nearest to each row of q [m, d], in order.

    Values are similarities, falling ("cosine", "dot"), or distances, rising ("l2", computed in float64).
    Rows of equal value come in the order of the bank; rounding may part copies of one row. `drop_self`: q is
    the bank, and row i is no neighbour of row i. Raises EngramError when the bank has fewer than k rows.
    O(m n d); memory block² + m k.
    """
    _check(q, bank, k + drop_self)
    dtype = torch.promote_types(torch.promote_types(q.dtype, bank.dtype), torch.float32)
    q, bank = _prepared(q.to(dtype), metric), _prepared(bank.to(dtype), metric)
    found = [
        _search(part, bank, k, metric, block, i * block if drop_self else None) for i, part in enumerate(q.split(block))
    ]
    values, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
    return (values.neg().clamp(min=0).sqrt() if metric == "l2" else values), indices


def vote(labels: Tensor, values: Tensor, C: int, *, temperature: float | None = None) -> Tensor:
    """Scores [m, C] from neighbours' labels [m, k] and similarities [m, k]; ties go to the lower class.

    Without a temperature each neighbour counts 1 (majority), else exp(similarity / T) (Wu et al. 2018).
    """
    weights = torch.ones_like(values) if temperature is None else (values.double() / temperature).exp()
    return weights.new_zeros(len(labels), C, dtype=torch.float64).scatter_add_(1, labels, weights.double())


def _check(q: Tensor, bank: Tensor, wanted: int) -> None:
    if q.ndim != 2 or bank.ndim != 2 or q.shape[1] != bank.shape[1]:
        raise EngramError(f"queries and bank are {tuple(q.shape)} and {tuple(bank.shape)}; want [m, d] and [n, d]")
    if len(bank) < wanted:
        raise EngramError(f"the bank has {len(bank)} rows, {wanted} are needed: lower k")
    if not (q.isfinite().all() and bank.isfinite().all()):
        raise EngramError("queries or bank hold NaN or infinity, which is near to nothing")


def _prepared(x: Tensor, metric: Metric) -> Tensor:
    if metric == "l2":
        return x.double()
    return normalize(x, dim=1, eps=1e-12) if metric == "cosine" else x


def _search(q: Tensor, bank: Tensor, k: int, metric: Metric, block: int, first: int | None) -> tuple[Tensor, Tensor]:
    """Best so far, merged with the bank block by block; earlier rows stand first, so ties keep order."""
    values, indices = q.new_empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.long, device=q.device)
    for start in range(0, len(bank), block):
        part = bank[start : start + block]
        score = _score(q, part, metric)
        if first is not None:  # row i of these queries is row first + i of the bank
            own = torch.arange(first - start, first - start + len(q), device=q.device)
            here = ((own >= 0) & (own < len(part))).nonzero()[:, 0]
            score[here, own[here]] = -torch.inf
        best, where = _top(score, k)
        values, picked = _top(torch.cat([values, best], 1), k)
        indices = torch.cat([indices, where + start], 1).gather(1, picked)
    return values, indices


def _score(q: Tensor, bank: Tensor, metric: Metric) -> Tensor:
    """[m, b], greater is nearer: similarity, or minus the squared distance."""
    dot = q @ bank.T
    if metric != "l2":
        return dot
    return 2 * dot - q.square().sum(1, keepdim=True) - bank.square().sum(1)


def _top(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Like topk, but of equal scores the first columns win, whatever the device."""
    k = min(k, score.shape[1])
    values, columns = score.topk(k, 1)
    last = values[:, -1:]
    tied = (score == last).sum(1) > (values == last).sum(1)
    if bool(tied.any()):
        columns[tied] = _first_of_equals(score[tied], last[tied], k)
    columns = columns.sort(1).values
    values, order = score.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def _first_of_equals(score: Tensor, last: Tensor, k: int) -> Tensor:
    """The columns [m, k] of the scores above the k-th, `last`, and of the first that equal it."""
    equal, above = score == last, score > last
    taken = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    return taken.nonzero()[:, 1].view(len(score), k)
