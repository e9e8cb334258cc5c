"""Learning without forgetting: on the rows of a new task, go on answering for old classes as before.

Li, Hoiem: Learning without Forgetting. ECCV 2016, arXiv 1606.09282.

Before a task, the logits z' of its rows are recorded. While it is learnt, the loss is (eq. 1 to 4)

    cross-entropy of the labels + weight * cross-entropy of softmax(z' / T) against softmax(z / T),

the second over the columns of known classes of which the task brings no rows. There is no factor T².

The paper has a head for every task, a softmax over each, and trains the new head alone first; it calls that
warm-up not crucial, and it is left out. Here classes share one head: the labels' softmax is over all classes
seen, the teacher's over the old ones together, as Mammoth has it (with weight 0.5). `keep.RehearsalFree` with
a softmax head is the same loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from engram.core.learning import GradientLearner
from engram.core.needs import Need, Needs, needs
from engram.data.table import Batch
from engram.data.task import Task
from engram.engine.losses import Mean, distil
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.engine.teacher import RowCache, cached
from engram.models.output import Output


@dataclass(kw_only=True, eq=False)
class LwF(GradientLearner):
    """Fine-tuning with distillation from the model before the task.

    `weight`: of the distillation (lambda_o), 0 is fine-tuning. `temperature`: T. Nothing is stored between
    tasks. Cost: a forward pass over each task's rows besides the training.
    """

    weight: float = 1.0
    temperature: float = 2.0

    @classmethod
    def tiny(cls) -> LwF:
        return cls(network={"name": "MLP", "hidden": [32]}, epochs=3, batch_size=32, optimizer=Optimizer(lr=1e-2))

    @property
    def needs(self) -> Needs:
        return needs({Need.BOUNDARIES})

    def start(self, task: Task, run: Run) -> None:
        self.old = [c for c in self.known if c not in task.train.classes] if self.weight else []
        self.teacher: RowCache | None = cached(self.model, task.train, "logits", run, "teacher") if self.old else None

    def terms(self, batch: Batch, output: Output) -> Mean:
        loss = super().terms(batch, output)
        if self.teacher is None:
            return loss
        assert output.logits is not None
        taught = self.teacher(batch)[:, self.old]
        return loss + self.weight * distil(output.logits[:, self.old], taught, self.temperature)
