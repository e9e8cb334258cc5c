"""Fine-tuning on the retain rows: forgetting by not being reminded. The baseline of every comparison."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from engram.core.forgetter import rows
from engram.core.needs import Need, Needs, needs
from engram.core.request import Request
from engram.core.unlearning import GradientForgetter, usual_loss
from engram.data.table import Batch
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run


@dataclass(kw_only=True, eq=False)
class Finetune(GradientForgetter):
    """Go on training on the retain rows alone; an epoch is one pass over them. It needs nothing of the forget rows.

    Cost: epochs times the retain rows, forward and backward.
    """

    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-3))

    @classmethod
    def tiny(cls) -> Finetune:
        """A setting for checks on a handful of rows."""
        return cls(epochs=2, batch_size=16)

    @property
    def needs(self) -> Needs:
        return needs({Need.RETAIN_ROWS, Need.RETAIN_LABELS})

    def batches(self, request: Request, epoch: int, run: Run) -> Iterator[Any]:
        table = rows(request.retain)
        return table.batches(self.batch_size, seed=run.number("order"), epoch=epoch, shard=run.shard)

    def loss(self, model: nn.Module, batch: Any) -> Mean:
        assert isinstance(batch, Batch)
        return usual_loss(model, batch)
