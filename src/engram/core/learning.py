"""The template of learners that follow a gradient."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from engram.core.learner import Learner, require_labels
from engram.core.needs import require_processes
from engram.core.settings import name_of
from engram.core.trace import Seen
from engram.data.table import Batch, Target
from engram.data.task import Task
from engram.engine.fit import Update, fit
from engram.engine.losses import Mean, by_target
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.models.build import build
from engram.models.head import Head


@dataclass(kw_only=True, eq=False)
class GradientLearner(Learner):
    """Fine-tuning on each task, if nothing is overridden; a method states its difference in one of the hooks.

    `network`: a name, {"name": …}, a model directory or a module; see `models.build`. Hooks in the order in
    which they run: `start` (the head has grown; take a teacher here, from the model as it is now), `batches`,
    `terms` (the loss of a batch), `after_step`, `end` (means, importances, buffers). A method of several
    updates a batch overrides `step`, and says in `optimizers` and `changing` what it trains with. `known`:
    the classes that the model could already tell when this task came, ascending.
    """

    network: Any = "MLP"
    optimizer: Optimizer = field(default_factory=Optimizer)
    epochs: int = 10
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen: Seen = self.trace("seen", Seen())
        self.known: tuple[int, ...] = ()

    def learn(self, task: Task, run: Run | None = None) -> None:
        """Train on the task's rows. Cost: epochs times rows, forward and backward."""
        require_processes(name_of(self), self.processes)
        require_labels(task)
        run = run or Run()
        with run.scope("learn"):
            self._prepare(task, run)
            self.start(task, run)
            self.optimise(task, run)
            self.seen.add(task.train.ids)
            self.end(task, run)

    def optimise(self, task: Task, run: Run, name: str = "fit") -> None:
        """Train the model on the task's rows by the hooks; it is in eval mode afterwards."""
        fit(
            lambda batch: self.step(batch, task),
            lambda epoch: self.batches(task, epoch, run),
            model=self.model.train(),
            optimizer=self.optimizers(),
            epochs=self.epochs,
            run=run,
            name=name,
            state=self.changing(),
            steps=-(-len(task.train) // self.batch_size),
            after_step=self.after_step,
        )
        self.model.eval()

    def start(self, task: Task, run: Run) -> None:
        """Before training."""

    def optimizers(self) -> Optimizer | Mapping[str, torch.optim.Optimizer]:
        """What trains the model: a plan, or the optimisers that `step` yields, by name."""
        return self.optimizer

    def changing(self) -> Mapping[str, Any]:
        """What training changes besides the model and the optimisers, by name, so that it can be resumed."""
        return {}

    def batches(self, task: Task, epoch: int, run: Run) -> Iterable[Any]:
        """The batches of an epoch, this process's share of each."""
        return task.train.batches(self.batch_size, seed=run.number("order"), epoch=epoch, shard=run.shard)

    def step(self, batch: Any, task: Task) -> Mean | Generator[Update, None, None]:
        """The loss of a batch; to be overridden only by methods that need more than one update per batch."""
        batch = batch.trimmed()
        return self.terms(batch, self.model(**batch.inputs))

    def terms(self, batch: Batch, output: Any) -> Mean:
        """The loss of a batch, given the model's output."""
        assert batch.labels is not None
        return by_target(output.logits, batch.labels)

    def after_step(self, step: int) -> None:
        """After each update."""

    def end(self, task: Task, run: Run) -> None:
        """After training; the model is in eval mode."""

    def _prepare(self, task: Task, run: Run) -> None:
        """Build the model for the first task; let the head grow for new classes."""
        self.known = _live(self.model) if self.started else ()
        if not self.started:
            self.model = self.first_model(task, run)
        head = getattr(self.model, "head", None)
        if head is not None and hasattr(head, "grow"):
            head.grow(task.classes or task.train.classes, run.generator("head"))

    def first_model(self, task: Task, run: Run) -> nn.Module:
        """The untrained model for the first task."""
        table = task.train
        outputs = table.labels.shape[1] if table.target == Target.NUMBERS and table.labels is not None else None
        network = copy.deepcopy(self.network) if isinstance(self.network, nn.Module) else self.network
        classes = task.classes or table.classes
        return build(network, inputs=table.shapes, classes=classes, outputs=outputs, generator=run.generator("weights"))


def _live(model: nn.Module) -> tuple[int, ...]:
    """The classes that a model's head can tell; none for a model without a class head."""
    head = getattr(model, "head", None)
    return tuple(head.live.nonzero()[:, 0].tolist()) if isinstance(head, Head) else ()
