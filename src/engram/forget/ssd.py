"""Selective synaptic dampening: shrink the parameters that matter mostly to the forget rows.

Foster, Schoepf, Brintrup: Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening. AAAI 2024,
arXiv 2308.07707.

1. I_D: how much every parameter matters to all training rows (retain and forget together); I_f: to the forget rows.
2. Selected are the parameters with I_f > alpha * I_D.
3. These are multiplied by min(lambda * I_D / I_f, 1); all others stay as they are. Nothing is trained.

Importance is the diagonal of the empirical Fisher matrix. Published code squares the gradient of a batch's mean loss
(`per_sample=False`): then the result depends on batch size and row order. With the per-row form, I_f / I_D is at most
n / n_f, so that alpha has to stay well below that: alpha 10 selects nothing when one of ten balanced classes goes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from engram.core.forgetter import Forgetter, Statistics, rows, statistics_of
from engram.core.needs import Need, Needs, needs
from engram.core.request import Request
from engram.data.table import Table
from engram.engine.importance import Importance, importance
from engram.engine.run import Run

KIND = "importance of all training rows"


@dataclass(kw_only=True, eq=False)
class SSD(Forgetter):
    """`alpha`: how many times more a parameter must matter to the forget rows. `strength`: the paper's lambda, on which
    the factor of the selected depends; `exponent` sharpens it. `per_sample`: the Fisher per row (alpha 1 to 3), or the
    published batch form (alpha 10). `batch_size` matters to the batch form. `loss`: "ce", or "norm" (squared norm of
    the logits) with `power` 1, which needs no labels.

    Cost: one forward and backward pass over the forget rows, and one over all rows unless `prepare` stored it.
    """

    alpha: float = 2.0
    strength: float = 1.0
    exponent: float = 1.0
    per_sample: bool = True
    batch_size: int = 64
    loss: str = "ce"
    power: int = 2

    processes: ClassVar[str] = "one"

    @classmethod
    def tiny(cls) -> SSD:
        """A setting for checks on a handful of rows."""
        return cls(alpha=1.0)

    @property
    def needs(self) -> Needs:
        forget, retain = {Need.FORGET_ROWS}, {Need.RETAIN_ROWS}
        if self.loss == "ce":
            forget, retain = {*forget, Need.FORGET_LABELS}, {*retain, Need.RETAIN_LABELS}
        return needs(forget | {Need.STATISTICS}, forget | retain)

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        self.check(request)
        run = run or Run()
        new = copy.deepcopy(model)
        of_forget = self._importance(model, rows(request.forget), run)
        stored = statistics_of(request, KIND)
        of_all = dict(stored) if stored is not None else self._of_all(model, request, run)
        with torch.no_grad():
            for name, parameter in new.named_parameters():
                if name in of_forget:
                    parameter.mul_(self.factors(of_forget[name], of_all[name]).to(parameter))
        return new

    def prepare(self, model: nn.Module, train: Table, run: Run | None = None) -> dict[str, Statistics]:
        """The importances of all training rows: with these stored, forgetting needs the forget rows alone."""
        return {KIND: self._importance(model, train, run or Run())}

    def factors(self, of_forget: torch.Tensor, of_all: torch.Tensor) -> torch.Tensor:
        """What every scalar parameter is multiplied by: 1 for those that are not selected."""
        selected = of_forget > self.alpha * of_all
        ratio = self.strength * of_all / torch.where(selected, of_forget, 1.0)
        return torch.where(selected, ratio.pow(self.exponent).clamp(max=1.0), 1.0)

    def _of_all(self, model: nn.Module, request: Request, run: Run) -> Importance:
        everything = rows(request.retain).concat(rows(request.forget))
        return run.phase("importance of all rows", lambda: self._importance(model, everything, run))

    def _importance(self, model: nn.Module, table: Table, run: Run) -> Importance:
        return importance(
            model,
            table,
            loss=self.loss,
            per_sample=self.per_sample,
            power=self.power,
            batch_size=self.batch_size,
            run=run,
        )
