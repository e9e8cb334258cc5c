"""Datamodel matching: predict by data attribution what retraining would give, then fine-tune to match it.

Georgiev, Rinberg, Park, Garg, Ilyas, Madry, Neel: Attribute-to-Delete: Machine Unlearning via Datamodel Matching.
ICLR 2025, arXiv 2410.23232.

1. Attribution: beta_i(x) [C], how much training row i raises every logit of x (`engine.attribution`).
2. f_hat(x) = f(x; theta_0) - multiplier * sum over the forget rows of beta_i(x), on forget and retain rows.
3. From theta_0, minimise the mean squared error between f and f_hat on the forget rows and a fixed retain sample.

The costly first step does not depend on the request: `prepare` does it once for all. The original fits step 1 by the
lasso, here it is ridge regression; and it searches rates and epochs for each forget set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engram.core.request import Request
from engram.data.table import Table
from engram.engine.optimizer import Optimizer
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.forget.matching import Matching
from engram.forget.predicted import Predicted


@dataclass(kw_only=True, eq=False)
class DatamodelMatching(Predicted, Matching):
    """Settings: see `Predicted` (what is predicted) and `Matching` (how it is matched). For classes and numbers.

    Labels are needed only where attribution is done at the time of the request. Cost: `models` trainings, or what
    `prepare` stored; then epochs times (1 + retain_ratio) times the forget rows, forward and backward.
    """

    @classmethod
    def tiny(cls) -> DatamodelMatching:
        """A setting for checks on a handful of rows."""
        recipe = Recipe({"name": "MLP", "hidden": [8]}, Optimizer(lr=1e-2), epochs=2, batch_size=32)
        return cls(models=8, ridge=1.0, recipe=recipe, epochs=2, batch_size=16, proximity=0.1)

    def aims(self, model: nn.Module, request: Request, table: Table, run: Run) -> Tensor:
        found = self.predicted(model, request, table, run)
        return torch.softmax(found, 1) if self.loss_kind == "ce" else found
