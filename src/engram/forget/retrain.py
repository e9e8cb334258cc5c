"""Retraining without the forget rows: the oracle that every other forgetter is judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from engram.core.forgetter import Forgetter, at_hand, rows
from engram.core.needs import Need, Needs, needs
from engram.core.request import Request
from engram.engine.run import Run
from engram.stats.seeds import derive


@dataclass(kw_only=True, eq=False)
class Retrain(Forgetter):
    """Train a new model on the retain rows with the recipe of the old one. Exact by definition.

    `seed`: another training for every seed, here and of the run. It does with a forget set that is all of the data only
    where the recipe does. Cost: one training.
    """

    seed: int = 0

    exact: ClassVar[bool] = True

    @classmethod
    def tiny(cls) -> Retrain:
        """A setting for checks on a handful of rows."""
        return cls(seed=1)

    @property
    def needs(self) -> Needs:
        return needs({Need.RETAIN_ROWS, Need.RETAIN_LABELS, Need.RECIPE})

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        self.check(request)
        run = run or Run()
        return at_hand(request, Need.RECIPE)(rows(request.retain), derive("retrain", run.seed, self.seed), run)
