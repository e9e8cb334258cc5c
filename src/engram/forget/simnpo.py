"""NPO without a reference: the force on a row depends on the mean log-probability of its tokens.

Fan et al.: Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning. arXiv 2410.07163.

    L = -(2 / beta) mean log sigmoid(-beta log p(answer) / |answer| - margin)       [+ retain_weight * a retain term]

Dividing by the answer's length is part of this method, and is not part of NPO.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from engram.data.table import Batch
from engram.engine.lm import answer_logp
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.forget.language import Retaining


@dataclass(kw_only=True, eq=False)
class SimNPO(Retaining):
    """`beta`: how soon the force dies out; half of it is left where the loss per token is `margin` / `beta` nats.

    Cost: as the template; nothing is computed beforehand.
    """

    beta: float = 2.5
    margin: float = 0.0

    @classmethod
    def tiny(cls) -> SimNPO:
        """A setting for checks on a handful of rows."""
        return cls(margin=0.1, optimizer=Optimizer(lr=1e-3), epochs=2, batch_size=8)

    def terms(self, model: nn.Module, forget: Batch, retain: Batch | None) -> Mean:
        logp = answer_logp(model, forget, reduce="mean")
        loss = (2 / self.beta) * Mean.of(-F.logsigmoid(-self.beta * logp - self.margin))
        return self.with_retain(loss, model, retain)
