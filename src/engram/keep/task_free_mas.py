"""Task-free continual learning: memory aware synapses on a stream that says nothing of its tasks.

Aljundi, Kelchtermans, Tuytelaars: Task-Free Continual Learning. CVPR 2019, arXiv 1812.03596; chapter of Aljundi:
Continual Learning in Neural Networks, arXiv 1910.02718.

For every batch of the stream, a few updates on

    loss of the batch + loss of the buffer + strength / 2 * sum over parameters of Omega (theta - theta*)².

1. The buffer holds the hardest rows: after the updates those of highest loss among its own and the batch's stay.
2. The losses of batches before their updates are watched through a window. It is on a plateau when their mean and their
   variance are low, and a peak has passed when the mean rose above that of the last plateau by more than this one's
   standard deviation.
3. On a plateau, if a peak has passed since the last update (or there was none yet): Omega becomes the running mean of
   itself and of the importances of `MAS` on the buffer, and theta* the model as it is.

Losses are means over rows. The authors' code sums them over the rows of batch and buffer together, so its thresholds
(0.2 and 0.1) are others; here the buffer is left out, whose rows are hard by choice and hide the plateaus. The code
also takes the norm of the outputs without its square, needs no full window, and refills the buffer after an update of
Omega.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engram.core.learning import GradientLearner
from engram.core.trace import Derived, State
from engram.data.buffer import Buffer
from engram.data.table import Batch, Ids, Table
from engram.data.task import Task
from engram.engine.importance import importance
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.keep.consolidation import padded, pulled
from engram.keep.replay import share

Parts = tuple[Batch, Batch | None]


class Plateaus:
    """Watches losses through a window of `length`; `mean` and `variance` (of the population): what a plateau's are
    below."""

    def __init__(self, length: int, mean: float, variance: float) -> None:
        self.length, self.mean, self.variance = length, mean, variance
        self.losses: list[float] = []
        self.last: list[float] | None = None  # mean and standard deviation of the last plateau that was used
        self.peak = True
        self.count = 0  # plateaus that were used

    def watch(self, loss: float) -> bool:
        """Take a loss in. Is this a plateau, and the first one after a peak?"""
        self.losses = [*self.losses, loss][-self.length :]
        window = torch.tensor(self.losses, dtype=torch.float64)
        mean, variance = float(window.mean()), float(window.var(correction=0))
        if self.last is not None and mean > sum(self.last):
            self.peak = True
        flat = len(window) == self.length and mean < self.mean and variance < self.variance
        if not (flat and self.peak):
            return False
        self.last, self.peak, self.count = [mean, variance**0.5], False, self.count + 1
        return True

    def state_dict(self) -> State:
        return {"losses": self.losses, "last": self.last, "peak": self.peak, "count": self.count}

    def load_state_dict(self, state: State) -> None:
        last = state["last"]
        self.losses, self.last = list(state["losses"]), None if last is None else list(last)
        self.peak, self.count = state["peak"], state["count"]


@dataclass(kw_only=True, eq=False)
class TaskFreeMAS(GradientLearner):
    """The sensitivity of the outputs holds parameters, renewed wherever the loss has settled.

    `buffer`: hard rows kept. `iterations`: updates for a batch. `strength`: lambda; 0 is replay of the hard rows alone.
    `window`, `plateau_mean`, `plateau_variance`: how many losses are watched, and what makes a plateau of them.

    The first pass over a task's rows is in their order, further ones (`epochs`) are shuffled. With one epoch and plain
    SGD, a stream that is cut elsewhere, at multiples of `batch_size`, gives the same bits, if its classes are announced
    with its first piece. Omega and theta* are traces; after rows were dropped theta* is the model as it is then.

    Cost: for each batch `iterations` updates on it and the buffer, and two forward passes; two numbers per parameter.
    """

    optimizer: Optimizer = field(default=Optimizer("sgd", lr=0.05, momentum=0.0))
    epochs: int = 1
    batch_size: int = 30
    buffer: int = 30
    iterations: int = 5
    strength: float = 0.5
    window: int = 5
    plateau_mean: float = 1.0
    plateau_variance: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kept: Buffer = self.trace("buffer", Buffer(self.buffer, rule="fifo"))
        self.importances: Derived = self.trace("importances", Derived())
        self.anchor: Derived = self.trace("anchor", Derived())
        self.plateaus = Plateaus(self.window, self.plateau_mean, self.plateau_variance)

    @classmethod
    def tiny(cls) -> TaskFreeMAS:
        small = {"name": "MLP", "hidden": [16]}
        return cls(network=small, batch_size=6, buffer=8, window=2, plateau_mean=10.0, plateau_variance=10.0)

    def start(self, task: Task, run: Run) -> None:
        self.run = run
        if not self.anchor.values:
            self._anchor()
        self._make_room()

    def changing(self) -> Mapping[str, Any]:
        return {
            "buffer": self.kept,
            "importances": self.importances,
            "anchor": self.anchor,
            "plateaus": self.plateaus,
        }

    def batches(self, task: Task, epoch: int, run: Run) -> Iterable[Parts]:
        self._aim()
        order = run.number("order")
        for batch in task.train.batches(self.batch_size, seed=order, epoch=epoch, shuffle=epoch > 0):
            rows = task.train.take(batch.rows)
            held = self.kept.table.without(rows.ids)
            loss = float(self._losses(rows).mean())
            for _ in range(self.iterations):
                yield share(rows, run), share(held, run) if len(held) else None
            self.keep_hardest(rows)
            if self.plateaus.watch(loss):
                self.consolidate()

    def step(self, batch: Parts, task: Task) -> Mean:
        new, old = batch
        loss = self.terms(new, self.model(**new.inputs))
        if old is not None:
            loss = loss + self.terms(old, self.model(**old.inputs))
        return loss + Mean.of(self.penalty()) if self.pull else loss

    def penalty(self) -> Tensor:
        """strength / 2 * sum of Omega (theta - theta*)², []."""
        return pulled(self.model, self.goal, self.pull)

    def keep_hardest(self, rows: Table) -> None:
        """Let the rows of highest loss stay in the buffer."""
        together = self.kept.table.without(rows.ids).concat(rows)
        hardest = self._losses(together).topk(min(self.buffer, len(together))).indices
        self.kept.drop(self.kept.table)
        self.kept.offer(together.take(hardest.sort().values))

    def consolidate(self) -> None:
        """Take the importances of the buffer into the running mean, and the model as it is for theta*."""
        found, old = importance(self.model, self.kept.table, loss="norm", power=1, run=self.run), self.importances
        for name, value in found.items():
            before = padded(old.values[name].to(value.device), value.shape)
            old.values[name] = before + (value - before) / self.plateaus.count
        old.add(self.kept.table.ids)
        self._anchor()
        self._aim()

    def drop(self, rows: Table) -> Ids:
        """Rows leave the buffer; theta*, which may tell of them, is taken anew from the model that comes next."""
        self.anchor.values = {}
        return super().drop(rows)

    def extra_state(self) -> State:
        return {"plateaus": self.plateaus.state_dict()}

    def load_extra_state(self, state: State) -> None:
        self.plateaus.load_state_dict(state["plateaus"])

    def _losses(self, rows: Table) -> Tensor:
        """The loss of every row, [n], in eval mode."""
        return predict(self.model, rows, "loss", run=self.run).double()

    def _anchor(self) -> None:
        self.anchor.values = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def _make_room(self) -> None:
        """Zeros where the model has grown: so what is held follows the model, and not when plateaus come."""
        for name, p in self.model.named_parameters():
            omega = self.importances.values.get(name, torch.zeros_like(p))
            self.importances.values[name] = padded(omega, p.shape)
            self.anchor.values[name] = padded(self.anchor.values[name], p.shape).to(p.dtype)

    def _aim(self) -> None:
        """Weights and goals of the penalty, shaped like the parameters; none before the first plateau."""
        self.pull: dict[str, Tensor] = {}
        self.goal: dict[str, Tensor] = {}
        for name, p in self.model.named_parameters() if self.strength and self.plateaus.count else ():
            omega, goal = self.importances.values[name], self.anchor.values[name]
            self.pull[name] = (0.5 * self.strength * padded(omega.to(p.device), p.shape)).to(p.dtype)
            self.goal[name] = padded(goal.to(p.device), p.shape).to(p.dtype)
