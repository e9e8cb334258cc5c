"""Importances of weights against a loop over single rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ratio import Ratio, speedup
from engram.data.readers import read
from engram.data.table import Table
from engram.engine.importance import importance
from engram.engine.run import Run
from engram.models.build import build


def ratios(rows: int = 1000) -> Iterator[Ratio]:
    """Those of EWC (Fisher of the true labels) and of MAS (norm of the outputs), on the MLP of the digits."""
    digits = read("sklearn:digits").take(range(rows))
    draws = torch.Generator().manual_seed(0)
    model = build(
        {"name": "MLP", "hidden": [256, 256]}, inputs=digits.shapes, classes=digits.classes, generator=draws
    ).eval()
    for name, loss, power in (("EWC", "ce", 2), ("MAS", "norm", 1)):
        yield speedup(
            f"importances of {name}, {rows} rows, MLP 64-256-256-10, against a loop over rows",
            lambda loss=loss, power=power: importance(model, digits, loss=loss, power=power, run=Run()),  # type: ignore[misc]
            lambda loss=loss, power=power: by_rows(model, digits, loss, power),  # type: ignore[misc]
            repeats=3,
        )


def by_rows(model: nn.Module, table: Table, loss: str, power: int) -> dict[str, Tensor]:
    """The loop that one would write: a backward pass for each row."""
    params = dict(model.named_parameters())
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in params.items()}
    for row in range(len(table)):
        batch = table.batch(torch.tensor([row]))
        logits = model(**batch.inputs).logits
        assert batch.labels is not None
        value = F.cross_entropy(logits, batch.labels) if loss == "ce" else logits.square().sum()
        for name, gradient in zip(params, torch.autograd.grad(value, list(params.values())), strict=True):
            total[name] += gradient.double().abs() ** power
    return {name: value / len(table) for name, value in total.items()}
