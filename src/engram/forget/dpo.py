"""Direct preference optimisation: an "I don't know" is preferred to the true answer.

Rafailov et al.: Direct Preference Optimization, NeurIPS 2023, arXiv 2305.18290; for forgetting as in Zhang, Lin, Bai,
Mei: Negative Preference Optimization, COLM 2024, arXiv 2404.05868, and Maini et al.: TOFU, arXiv 2401.06121.

With r_w and r_l the log-ratios to the model before forgetting of the refusal and of the true answer, sums over tokens:

    L_DPO = -(2 / beta) mean log sigmoid(beta (r_w - r_l))      [+ retain_weight * a term on the retain rows]

The factor is 2 / beta as in published code (the paper writes 1 / beta). Without the refusal it is NPO.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from engram.core.forgetter import rows
from engram.core.request import Request
from engram.data.table import Batch, Table
from engram.engine.lm import answer_logp
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.engine.teacher import RowCache
from engram.forget.language import Retaining, of_same_rows, reference_logp, refusals_for
from engram.forget.npo import rejection


@dataclass(kw_only=True, eq=False)
class DPO(Retaining):
    """`refusals`: answers such as "I don't know." as token ids, end-of-sequence included; each forget row draws one,
    once. A classifier needs none: it prefers a class drawn at random. `retain_weight` 0 is plain DPO; else
    `retain_term` "loss" is DPO+RT and "kl" DPO+KL.

    Cost: as the template, with a second pass over each forget batch, and two forward passes over the forget rows.
    """

    beta: float = 0.1
    refusals: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def tiny(cls) -> DPO:
        """A setting for checks on a handful of rows."""
        return cls(beta=0.5, optimizer=Optimizer(lr=1e-3), epochs=2, batch_size=8)

    def targets(self, model: nn.Module, request: Request, run: Run) -> None:
        super().targets(model, request, run)
        forget = rows(request.forget)
        self.preferred: Table = refusals_for(model, forget, self.refusals, run)
        self.rejected_before: RowCache = reference_logp(model, forget, run, "reference of true answers")
        self.preferred_before: RowCache = reference_logp(model, self.preferred, run, "reference of refusals")

    def terms(self, model: nn.Module, forget: Batch, retain: Batch | None) -> Mean:
        preferred = of_same_rows(self.preferred, forget)
        gain = answer_logp(model, preferred, reduce="sum") - self.preferred_before(preferred)
        loss = answer_logp(model, forget, reduce="sum") - self.rejected_before(forget)
        return self.with_retain(rejection(loss - gain, self.beta), model, retain)
