"""Forgetting against doing it all again."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.ratio import Ratio, speedup
from engram.core.needs import Need
from engram.core.request import Request
from engram.data.readers import read
from engram.engine.optimizer import Optimizer
from engram.engine.recipe import Recipe
from engram.forget.ssd import SSD
from engram.stats.ridge import Ridge


def ratios(rows: int = 60_000, width: int = 2048) -> Iterator[Ratio]:
    """ACU's subtraction against a refit on the rows that stay; SSD against retraining."""
    draws = torch.Generator().manual_seed(0)
    phi = torch.rand(rows, width, generator=draws).double()
    y = torch.nn.functional.one_hot(torch.randint(0, 10, (rows,), generator=draws), 10).double()
    ridge = Ridge(width, 0.1)
    ridge.add(phi, y)
    for k in (1, 10, 100, 1000):

        def forget(k: int = k) -> None:
            ridge.remove(phi[:k], y[:k])
            _ = ridge.weights
            ridge.add(phi[:k], y[:k])  # put back for the next repeat: counted, so the ratio is a lower bound

        def refit(k: int = k) -> None:
            other = Ridge(width, 0.1)
            other.add(phi[k:], y[k:])
            _ = other.weights

        yield speedup(f"ACU forgets {k} of {rows} records, d = {width}, against a refit", forget, refit, repeats=3)
    yield from _ssd()


def _ssd() -> Iterator[Ratio]:
    digits = read("sklearn:digits")
    recipe = Recipe({"name": "MLP", "hidden": [128]}, Optimizer(), epochs=30)
    model = recipe(digits, 0)
    request = Request.of_classes(digits, (3,))
    stored = request.but(at_hand={Need.STATISTICS: SSD().prepare(model, digits)})
    rest = request.retain
    assert rest is not None
    name = "SSD forgets a class, MLP of 30 epochs, against retraining"
    yield speedup(name, lambda: SSD().forget(model, request), lambda: recipe(rest, 1), repeats=3)
    yield speedup(f"{name}; statistics stored", lambda: SSD().forget(model, stored), lambda: recipe(rest, 1), repeats=3)
