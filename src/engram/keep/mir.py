"""Maximally interfered retrieval: replay the rows that the coming update would harm most.

Aljundi, Caccia, Belilovsky, Caccia, Lin, Charlin, Tuytelaars: Online Continual Learning with Maximally
Interfered Retrieval. NeurIPS 2019, arXiv 1908.04742; the form with a buffer (algorithm 1, section 3.1).

For a batch, with theta' = theta - lr * (gradient of the batch's loss):

1. Draw candidates from the buffer; score each by loss(theta') - loss(theta), or (`best`) by loss(theta') - the least
   loss that the row was ever scored with, or had when its task ended, if that is less than loss(theta).
2. Train on the batch and the candidates of highest score: the sum of the two mean losses.

The buffer, a reservoir, takes in a task's rows when it ends, so that all candidates are of earlier ones.
Gradient and scores are taken in eval mode, so that no batch statistics move; published code has none. The
generative form, which searches a generator's codes for interfered rows, is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from engram.core.learning import GradientLearner
from engram.data.buffer import Buffer
from engram.data.table import Batch, Table
from engram.data.task import Task
from engram.engine.curvature import mean_gradient, trainable
from engram.engine.losses import Mean, per_row
from engram.engine.optimizer import Optimizer
from engram.engine.predict import evaluating, predict
from engram.engine.run import Run
from engram.keep.replay import share

LEAST = "least loss"  # the buffer's column of the least loss that a row was seen with


@dataclass(kw_only=True, eq=False)
class MIR(GradientLearner):
    """Replay of the most interfered rows.

    `buffer`: rows kept. `candidates`: how many are scored for a batch; `replayed`: how many of them are trained
    on. `best`: compare with the least past loss. The virtual update is one of plain SGD with the optimiser's `lr`.
    Cost: for each batch a further backward pass, and two forward passes over the candidates.
    """

    optimizer: Optimizer = field(default=Optimizer("sgd", lr=0.1, momentum=0.0))
    epochs: int = 1
    batch_size: int = 10
    buffer: int = 500
    candidates: int = 50
    replayed: int = 10
    best: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kept: Buffer = self.trace("buffer", Buffer(self.buffer))

    @classmethod
    def tiny(cls) -> MIR:
        return cls(network={"name": "MLP", "hidden": [32]}, epochs=2, buffer=20, candidates=16, replayed=8)

    def changing(self) -> Mapping[str, Any]:
        return {"buffer": self.kept} if self.best else {}

    def batches(self, task: Task, epoch: int, run: Run) -> Iterable[tuple[Batch, Batch | None]]:
        draws = run.generator("replay", epoch)
        for batch in task.train.batches(self.batch_size, seed=run.number("order"), epoch=epoch):
            rows = task.train.take(batch.rows)
            harmed = self.retrieve(rows, self.kept.draw(self.candidates, draws), run) if len(self.kept) else None
            yield share(rows, run), None if harmed is None else share(harmed, run)

    def step(self, batch: tuple[Batch, Batch | None], task: Task) -> Mean:
        new, old = batch
        loss = self.terms(new, self.model(**new.inputs))
        return loss if old is None else loss + self.terms(old, self.model(**old.inputs))

    def retrieve(self, rows: Table, candidates: Table, run: Run) -> Table:
        """Those candidates that an update on `rows` would harm most."""
        return candidates.take(
            self.interference(rows, candidates, run).topk(min(self.replayed, len(candidates))).indices
        )

    def interference(self, rows: Table, candidates: Table, run: Run) -> Tensor:
        """By how much one step of SGD on `rows` would raise the loss of every candidate, [n]; the model stays."""
        with evaluating(self.model), torch.enable_grad():
            slope = mean_gradient(self.model, rows, run=run)
        now = trainable(self.model)
        then = {name: p - self.optimizer.lr * slope[name].to(p) for name, p in now.items()}
        batch = candidates.batch(torch.arange(len(candidates))).to(run.device)
        before = self._losses(batch, now).cpu()
        return self._losses(batch, then).cpu() - (self._least(candidates, before) if self.best else before)

    def _least(self, candidates: Table, losses: Tensor) -> Tensor:
        """The least loss of every candidate so far, [n]; the buffer remembers it."""
        least = torch.minimum(torch.as_tensor(candidates.extra[LEAST]), losses)
        self.kept.drop(candidates)
        self.kept.offer(candidates.with_column(LEAST, least))
        return least

    def _losses(self, batch: Batch, weights: Mapping[str, Tensor]) -> Tensor:
        assert batch.labels is not None
        with evaluating(self.model):
            return per_row(functional_call(self.model, dict(weights), (), batch.inputs).logits, batch.labels)

    def end(self, task: Task, run: Run) -> None:
        rows = task.train
        self.kept.offer(rows.with_column(LEAST, predict(self.model, rows, "loss", run=run)) if self.best else rows)
