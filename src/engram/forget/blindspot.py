"""Blindspot: a briefly trained network that never saw the forget rows says what to answer on them.

Tarun, Chundawat, Mandal, Kankanhalli: Deep Regression Unlearning. ICML 2023, arXiv 2210.08196.

1. A guide B, of the same kind as the model M and with weights of its own, is trained for a few epochs on the retain
   rows alone.
2. M goes on training on retain and forget rows mixed, where a row's loss is
   - l(M(x), y) for a retain row, l the task loss;
   - l(M(x), B(x)) + attention_weight * sum over layers k of mean (att(M_k) - att(B_k))² for a forget row, whose target
     is not looked at.
   att of an activation: squares, averaged over the channels, the rest flattened and divided by its length.

The mean over the rows of a batch is c L_f + (1 - c) L_r, where c is the share of forget rows and L_f, L_r are the
means of the two kinds. A guide that was trained too little answers noise, and more epochs of step 2 forget too much.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.core.forgetter import at_hand, rows
from engram.core.needs import Need, Needs, needs
from engram.core.request import Request
from engram.core.unlearning import GradientForgetter
from engram.data.table import Batch, Table
from engram.engine.hooks import capture
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.engine.teacher import frozen
from engram.forget.gaussian import row_errors
from engram.models.heads import ValueHead

FLAG = "to be forgotten"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(kw_only=True, eq=False)
class Blindspot(GradientForgetter):
    """`guide_epochs`: how long the guide is trained. `attention_weight`: the paper's lambda. `layers`: the names of
    those whose attention is compared; left out, all convolutions or, in a model without, all linear layers under the
    head. `error`: the loss that the model was trained with, "squared" or "absolute" (the paper's image models).

    The paper's settings are these for AgeDB, and for STS-B `guide_epochs` 10, `epochs` 5. An epoch is one pass over
    retain and forget rows. A recipe that is not made of epochs (a learner's history) trains the guide in full. Cost:
    the guide's training; epochs times all rows, forward and backward; epochs times the forget rows forward in the
    guide.
    """

    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-3))
    epochs: int = 1
    batch_size: int = 256
    guide_epochs: int = 2
    attention_weight: float = 50.0
    layers: tuple[str, ...] = ()
    error: str = "squared"

    @classmethod
    def tiny(cls) -> Blindspot:
        """A setting for checks on a handful of rows."""
        return cls(epochs=2, batch_size=16)

    @property
    def needs(self) -> Needs:
        return needs({Need.FORGET_ROWS, Need.RETAIN_ROWS, Need.RETAIN_LABELS, Need.RECIPE})

    def guide(self, request: Request, run: Run) -> nn.Module:
        """The guide, trained on the retain rows alone; look at its own errors before trusting it."""
        recipe = at_hand(request, Need.RECIPE)
        short = replace(recipe, epochs=self.guide_epochs) if hasattr(recipe, "epochs") else recipe
        return short(rows(request.retain), run.number("guide"), run)

    def targets(self, model: nn.Module, request: Request, run: Run) -> None:
        self.teacher = frozen(run.phase("guide", lambda: self.guide(request, run))).to(run.device)

    def batches(self, request: Request, epoch: int, run: Run) -> Iterator[Any]:
        table = mixed(rows(request.retain), rows(request.forget))
        return table.batches(self.batch_size, seed=run.number("order"), epoch=epoch, shard=run.shard)

    def loss(self, model: Any, batch: Any) -> Mean:
        assert isinstance(batch, Batch) and batch.labels is not None
        gone = batch.extra[FLAG].to(batch.labels.device)
        with capture(model, self._attended(model)) as seen:
            outputs = model(**batch.inputs).logits
        losses = row_errors(outputs[~gone], batch.labels[~gone], self.error)
        if bool(gone.any()):
            inputs = {name: value[gone] for name, value in batch.inputs.items()}
            layers = {name: value[gone] for name, value in seen.items()}
            losses = torch.cat([losses, self.imitation(outputs[gone], layers, inputs)])
        return Mean.of(losses)

    def imitation(self, outputs: Tensor, layers: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """How far outputs [B, k] and layers {name: [B, …]} of forget rows are from the guide's: [B]."""
        with torch.no_grad(), capture(self.teacher, layers) as wanted:
            answers = self.teacher(**inputs).logits
        losses = row_errors(outputs, answers, self.error)
        for name, found in layers.items():
            apart = (attention(found) - attention(wanted[name])).square().mean(1)
            losses = losses + self.attention_weight * apart
        return losses

    def _attended(self, model: nn.Module) -> tuple[str, ...]:
        """The names of the layers whose attention counts."""
        if not self.attention_weight:
            return ()
        parts = dict(model.named_modules())
        spatial = tuple(name for name, part in parts.items() if isinstance(part, CONVOLUTIONS))
        plain = (n for n, part in parts.items() if isinstance(part, nn.Linear) and not isinstance(part, ValueHead))
        return self.layers or spatial or tuple(plain)


def attention(activation: Tensor) -> Tensor:
    """Where a layer is active, whatever the scale: [B, c, …] to [B, positions], squares averaged over the channels, of
    length 1 (0 where all is 0); units are the positions of [B, d]."""
    energy = activation.float().square()
    positions = energy if energy.ndim == 2 else energy.mean(1).flatten(1)
    return F.normalize(positions, dim=1)


def mixed(retain: Table, forget: Table) -> Table:
    """Retain rows, then forget rows without their labels; the extra column `FLAG` says which are to be forgotten."""
    assert retain.labels is not None
    blank = forget.with_labels(retain.labels.new_zeros(len(forget), *retain.labels.shape[1:]))
    kept = retain.with_column(FLAG, torch.zeros(len(retain), dtype=torch.bool))
    return kept.concat(blank.with_column(FLAG, torch.ones(len(blank), dtype=torch.bool)))
