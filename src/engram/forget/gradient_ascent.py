"""Gradient ascent on the forget rows: the plainest forgetter, and the one that ruins a model soonest."""

from __future__ import annotations

from dataclasses import dataclass

from engram.core.unlearning import GradientForgetter
from engram.engine.optimizer import Optimizer


@dataclass(kw_only=True, eq=False)
class GradientAscent(GradientForgetter):
    """Maximise the usual loss of the forget rows. Needs the forget rows and their labels, nothing else.

    Nothing bounds the loss from above: with many steps the model is destroyed (see NPO for the cure).
    """

    retain_weight: float = 0.0

    @classmethod
    def tiny(cls) -> GradientAscent:
        """A setting for checks on a handful of rows."""
        return cls(optimizer=Optimizer(lr=1e-3), epochs=2, batch_size=8)
