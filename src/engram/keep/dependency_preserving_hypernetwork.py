"""Dependency preserving hypernetwork: a recurrent network generates each task's network layer after layer.

Chandra, Varshney, Srijith, Gupta: Continual Learning with Dependency Preserving Hypernetworks. WACV 2023, arXiv
2209.07712. It adds three things to the chunked hypernetwork (`keep.ChunkedHypernetwork`, where the rest is told):

1. The generator is an LSTM over the chunks, from the input layer to the output layer, so that what is generated follows
   from what was generated before (`models.hypernetwork.RecurrentGenerator`).
2. A new regulariser: each weight of an earlier task is held by its importance F for that task,

       R = 1 / (t - 1) sum over j < t, i of F_ji (Theta*_ji - Theta_ji)².

3. A rule of growth: where the loss of a new task stays above `limit`, the LSTM gets more hidden units, and the task is
   trained on. New units do not feed old ones and begin with no say in the output, so that at that moment every task
   keeps its weights.

A RECONSTRUCTION. The paper's abstract says that there are these three; its equations could not be read and there is no
published code. Ours are: the form of the recurrence (vectors of task and chunk as its input), F as the diagonal of the
Fisher information of the target network at the end of a task, scaled to mean 1 (which published code of the parent
method knows), the trigger of growth and its zeros. The regulariser that they stand on, with its look-ahead, is that of
the parent method and its code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engram.data.task import Task
from engram.engine.predict import evaluating
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.chunked_hypernetwork import TINY, ChunkedHypernetwork
from engram.models.hypernetwork import RecurrentGenerator, WeightGenerator
from engram.models.seeding import seeded


@dataclass(kw_only=True, eq=False)
class DependencyPreservingHypernetwork(ChunkedHypernetwork):
    """Settings beside those of ChunkedHypernetwork, of which `hidden` is the size of the LSTM's state:

    `importance`: "fisher", "mas" or None. `feedback`: the chunk before is an input of the next, projected onto so many
    numbers; 0: it is not. `limit`: the loss of a new task, in nats a row, above which the generator grows by `units`
    and the task is trained once more; None: never. Cost: as the chunked form, but the chunks of a task are generated
    one after another: keep their number, D / `chunk`, between 10 and 100.
    """

    importance: str | None = "fisher"
    feedback: int = 0
    limit: float | None = None
    units: int = 4

    @classmethod
    def tiny(cls) -> DependencyPreservingHypernetwork:
        return cls(**TINY, subset=1, feedback=2, limit=-1.0, units=1)

    def check(self) -> None:
        super().check()
        if self.feedback < 0 or self.units < 1:
            raise EngramError(f"feedback is 0 or more and units 1 or more; got {self.feedback} and {self.units}")

    def generator(self) -> WeightGenerator:
        sizes = self.task_width, self.chunk_width, self.hidden, self.chunk
        return RecurrentGenerator(*sizes, feedback=self.feedback)

    def end(self, task: Task, run: Run) -> None:
        if self.limit is not None and self.loss_of(task) > self.limit:
            self.grow(run)
            self.optimise(task, run, "grown")
        super().end(task, run)

    def grow(self, run: Run) -> None:
        """More hidden units; every task keeps its weights."""
        assert isinstance(self.whole.generator, RecurrentGenerator)
        with seeded(run.generator("growth")):
            self.whole.generator.grow(self.units)

    @torch.no_grad()
    def loss_of(self, task: Task) -> float:
        """The mean loss of the newest task's network over its rows."""
        total = count = 0.0
        with evaluating(self.model):
            weights = self.whole.weights([self.newest])[0]
            for batch in task.train.batches(256, shuffle=False):
                (found, known), *_ = self.task_loss(batch.to(weights.device), weights).terms
                total, count = total + float(found), count + float(known)
        return total / max(count, 1.0)
