"""Many trainings at once against a pool of processes that does them one by one, both with the same workers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from joblib import Parallel, delayed
from torch import Tensor, nn

from benchmarks.ratio import Ratio, speedup
from engram.data.readers import read
from engram.data.table import Table
from engram.engine.many import fit_many
from engram.engine.recipe import Recipe
from engram.stats.seeds import generator

WORKERS = 2
CASES: dict[str, tuple[Any, int, float]] = {
    "MLP 64-32-10": ({"name": "MLP", "hidden": [32]}, 64, 1.5),
    "MLP 64-200-10": ({"name": "MLP", "hidden": [200]}, 64, 1.5),
    "MLP 64-64-64-10": ({"name": "MLP", "hidden": [64, 64]}, 64, 1.5),
    "MLP 64-256-256-10": ({"name": "MLP", "hidden": [256, 256]}, 16, 0.95),
    "ConvNet 16-32 on 8x8": ({"name": "ConvNet", "widths": [16, 32], "norm": "group"}, 16, 0.95),
    "ConvNet 32-64 on 8x8, batch statistics": ({"name": "ConvNet", "widths": [32, 64]}, 8, 0.95),
}


def ratios() -> Iterator[Ratio]:
    """Digits, halves of the rows, 10 epochs, batch 64, Adam."""
    digits = read("sklearn:digits")
    for name, (network, count, least) in CASES.items():
        recipe = Recipe(network, epochs=10, classes=digits.classes)
        halves = [torch.randperm(len(digits), generator=generator("half", k))[: len(digits) // 2] for k in range(count)]
        yield _against_a_pool(f"fit_many, {count} x {name}, against a pool", recipe, digits, halves, least)


def _against_a_pool(name: str, recipe: Recipe, table: Table, subsets: list[Tensor], least: float) -> Ratio:
    seeds = range(len(subsets))

    def pool() -> list[nn.Module]:
        jobs = (delayed(_single)(recipe, table.take(rows), seed) for rows, seed in zip(subsets, seeds, strict=True))
        return list(Parallel(n_jobs=WORKERS, mmap_mode="c")(jobs))  # as fit_many asks, so that both find warm processes

    def ours() -> list[nn.Module]:
        return fit_many(recipe, table, subsets, seeds, workers=WORKERS)

    return speedup(name, ours, pool, least=least, repeats=3, clock=time.perf_counter)


def _single(recipe: Recipe, table: Table, seed: int) -> nn.Module:
    torch.set_num_threads(1)
    return recipe(table, seed)
