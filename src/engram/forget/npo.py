"""Negative preference optimisation: gradient ascent whose force dies out where the row is forgotten already.

Zhang, Lin, Bai, Mei: Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning. COLM 2024,
arXiv 2404.05868.

With r = log p(answer) - log p_ref(answer), sums over the answer's tokens, ref the model before forgetting:

    L_NPO = (2 / beta) mean log(1 + exp(beta r))        [+ retain_weight * a term on the retain rows]

Its gradient is that of the mean log-probability, weighted by 2 e^{beta r} / (1 + e^{beta r}): 1 at the start, 0 once
the answer has become unlikely. beta -> 0 is gradient ascent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from engram.core.forgetter import rows
from engram.core.request import Request
from engram.data.table import Batch
from engram.engine.lm import answer_logp
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.engine.teacher import RowCache
from engram.forget.language import Retaining, reference_logp


def rejection(ratio: Tensor, beta: float) -> Mean:
    """(2 / beta) mean log(1 + exp(beta r)) of log-ratios r [B]; its limit is r + (2 / beta) log 2 as beta goes to 0."""
    return (2 / beta) * Mean.of(-F.logsigmoid(-beta * ratio))


@dataclass(kw_only=True, eq=False)
class NPO(Retaining):
    """`beta`: how soon the force dies out. `retain_weight` 0 is plain NPO; else `retain_term` "loss" is NPO+RT and "kl"
    NPO+KL.

    For causal language models (token labels) and for classifiers. The reference's log-probabilities are computed once
    per row; there is no second model in memory. Cost: as the template, and one forward pass over the forget rows.
    """

    beta: float = 0.1

    @classmethod
    def tiny(cls) -> NPO:
        """A setting for checks on a handful of rows."""
        return cls(beta=0.5, optimizer=Optimizer(lr=1e-3), epochs=2, batch_size=8)

    def targets(self, model: nn.Module, request: Request, run: Run) -> None:
        super().targets(model, request, run)
        self.reference: RowCache = reference_logp(model, rows(request.forget), run, "reference log-probabilities")

    def terms(self, model: nn.Module, forget: Batch, retain: Batch | None) -> Mean:
        ratio = answer_logp(model, forget, reduce="sum") - self.reference(forget)
        return self.with_retain(rejection(ratio, self.beta), model, retain)
