"""The engine against what one would write by hand."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.ratio import Ratio, overhead, speedup
from engram.data.readers import read
from engram.data.table import Table
from engram.engine.cache import FeatureCache
from engram.engine.fit import fit
from engram.engine.importance import importance
from engram.engine.losses import by_target
from engram.engine.optimizer import Optimizer
from engram.engine.recipe import Recipe
from engram.engine.run import Run


def ratios() -> Iterator[Ratio]:
    """Training, per-row Fisher, cached features."""
    digits = read("sklearn:digits")
    yield _fit("fit, MLP 64-128-128-10 in memory, batch 64, against a bare loop", "MLP", digits, 10, 1.25)
    images = Table({"pixel_values": _images(512)}, torch.arange(512) % 10)
    yield _fit("fit, ResNet-20 on 32x32, batch 64, against a bare loop", "ResNet20", images, 1, 1.10, repeats=3)
    yield _fisher("per-row Fisher, MLP, against batch size 1", "MLP", digits.take(range(512)), 20.0)
    yield _fisher("per-row Fisher, ResNet-20, against batch size 1", "ResNet20", images.take(range(64)), 2.5, repeats=3)
    model = _model("ResNet20", images).eval()
    few = images.take(range(64))
    for layout in (torch.contiguous_format, torch.channels_last):
        name = f"64 rows' gradient at once, ResNet-20, {str(layout)[6:].split('_')[0]}, against single ones"
        yield speedup(name, partial(_gradients, model, few, 64, layout), partial(_gradients, model, few, 1), repeats=3)
    with TemporaryDirectory() as folder:
        yield _cache(Path(folder), images)


def _images(n: int) -> torch.Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _model(network: str, table: Table) -> nn.Module:
    return Recipe(network).start(table, Run())


def _fit(name: str, network: str, table: Table, epochs: int, most: float, repeats: int = 5) -> Ratio:
    assert table.labels is not None
    x, y = table.batch(torch.arange(len(table))).inputs["pixel_values"], table.labels

    def ours() -> None:
        model = _model(network, table).train()
        fit(
            lambda batch: by_target(model(**batch.inputs).logits, batch.labels),
            lambda epoch: table.batches(64, seed=0, epoch=epoch),
            model=model,
            optimizer=Optimizer("adam"),
            epochs=epochs,
            run=Run(),
        )

    def bare() -> None:
        model = _model(network, table).train()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for epoch in range(epochs):
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
            for rows in order.split(64):
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(model(pixel_values=x[rows]).logits, y[rows]).backward()
                optimizer.step()

    return overhead(name, ours, bare, most=most, repeats=repeats)


def _fisher(name: str, network: str, table: Table, least: float, repeats: int = 5) -> Ratio:
    model = _model(network, table).eval()
    params = list(model.parameters())

    def loop() -> None:
        total = [torch.zeros_like(p) for p in params]
        for batch in table.batches(1, shuffle=False):
            assert batch.labels is not None
            grads = torch.autograd.grad(F.cross_entropy(model(**batch.inputs).logits, batch.labels), params)
            for sums, g in zip(total, grads, strict=True):
                sums += g**2

    return speedup(name, lambda: importance(model, table), loop, least=least, repeats=repeats)


def _gradients(
    model: nn.Module, table: Table, size: int, layout: torch.memory_format = torch.contiguous_format
) -> None:
    params = list(model.parameters())
    for batch in table.batches(size, shuffle=False):
        assert batch.labels is not None
        pixels = batch.inputs["pixel_values"].contiguous(memory_format=layout)
        torch.autograd.grad(F.cross_entropy(model(pixel_values=pixels).logits, batch.labels), params)


def _cache(folder: Path, table: Table) -> Ratio:
    model = _model("ResNet20", table)
    cache = FeatureCache(folder)

    def cold() -> None:
        cache.drop(table)
        cache.features(model, table)

    name = "features of 512 images, ResNet-20: warm cache against cold"
    return speedup(name, lambda: cache.features(model, table), cold)
