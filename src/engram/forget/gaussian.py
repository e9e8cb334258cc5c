"""Gaussian fine-tuning: the forget rows get new targets, drawn from the distribution of all targets, and train on.

Tarun, Chundawat, Mandal, Kankanhalli: Deep Regression Unlearning. ICML 2023, arXiv 2210.08196 (Gaussian-Amnesiac).

1. mu, sigma: mean and standard deviation of the targets of all training rows, retain and forget together.
2. Every forget target is replaced, once, by a draw from N(mu, sigma²).
3. The model is trained on with the retain rows and the relabelled forget rows, in one shuffled pass.

It is the answer of regression to the random wrong label of classification. What it leaves behind are predictions on
the forget rows that were pulled towards noise around mu, which is not what a retrained model answers: see Blindspot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engram.core.forgetter import rows
from engram.core.needs import Need, Needs, needs
from engram.core.request import Request
from engram.core.unlearning import GradientForgetter
from engram.data.table import Batch, Table
from engram.engine.losses import Mean, per_row
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.errors import EngramError, unknown

ERRORS = {"squared": torch.square, "absolute": torch.abs}


@dataclass(kw_only=True, eq=False)
class GaussianFineTune(GradientForgetter):
    """`error`: the loss that the model was trained with, "squared" or "absolute" (the paper's image models). The
    paper trains 1 epoch (AgeDB) or 5 (STS-B); an epoch is one pass over retain and forget rows.

    Class labels, which the paper has not, are drawn by their shares among the training rows. Cost: epochs times all
    rows, forward and backward.
    """

    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-3))
    epochs: int = 1
    batch_size: int = 256
    error: str = "squared"

    @classmethod
    def tiny(cls) -> GaussianFineTune:
        """A setting for checks on a handful of rows."""
        return cls(epochs=2, batch_size=16)

    @property
    def needs(self) -> Needs:
        return needs({Need.FORGET_ROWS, Need.FORGET_LABELS, Need.RETAIN_ROWS, Need.RETAIN_LABELS})

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        self.check(request)
        run = run or Run()
        with run.scope("relabel"):
            drawn = self.relabelled(request, run)
        return super().forget(model, request.but(forget=drawn), run)

    def relabelled(self, request: Request, run: Run) -> Table:
        """The forget rows with their new targets."""
        forget, retain = rows(request.forget), rows(request.retain)
        assert forget.labels is not None and retain.labels is not None
        labels = torch.cat([retain.labels, forget.labels])
        return forget.with_labels(drawn_targets(labels, len(forget), run.generator("targets")))

    def batches(self, request: Request, epoch: int, run: Run) -> Iterator[Any]:
        table = rows(request.retain).concat(rows(request.forget))
        return table.batches(self.batch_size, seed=run.number("order"), epoch=epoch, shard=run.shard)

    def loss(self, model: Any, batch: Any) -> Mean:
        assert isinstance(batch, Batch) and batch.labels is not None
        return Mean.of(row_errors(model(**batch.inputs).logits, batch.labels, self.error))


def drawn_targets(labels: Tensor, n: int, draws: torch.Generator) -> Tensor:
    """`n` targets from the distribution of labels: numbers [N, k] give [n, k] from the normal distribution of each
    column's mean and standard deviation (that of the population); classes [N] give [n] by their shares.

    EngramError for labels that are tokens.
    """
    if labels.is_floating_point():
        exact = labels.double()
        noise = torch.randn(n, labels.shape[1], generator=draws, dtype=torch.float64)
        return (exact.mean(0) + exact.std(0, correction=0) * noise).to(labels)
    if labels.ndim > 1:
        raise EngramError("Gaussian fine-tuning draws numbers or classes, and these labels are tokens; use NPO")
    return labels[torch.randint(len(labels), (n,), generator=draws)]


def row_errors(outputs: Tensor, targets: Tensor, error: str = "squared") -> Tensor:
    """The task loss of every row, [B]: numbers [B, k] against targets [B, k], the mean `error` over those that are
    finite; for class labels or tokens, what is usual for them.

    EngramError for another error than "squared" or "absolute", and for numbers of unequal shapes: [B, 1] and [B] would
    silently become [B, B].
    """
    if error not in ERRORS:
        raise unknown("error", error, ERRORS)
    if not targets.is_floating_point():
        return per_row(outputs, targets)
    if outputs.shape != targets.shape:
        raise EngramError(f"outputs {list(outputs.shape)} and targets {list(targets.shape)} have to be of one shape")
    known = targets.isfinite()
    difference = torch.where(known, outputs.float(), 0.0) - torch.where(known, targets.float(), 0.0)
    return ERRORS[error](difference).flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)
