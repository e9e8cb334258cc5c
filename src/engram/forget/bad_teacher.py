"""Bad teacher: imitate the old model on retain rows, and a network that knows nothing on forget rows.

Chundawat, Tarun, Mandal, Kankanhalli: Can Bad Teaching Induce Forgetting? Unlearning in Deep Networks using an
Incompetent Teacher. AAAI 2023, arXiv 2205.08096.

With T_c the model before forgetting (competent), T_d a network of the same kind with initial weights (incompetent), and
l = 1 for a forget row, 0 for a retain row, both among the rows of one batch (the paper's unlearning objective):

    L(x, l) = (1 - l) KL(T_c(x) || S(x)) + l KL(T_d(x) || S(x))

The student S starts as the model. Published code divides the sum also by the number of classes, which scales the loss.
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
from engram.engine.lm import kl_to
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.engine.teacher import RowCache, class_logits, untrained


@dataclass(kw_only=True, eq=False)
class BadTeacher(GradientForgetter):
    """`retain_share`: the share of the retain rows that takes part, drawn once (the paper: 30 %). `temperature`: that
    of student and teachers.

    For classifiers (EngramError where labels are numbers); no labels are needed. An epoch is one pass over the rows
    that take part. Cost: epochs times these rows, forward and backward, and one forward pass of one of the teachers.
    """

    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-4))
    epochs: int = 1
    batch_size: int = 256
    retain_share: float = 0.3
    temperature: float = 1.0

    @classmethod
    def tiny(cls) -> BadTeacher:
        """A setting for checks on a handful of rows."""
        return cls(optimizer=Optimizer(lr=1e-2), epochs=2, batch_size=16, temperature=2.0)

    @property
    def needs(self) -> Needs:
        return needs({Need.FORGET_ROWS, Need.RETAIN_ROWS})

    def targets(self, model: nn.Module, request: Request, run: Run) -> None:
        forget = rows(request.forget)
        retain = some(rows(request.retain), self.retain_share, run.generator("retain rows"))
        self.table = forget.unlabelled().concat(retain.unlabelled())
        self.told = RowCache(run.phase("teachers", lambda: self.teach(model, forget, retain, run)))

    def teach(self, model: nn.Module, forget: Table, retain: Table, run: Run) -> Tensor:
        """What each row is told [n, C], forget rows first: the logits of the teacher that is in charge of it."""
        incompetent = untrained(model, run.generator("incompetent teacher"))
        told = ((incompetent, forget), (model, retain))
        return torch.cat([predict(teacher, table, class_logits, run=run) for teacher, table in told])

    def batches(self, request: Request, epoch: int, run: Run) -> Iterator[Any]:
        return self.table.batches(self.batch_size, seed=run.number("order"), epoch=epoch, shard=run.shard)

    def loss(self, model: nn.Module, batch: Any) -> Mean:
        assert isinstance(batch, Batch)
        told = torch.log_softmax(self.told(batch).float() / self.temperature, -1)
        return kl_to(told, model(**batch.inputs).logits / self.temperature)


def some(table: Table, share: float, draws: torch.Generator) -> Table:
    """A random share of the rows, in their order; at least one of them."""
    chosen = torch.randperm(len(table), generator=draws)[: max(1, round(share * len(table)))]
    return table.take(chosen.sort().values)
