"""LiRA: was each of these rows trained on, judged by models that were and models that were not?

Carlini, Chien, Nasr, Song, Terzis, Tramèr: Membership Inference Attacks From First Principles. IEEE S&P 2022,
arXiv 2112.03570.

Shadow models are trained on random halves of all rows at hand. For every row x, its confidences phi (logit-scaled)
under the shadow models with x and without it are taken as normal; the attacked model's phi(x) gets the score

    Λ(x) = ln N(phi; with x) - ln N(phi; without x)          online
    ln P(phi_without < phi)                                  offline

or its mean over views of x, if there are several. Members are the forget rows, the others test rows. The aim is not .5
but what the same attack achieves on models that never saw the forget rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from engram.audit.populations import class_rows, confidences, models_enough
from engram.core.finding import MARGINS, Finding, figure
from engram.core.probe import Measure, Measured, Probe, Subject, compared, oracles_of
from engram.core.settings import name_of
from engram.data.augment import Augment
from engram.data.table import Table
from engram.engine.run import Run
from engram.errors import EngramError
from engram.stats.attacks import lira
from engram.stats.intervals import Estimate, Values, auc, tpr_at

RATES = (0.001, 0.01)  # false positives
FEW = 64  # shadow models, below which all rows share one standard deviation
PER_CLASS = 4  # rows


@dataclass(kw_only=True, eq=False)
class LiRA(Probe):
    """AUC, and TPR at 0.1 % and 1 % FPR, of the likelihood-ratio attack on the forget rows.

    `shadows`: how many; fewer than 64 pool the standard deviation over rows. `offline`: look at the shadow models
    without a row alone. `views`: of every row that the models are asked about, the row itself among them; the others
    are made by `augment`, which should be what the models were trained with (the published attack asks about mirrored
    and shifted images; a recipe trains on rows as they are, and then more views add noise). After a class request the
    others are test rows of the forgotten classes, if there are any. A TPR at 0.1 % FPR is worth something from some
    thousand test rows on; its interval says so. EngramError for rows without class labels, and for fewer than 4 rows a
    class. Cost: `shadows` + `oracles` trainings, `views` forward passes each; the views stand in memory.
    """

    shadows: int = 64
    offline: bool = False
    views: int = 1
    augment: Augment = field(default_factory=lambda: Augment(brightness=0.0, contrast=0.0))
    oracles: int = 5
    margin: float = MARGINS["AUC"]

    asks: ClassVar[frozenset[str]] = frozenset({"model", "forget", "retain", "test", "recipe"})

    @classmethod
    def tiny(cls) -> LiRA:
        """A setting for checks on a handful of rows."""
        return cls(shadows=4, oracles=2)

    def check(self, subject: Subject) -> None:
        """EngramError for what is not at hand, rows without class labels, too few of them, and too few models."""
        super().check(subject)
        models_enough(self, self.shadows, 4)
        if self.views < 1:
            raise EngramError(f"{name_of(self)} asks about 1 view of a row or more, not {self.views}")
        members, others = self._sides(subject)
        rows, classes = (
            sum(map(len, (members, others, subject.rows["retain"]))),
            len({*members.classes, *others.classes}),
        )
        if rows < PER_CLASS * classes:
            raise EngramError(
                f"{name_of(self)} trains every shadow model on half of the rows: {rows} rows of {classes} classes are "
                f"too few, {PER_CLASS * classes} or more are needed"
            )

    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        self.check(subject)
        run = run or Run()
        members, others = self._sides(subject)
        attack = self._attack(subject, members, others, run)
        oracles = oracles_of(subject, self.oracles, run)
        n = min(len(members), len(others))
        protocol = {
            "variant": "offline" if self.offline else "online",
            "shadow models": self.shadows,
            "standard deviation": "pooled" if self.shadows < FEW else "of every row",
            "members": len(members),
            "others": len(others),
            "views of a row": self.views,
        }
        found = [
            compared(name, measure, subject.model, oracles, n=n, unit=unit, margin=self.margin, protocol=protocol)
            for name, unit, measure in attack.measures()
        ]
        if subject.before is not None:
            value, interval = attack.auc(subject.before)
            name = "AUC of LiRA before forgetting"
            found.append(figure(name, value, n, "AUC", interval=interval, protocol=protocol))
        return found

    def _sides(self, subject: Subject) -> tuple[Table, Table]:
        """Members and others."""
        others = "test-forget" if "test-forget" in subject.rows else "test"
        return class_rows(self, subject, "forget"), class_rows(self, subject, others)

    def _attack(self, subject: Subject, members: Table, others: Table, run: Run) -> _Attack:
        """Train the shadow models, the others among their rows, and look at what they say."""
        asked = members.concat(others)
        asked = replace(asked, ids=tuple(f"asked {k}" for k in range(len(asked))))  # of two tables: ids may recur
        pool = replace(subject, rows={"retain": subject.rows["retain"], "forget": asked})
        shadows = pool.models("shadow", self.shadows, run)
        views = self._views(asked, run)
        phi = _over_views([shadow.model for shadow in shadows], views, run)
        inside = torch.tensor([[id in shadow.rows.positions for id in asked.ids] for shadow in shadows])
        inside = inside.reshape(*inside.shape, *[1] * (phi.ndim - 2))
        with_it, without = (phi.masked_fill(~mask, torch.nan) for mask in (inside, ~inside))
        return _Attack(views, len(members), None if self.offline else with_it, without, self.shadows < FEW, run)

    def _views(self, asked: Table, run: Run) -> list[Table]:
        """The rows as they are, and changed."""
        if self.views == 1:
            return [asked]
        inputs = asked.batch(torch.arange(len(asked))).inputs
        changed = (self.augment(inputs, run.generator("view", k)) for k in range(1, self.views))
        return [asked, *(replace(asked, inputs=new) for new in changed)]


@dataclass(frozen=True, eq=False)
class _Attack:
    """What the shadow models say of the asked rows [N, n] (or of their views [N, n, A]), the first ones of which are
    the members."""

    views: list[Table]
    members: int
    inside: Tensor | None
    outside: Tensor
    pooled: bool
    run: Run
    known: dict[int, np.ndarray] = field(default_factory=dict)

    def measures(self) -> list[tuple[str, str, Measure]]:
        """Name, unit and measure of each finding."""
        rates = [(f"TPR of LiRA at {100 * rate:g}% FPR", "rate", self._rate(rate)) for rate in RATES]
        return [("AUC of LiRA", "AUC", self.auc), *rates]

    def auc(self, model: nn.Module) -> Measured:
        return self._measured(model, auc)

    def _rate(self, rate: float) -> Measure:
        return lambda model: self._measured(model, lambda members, others: tpr_at(members, others, rate))

    def _measured(self, model: nn.Module, statistic: Callable[[Values, Values], Estimate]) -> Measured:
        score = self._scores(model)
        found = statistic(score[: self.members], score[self.members :])
        return found.value, (found.low, found.high)

    def _scores(self, model: nn.Module) -> np.ndarray:
        if id(model) not in self.known:
            phi = _over_views([model], self.views, self.run)[0]
            self.known[id(model)] = lira(phi, self.inside, self.outside, pooled=self.pooled)
        return self.known[id(model)]


def _over_views(models: Sequence[nn.Module], views: Sequence[Table], run: Run) -> Tensor:
    """Confidences [N, n] of one view, [N, n, A] of several."""
    found = [confidences(models, view, run) for view in views]
    return found[0] if len(found) == 1 else torch.stack(found, -1)
