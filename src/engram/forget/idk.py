"""Learning to answer "I don't know": plain training on the forget questions with refusals for answers.

Maini et al.: TOFU, arXiv 2401.06121; a baseline of Zhang, Lin, Bai, Mei: Negative Preference Optimization, COLM 2024,
arXiv 2404.05868. One cross-entropy over the tokens of both [forget questions with refusals; retain rows].
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from engram.core.forgetter import rows
from engram.core.request import Request
from engram.core.unlearning import usual_loss
from engram.data.table import Batch, Table
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.forget.language import Adapted, of_same_rows, refusals_for


@dataclass(kw_only=True, eq=False)
class IDK(Adapted):
    """`refusals`: answers such as "I don't know." as token ids, end-of-sequence included; each forget row draws one,
    once. A classifier needs none: it learns a class drawn at random. A token of the retain rows counts `retain_weight`
    times.

    Cost: as the template.
    """

    refusals: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def tiny(cls) -> IDK:
        """A setting for checks on a handful of rows."""
        return cls(optimizer=Optimizer(lr=1e-3), epochs=2, batch_size=8)

    def targets(self, model: nn.Module, request: Request, run: Run) -> None:
        self.refused: Table = refusals_for(model, rows(request.forget), self.refusals, run)

    def terms(self, model: nn.Module, forget: Batch, retain: Batch | None) -> Mean:
        loss = usual_loss(model, of_same_rows(self.refused, forget))
        return loss if retain is None else _together(loss, usual_loss(model, retain), self.retain_weight)


def _together(one: Mean, other: Mean, weight: float) -> Mean:
    """One mean over the entries of both, those of the other so weighted."""
    (total, count), (more, entries) = one.terms[0], other.terms[0]
    return Mean.over(total + weight * more, count + weight * entries)
