"""Dark experience replay: rows of a buffer are held at the logits that they had, and at their labels.

Buzzega, Boschini, Porrello, Abati, Calderara: Dark Experience for General Continual Learning: a Strong, Simple
Baseline. NeurIPS 2020, arXiv 2004.07211.

The loss of a batch (eq. 6, algorithm 2) is

    cross-entropy of the batch
    + alpha * mean squared distance of the logits of rows of the buffer from those stored with them
    + beta * cross-entropy of other rows of the buffer.

Both draws are of their own. Rows enter the buffer with the logits that they have before the update, by
reservoir sampling, without regard to tasks; alpha alone is DER.

In published code each visit to a row is offered to the reservoir, so that a row may be held several times,
with logits of several epochs. Here it is offered once, in an epoch drawn for it, and held once. Stored logits
are taken in eval mode. Published heads have all classes from the start, and so stored logits of classes that
are still to come, which is what holds those down on old rows. Here a class that is born gets, for the rows
held, the logits that it then has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engram.core.learning import GradientLearner
from engram.core.trace import State
from engram.data.buffer import Buffer
from engram.data.table import Batch, Ids, Table
from engram.data.task import Task
from engram.engine.losses import Mean
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.keep.replay import share

LOGITS = "logits"  # the buffer's column [n, W] of stored logits, 0 for classes that were not live
LIVE = "live"  # the buffer's column [n, W] of which classes were live
Parts = tuple[Batch, Batch | None, Batch | None]


@dataclass(kw_only=True, eq=False)
class DERpp(GradientLearner):
    """Fine-tuning with replay of logits and labels.

    `buffer`: rows kept. `replayed`: rows in each of the two draws. `alpha`, `beta`: weights of the logits and of
    the labels; with both 0 it is fine-tuning. The values are Mammoth's for 500 rows of split MNIST; for CIFAR-10
    it has 0.2 and 0.5. After rows were dropped, stored logits of other rows may still tell what the model knew of
    them: `refresh` takes them anew from the model as it then is.

    Cost: as fine-tuning, times 1 + 2 replayed / batch_size, and a forward pass over the task's rows.
    """

    buffer: int = 500
    replayed: int = 64
    alpha: float = 1.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kept: Buffer = self.trace("buffer", Buffer(self.buffer))
        self.stale = False

    @classmethod
    def tiny(cls) -> DERpp:
        return cls(network={"name": "MLP", "hidden": [32]}, epochs=3, batch_size=32, buffer=20, replayed=16)

    def start(self, task: Task, run: Run) -> None:
        self.refresh(run)
        if len(self.kept):
            now = predict(self.model, self.kept.table, run=run)
            stored = self._stored(now.shape[1])
            self._store(torch.where(torch.isfinite(stored), stored, now))

    def refresh(self, run: Run | None = None) -> None:
        """After rows were dropped: store what the model says now."""
        if self.stale and len(self.kept):
            self._store(predict(self.model, self.kept.table, run=run))
        self.stale = False

    def changing(self) -> Mapping[str, Any]:
        return {"buffer": self.kept}

    def batches(self, task: Task, epoch: int, run: Run) -> Iterable[Parts]:
        draws = run.generator("replay", epoch)
        for batch in task.train.batches(self.batch_size, seed=run.number("order"), epoch=epoch):
            rows = task.train.take(batch.rows)
            drawn = rows.take([run.number("visit", id) % self.epochs == epoch for id in rows.ids])
            seen = _with_logits(drawn, predict(self.model, drawn, run=run)) if len(drawn) else drawn
            dark, plain = (self._draw(weight, draws, run) for weight in (self.alpha, self.beta))
            yield share(rows, run), dark, plain
            self.kept.offer(seen)

    def step(self, batch: Parts, task: Task) -> Mean:
        new, dark, plain = batch
        loss = self.terms(new, self.model(**new.inputs))
        if dark is not None:
            loss = loss + self.alpha * distance(self.model(**dark.inputs).logits, dark.extra[LOGITS], dark.extra[LIVE])
        if plain is not None:
            loss = loss + self.beta * self.terms(plain, self.model(**plain.inputs))
        return loss

    def drop(self, rows: Table) -> Ids:
        self.stale = True
        return super().drop(rows)

    def extra_state(self) -> State:
        return {"stale": self.stale}

    def load_extra_state(self, state: State) -> None:
        self.stale = state["stale"]

    def _draw(self, weight: float, draws: torch.Generator, run: Run) -> Batch | None:
        return share(self.kept.draw(self.replayed, draws), run) if weight and len(self.kept) else None

    def _stored(self, width: int) -> Tensor:
        """The stored logits, with -inf where a class was not live: [n, width], or as wide as they are."""
        logits, live = (torch.as_tensor(self.kept.table.extra[name]) for name in (LOGITS, LIVE))
        return F.pad(logits.masked_fill(~live, -torch.inf), (0, max(width - logits.shape[1], 0)), value=-torch.inf)

    def _store(self, logits: Tensor) -> None:
        rows = _with_logits(self.kept.table, logits)
        self.kept.drop(rows)
        self.kept.offer(rows)


def distance(logits: Tensor, stored: Tensor, live: Tensor) -> Mean:
    """Mean squared distance of logits from stored ones over the columns that were live and are, [B, W] each."""
    both = torch.isfinite(logits) & live.to(logits.device)
    return Mean.over(torch.where(both, logits - stored.to(logits), 0.0).square().sum(), both.sum())


def _with_logits(rows: Table, logits: Tensor) -> Table:
    live = torch.isfinite(logits)
    return rows.with_column(LOGITS, logits.masked_fill(~live, 0.0)).with_column(LIVE, live)
