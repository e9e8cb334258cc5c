"""TAME: experts that notice a change of task by their own loss, and a selector that routes rows to them.

Zhu, Majzoubi, Jain, Choromanska: TAME: Task Agnostic Continual Learning using Multiple Experts. CVPR 2024
workshops, arXiv 2210.03869.

For every batch of a stream that announces nothing:

1. Each expert k says its loss l_k; its smoothed loss S_k moves to alpha l_k + (1 - alpha) S_k.
2. The active expert's threshold is the mean of its recent losses plus three times their standard deviation.
3. S within the threshold: the active expert trains on the batch and remembers the loss.
4. Otherwise the first expert, in order of creation, the active one included, of which the loss, smoothed over
   the batches that it was trained on, would be below its own threshold becomes active and trains; if there is
   none, a new one does.
5. Some rows are kept for every class, each with the number of the expert that took it, and some rows more.

When the model is wanted, a selector is trained on the rows of the first kind, to tell which expert a row
belongs to; half of its weights and nearly all of the experts' are cut, those that are nearest to zero over all
layers together, and what is left is trained on: the selector on its rows, an expert on those of the second kind
that it took. Experts as they were before go on learning; the pruned ones are made of them anew each time.

All networks end in a sigmoid, on which cross-entropy is taken, so that early losses stay near ln C and raise no
alarm. Losses are remembered less ln C, that of chance: no decision depends on it as long as C stays.

Where paper and published code differ: a window of 100 losses and Nesterov's momentum are the paper's (code: 35,
and none); the least standard deviation of 0.005 and schedules that count an expert's own updates are the code's.
Published code has the calls that prune experts taken out, and its accuracy counts a row as right when the place
of its class within the task is, whichever expert gave it; here the class has to be right.

Beyond the paper: there C, the number of classes of a task, is known. So it is with `outputs=C`: a class that an
expert has not met takes its next free output, and once all are taken, foreign classes are scored at the outputs
in order, as if they were the expert's own; a change that is not noticed is then learnt over the old classes, and
the new ones are never predicted. Left out, an expert has an output for every class that it was trained on, and a
class that it lacks counts as an output that says 0: so foreign classes always have a loss near that of chance,
and jumps are clearer. Of a change that is not noticed some classes are learnt: the sigmoid soon says 1 for
several new ones alike, and stays there.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.core.learning import GradientLearner
from engram.core.trace import State
from engram.data.buffer import Buffer
from engram.data.table import MISSING, Batch, Ids, Table, Target
from engram.data.task import Task
from engram.engine.fit import Update, fit
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.predict import evaluating
from engram.engine.run import Run
from engram.engine.select import Masks, cut, prune
from engram.errors import EngramError
from engram.models.build import build
from engram.models.head import Head
from engram.models.heads import LinearHead
from engram.models.predictor import Predictor
from engram.models.routed import Routed

EXPERTS = Optimizer("sgd", lr=0.1, nesterov=True, weight_decay=5e-4)
SELECTOR = Optimizer("sgd", lr=0.1, weight_decay=5e-4)
PRUNED = Optimizer("sgd", lr=0.1, weight_decay=1e-4, schedule="steps", milestones=(0.5, 0.75))
PRUNED_SELECTOR = replace(PRUNED, lr=1e-3)
FREE = -1  # stands for an output's class
EXPERT = "expert"  # the buffers' column that says which expert took a row


@dataclass
class Monitor:
    """What is remembered of an expert's losses.

    The last ones before it was trained on a batch, the smoothed loss over the stream and over the batches that it
    was trained on, the threshold, and how often it was trained.
    """

    losses: list[float]
    smoothed: float | None = None
    active: float | None = None
    threshold: float = math.inf
    updates: int = 0

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

    def accept(self, loss: float, window: int, alpha: float) -> None:
        """The expert is trained on a batch that had this loss before."""
        self.losses = [*self.losses, loss][-window:]
        self.active = smooth(self.active, loss, alpha)
        self.updates += 1


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

    `network`: the build of an expert, an encoder with a class head. `outputs`: C, the number of classes of a task;
    None for as many as an expert meets. `window`, `alpha`, `floor`: how many losses a threshold is made of, the
    weight of a new loss, the least standard deviation. An expert's learning rate follows the `optimizer`'s schedule
    over `schedule_steps` updates of its own. `buffer`, `pruning_buffer`: rows kept for the selector, in equal parts
    by class, and for pruned experts, of all alike. `selector`: its build (that of an expert when left out), trained
    by `selector_optimizer` for `selector_epochs`. `pruned`, `selector_pruned`: shares of the weights that are cut;
    with `pruned=0` the model's experts are those that go on learning, and no rows are kept for them. Then they are
    trained for `retrain_epochs` by `retrain` and `selector_retrain`.

    A change is noticed when losses have settled before: a task needs several times `window` batches. One of a few
    dozen has falling losses, whose spread hides the jump; give a window of a quarter of them, such as 10 (in a
    stream with many batches so short a one gives false alarms). Nor is there a jump where a stream drifts.

    The first pass over a task's rows is in their order; further ones (`epochs`) are shuffled, within each piece that
    one expert took. With one epoch and no dropout, a stream that is cut elsewhere, at multiples of `batch_size`,
    gives the same bits. Cost: a forward pass of every expert on each batch; `refresh` trains over both buffers.
    Memory grows by one expert for each task that was noticed, and by its pruned copy, of which zeros are stored.
    EngramError for rows without classes, and networks without a class head.
    """

    optimizer: Optimizer = EXPERTS
    batch_size: int = 128
    outputs: int | None = None
    window: int = 100
    alpha: float = 0.2
    floor: float = 0.005
    schedule_steps: int | None = None
    buffer: int = 5000
    pruning_buffer: int = 6000
    selector: Any = None
    selector_optimizer: Optimizer = SELECTOR
    selector_epochs: int = 200
    pruned: float = 0.98
    selector_pruned: float = 0.5
    retrain: Optimizer = PRUNED
    selector_retrain: Optimizer = PRUNED_SELECTOR
    retrain_epochs: int = 200

    processes: ClassVar[str] = "one"
    growth: ClassVar[str] = "per task"

    def __post_init__(self) -> None:
        super().__post_init__()
        moving = self.optimizer.schedule != "constant" or self.optimizer.warmup > 0
        if moving and not self.schedule_steps:
            raise EngramError("nobody says how long a task is: give schedule_steps, over which the schedule runs")
        self.kept: Buffer = self.trace("buffer", Buffer(self.buffer, rule="per_class"))
        self.spare: Buffer = self.trace("pruning buffer", Buffer(self.pruning_buffer))
        self.bank = Bank(self.optimizer)
        self.unpruned: Routed | None = None  # what goes on learning, while the model is what was made of it
        self.first_pass = True
        self.stale = True

    @classmethod
    def tiny(cls) -> TAME:
        small = {"name": "MLP", "hidden": [32]}
        return cls(
            network=small,
            epochs=1,
            batch_size=16,
            buffer=40,
            pruning_buffer=40,
            selector_epochs=5,
            pruned=0.8,
            retrain_epochs=3,
        )

    @property
    def model(self) -> nn.Module:
        """The whole predictor; one that is set from outside takes the place of what goes on learning, too."""
        return super().model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self._model, self.unpruned = model, None

    def learn(self, task: Task, run: Run | None = None) -> None:
        """Take rows in, as a stream; those without a label are left out."""
        if task.train.target not in (Target.CLASSES, Target.NONE):
            raise EngramError(f"experts tell classes apart, and the target of these rows is {task.train.target}")
        labels = task.train.labels
        if labels is not None and bool((known := labels != MISSING).any()):
            task = task if bool(known.all()) else replace(task, train=task.train.take(known))
        super().learn(task, run)

    def first_model(self, task: Task, run: Run) -> nn.Module:
        router = classifier(self._selector_build, task.train.shapes, range(1), run.generator("untrained selector"))
        self.bank.monitors = [Monitor([0.0])]
        return Routed([self._expert(0, task, run)], router, self.outputs or 0)

    def start(self, task: Task, run: Run) -> None:
        if self.unpruned is not None:
            self.model = self.unpruned
        self.run = run.with_seed(run.seed)  # what is drawn depends on no piece of the stream
        self.stale = True
        self.model.to(run.device)
        self.bank.attach(self.routed)

    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        return {}

    def changing(self) -> Mapping[str, Any]:
        return {"bank": self.bank, "buffer": self.kept, "pruning buffer": self.spare}

    def batches(self, task: Task, epoch: int, run: Run) -> Iterable[Batch]:
        self.first_pass = epoch == 0
        if self.first_pass:
            return task.train.batches(self.batch_size, shuffle=False)
        order = run.number("order")
        pieces = (task.train.take(rows) for rows in self.bank.pieces(self.batch_size, len(task.train)))
        return itertools.chain.from_iterable(
            piece.batches(self.batch_size, seed=order, epoch=epoch) for piece in pieces
        )

    def step(self, batch: Batch, task: Task) -> Generator[Update, None, None]:
        expert = self.choose(batch, task)
        names, targets = self.places(expert, batch)
        self._take(expert, names)
        if self.first_pass:
            self._keep(expert, task.train.take(batch.rows))
        optimizer = self.bank.optimizers[expert]
        self.optimizer.set_rate(optimizer, (self.bank.monitors[expert].updates - 1) / (self.schedule_steps or 1))
        scores = self.routed.local(expert, **batch.inputs)
        yield Mean.of(row_losses(scores, targets, len(names))), optimizer

    def end(self, task: Task, run: Run) -> None:
        self.bank.taken = []

    def choose(self, batch: Batch, task: Task) -> int:
        """The expert that takes the batch: the active one, an earlier one, or a new one."""
        losses = self.losses(batch)
        for monitor, loss in zip(self.bank.monitors, losses, strict=True):
            monitor.watch(loss, self.alpha)
        active = self.bank.monitors[self.bank.active]
        active.threshold = threshold(active.losses, self.floor)
        if active.alarmed:
            fitting = (k for k, m in enumerate(self.bank.monitors) if m.fits(losses[k], self.alpha))
            self.bank.active = next(fitting, len(losses))
        if self.bank.active == len(losses):
            self._new_expert(task)
            losses = self.losses(batch)
            self.bank.monitors[-1].watch(losses[-1], self.alpha)
        found = self.bank.active
        self.bank.monitors[found].accept(losses[found], self.window, self.alpha)
        return found

    def losses(self, batch: Batch) -> list[float]:
        """The loss of every expert on a batch, in eval mode, less that of chance."""
        with evaluating(self.routed):
            every = self.routed.every(batch.inputs)
        return [self._loss(k, scores, batch) for k, scores in enumerate(every)]

    def places(self, expert: int, batch: Batch) -> tuple[list[int], Tensor]:
        """The classes that the expert's outputs would stand for after this batch, and the output of every row [B]."""
        assert batch.labels is not None
        names = self.routed.names[expert, : _width(self.routed.experts[expert])].tolist()
        labels, index = torch.unique(batch.labels, return_inverse=True)
        found = [_place(names, label, rank, self.outputs) for rank, label in enumerate(labels.tolist())]
        return names, torch.tensor(found, device=index.device)[index]

    def refresh(self, run: Run | None = None) -> None:
        """Train the selector anew on the rows that are kept, and prune: the model from what goes on learning."""
        if not (self.started and self.stale and len(self.kept)):
            return
        run = run or Run()
        with run.scope("refresh"):
            self._derive(run.with_seed(run.seed))
        self.stale = False

    def drop(self, rows: Table) -> Ids:
        """Rows leave the buffers; the optimisers' moments, which have seen them, start anew."""
        self.stale = True
        self.bank.reset()
        return super().drop(rows)

    @property
    def routed(self) -> Routed:
        """The model."""
        assert isinstance(self.model, Routed)
        return self.model

    def extra_state(self) -> State:
        from engram.models.io import pack

        growing = None if self.unpruned is None else list(pack(self.unpruned))
        return {"bank": self.bank.state_dict(), "unpruned": growing}

    def load_extra_state(self, state: State) -> None:
        from engram.models.io import unpack

        growing = None if state["unpruned"] is None else unpack(*state["unpruned"])
        assert growing is None or isinstance(growing, Routed)
        self.unpruned = growing
        self.bank = Bank(self.optimizer)
        self.bank.load_state_dict(state["bank"])
        self.stale = True

    @property
    def _selector_build(self) -> Any:
        return self.network if self.selector is None else self.selector

    def _loss(self, expert: int, scores: Tensor, batch: Batch) -> float:
        names, targets = self.places(expert, batch)
        return float(row_losses(scores, targets, len(names)).mean()) - math.log(len(names))

    def _keep(self, expert: int, rows: Table) -> None:
        """Offer rows to the buffers, with the number of the expert that took them."""
        self.bank.taken.append(expert)
        marked = rows.with_column(EXPERT, torch.full((len(rows),), expert))
        self.kept.offer(marked)
        if self.pruned:
            self.spare.offer(marked)

    def _take(self, expert: int, names: Sequence[int]) -> None:
        """Let an expert have outputs for these classes."""
        head: Any = self.routed.experts[expert].head
        have = _width(self.routed.experts[expert])
        if len(names) > have:
            head.grow(range(have, len(names)), self.run.generator("outputs", expert, len(names)))
            self.bank.regrow(expert)
        self.routed.name(expert, names)

    def _new_expert(self, task: Task) -> None:
        number = len(self.routed.experts)
        self.routed.add(self._expert(number, task, self.run).to(self.run.device).train())
        head: Any = self.routed.router.head
        head.grow([number], self.run.generator("untrained selector", number))
        self.bank.monitors.append(Monitor([0.0]))
        self.bank.add(self.routed.experts[number])

    def _expert(self, number: int, task: Task, run: Run) -> nn.Module:
        draws = run.with_seed(run.seed).generator("expert", number)
        return classifier(self.network, task.train.shapes, range(self.outputs or 0), draws)

    def _derive(self, run: Run) -> None:
        growing = (self.routed if self.unpruned is None else self.unpruned).to(run.device)
        router = self._selector(growing, run)
        if not self.pruned:
            growing.router = router
            return
        model = copy.deepcopy(growing)
        model.router = router
        for k, expert in enumerate(model.experts):
            self._prune(expert, self.pruned, self._rows_of(k, model), self.retrain, run, f"expert {k}")
        self._model, self.unpruned = model, growing

    def _selector(self, growing: Routed, run: Run) -> nn.Module:
        """A selector among these experts, trained on the rows that are kept, pruned, and trained again."""
        table = self.kept.table
        rows = Table(table.inputs, torch.as_tensor(table.extra[EXPERT]), table.ids)
        number = range(len(growing.experts))
        found = classifier(self._selector_build, table.shapes, number, run.generator("selector"))
        self._train(found, rows, self.selector_optimizer, self.selector_epochs, run, "selector")
        self._prune(found, self.selector_pruned, rows, self.selector_retrain, run, "pruned selector")
        return found

    def _rows_of(self, expert: int, model: Routed) -> Table:
        """The rows kept that this expert took, as far as it has their classes, labelled by its outputs."""
        table = self.spare.table
        if table.labels is None:
            return table
        own = model.names[expert].cpu()
        there = table.labels[:, None] == own
        mine = table.take((torch.as_tensor(table.extra[EXPERT]) == expert) & there.any(1))
        return Table(mine.inputs, (torch.as_tensor(mine.labels)[:, None] == own).int().argmax(1), mine.ids)

    def _prune(self, network: nn.Module, share: float, rows: Table, plan: Optimizer, run: Run, name: str) -> None:
        """Cut a share of the weights and train what is left."""
        if not share:
            return
        masks = prune(network, share)
        if len(rows):
            self._train(network, rows, plan, self.retrain_epochs, run, name, masks)

    def _train(
        self,
        network: nn.Module,
        rows: Table,
        plan: Optimizer,
        epochs: int,
        run: Run,
        name: str,
        masks: Masks | None = None,
    ) -> None:
        """Train a classifier that ends in a sigmoid; weights outside the masks stay zero."""
        order = run.number(name, "order")

        def step(batch: Batch) -> Mean:
            assert batch.labels is not None
            scores = torch.sigmoid(network(**batch.inputs).logits)
            return Mean.of(F.cross_entropy(scores, batch.labels, reduction="none"))

        fit(
            step,
            lambda epoch: rows.batches(self.batch_size, seed=order, epoch=epoch),
            model=network.train(),
            optimizer=plan,
            epochs=epochs,
            steps=-(-len(rows) // self.batch_size),
            run=run,
            name=name,
            after_step=lambda _: cut(network, masks or {}),
        )
        network.eval()


def row_losses(scores: Tensor, targets: Tensor, outputs: int) -> Tensor:
    """Cross-entropy on an expert's sigmoid outputs [B, C], [B]; those up to `outputs` that it lacks say 0."""
    return F.cross_entropy(F.pad(scores, (0, outputs - scores.shape[1])), targets, reduction="none")


def classifier(spec: Any, inputs: Mapping[str, Sequence[int]], classes: range, draws: torch.Generator) -> nn.Module:
    """A network with a fresh head; EngramError for one without a class head."""
    found = build(spec, inputs=inputs, generator=draws)
    if not (isinstance(found, Predictor) and isinstance(found.head, Head)):
        raise EngramError("TAME wants encoders with a class head, such as network='MLP', for experts and selector")
    found.head = LinearHead(found.head.width)
    found.head.grow(classes, draws)
    return found


def _width(expert: nn.Module) -> int:
    """How many outputs an expert has."""
    head: Any = expert.head
    return len(head.live)


def _place(names: list[int], label: int, rank: int, outputs: int | None) -> int:
    """The output of a class: its own, else the next free one or, unless there are only so many `outputs`, another one
    more, which it takes; else that of its rank in the batch."""
    if label in names:
        return names.index(label)
    if FREE in names:
        names[names.index(FREE)] = label
        return names.index(label)
    if outputs is not None:
        return rank % outputs
    names.append(label)
    return len(names) - 1


class Bank:
    """What experts have besides weights: their optimisers and monitors, which of them is active, and which took each
    batch of the piece of the stream that is being learnt."""

    def __init__(self, plan: Optimizer) -> None:
        self.plan = plan
        self.active = 0
        self.taken: list[int] = []
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

    def regrow(self, number: int) -> None:
        """An expert's head has grown: its optimiser again, with no moments for the rows that are new."""
        assert self.model is not None
        old = self.optimizers[number]
        fresh = self.plan.build(self.model.experts[number].parameters())
        state, params = copy.deepcopy(old.state_dict()), fresh.param_groups[0]["params"]
        for k, moments in state["state"].items():
            state["state"][k] = {name: _lengthened(value, params[k]) for name, value in moments.items()}
        fresh.load_state_dict(state)
        self.optimizers[number] = fresh

    def moments(self) -> list[Any]:
        """The optimisers' states, copied."""
        return copy.deepcopy([optimizer.state_dict() for optimizer in self.optimizers] or self.loaded)

    def pieces(self, size: int, rows: int) -> list[range]:
        """Row numbers of the runs of batches that one expert took."""
        runs = [len(list(run)) for _, run in itertools.groupby(self.taken)]
        ends = [size * end for end in itertools.accumulate(runs)]
        return [range(start, min(end, rows)) for start, end in itertools.pairwise([0, *ends])]

    def reset(self) -> None:
        """Let the optimisers start anew."""
        self.optimizers, self.loaded = [], []

    def state_dict(self) -> State:
        monitors = [asdict(monitor) for monitor in self.monitors]
        return {"active": self.active, "taken": self.taken, "monitors": monitors, "moments": self.moments()}

    def load_state_dict(self, state: State) -> None:
        self.active, self.taken = state["active"], list(state["taken"])
        self.monitors = [Monitor(**monitor) for monitor in state["monitors"]]
        self.optimizers, self.loaded = [], copy.deepcopy(state["moments"])
        if self.model is not None:
            self.attach(self.model)


def _lengthened(value: Any, like: Tensor) -> Any:
    """Moments of a parameter that grew by rows, with zeros for these; other things as they are."""
    if not isinstance(value, Tensor) or value.ndim != like.ndim or value.shape == like.shape:
        return value
    longer = value.new_zeros(like.shape)
    longer[: len(value)] = value
    return longer
