"""What forgetting by matching shares: fine-tune towards outputs that were fixed before, on forget rows and some others.

    L = mean over the rows' w |f(x) - target(x)|² / C + proximity |theta - theta_0|²,

w = 1 for a forget row, `retain_weight` for a retain row; or cross-entropy against the target's probabilities in the
place of the squared error. Logits are compared without their mean over the live classes, which no softmax sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engram.core.forgetter import rows
from engram.core.request import Request
from engram.core.unlearning import GradientForgetter
from engram.data.table import Batch, Table, Target
from engram.engine.attribution import centred
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.engine.teacher import RowCache
from engram.errors import EngramError, unknown
from engram.models.heads import ValueHead

LOSSES = ("mse", "ce")


def decaying() -> Optimizer:
    """Adam, its rate times 0.95 at each of four equal steps: after every epoch, if there are five."""
    return Optimizer(lr=5e-4, schedule="steps", milestones=(0.2, 0.4, 0.6, 0.8), gamma=0.95)


@dataclass(kw_only=True, eq=False)
class Matching(GradientForgetter):
    """`loss_kind`: "mse" or "ce" (classes only). `retain_ratio`: so many retain rows per forget row, drawn once;
    `retain_weight`: what one of them counts beside a forget row, 0 for none (the paper instead repeats forget rows).
    `proximity`: weight of the squared distance of the weights from what they were.

    An epoch is one pass over forget rows and retain sample, mixed. A subclass says in `aims` what is matched.
    """

    optimizer: Optimizer = field(default_factory=decaying)
    batch_size: int = 512
    retain_ratio: float = 3.0
    loss_kind: str = "mse"
    proximity: float = 0.0

    def aims(self, model: nn.Module, request: Request, table: Table, run: Run) -> Tensor:
        """What is matched on the table's rows, [m, C]: logits or values for "mse", probabilities for "ce"."""
        raise NotImplementedError

    def targets(self, model: nn.Module, request: Request, run: Run) -> None:
        if self.loss_kind not in LOSSES:
            raise unknown("loss_kind", self.loss_kind, LOSSES)
        forget = rows(request.forget)
        self.numbers = of_numbers(model, request)
        if self.numbers and self.loss_kind == "ce":
            raise EngramError("a model of numbers has no class probabilities to match; use loss_kind='mse'")
        sample = self._sample(request, run)
        self.table = forget.unlabelled().concat(sample.unlabelled()) if sample is not None else forget.unlabelled()
        self.weights = torch.full((len(self.table),), self.retain_weight)
        self.weights[: len(forget)] = 1.0
        self.aim = RowCache(self.aims(model, request, self.table, run))
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()} if self.proximity else {}

    def batches(self, request: Request, epoch: int, run: Run) -> Iterator[Any]:
        return self.table.batches(self.batch_size, seed=run.number("order"), epoch=epoch, shard=run.shard)

    def loss(self, model: nn.Module, batch: Any) -> Mean:
        assert isinstance(batch, Batch)
        errors = self.errors(model(**batch.inputs).logits, self.aim(batch))
        weights = self.weights[batch.rows].to(errors)
        loss = Mean.over((weights * errors).sum(), weights.sum())
        return loss + self.proximity * self._distance(model) if self.proximity else loss

    def errors(self, outputs: Tensor, aim: Tensor) -> Tensor:
        """How far each row is from its aim, [B]: of outputs [B, C] and what `aims` gave."""
        if self.numbers:
            return (outputs - aim).square().mean(1)
        live = torch.isfinite(outputs) & torch.isfinite(aim)
        if self.loss_kind == "ce":
            return -(torch.where(live, aim, 0.0) * outputs.log_softmax(1).masked_fill(~live, 0.0)).sum(1)
        gap = centred(outputs.masked_fill(~live, -torch.inf)) - centred(aim.masked_fill(~live, -torch.inf))
        return gap.square().sum(1) / live.sum(1).clamp(min=1)

    def _sample(self, request: Request, run: Run) -> Table | None:
        """The retain rows that take part, in their order."""
        if not self.retain_weight or request.retain is None or request.forget is None:
            return None
        wanted = round(self.retain_ratio * len(request.forget))
        chosen = torch.randperm(len(request.retain), generator=run.generator("retain sample"))[:wanted]
        return request.retain.take(chosen.sort().values)

    def _distance(self, model: nn.Module) -> Mean:
        moved = [(p - self.before[name].to(p)).square().sum() for name, p in model.named_parameters()]
        return Mean.of(torch.stack(moved).sum())


def of_numbers(model: nn.Module, request: Request) -> bool:
    """Does the model give numbers rather than logits of classes? Its head says, or the labels that are at hand."""
    tables = [table for table in (request.forget, request.retain) if table is not None]
    if any(table.target == Target.TOKENS for table in tables):
        raise EngramError("outputs of whole rows are matched, and labels of tokens have one for each; use forget.NPO")
    numbers = any(table.target == Target.NUMBERS for table in tables)
    return numbers or any(isinstance(module, ValueHead) for module in model.modules())
