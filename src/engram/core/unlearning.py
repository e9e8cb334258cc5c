"""The template of forgetters that follow a gradient."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from engram.core.forgetter import Forgetter, rows
from engram.core.needs import Need, Needs, needs
from engram.core.request import Request
from engram.data.sampling import paired
from engram.data.table import Batch
from engram.engine.fit import fit
from engram.engine.losses import Mean, by_target
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run


@dataclass(kw_only=True, eq=False)
class GradientForgetter(Forgetter):
    """Gradient difference, if nothing is overridden: up on the forget rows, down on the retain rows.

    `retain_weight` 0 leaves the retain rows out, and then they are not needed. `retain_ratio`: retain rows per forget
    row of a batch. An epoch is one pass over the forget rows; a schedule moves once per epoch. The model is trained in
    eval mode unless `batch_statistics` is set, so that running statistics stay those of all the data.

    Hooks: `params` (what is trained), `targets` (teacher outputs, computed once), `terms` (the loss of a forget batch
    and its retain batch).
    """

    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-4))
    epochs: int = 5
    batch_size: int = 32
    retain_weight: float = 1.0
    retain_ratio: float = 1.0
    batch_statistics: bool = False

    @property
    def needs(self) -> Needs:
        forget = {Need.FORGET_ROWS, Need.FORGET_LABELS}
        return needs(forget | {Need.RETAIN_ROWS, Need.RETAIN_LABELS} if self.retain_weight else forget)

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        """A trained copy. Cost: epochs times (1 + retain_ratio) times the forget rows, forward and backward."""
        self.check(request)
        run = run or Run()
        with run.scope("forget"):
            new = copy.deepcopy(model).train(self.batch_statistics)
            self.targets(model, request, run)
            trainable = {id(p) for p in self.params(new)}
            before = {name: p.requires_grad for name, p in new.named_parameters()}
            for p in new.parameters():
                p.requires_grad_(id(p) in trainable and p.requires_grad)
            fit(
                lambda batch: self.loss(new, batch),
                lambda epoch: self.batches(request, epoch, run),
                model=new,
                optimizer=self.optimizer,
                epochs=self.epochs,
                run=run,
            )
            for name, p in new.named_parameters():
                p.requires_grad_(before[name])
            return new.eval()

    def params(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """The parameters that are trained; all of them unless overridden."""
        return model.parameters()

    def targets(self, model: nn.Module, request: Request, run: Run) -> None:
        """Compute what the loss compares with, from the model as it was."""

    def batches(self, request: Request, epoch: int, run: Run) -> Iterator[Any]:
        """Pairs of a forget batch and a retain batch (None without a retain weight)."""
        retain = request.retain if self.retain_weight else None
        seed = run.number("order")
        return paired(
            rows(request.forget), retain, self.batch_size, self.retain_ratio, seed=seed, epoch=epoch, shard=run.shard
        )

    def loss(self, model: nn.Module, batch: Any) -> Mean:
        """The loss of what `batches` gives; a method overrides it only if that is no pair."""
        return self.terms(model, *batch)

    def terms(self, model: nn.Module, forget: Batch, retain: Batch | None) -> Mean:
        """The loss of a pair."""
        loss = -usual_loss(model, forget)
        return loss if retain is None else loss + self.retain_weight * usual_loss(model, retain)


def usual_loss(model: Any, batch: Batch) -> Mean:
    """The loss that the model was trained with, by the kind of labels."""
    batch = batch.trimmed()
    assert batch.labels is not None
    return by_target(model(**batch.inputs).logits, batch.labels)
