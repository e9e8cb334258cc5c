"""Centres of clusters: seeding far apart, nearest keys, and codebooks that follow their rows by moving averages."""

from __future__ import annotations

import torch
from torch import Tensor

from engram.errors import EngramError

CELLS = 1 << 22  # distances that are held at once


def plus_plus(
    x: Tensor, k: int, *, away_from: Tensor | None = None, power: float = 2, generator: torch.Generator
) -> Tensor:
    """Seed k centres [k, d], float64, among the rows x [n, d] (k-means++; Arthur and Vassilvitskii 2007).

    The first is any row, each further one a row drawn in proportion to the distance to its nearest centre, to the
    power `power` (2 as published). `away_from` [m, d]: known centres, which repel from the first draw on and are
    not among those that come back. EngramError if the rows stand in fewer than k places. Cost O(n (k + m) d).
    """
    x = x.double()
    gap = torch.full((len(x),), torch.inf, dtype=torch.float64)
    for known in () if away_from is None else away_from.double():
        gap = torch.minimum(gap, _gap(x, known))
    centres = []
    for _ in range(k):
        weight = (gap**power).clamp(max=1.0) if torch.isinf(gap).all() else gap**power
        centres.append(x[_drawn(weight, k, generator)])
        gap = torch.minimum(gap, _gap(x, centres[-1]))
    return torch.stack(centres) if centres else x[:0]


def _gap(x: Tensor, centre: Tensor) -> Tensor:
    return (x - centre).square().sum(1).sqrt()


def _drawn(weight: Tensor, k: int, generator: torch.Generator) -> int:
    """The place of one row, drawn in proportion to its weight [n]."""
    heaped = weight.cumsum(0)
    if not len(heaped) or not heaped[-1] > 0:
        raise EngramError(f"the rows stand in fewer than {k} places, so {k} centres cannot be seeded; ask for fewer")
    aim = torch.rand(1, generator=generator, dtype=torch.float64) * heaped[-1]
    return int(torch.searchsorted(heaped, aim, right=True).clamp(max=len(heaped) - 1))


def relative_distances(x: Tensor, keys: Tensor) -> Tensor:
    """|key|² - 2 x·key: squared distances up to |x|², [..., n, d] and [..., M, d] -> [..., n, M]."""
    return keys.square().sum(-1)[..., None, :] - 2 * x @ keys.mT


def assign(x: Tensor, keys: Tensor, live: Tensor | None = None) -> Tensor:
    """The place of every row's nearest key, the first of equals: [..., n, d] and [..., M, d] -> int64 [..., n].

    `live` [..., M]: keys that may answer; where none may, the place is 0. Each codebook of a leading dimension has
    rows of its own. Cost O(n M d) a codebook; memory bounded by blocks of rows.
    """
    block = max(1, CELLS // max(1, keys.shape[:-1].numel()))
    found = []
    for rows in x.split(block, dim=-2):
        distance = relative_distances(rows, keys)
        barred = distance if live is None else distance.masked_fill(~live[..., None, :], torch.inf)
        found.append(barred.argmin(-1))
    return torch.cat(found, -1)


@torch.no_grad()
def ema_codebook(
    x: Tensor,
    keys: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float = 0.95,
    revive: float = 0.1,
    generator: torch.Generator,
) -> None:
    """One step of a codebook towards the rows of a batch, in place (van den Oord et al. 2017, appendix A.1).

    x [..., B, d]; keys [..., M, d]; counts [..., M] and sums [..., M, d]: moving averages, over batches, of the
    number and the sum of the rows that are nearest to each key. A key is its sum over its count, the count smoothed
    by 1e-5. A key whose count is below `revive` * B / M becomes a row of the batch, any row; 0 revives none.
    Leading dimensions are codebooks of their own. float64 is wanted throughout.
    """
    size, smooth = keys.shape[-2], 1e-5
    one_hot = torch.nn.functional.one_hot(assign(x, keys), size).to(keys)
    counts.lerp_(one_hot.sum(-2), 1 - decay)
    sums.lerp_(one_hot.mT @ x, 1 - decay)
    total = counts.sum(-1, keepdim=True)
    smoothed = (counts + smooth) / (total + size * smooth) * total
    keys.copy_(sums / smoothed[..., None])
    floor = revive * x.shape[-2] / size
    dead = counts < floor
    chosen = torch.randint(x.shape[-2], dead.shape, generator=generator)
    reborn = x.gather(-2, chosen[..., None].expand(keys.shape))
    keys.copy_(torch.where(dead[..., None], reborn, keys))
    counts.copy_(torch.where(dead, floor, counts))
    sums.copy_(torch.where(dead[..., None], reborn * floor, sums))
