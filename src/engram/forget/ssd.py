"""Selective synaptic dampening: shrink the parameters that matter mostly to the forget rows.

Foster, Schoepf, Brintrup: Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening. AAAI 2024,
arXiv 2308.07707.

1. I_D: how much every parameter matters to all training rows (retain and forget together); I_f: to the forget rows.
2. Selected are the parameters with I_f > alpha * I_D.
3. These are multiplied by min(lambda * I_D / I_f, 1); all others stay as they are. Nothing is trained.

Importance is the diagonal of the empirical Fisher matrix. Published code squares the gradient of a batch's mean loss
(`per_sample=False`): then the result depends on batch size and row order. With the per-row form, I_f / I_D is at most
n / n_f, so that alpha has to stay well below that: alpha 10 selects nothing when one of ten balanced classes goes.

Beyond the paper: `scale="layer"` measures I_f / I_D against the mean ratio of its layer, since late layers dominate
otherwise; and `alpha="auto"` looks for alpha. It goes down a fixed grid, in both scales, as long as the predictions of
retain rows stay, and takes the setting that gets fewest forget rows right. It sees what SSD sees: forget
rows and retain rows, or the forget rows and stored importances alone, whose I_D then bounds the damage to second order:
sum of I_D (change of the parameter)², which is safe and weak.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import nn

from engram.core.forgetter import Forgetter, Statistics, rows, statistics_of
from engram.core.needs import Need, Needs, needs
from engram.core.request import Request
from engram.data.table import Table
from engram.engine.importance import Importance, importance
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.errors import EngramError, unknown

KIND = "importance of all training rows"
SCALES = ("model", "layer")
GRID = tuple(round(30 / 1.2**k, 4) for k in range(18))  # alphas from 30 down to 1.35
DAMAGE = 0.04  # of the loss, to second order, where no retain rows can be asked
ASKED = 1000  # retain rows


@dataclass(kw_only=True, eq=False)
class SSD(Forgetter):
    """`alpha`: how many times more a parameter must matter to the forget rows, or "auto"; `scale`: "model", or "layer".
    `strength`: the paper's lambda, on which the factor of the selected depends; `exponent` sharpens it. `budget`: the
    share of the retain rows whose prediction "auto" may change. `per_sample`: the Fisher per row (alpha 1 to 3), or the
    published batch form (alpha 10). `batch_size` matters to the batch form. `loss`: "ce", or "norm" (squared norm of
    the logits) with `power` 1, which needs no labels.

    Cost: one forward and backward pass over the forget rows, and one over all rows unless `prepare` stored it; with
    "auto", a few tens of forward passes over the forget rows and 1,000 retain rows besides. EngramError for an unknown
    scale, and where "auto" is asked to judge a model that predicts no classes.
    """

    alpha: float | Literal["auto"] = 2.0
    scale: str = "model"
    strength: float = 1.0
    exponent: float = 1.0
    budget: float = 0.04
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
        if self.scale not in SCALES:
            raise unknown("scale", self.scale, SCALES)
        run = run or Run()
        of_forget = self._importance(model, rows(request.forget), run)
        stored = statistics_of(request, KIND)
        of_all = dict(stored) if stored is not None else self._of_all(model, request, run)
        if self.alpha != "auto":
            return self.dampened(model, of_forget, of_all)
        alpha, scale = run.phase("alpha", lambda: self.found(model, request, of_forget, of_all, run))
        return replace(self, alpha=alpha, scale=scale).dampened(model, of_forget, of_all)

    def dampened(self, model: nn.Module, of_forget: Importance, of_all: Importance) -> nn.Module:
        """A copy of the model whose selected parameters are smaller."""
        new = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in new.named_parameters():
                if name in of_forget:
                    mine, everyones = (found[name].to(parameter.device) for found in (of_forget, of_all))
                    parameter.mul_(self.factors(mine, everyones).to(parameter))
        return new

    def found(
        self, model: nn.Module, request: Request, of_forget: Importance, of_all: Importance, run: Run
    ) -> tuple[float, str]:
        """The alpha and scale of "auto"."""
        gone = rows(request.forget)
        kept = None if request.retain is None else _some(request.retain, run)
        wrong = _answers(model, gone, run) if gone.labels is None else gone.labels  # what is to be unlearnt
        right = None if kept is None else _answers(model, kept, run)
        best = (2.0, 0.0, GRID[0], "model")  # fewest forget rows right, then least damage
        for scale in SCALES:
            for alpha in GRID:
                new = replace(self, alpha=alpha, scale=scale).dampened(model, of_forget, of_all)
                damage = _damage(model, new, of_all)
                if damage == 0:
                    continue
                if kept is not None and right is not None:
                    damage = 1 - _agreement(new, kept, right, run)
                if damage > (self.budget if kept is not None else DAMAGE):
                    break
                best = min(best, (_agreement(new, gone, wrong, run), damage, alpha, scale))
        return best[2], best[3]

    def prepare(self, model: nn.Module, train: Table, run: Run | None = None) -> dict[str, Statistics]:
        """The importances of all training rows: with these stored, forgetting needs the forget rows alone."""
        return {KIND: self._importance(model, train, run or Run())}

    def factors(self, of_forget: torch.Tensor, of_all: torch.Tensor) -> torch.Tensor:
        """What every scalar parameter is multiplied by: 1 for those that are not selected."""
        if self.scale == "layer":
            of_all = of_all * (of_forget.sum() / of_all.sum().clamp(min=1e-300))
        selected = of_forget > float(self.alpha) * of_all
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


def _some(retain: Table, run: Run) -> Table:
    order = torch.randperm(len(retain), generator=run.generator("rows asked"))
    return retain.take(order[:ASKED].sort().values)


def _answers(model: nn.Module, table: Table, run: Run) -> torch.Tensor:
    logits = predict(model, table, run=run)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise EngramError('alpha="auto" judges by predicted classes, and this model predicts none; give a number')
    return logits.argmax(1)


def _agreement(model: nn.Module, table: Table, answers: torch.Tensor, run: Run) -> float:
    """The share of rows that are given these answers."""
    return float((_answers(model, table, run) == answers).double().mean())


def _damage(model: nn.Module, new: nn.Module, of_all: Importance) -> float:
    """Sum of I_D (change)²: about twice the rise of the loss on all rows."""
    before = dict(model.named_parameters())
    changes = ((name, (p - before[name]).detach().double()) for name, p in new.named_parameters() if name in of_all)
    return sum(float((of_all[name].to(change) * change.square()).sum()) for name, change in changes)
