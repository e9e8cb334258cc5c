"""What audits are made of: projected gradients, alignment of representations, nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from benchmarks.keeping import peak
from benchmarks.ratio import Ratio, speedup
from engram.engine.attribution import Projection
from engram.stats.knn import nearest
from engram.stats.similarity import cka

PARAMETERS = 272_474  # of a ResNet-20 for ten classes


def ratios() -> Iterator[Ratio]:
    """Memory bounds are those beside the data."""
    yield from _alignment()
    yield from _neighbours()
    if find_spec("trak") is not None:  # the package traker, which nothing here depends on
        yield _projection()


def _projection(rows: int = 64, width: int = 512, seeds: int = 6) -> Ratio:
    """Against a dense matrix of signs, in blocks of 100 columns, by traker's BasicProjector; the gradients have 8
    common directions, and scales that differ by parameter."""
    from trak.projectors import BasicProjector, ProjectionType

    draws = torch.Generator().manual_seed(0)
    scales = torch.rand(PARAMETERS, generator=draws) ** 8
    shared = torch.randn(rows, 8, generator=draws) @ torch.randn(8, PARAMETERS, generator=draws)
    x = shared * scales + 0.1 * torch.randn(rows, PARAMETERS, generator=draws)

    def dense(seed: int) -> Any:
        return BasicProjector(PARAMETERS, width, 7919 * seed, ProjectionType.rademacher, "cpu")

    off = ~torch.eye(rows, dtype=torch.bool)
    ours, theirs = (
        torch.stack([(_cosines(z) - _cosines(x))[off] for z in projected]).square().mean().sqrt()
        for projected in (
            [Projection(PARAMETERS, width, seed)(x) for seed in range(seeds)],
            [dense(seed).project(x, 0) for seed in range(seeds)],
        )
    )
    sketch, basic = Projection(PARAMETERS, width, 0), dense(0)
    name = f"TRAK: {rows} gradients of {PARAMETERS:,} to {width}, BasicProjector (error {ours:.3f}, its {theirs:.3f})"
    return speedup(name, lambda: sketch(x), lambda: basic.project(x, 0), least=15)


def _cosines(x: Tensor) -> Tensor:
    x = torch.nn.functional.normalize(x.double(), dim=1)
    return x @ x.T


def _alignment(rows: int = 60_000, width: int = 512) -> Iterator[Ratio]:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=draws)
    y = x.roll(1, 1) + 0.5 * torch.randn(rows, width, generator=draws)
    found = cka(x, y, unbiased=False)
    yield _megabytes("CKA, 60,000 x 512: MB beside the data", peak(lambda: cka(x, y)), 50)
    a, b = (side.double() - side.double().mean(0) for side in (x, y))
    gap = abs(found - float((a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())))
    yield Ratio("CKA, 60,000 x 512: difference to whole products in float64", gap, gap, gap, "<= 1e-6", gap <= 1e-6)


def _neighbours(rows: int = 60_000, queries: int = 10_000, width: int = 64, k: int = 10) -> Iterator[Ratio]:
    draws = torch.Generator().manual_seed(0)
    bank, q = (torch.randn(n, width, generator=draws) for n in (rows, queries))
    theirs = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine").fit(bank.numpy())
    name = f"{k} nearest of {rows:,} x {width} for {queries:,} rows"
    yield _megabytes(f"{name}: MB beside the data", peak(lambda: nearest(q, bank, k)), 300)
    act = lambda: theirs.kneighbors(q.numpy())  # noqa: E731
    yield speedup(f"{name}, against scikit-learn, brute", lambda: nearest(q, bank, k), act, least=1, repeats=1)


def _megabytes(name: str, size: int, most: float) -> Ratio:
    value = size / 2**20
    return Ratio(name, value, value, value, f"<= {most:g}", value <= most)
