"""Samplers: which rows meet in a batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from engram.data.table import Batch, Table
from engram.errors import EngramError
from engram.stats.seeds import generator


def paired(
    forget: Table,
    retain: Table | None,
    size: int,
    ratio: float = 1.0,
    *,
    seed: int = 0,
    epoch: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Batch, Batch | None]]:
    """One pass over the forget rows in batches of `size`, each with `ratio` times as many retain rows.

    Retain rows are drawn without repetition until all have been used, then anew. EngramError for a retain
    table without rows.
    """
    rank, world = shard
    order = torch.randperm(len(forget), generator=generator("forget order", seed, epoch))
    partners = None if retain is None else endless(len(retain), "retain order", seed, epoch)
    for chosen in order.split(size):
        beside = None
        if retain is not None and partners is not None:
            wanted = max(1, round(ratio * len(chosen)))
            beside = retain.batch(torch.tensor([next(partners) for _ in range(wanted)])[rank::world])
        yield forget.batch(chosen[rank::world]), beside


def endless(n: int, *key: object) -> Iterator[int]:
    """Row numbers below n in random order, each once before any comes again; EngramError for n = 0."""
    if n < 1:
        raise EngramError("there are no rows to draw from")
    draws = generator(*key)
    while True:
        yield from torch.randperm(n, generator=draws).tolist()


def weighted(weights: Tensor, k: int, draws: torch.Generator) -> Tensor:
    """`k` different row numbers [k], drawn with chances proportional to `weights` [n] (Gumbel top-k,
    float64).

    EngramError for weights that are negative or NaN, and if fewer than k are above 0.
    """
    positive = int((weights > 0).sum())
    if not bool((weights >= 0).all()) or k > positive:
        raise EngramError(
            f"cannot draw {k} rows: {positive} of {len(weights)} weights are above 0, and none may be below"
        )
    noise = torch.rand(len(weights), generator=draws, dtype=torch.float64).clamp_(min=1e-300)
    return (weights.double().log() - (-noise.log()).log()).topk(k).indices
