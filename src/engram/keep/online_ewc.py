"""Online elastic weight consolidation: one running Fisher diagonal holds parameters at where they were.

Schwarz, Luketina, Czarnecki, Grabska-Barwinska, Teh, Pascanu, Hadsell: Progress & Compress: A scalable
framework for continual learning. ICML 2018, arXiv 1805.06370 (online EWC); after Kirkpatrick and others:
Overcoming catastrophic forgetting in neural networks. PNAS 2017, arXiv 1612.00796.

1. After a task, with F its Fisher diagonal at the model that was reached: F* = gamma F* + F.
2. While a task is learnt: its loss + strength / 2 * sum of gamma F* (theta - theta')².

Mammoth has neither the half nor the gamma in the loss, and weighs the squared gradient of a row by the
probability of its label.
"""

from __future__ import annotations

from dataclasses import dataclass

from engram.data.task import Task
from engram.engine.importance import importance
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.keep.consolidation import Consolidation


@dataclass(kw_only=True, eq=False)
class OnlineEWC(Consolidation):
    """The penalty with one running Fisher diagonal.

    `strength`: lambda, twice Mammoth's 90 for split MNIST, because of the half. `gamma`: what is left of the old
    Fisher when a new one comes, 1 for all of it. `fisher`: whose labels the Fisher takes, per row: "true" as in
    published code, "model", "sampled", or "all" (exact). Cost: a backward pass over each task's rows besides the
    training, and one number per parameter.
    """

    strength: float = 180.0
    gamma: float = 1.0
    fisher: str = "true"

    @classmethod
    def tiny(cls) -> OnlineEWC:
        small = {"name": "MLP", "hidden": [32]}
        return cls(network=small, epochs=3, batch_size=32, optimizer=Optimizer(lr=1e-2), gamma=0.9)

    @property
    def factor(self) -> float:
        return self.strength * self.gamma / 2

    def end(self, task: Task, run: Run) -> None:
        found = importance(self.model, task.train, labels=self.fisher, run=run)
        self.consolidate(found, task.train.ids, keep=self.gamma)
