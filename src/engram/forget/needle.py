"""Needle: destroy the one vector that carries a concept, and leave every other weight as it was, to the bit.

Hong, Yu, Yang, Ravfogel, Geva: Intrinsic Evaluation of Unlearning Using Parametric Knowledge Traces. arXiv 2406.11614;
EMNLP 2025.

The concept vector v is a column of the second projection of an MLP (see `models.concepts`):

    v <- v + eps, eps ~ N(0, noise^2 I);    then ascent of the usual loss on the text of the concept, in v alone

The published code keeps the whole matrix trainable under masked gradients, so that the weight decay of AdamW shrinks
all other columns too. Here the column is a parameter of its own, without decay: nothing else moves, as the paper says.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from engram.core.forgetter import Forgetter, rows
from engram.core.needs import Need, Needs, needs
from engram.core.request import Request
from engram.core.unlearning import usual_loss
from engram.data.table import Batch
from engram.engine.fit import fit
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.concepts import Place, columns_at, located, text_of, write, written
from engram.models.guards import sharing


class Columns(nn.Module):
    """Columns [k, d] as parameters of their own."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)


@dataclass(kw_only=True, eq=False)
class Needle(Forgetter):
    """`vectors`: the columns, each as (layer, dimension); where none are given, the `count` best ones for the text of
    the forget rows, compared with that of the retain rows (`top`, `drop`: see `models.concepts.located`).

    `noise`: the standard deviation of what is added to every number of a column; `epochs` 0 leaves it at that. The
    paper trains in batches of 4, 8 of which make an update; the learning rate is per number of the column and update,
    and far above its scale: that is the aim.

    For causal language models and for classifiers, where the column is what one feature says of every class. The paper
    knows the vector beforehand, so this is an upper bound for what other forgetters do to it, not their rival. Cost:
    `epochs` passes over the forget rows, forward and backward, and a copy of one matrix per layer and batch; to locate,
    2 V d flops for each of the m columns of all layers.
    """

    vectors: tuple[tuple[int, int], ...] = ()
    top: int | None = None
    count: int = 1
    drop: float = 0.3
    noise: float = 0.1
    optimizer: Optimizer = field(default_factory=lambda: Optimizer("adamw", lr=2e-1))
    epochs: int = 1
    batch_size: int = 32

    @classmethod
    def tiny(cls) -> Needle:
        """A setting for checks on a handful of rows."""
        return cls(top=2, optimizer=Optimizer("adamw", lr=1e-2), epochs=2, batch_size=8)

    @property
    def needs(self) -> Needs:
        forget = {Need.FORGET_ROWS, Need.FORGET_LABELS}
        if not self.vectors:
            return needs(forget | {Need.RETAIN_ROWS, Need.RETAIN_LABELS})
        return needs(forget if self.epochs else ())

    def check(self, request: Request) -> None:
        """Besides what all forgetters check: EngramError for a negative noise."""
        super().check(request)
        if self.noise < 0:
            raise EngramError(f"noise={self.noise} is a standard deviation; give 0 or more")

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        """A copy with other columns at these places. EngramError for a place that the model does not have."""
        self.check(request)
        run = run or Run()
        with run.scope("forget"):
            new = copy.deepcopy(model).to(run.device).eval()
            places = self.places(new, request)
            columns = Columns(self.noisy(columns_at(new, places), run))
            if self.epochs:
                self.climb(sharing(new), places, columns, request, run)
            write(new, places, columns.values.detach())
        return new

    def places(self, model: nn.Module, request: Request) -> list[Place]:
        """Where the concept vectors are."""
        if self.vectors:
            return [(layer, dim) for layer, dim in self.vectors]
        concept, others = text_of(rows(request.forget)), text_of(rows(request.retain))
        return [found.place for found in located(model, concept, others, self.top, self.count, self.drop)]

    def noisy(self, columns: Tensor, run: Run) -> Tensor:
        """Columns [k, d] with noise."""
        drawn = torch.randn(columns.shape, generator=run.generator("noise"), dtype=torch.float64)
        return columns + self.noise * drawn.to(columns)

    def climb(self, still: Any, places: list[Place], columns: Columns, request: Request, run: Run) -> None:
        """Move the columns, and nothing else, up the loss of the forget rows. `still`: the model, without gradients."""
        table, order = rows(request.forget), run.number("order")

        def edited(**inputs: Tensor) -> Any:
            return functional_call(still, written(still, places, columns.values), (), inputs)

        def step(batch: Batch) -> Mean:
            return -usual_loss(edited, batch)

        fit(
            step,
            lambda epoch: table.batches(self.batch_size, seed=order, epoch=epoch, shard=run.shard),
            model=columns,
            optimizer=self.optimizer,
            epochs=self.epochs,
            run=run,
        )
