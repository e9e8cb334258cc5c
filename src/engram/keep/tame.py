"""TAME: experts that notice a change of task by their own loss, and a selector that routes rows to them.

Zhu, Majzoubi, Jain, Choromanska: TAME: Task Agnostic Continual Learning using Multiple Experts. CVPR 2024
workshops, arXiv 2210.03869.

For every batch of a stream that announces nothing:

1. Each expert k says its loss l_k; its smoothed loss S_k moves to alpha l_k + (1 - alpha) S_k.
2. The active expert's threshold is the mean of its recent losses plus three times their standard deviation.
3. S within the threshold: the active expert trains on the batch and remembers the loss.
4. Otherwise the first expert, in order of creation, whose smoothed loss would be below its own threshold
   becomes active and trains; if there is none, a new one does.
5. Some rows are kept for every class, each with the number of the expert that took it.

When the model is wanted, a selector is trained on these rows, to tell which expert a row belongs to.

Experts end in a sigmoid, on which cross-entropy is taken, so that early losses stay near ln C and raise no
alarm. They have C outputs each, whatever the class ids: a class that an expert has not met takes its next
free output; once all are taken, foreign classes are scored at the outputs in order, as if they were the
expert's own. A change that is not noticed is therefore learnt over the old classes, and the new ones are
never predicted.

Minimal form: neither experts nor selector are pruned, and there is no learning-rate schedule.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.core.learning import GradientLearner
from engram.core.trace import State
from engram.data.buffer import Buffer
from engram.data.table import Batch, Ids, Table
from engram.data.task import Task
from engram.engine.fit import Update
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.predict import evaluating
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.models.build import build
from engram.models.routed import Routed

SGD = Optimizer("sgd", lr=0.1, weight_decay=5e-4)
EXPERT = "expert"  # the buffer's column that says which expert took a row


@dataclass
class Monitor:
    """What is remembered of an expert's losses.

    The last ones it was trained on, the smoothed loss over the stream and while active, and the threshold.
    """

    losses: list[float]
    smoothed: float | None = None
    active: float | None = None
    threshold: float = math.inf

    def watch(self, loss: float, alpha: float) -> None:
        """A loss of the stream."""
        self.smoothed = smooth(self.smoothed, loss, alpha)

    @property
    def alarmed(self) -> bool:
        """Has the smoothed loss jumped above the threshold? Never before the expert was trained on a
        batch."""
        return self.active is not None and self.smoothed is not None and self.smoothed > self.threshold

    def fits(self, loss: float, alpha: float) -> bool:
        """Would a batch of this loss belong to what the expert learnt last?"""
        return smooth(self.active, loss, alpha) < self.threshold

    def accept(self, loss: float, window: int) -> None:
        """The expert is trained on a batch that had this loss before."""
        self.losses = [*self.losses, loss][-window:]
        self.active = self.smoothed


def smooth(before: float | None, loss: float, alpha: float) -> float:
    """alpha loss + (1 - alpha) before; the first loss is taken whole."""
    return loss if before is None else alpha * loss + (1 - alpha) * before


def threshold(losses: list[float], floor: float = 0.005) -> float:
    """Mean plus three standard deviations (of the population, at least `floor`) of recent losses."""
    values = torch.tensor(losses, dtype=torch.float64)
    return float(values.mean() + 3 * values.std(correction=0).clamp(min=floor))


@dataclass(kw_only=True, eq=False)
class TAME(GradientLearner):
    """Experts found by their losses.

    `network`: the build of an expert. `outputs`: C, the number of classes of a task. `window`, `alpha`,
    `floor`: how many losses a threshold is made of (few against the batches of a task), the weight of a new
    loss, the least standard deviation. `buffer`: rows kept, in equal parts by class. `selector`: its build
    (that of an expert when left out), trained by `selector_optimizer` for `selector_epochs`.

    The first pass over a task's rows is in their order, further ones (`epochs`) are shuffled. With one epoch
    and no dropout, a stream that is cut elsewhere, at multiples of `batch_size`, gives the same bits. Cost: a
    forward pass of every expert on each batch; memory grows by one expert for each task that was noticed.
    """

    optimizer: Optimizer = SGD
    batch_size: int = 128
    outputs: int = 2
    window: int = 100
    alpha: float = 0.2
    floor: float = 0.005
    buffer: int = 5000
    selector: Any = None
    selector_optimizer: Optimizer = field(default=SGD)
    selector_epochs: int = 200

    processes: ClassVar[str] = "one"
    growth: ClassVar[str] = "per task"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kept: Buffer = self.trace("buffer", Buffer(self.buffer, rule="per_class"))
        self.bank = Bank(self.optimizer)
        self.first_pass = True
        self.stale = True

    @classmethod
    def tiny(cls) -> TAME:
        small = {"name": "MLP", "hidden": [32]}
        return cls(network=small, epochs=1, batch_size=16, buffer=40, selector_epochs=5)

    def first_model(self, task: Task, run: Run) -> nn.Module:
        shapes = task.train.shapes
        router = build(
            self.selector or self.network,
            inputs=shapes,
            classes=(0,),
            generator=run.generator("untrained selector"),
        )
        self.bank.monitors = [self._monitor()]
        return Routed([self._expert(0, task, run)], router, self.outputs)

    def start(self, task: Task, run: Run) -> None:
        self.run = run
        self.stale = True
        self.bank.attach(self.routed)

    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        return {}

    def changing(self) -> Mapping[str, Any]:
        return {"bank": self.bank, "buffer": self.kept}

    def batches(self, task: Task, epoch: int, run: Run) -> Iterable[Batch]:
        self.first_pass = epoch == 0
        return task.train.batches(self.batch_size, seed=run.number("order"), epoch=epoch, shuffle=epoch > 0)

    def step(self, batch: Batch, task: Task) -> Generator[Update, None, None]:
        expert = self.choose(batch, task)
        names, targets = self.places(expert, batch)
        self.routed.names[expert] = names
        if self.first_pass:
            rows = task.train.take(batch.rows)
            self.kept.offer(rows.with_column(EXPERT, torch.full((len(rows),), expert)))
        yield Mean.of(self.row_losses(expert, batch, targets)), self.bank.optimizers[expert]

    def choose(self, batch: Batch, task: Task) -> int:
        """The expert that takes the batch: the active one, an earlier one, or a new one."""
        losses = self.losses(batch)
        for monitor, loss in zip(self.bank.monitors, losses, strict=True):
            monitor.watch(loss, self.alpha)
        active = self.bank.active
        monitor = self.bank.monitors[active]
        monitor.threshold = threshold(monitor.losses, self.floor)
        if not monitor.alarmed:
            monitor.accept(losses[active], self.window)
            return active
        fitting = (k for k, m in enumerate(self.bank.monitors) if m.fits(losses[k], self.alpha))
        self.bank.active = found = next(fitting, len(losses))
        if found == len(losses):
            self._new_expert(task)
            losses = self.losses(batch)
        chosen = self.bank.monitors[found]
        chosen.smoothed = smooth(chosen.active, losses[found], self.alpha)
        chosen.accept(losses[found], self.window)
        return found

    def losses(self, batch: Batch) -> list[float]:
        """The loss of every expert on a batch, in eval mode."""
        with evaluating(self.routed):
            targets = [self.places(k, batch)[1] for k in range(len(self.routed.experts))]
            return [float(self.row_losses(k, batch, target).mean()) for k, target in enumerate(targets)]

    def row_losses(self, expert: int, batch: Batch, targets: Tensor) -> Tensor:
        """Cross-entropy on an expert's sigmoid outputs, [B]."""
        return F.cross_entropy(self.routed.local(expert, **batch.inputs), targets, reduction="none")

    def places(self, expert: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the expert's outputs would stand for after this batch [C], and the output of every row [B]."""
        assert batch.labels is not None
        names = self.routed.names[expert].clone()
        labels, index = torch.unique(batch.labels, return_inverse=True)
        place = [_place(names, int(label), rank) for rank, label in enumerate(labels)]
        return names, torch.tensor(place, device=index.device)[index]

    def refresh(self, run: Run | None = None) -> None:
        """Train the selector anew on the rows that are kept."""
        if not (self.started and self.stale and len(self.kept)):
            return
        run, table = run or Run(), self.kept.table
        labelled = Table(table.inputs, torch.as_tensor(table.extra[EXPERT]), table.ids)
        network = self.selector or self.network
        recipe = Recipe(
            network,
            self.selector_optimizer,
            self.selector_epochs,
            self.batch_size,
            tuple(range(len(self.bank.monitors))),
        )
        self.routed.router = recipe(labelled, run.seed, run)
        self.stale = False

    def drop(self, rows: Table) -> Ids:
        """Rows leave the buffer; the optimisers' moments, which have seen them, start anew."""
        self.stale = True
        self.bank.reset()
        return super().drop(rows)

    @property
    def routed(self) -> Routed:
        """The model."""
        assert isinstance(self.model, Routed)
        return self.model

    def extra_state(self) -> State:
        return {"bank": self.bank.state_dict()}

    def load_extra_state(self, state: State) -> None:
        self.bank = Bank(self.optimizer)
        self.bank.load_state_dict(state["bank"])
        self.stale = True

    def _new_expert(self, task: Task) -> None:
        number = len(self.routed.experts)
        self.routed.add(self._expert(number, task, self.run).to(self.run.device).train())
        head: Any = self.routed.router.head
        head.grow([number], self.run.generator("untrained selector", number))
        self.bank.monitors.append(self._monitor())
        self.bank.add(self.routed.experts[number])

    def _expert(self, number: int, task: Task, run: Run) -> nn.Module:
        draws = run.with_seed(run.seed).generator("expert", number)  # whatever piece of the stream it comes with
        return build(self.network, inputs=task.train.shapes, classes=range(self.outputs), generator=draws)

    def _monitor(self) -> Monitor:
        return Monitor([math.log(self.outputs)])


def _place(names: Tensor, label: int, rank: int) -> int:
    """The output of a class: its own, else the next free one, which it takes, else that of its rank in the
    batch."""
    own, free = (names == label).nonzero(), (names < 0).nonzero()
    if len(own):
        return int(own[0])
    if not len(free):
        return rank % len(names)
    names[free[0]] = label
    return int(free[0])


class Bank:
    """What experts have besides weights: their optimisers and monitors, and which of them is active."""

    def __init__(self, plan: Optimizer) -> None:
        self.plan = plan
        self.active = 0
        self.monitors: list[Monitor] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.loaded: list[Any] = []  # moments that wait for a model
        self.model: Routed | None = None

    def attach(self, model: Routed) -> None:
        """Build the optimisers over a model's experts, with the moments they had."""
        moments = self.moments()
        self.model, self.optimizers, self.loaded = model, [], []
        for expert in model.experts:
            self.add(expert)
        for optimizer, state in zip(self.optimizers, moments, strict=False):
            optimizer.load_state_dict(state)

    def add(self, expert: nn.Module) -> None:
        """An optimiser for one more expert."""
        self.optimizers.append(self.plan.build(expert.parameters()))

    def moments(self) -> list[Any]:
        """The optimisers' states, copied."""
        return copy.deepcopy([optimizer.state_dict() for optimizer in self.optimizers] or self.loaded)

    def reset(self) -> None:
        """Let the optimisers start anew."""
        self.optimizers, self.loaded = [], []

    def state_dict(self) -> State:
        monitors = [asdict(monitor) for monitor in self.monitors]
        return {"active": self.active, "monitors": monitors, "moments": self.moments()}

    def load_state_dict(self, state: State) -> None:
        self.active = state["active"]
        self.monitors = [Monitor(**monitor) for monitor in state["monitors"]]
        self.optimizers, self.loaded = [], copy.deepcopy(state["moments"])
        if self.model is not None:
            self.attach(self.model)
