"""Experts find by their losses what nobody announced. On digits: five pairs of classes, one after the other.

Buffers hold the published shares of the stream (a twelfth of the rows for the selector, a tenth for pruned experts).
Published accuracies count a row as right when the place of its class within its task is, whichever expert gave it; here
both are measured. `claims(seeds, tables, plan)` measures the same on other data.

Outside its band lies the simplest use of the selector's rows: one network that is trained on them alone, with the
classes for labels, knows more at the end (by 0.05 over seeds 0 to 2) than selector and experts. A tenth of so small a
stream is nearly enough to learn all classes; what experts add by the other rows, the selector loses.

On Fashion-MNIST (60000 rows, `LARGE` but 30 epochs for selector and pruned experts, one seed) all numbers of experts
are those of the paper; final accuracy 0.821, by places 0.963, with the right experts 0.989, of one network 0.200, of
one network of the selector's 5000 rows 0.836; pruning costs nothing (-0.011).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engram.data.streams import Stage, class_stream
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.predict import accuracy, evaluating
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.keep.finetune import Finetune
from engram.keep.tame import TAME
from engram.reproduce.claims import Claim
from engram.reproduce.digits import digits


@dataclass(frozen=True)
class Plan:
    """`network`: of experts, selector and baselines; `settings`: of TAME besides; `epochs` of a baseline on the
    buffer's rows are those of the selector."""

    network: Any
    epochs: int
    batch_size: int
    settings: dict[str, Any] = field(default_factory=dict)

    def learner(self, **changed: Any) -> TAME:
        """TAME by this plan."""
        return TAME(**{**self.common, **self.settings, **changed})

    @property
    def common(self) -> dict[str, Any]:
        """The settings of every learner."""
        return {"network": self.network, "epochs": self.epochs, "batch_size": self.batch_size}


DIGITS = Plan(
    {"name": "MLP", "hidden": [128]},
    epochs=10,
    batch_size=32,
    settings={
        "window": 35,
        "buffer": 100,
        "pruning_buffer": 125,
        "selector_epochs": 100,
        "retrain_epochs": 100,
    },
)
LARGE = Plan({"name": "MLP", "hidden": [128]}, epochs=10, batch_size=128)  # published settings, of 60000 rows


@dataclass(frozen=True)
class World:
    """Five tasks of two classes and their test rows."""

    plan: Plan
    stages: list[Stage]
    run: Run

    @classmethod
    def of(cls, tables: tuple[Table, Table], plan: Plan, run: Run) -> World:
        return cls(plan, class_stream(*tables, base=2, increment=2), run)

    @property
    def test(self) -> Table:
        """The test rows of all tasks."""
        return self.stages[0].test.concat(*(stage.test for stage in self.stages[1:]))

    def learnt(self, learner: Any) -> Any:
        """The learner that has taken in the stream."""
        for stage in self.stages:
            learner.learn(Task(stage.task.train), self.run)
        learner.refresh(self.run)
        return learner

    def finals(self) -> dict[str, float]:
        """Of the stream: what TAME found, and what it and others know at its end."""
        learner, test = self.learnt(self.plan.learner()), self.test
        final, told = accuracy(learner.model, test), oracle(learner, test)
        bare = self.unpruned(learner)
        single = accuracy(self.learnt(Finetune(**self.plan.common)).model, test)
        return {
            FOUND: float(len(learner.routed.experts)),
            FINAL: final,
            PLACES: places(learner, test),
            SINGLE: final - single,
            BUFFER: final - accuracy(self.of_the_buffer(learner), test),
            ROUTING: told - final,
            PRUNING: accuracy(bare.model, test) - final,
            LEFT: left(learner.model),
        }

    def unpruned(self, learner: TAME) -> TAME:
        """The same learner without pruning."""
        bare = self.plan.learner(pruned=0.0, selector_pruned=0.0)
        bare.load_state_dict(learner.state_dict())
        if bare.unpruned is not None:
            bare.model = bare.unpruned
        bare.refresh(self.run)
        return bare

    def of_the_buffer(self, learner: TAME) -> nn.Module:
        """One network of the rows that the selector was trained on alone, with the classes for labels."""
        return Recipe(self.plan.network, epochs=learner.selector_epochs)(learner.kept.table, self.run.seed)

    def recurrence(self) -> dict[str, float]:
        """Tasks A, B, C, B, D: how many experts, and whether the second half of B goes to the expert of the first; in
        twice the epochs, as half of a task needs them to settle."""
        a, b, c, d = (stage.task.train for stage in self.stages[:4])
        half, learner, active = len(b) // 2, self.plan.learner(epochs=2 * self.plan.epochs), []
        for rows in (a, b.take(range(half)), c, b.take(range(half, len(b))), d):
            learner.learn(Task(rows), self.run)
            active.append(learner.bank.active)
        return {KNOWN: float(active[3] == active[1] != active[2]), FOUR: float(len(learner.routed.experts))}


