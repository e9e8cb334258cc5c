"""Negative preference optimisation: gradient ascent whose force dies out where the row is forgotten already.

Zhang, Lin, Bai, Mei: Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning. COLM 2024,
arXiv 2404.05868.

With r = log p(answer) - log p_ref(answer), sums over the answer's tokens, ref the model before forgetting:

    L_NPO = (2 / beta) mean log(1 + exp(beta r))        [+ retain_weight * the usual loss of retain rows]

Its gradient is that of the mean log-probability, weighted by 2 e^{beta r} / (1 + e^{beta r}): 1 at the start, 0 once
the answer has become unlikely. beta -> 0 is gradient ascent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from engram.core.forgetter import rows
from engram.core.request import Request
from engram.core.unlearning import GradientForgetter, usual_loss
from engram.data.table import Batch
from engram.engine.lm import sequence_logp
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.engine.teacher import RowCache, cached


@dataclass(kw_only=True, eq=False)
class NPO(GradientForgetter):
    """`beta`: how soon the force dies out. `retain_weight` 0 is plain NPO, 1 is NPO+RT.

    For causal language models (token labels) and for classifiers. The reference's log-probabilities are computed once
    per row; there is no second model in memory. Cost: as the template, and one forward pass over the forget rows.
    """

    beta: float = 0.1

    @classmethod
    def tiny(cls) -> NPO:
        """A setting for checks on a handful of rows."""
        return cls(beta=0.5, optimizer=Optimizer(lr=1e-3), epochs=2, batch_size=8)

    def targets(self, model: nn.Module, request: Request, run: Run) -> None:
        self.reference: RowCache = cached(model, rows(request.forget), _logp, run, "reference log-probabilities")

    def terms(self, model: nn.Module, forget: Batch, retain: Batch | None) -> Mean:
        assert forget.labels is not None
        ratio = sequence_logp(model(**forget.inputs).logits, forget.labels) - self.reference(forget)
        loss = (2 / self.beta) * Mean.of(F.softplus(self.beta * ratio))
        return loss if retain is None else loss + self.retain_weight * usual_loss(model, retain)


def _logp(output: Any, batch: Batch) -> Tensor:
    assert batch.labels is not None
    return sequence_logp(output.logits, batch.labels)
