"""U-LiRA: can a model that unlearned a row be told from one that never saw it?

Hayes, Shumailov, Triantafillou, Khalifa, Papernot: Inexact Unlearning Needs More Careful Evaluations to Avoid a False
Sense of Privacy. SaTML 2025, arXiv 2403.01218; after Kurmanji et al. 2023.

One attacker per row x: its confidences under models that were trained with x and then made to forget it by the method
under examination, and under models that were retrained without, are taken as normal, and a model is called unlearned
where p = N_u / (N_u + N_r) > .5. The attackers learn from one half of the models and are judged on the other, and the
other way round: unseen models of one kind with themselves then give .5, which is the aim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from engram.audit.lira import FEW, RATES
from engram.audit.populations import PopulationProbe, class_rows, confidences, over_rows, parted, populations
from engram.core.finding import MARGINS, Finding
from engram.core.probe import Subject
from engram.engine.run import Run
from engram.stats.attacks import ulira_log_odds
from engram.stats.intervals import auc

Statistic = Callable[[np.ndarray], float]


@dataclass(kw_only=True, eq=False)
class ULiRA(PopulationProbe):
    """Accuracy, AUC, and TPR at 0.1 % and 1 % FPR of telling unlearned from retrained models, over the forget rows.

    It examines the method rather than one model: `models` originals are trained on all rows and forget the request,
    and twice as many are retrained without it. References: retrained models told from retrained ones, at the same
    number. Fewer than 128 models pool the standard deviation over rows. Intervals: bootstrap over the rows.
    EngramError for rows without class labels, and for fewer than 4 models. Cost: 3 `models` trainings, `models` times
    forgetting; shared with KLoM and ForgettingScore.
    """

    models: int = 64
    margin: float = MARGINS["AUC"]

    asks: ClassVar[frozenset[str]] = frozenset({"model", "request", "forget", "retain", "recipe", "forgetter"})
    tables: ClassVar[tuple[str, ...]] = ("forget",)
    least: ClassVar[int] = 4

    @classmethod
    def tiny(cls) -> ULiRA:
        """A setting for checks on a handful of rows."""
        return cls(models=4)

    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        run = run or Run()
        self.check(subject)
        forget = class_rows(self, subject, "forget")
        made = populations(subject, self.models, run)
        unlearned, retrained = (confidences(models, forget, run) for models in (made.unlearned, made.retrained))
        pooled = len(unlearned) // 2 < FEW
        told = crossed(unlearned, retrained[: len(unlearned)], pooled)
        untold = [crossed(one, other, pooled) for one, other in parted(retrained, run)]
        protocol = {
            "unlearned models": len(unlearned),
            "retrained models": len(unlearned),
            "standard deviation": "pooled" if pooled else "of every row",
            "references": "retrained against retrained models, at the same number",
        }
        found = []
        for name, unit, statistic in _statistics():
            value, interval = over_rows(told, statistic, run)
            reference = tuple(statistic(scores.numpy()) for scores in untold)
            found.append(
                Finding(
                    name,
                    value,
                    len(forget),
                    interval,
                    unit=unit,
                    reference=reference,
                    margin=self.margin,
                    protocol=protocol,
                )
            )
        return found


def crossed(unlearned: Tensor, retrained: Tensor, pooled: bool) -> Tensor:
    """Log-odds [n, 2 halves, 2 kinds, N // 2] of "unlearned" for confidences [N, n] of either kind, by attackers that
    learnt from the other half of the models."""
    size = len(unlearned) // 2
    halves = [slice(0, size), slice(size, 2 * size)]
    found = [
        [
            ulira_log_odds(kind[judged], unlearned[known], retrained[known], pooled=pooled)
            for kind in (unlearned, retrained)
        ]
        for known, judged in (halves, halves[::-1])
    ]
    return torch.from_numpy(np.array(found)).permute(3, 0, 1, 2)


def _statistics() -> list[tuple[str, str, Statistic]]:
    """Name, unit and statistic of the log-odds; areas and rates within each half, where the attackers are the same."""

    found = [("accuracy of U-LiRA", "accuracy", _accuracy), ("AUC of U-LiRA", "AUC", _halved(_area))]
    rates = [(f"TPR of U-LiRA at {100 * fpr:g}% FPR", "rate", _halved(partial(_rate, fpr))) for fpr in RATES]
    return [*found, *rates]


def _accuracy(odds: np.ndarray) -> float:
    return float(((odds[:, :, 0] > 0).mean() + (odds[:, :, 1] <= 0).mean()) / 2)


def _area(odds: np.ndarray) -> float:
    return auc(odds[:, 0], odds[:, 1]).value


def _rate(fpr: float, odds: np.ndarray) -> float:
    """As `intervals.tpr_at` gives it, without its interval."""
    others = np.sort(odds[:, 1], axis=None)[::-1]
    return float((odds[:, 0] > others[math.floor(fpr * len(others) + 1e-9)]).mean())


def _halved(statistic: Statistic) -> Statistic:
    return lambda odds: float(np.mean([statistic(odds[:, half]) for half in range(2)]))
