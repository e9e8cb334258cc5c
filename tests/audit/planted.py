"""Planted cases: digits with random labels, of which nothing can be known but what was memorised."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engram.core.finding import Finding
from engram.core.forgetter import Forgetter
from engram.core.probe import Probe, Subject, Trained
from engram.core.request import Request
from engram.data.table import Table
from engram.engine.optimizer import Optimizer
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.models.output import Output

RECIPE = Recipe({"name": "MLP", "hidden": [64]}, Optimizer(lr=1e-2), epochs=30, batch_size=30, classes=tuple(range(10)))


@dataclass(kw_only=True, eq=False)
class Nothing(Forgetter):
    """Hands back the model as it is: everything is still known."""

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        return copy.deepcopy(model)


@dataclass(kw_only=True, eq=False)
class Anew(Forgetter):
    """Retrains, with the seed of the run: nothing is known any more."""

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        assert request.retain is not None and run is not None
        return RECIPE(request.retain, run.seed, run)


@dataclass(frozen=True, eq=False)
class Same(Subject):
    """Forgetting gives the retrained models themselves, and all of these are the same few."""

    def models(self, role: str, n: int, run: Run) -> list[Trained]:
        few = super().models("oracle", 6, run)
        return [few[k % 6] for k in range(n)]


class Says(nn.Module):
    """Answers every row with the values that the function gives for it, [n, k]."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, values: Tensor, **_: Any) -> Output:
        return Output(logits=self.answer(values))


def random_labels(table: Table, seed: int) -> Table:
    return table.with_labels(torch.randint(0, 10, (len(table),), generator=torch.Generator().manual_seed(seed)))


def found(probe: Probe, subject: Subject, run: Run | None = None) -> dict[str, Finding]:
    """What the probe finds, by name."""
    probe.check(subject)
    return {finding.name: finding for finding in probe.examine(subject, run)}
