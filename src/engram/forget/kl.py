"""Gradient ascent held by the model as it was: up on the forget rows, near the old outputs on the retain rows.

Maini et al.: TOFU, arXiv 2401.06121 ("KL minimisation"); a baseline of Zhang, Lin, Bai, Mei: Negative Preference
Optimization, COLM 2024, arXiv 2404.05868.

    L = -loss(forget) + retain_weight * KL(model before || model) on the retain rows

The divergence is summed over the vocabulary and averaged over all positions, question and padding included.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from engram.core.unlearning import usual_loss
from engram.data.table import Batch
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.forget.language import Retaining


@dataclass(kw_only=True, eq=False)
class KLForget(Retaining):
    """Gradient ascent with the divergence for its `retain_term`; with "loss" it would be GradientDifference.

    Cost: as the template, and one forward pass over the retain rows.
    """

    retain_term: str = "kl"

    @classmethod
    def tiny(cls) -> KLForget:
        """A setting for checks on a handful of rows."""
        return cls(optimizer=Optimizer(lr=1e-3), epochs=2, batch_size=8)

    def terms(self, model: nn.Module, forget: Batch, retain: Batch | None) -> Mean:
        return self.with_retain(-usual_loss(model, forget), model, retain)