def owners(learner: TAME, test: Table) -> Tensor:
    """The first expert that has each row's class, [n]; 0 where none has."""
    labels = torch.as_tensor(test.labels)
    return (learner.routed.names[:, :, None] == labels).any(1).int().argmax(0)


def oracle(learner: TAME, test: Table) -> float:
    """Accuracy when a row's expert is told."""
    with evaluating(learner.model):
        found = learner.model(**test.batch(torch.arange(len(test))).inputs, task=owners(learner, test)).logits
    return float((found.argmax(1) == test.labels).float().mean())


def places(learner: TAME, test: Table) -> float:
    """The share of rows for which the chosen expert says the right place of the class within its task, by parity."""
    with evaluating(learner.model):
        found = learner.model(**test.batch(torch.arange(len(test))).inputs).logits.argmax(1)
    return float((found % 2 == torch.as_tensor(test.labels) % 2).float().mean())


def left(model: nn.Module) -> float:
    """The share of all weights that are not zero."""
    sizes = [(int(p.count_nonzero()), p.numel()) for p in model.parameters()]
    return sum(one for one, _ in sizes) / sum(other for _, other in sizes)


def claims(seeds: Iterable[int], tables: tuple[Table, Table] | None = None, plan: Plan = DIGITS) -> list[Claim]:
    """Numbers of experts, accuracies and their differences; `tables`: train and test rows of other data."""
    tables = tables or digits()
    worlds = [World.of(tables, plan, Run(seed=seed)) for seed in seeds]
    found = [{**world.finals(), **world.recurrence()} for world in worlds]
    return [Claim(says, paper, band, tuple(row[says] for row in found)) for says, (paper, band) in BANDS.items()]


FOUND = "experts found for five tasks that nobody announced"
FOUR = "experts found for tasks A, B, C, B, D"
KNOWN = "share of streams in which the second B goes to the expert of the first"
FINAL = "final accuracy over all classes"
PLACES = "final accuracy counted as published, by a class's place within its task"
SINGLE = "final accuracy above that of one network that is fine-tuned"
BUFFER = "final accuracy above that of one network of the selector's rows alone"
ROUTING = "final accuracy that the selector costs, against the right experts"
PRUNING = "final accuracy that pruning costs"
LEFT = "share of all weights that pruning leaves"
BANDS: dict[str, tuple[str, tuple[float, float]]] = {
    FOUND: ("one for each task (Figure 4)", (4.8, 5.4)),
    FOUR: ("4 (Figure 4)", (3.8, 4.4)),
    KNOWN: ("it does (Figure 4)", (0.9, 1.0)),
    FINAL: ("98.63 % on Split MNIST, by places", (0.75, 0.95)),
    PLACES: ("98.63 % on Split MNIST", (0.85, 1.0)),
    SINGLE: ("above all methods that are not told the tasks", (0.5, 0.8)),
    BUFFER: ("no figure; the simplest use of the same rows", (0.0, 0.15)),
    ROUTING: ("the bottleneck: 62 % of rows routed right on CIFAR-100, 20 tasks", (0.0, 0.25)),
    PRUNING: ("little; 62.39 and 64.41 % with 200 and 1000 rows to retrain on CIFAR-100", (-0.02, 0.1)),
    LEFT: ("37.0 K for five experts and a selector, of about 370 K (LeNet)", (0.08, 0.13)),
}
