"""Memory aware synapses: a parameter matters by how much the outputs move with it, whatever the labels.

Aljundi, Babiloni, Elhoseiny, Rohrbach, Tuytelaars: Memory Aware Synapses: Learning what (not) to forget.
ECCV 2018, arXiv 1711.09601; chapter of Aljundi: Continual Learning in Neural Networks, arXiv 1910.02718.

1. After a task: Omega grows by the mean over rows of |d ||F(x)||² / d theta|, F the logits.
2. While a task is learnt: its loss + strength * sum of Omega (theta - theta')², over all parameters but the
   head's.

The authors' code takes the absolute value after summing over a batch, so that rows cancel and the result
depends on the batch size; here it is taken per row, as the equation says. Avalanche further halves the
penalty, averages the importances of tasks and takes the norm without its square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from engram.data.task import Task
from engram.engine.importance import importance
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.keep.consolidation import Consolidation


@dataclass(kw_only=True, eq=False)
class MAS(Consolidation):
    """The penalty with the sensitivity of the outputs.

    `strength`: lambda. Made for a head per task: where tasks share one, the features are kept, and the head's rows
    of old classes are not. Cost: a backward pass over each task's rows besides the training, and one number per
    parameter.
    """

    holds_head: ClassVar[bool] = False

    @classmethod
    def tiny(cls) -> MAS:
        return cls(network={"name": "MLP", "hidden": [32]}, epochs=3, batch_size=32, optimizer=Optimizer(lr=1e-2))

    def end(self, task: Task, run: Run) -> None:
        self.consolidate(importance(self.model, task.train, loss="norm", power=1, run=run), task.train.ids)
