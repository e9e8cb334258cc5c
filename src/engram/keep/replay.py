"""Experience replay: every batch of a task is trained on together with rows of a buffer.

The plain baseline of rehearsal (Chaudhry and others: On Tiny Episodic Memories in Continual Learning, 2019).
The buffer is filled when a task ends, and keeps raw rows: it is the trace that has to be asked when a row
must go.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from engram.core.learning import GradientLearner
from engram.data.buffer import Buffer
from engram.data.table import Batch, Table
from engram.data.task import Task
from engram.engine.run import Run


@dataclass(kw_only=True, eq=False)
class Replay(GradientLearner):
    """Fine-tuning on the task's rows and on rows that were kept.

    `buffer`: rows kept. `rule`: which ones: "reservoir" (a uniform sample of all rows seen), "fifo" (the
    last), or "per_class" (equal parts). `replayed`: rows of the buffer beside each batch; the loss is the
    mean over both. Cost: as fine-tuning, times 1 + replayed / batch_size.
    """

    buffer: int = 500
    rule: str = "reservoir"
    replayed: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kept: Buffer = self.trace("buffer", Buffer(self.buffer, rule=self.rule))

    @classmethod
    def tiny(cls) -> Replay:
        return cls(network={"name": "MLP", "hidden": [32]}, epochs=3, batch_size=32, buffer=20, replayed=16)

    def batches(self, task: Task, epoch: int, run: Run) -> Iterable[Batch]:
        draws = run.generator("replay", epoch)
        for batch in task.train.batches(self.batch_size, seed=run.number("order"), epoch=epoch):
            rows = task.train.take(batch.rows)
            if len(self.kept):
                rows = rows.concat(self.kept.draw(self.replayed, draws))
            yield share(rows, run)

    def end(self, task: Task, run: Run) -> None:
        self.kept.offer(task.train)


def share(rows: Table, run: Run) -> Batch:
    """This process's share of rows that are trained on together."""
    rank, processes = run.shard
    return rows.batch(torch.arange(rank, len(rows), processes))
