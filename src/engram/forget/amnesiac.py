"""Relabelling: train on with random wrong labels on the forget rows, among the retain rows.

Graves, Nagisetty, Ganesh: Amnesiac Machine Learning. AAAI 2021, arXiv 2010.10981.

Every forget row gets one label, drawn once and for all from the other classes; then the model trains on forget and
retain rows mixed. The paper calls this "unlearning" and keeps "amnesiac unlearning" for the subtraction of recorded
updates; later comparisons (bad teacher, SSD) call the relabelling amnesiac, as it is called here. Published code
leaves out the forgotten class when a whole class goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engram.core.forgetter import rows
from engram.core.needs import Need, Needs, needs
from engram.core.request import Classes, Request
from engram.core.unlearning import GradientForgetter, usual_loss
from engram.data.table import Batch, Table, Target
from engram.engine.lm import live_classes
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.errors import EngramError


@dataclass(kw_only=True, eq=False)
class Amnesiac(GradientForgetter):
    """For classifiers. All rows weigh alike, and an epoch is one pass over all of them; the fewer the forget rows, the
    more epochs it takes. If whole classes go, no row gets the label of one of them.

    Cost: epochs times all rows, forward and backward.
    """

    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-3))
    batch_size: int = 64

    @classmethod
    def tiny(cls) -> Amnesiac:
        """A setting for checks on a handful of rows."""
        return cls(epochs=2, batch_size=16)

    @property
    def needs(self) -> Needs:
        return needs({Need.FORGET_ROWS, Need.FORGET_LABELS, Need.RETAIN_ROWS, Need.RETAIN_LABELS})

    def targets(self, model: nn.Module, request: Request, run: Run) -> None:
        forget = rows(request.forget)
        classes = live_classes(model, forget)
        if isinstance(request.what, Classes):
            classes = classes[~torch.isin(classes, torch.tensor(request.what.labels))]
        self.table = relabelled(forget, classes, run.generator("labels")).concat(rows(request.retain))

    def batches(self, request: Request, epoch: int, run: Run) -> Iterator[Any]:
        return self.table.batches(self.batch_size, seed=run.number("order"), epoch=epoch, shard=run.shard)

    def loss(self, model: nn.Module, batch: Any) -> Mean:
        assert isinstance(batch, Batch)
        return usual_loss(model, batch)


def relabelled(table: Table, classes: Tensor, draws: torch.Generator) -> Table:
    """The rows with another label each, uniform over those `classes` [C] that are not its own.

    EngramError for rows without class labels, and where there is no other class.
    """
    if table.target != Target.CLASSES or table.labels is None:
        raise EngramError(f"relabelling wants rows with class labels, and the target of these is {table.target}")
    others = table.labels[:, None] != classes
    if not bool(others.any(1).all()):
        raise EngramError("there is no other class to relabel the forget rows with; use forget.GradientDifference")
    return table.with_labels(classes[torch.multinomial(others.float(), 1, generator=draws)[:, 0]])
