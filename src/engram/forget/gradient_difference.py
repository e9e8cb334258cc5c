"""Gradient difference: up on the forget rows, down on the retain rows.

Liu, Liu, Stone: Continual Learning and Private Unlearning. CoLLAs 2022, arXiv 2203.12817. As a language baseline:
Maini et al.: TOFU, arXiv 2401.06121.
"""

from __future__ import annotations

from dataclasses import dataclass

from engram.core.unlearning import GradientForgetter
from engram.engine.optimizer import Optimizer


@dataclass(kw_only=True, eq=False)
class GradientDifference(GradientForgetter):
    """L = -loss(forget) + retain_weight * loss(retain): the template as it stands."""

    @classmethod
    def tiny(cls) -> GradientDifference:
        """A setting for checks on a handful of rows."""
        return cls(optimizer=Optimizer(lr=1e-3), epochs=2, batch_size=8)
