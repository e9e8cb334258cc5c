"""One mechanism, many skills: how stiff each group of weights is, while what is learnt.

Ling, Bohn: A Deep Learning Framework for Lifelong Machine Learning. arXiv 2105.00157 (2021); earlier 1911.09704.

Weights are held in groups, each with a consolidation value b >= 0. Training lowers

    the loss of the rows + sum over groups of b |theta - target|²,

target being what the weights are as training begins, or 0 for what shall decay. b = 0 is free; b = inf is frozen, and
left out of the optimiser; between them the pull is an implicit step after each update (`engine.optimizer.Pull`). The
network has a block of units for each task, links between blocks, and a head for each class (`models.columns`). A policy
(`keep.policies`) says what b is, in words about groups, and what is rehearsed; each skill is a few lines of data there:

learn; learn without forgetting; forward transfer and few-shot learning from the most similar block; reduction of
confusion; backward transfer; refinement of all; graceful forgetting; retention by importance; and rain man (all is
frozen at once, perfect recall and no new features), memory loss (b fades) and sleep deprivation (b never rises).

Reconstructed: no code was found, and the abstracts name the mechanism and the skills only. Ours are the figures, the
words of the policies, and which block is let go. Similarity is the leave-one-out error of nearest neighbours by a
block's features; a source's is lower than an untrained block's by more than two standard deviations. Confusion is read
off the rows kept for rehearsal. It is mended with all of these, not only those of confused classes: else their heads
take rows of the others, whose accuracy fell by up to 96 points in trials.

While a task is new, its classes are told apart among themselves; in rehearsal all classes compete. Without a policy
that rehearses, heads of different tasks were never compared: tell the task, or expect classes to be mistaken.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engram.core.learner import require_labels
from engram.core.learning import GradientLearner
from engram.core.needs import Need, Needs, needs, require_processes
from engram.core.request import Classes, Request
from engram.core.settings import name_of
from engram.core.trace import Derived, State
from engram.data.buffer import Buffer
from engram.data.table import MISSING, Batch, Ids, Table, Target
from engram.data.task import Task
from engram.engine.fit import fit
from engram.engine.importance import importance
from engram.engine.losses import Mean, by_target
from engram.engine.optimizer import Optimizer, Pull
from engram.engine.predict import accuracy, predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.policies import FORGET, FROZEN, HELD, Policy, Step, policy_of
from engram.models.columns import Block, Columns, Group
from engram.models.encoders import flat_size
from engram.models.seeding import seeded
from engram.stats.knn import nearest, vote

PROBED = 500  # rows on which blocks are compared
NEIGHBOURS = 3
CLEAR = 2.0  # standard deviations


@dataclass(frozen=True)
class Birth:
    """How a task was taken in: the block that serves it, the source that it began from (None: fresh), the probe's error
    of every block there was (the untrained one's last), and the units by which each layer was widened."""

    block: int
    source: int | None
    errors: tuple[float, ...]
    widened: int = 0


@dataclass(kw_only=True, eq=False)
class LifelongFramework(GradientLearner):
    """A network of columns under a policy.

    `policy`: a name in `keep.policies.POLICIES`, a `Policy`, or a mapping of its fields. `network`: {"name": "MLP",
    "hidden": units of each layer of a block}; links go from layer to layer, so there are none with one layer.
    `rehearsed`: rows kept of each class, where the policy rehearses; else none are. `tolerated`, `units`, `expansions`:
    a block whose training error is larger gets so many more units a layer, at most so often, where the policy expands.
    `confused`: from which rate on a class counts as mistaken for another. b is in units of a mean loss, for SGD.

    `births` tells how each task was taken in. Cost: as fine-tuning, in each step of the policy; links make older blocks
    run along. Memory grows by a block for each task, unless the policy bounds the columns. EngramError for rows without
    classes and for other networks.
    """

    policy: Any = "no forgetting"
    network: Any = field(default_factory=lambda: {"name": "MLP", "hidden": [32, 32]})
    optimizer: Optimizer = field(default_factory=lambda: Optimizer("sgd", lr=0.05))
    rehearsed: int = 10
    tolerated: float = 0.05
    units: int = 10
    expansions: int = 5
    confused: float = 0.05

    growth: ClassVar[str] = "per task"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.plan: Policy = policy_of(self.policy)
        if self.rehearsed < 1:
            raise EngramError(f"{self.rehearsed} rows of each class rehearse nothing; give 1 or more")
        self.kept: Buffer = self.trace("rehearsal", Buffer(self.rehearsed, rule="per_class"))
        self.held: Derived = self.trace("consolidation", Derived())
        self.births: list[Birth] = []
        self.roles: dict[str, set[str]] = {}

    @classmethod
    def tiny(cls) -> LifelongFramework:
        mended = {"b": {"all": HELD, "confused head": 0.0, "backward": 0.0}, "rows": "confused"}
        plan = {
            "steps": [{"b": {"all": FROZEN, "new": 0.0, "new head": 0.01}}, mended],
            "start": "link",
            "backward": True,
            "expands": True,
            "raised": 0.1,
            "importance": 1.0,
            "fade": 0.5,
        }
        small = {"name": "MLP", "hidden": [12, 12]}
        return cls(policy=plan, network=small, epochs=3, batch_size=16, rehearsed=2, units=1, expansions=1)

    @property
    def needs(self) -> Needs:
        return needs({Need.BOUNDARIES})

    @property
    def columns(self) -> Columns:
        """The model."""
        assert isinstance(self.model, Columns)
        return self.model

    def learn(self, task: Task, run: Run | None = None) -> None:
        """Take a task in by the steps of the policy."""
        require_processes(name_of(self), self.processes)
        require_labels(task)
        if task.train.target != Target.CLASSES:
            raise EngramError(f"heads are those of classes, and the target of these rows is {task.train.target}")
        rows, run = task.train.take(torch.as_tensor(task.train.labels) != MISSING), run or Run()
        with run.scope("learn"):
            self._prepare(task, run)
            self.begin(rows, run)
            self.seen.add(task.train.ids)
            if self.plan.rehearses:
                self.keep(rows)
            for step in self.plan.steps:
                self.follow(step, rows, run)
            self.consolidate(rows, run)

    def first_model(self, task: Task, run: Run) -> nn.Module:
        given = {"name": self.network} if isinstance(self.network, str) else self.network
        if (
            not isinstance(given, Mapping)
            or given.get("name") != "MLP"
            or given.keys() - {"name", "hidden", "activation"}
        ):
            raise EngramError("blocks of columns are layers of units: give network={'name': 'MLP', 'hidden': [32, 32]}")
        return Columns(flat_size(Columns, task.train.shapes), activation=given.get("activation", "relu"))

    # --- a task comes

    def begin(self, rows: Table, run: Run) -> None:
        """Say which block serves the task, with heads for its classes, and where it begins."""
        with seeded(run.generator("block")):
            birth = self._block(rows, run)
            self.columns.know(birth.block, rows.classes)
            if self.plan.backward and birth.source is not None:
                self.columns.link(birth.block, birth.source)
        self.births.append(birth)
        self.roles = self._roles(birth, rows.classes)

    def follow(self, step: Step, rows: Table, run: Run) -> None:
        """One step of the policy."""
        for _ in range(step.times):
            wanted = self._rows(step, rows, run)
            if not len(wanted):
                continue
            self.train(step, wanted, run)
            if step.rows == "new" and self.plan.expands:
                self.expand(step, rows, run)

    def train(self, step: Step, rows: Table, run: Run) -> None:
        """Train what is not frozen on these rows."""
        b = {group: self.stiffness(step, group) for group in self.columns.groups()}
        self.columns.to(run.device)
        for group, value in b.items():
            for p in self.columns.weights(group):
                p.requires_grad_(value < FROZEN)
        updates = -(-len(rows) // self.batch_size)
        if min(b.values()) < FROZEN:
            fit(
                lambda batch: self.loss(batch, rows.classes if step.rows == "new" else None),
                lambda epoch: rows.batches(self.batch_size, seed=run.number("order"), epoch=epoch, shard=run.shard),
                model=self.model.train(),
                optimizer=self.optimizer,
                epochs=self.epochs,
                run=run,
                steps=updates,
                after_step=Pull(self.optimizer, self._pulled(step, b), updates * self.epochs),
            )
        self.model.requires_grad_(True).eval()

    def loss(self, batch: Batch, among: Collection[int] | None) -> Mean:
        """Cross-entropy among these classes, or all."""
        assert batch.labels is not None
        return by_target(self.model(**batch.inputs, among=among).logits, batch.labels)

    def expand(self, step: Step, rows: Table, run: Run) -> None:
        """Widen the task's block while it has not learnt its rows."""
        for _ in range(self.expansions):
            if 1 - accuracy(self.model, rows, classes=rows.classes, run=run) <= self.tolerated:
                return
            birth = self.births[-1]
            with seeded(run.generator("units", birth.widened)):
                self.columns.widen(birth.block, self.units)
            self.births[-1] = replace(birth, widened=birth.widened + self.units)
            self.train(step, rows, run)

    def stiffness(self, step: Step, group: Group) -> float:
        """b of a group in a step."""
        b = step.stiffness(self.words(group))
        return self.held.values.get(group.name, 0.0) if b == HELD else float(b)

    def words(self, group: Group) -> set[str]:
        """What policies call a group."""
        words = {"all", group.kind} | {role for role, names in self.roles.items() if group.name in names}
        if group.kind == "within" and group.layer == len(self.columns.columns[0].layers) - 1:
            words.add("top")
        return words if "new" in words else words | {"old"}

    def consolidate(self, rows: Table, run: Run) -> None:
        """What b has become when the task has ended."""
        plan, fisher = self.plan, {}
        if plan.importance:
            fisher = importance(self.model, rows, run=run)
            self.held.add(rows.ids)
        for group in self.columns.groups():
            found = [fisher[f"{group.name}.{name}"].mean() for name in _names(self.columns, group) if fisher]
            mattered = float(torch.stack(found).mean()) if found else 0.0
            before = self.held.values.get(group.name)
            b = plan.raised if before is None else plan.fade * before
            self.held.values[group.name] = b + plan.importance * mattered

    # --- which block, and which rows

    def similarity(self, rows: Table, run: Run) -> tuple[float, ...]:
        """The share of rows that nearest neighbours among the other rows tell wrong, by the features of each block."""
        order = torch.randperm(len(rows), generator=run.generator("probe"))[:PROBED]
        some, k = rows.take(order), min(NEIGHBOURS, len(order) - 1)
        if k < 1:
            return (1.0,) * len(self.columns.columns)
        tops = predict(self.model, some, "pooler_output", run=run)
        labels = torch.as_tensor(some.labels)
        widths = [block.hidden[-1] for block in self.columns.columns]
        return tuple(_mistaken(features, labels, k) for features in tops.split(widths, 1))

    def confusions(self) -> list[tuple[int, int]]:
        """Pairs (c, told) of different classes: the rows kept of c are mistaken so at a rate above `confused`."""
        rows = self.kept.table
        if not len(rows):
            return []
        labels, told = torch.as_tensor(rows.labels), predict(self.model, rows).argmax(1)
        pairs = sorted({pair for pair in zip(labels.tolist(), told.tolist(), strict=True) if pair[0] != pair[1]})
        return [(c, d) for c, d in pairs if float((told[labels == c] == d).double().mean()) > self.confused]

    def keep(self, rows: Table) -> None:
        """Keep some rows of each class for rehearsal."""
        self.kept.size = self.rehearsed * len({*self.kept.table.classes, *rows.classes})
        self.kept.offer(rows)

    def _block(self, rows: Table, run: Run) -> Birth:
        """A block for the task: a vacant one, a new one, or, where there are enough, the one that is held least."""
        columns = self.columns
        old, bound = len(columns.columns), self.plan.columns
        vacant = next(iter(columns.vacant), None)
        if vacant is None and bound is not None and old >= bound:
            return Birth(min(range(old), key=self.priority), None, ())
        at = columns.put(Block(columns.inputs, self._hidden), vacant)
        others = [t for t in range(old) if t != at]
        if self.plan.start == "fresh" or not others:
            return Birth(at, None, ())
        errors = self.similarity(rows, run)
        source = min(others, key=lambda t: errors[t])
        found = (*(errors[t] for t in others), errors[at])
        if errors[at] - errors[source] <= CLEAR * _deviation(errors[at], min(PROBED, len(rows))):
            return Birth(at, None, found)
        if self.plan.start == "copy":
            columns.put(columns.twin(source), at)
        else:
            columns.link(source, at, like=source)
        return Birth(at, source, found)

    def priority(self, block: int) -> float:
        """The sum of b over the layers of a block."""
        own = [group for group in self.columns.groups() if group.block == block and group.kind == "within"]
        return sum(self.held.values.get(group.name, 0.0) for group in own)

    @property
    def _hidden(self) -> list[int]:
        given = self.network.get("hidden", (32, 32)) if isinstance(self.network, Mapping) else (32, 32)
        return list(given)

    def _roles(self, birth: Birth, classes: Collection[int]) -> dict[str, set[str]]:
        """The names of the groups that play a part."""
        groups = list(self.columns.groups())
        new = {g.name for g in groups if g.block == birth.block and (g.kind != "head" or g.other in classes)}
        copied = self.plan.start == "copy" and birth.source is not None
        return {
            "new": new,
            "source": {g.name for g in groups if g.block == birth.source},
            "copied": {g.name for g in groups if copied and g.block == birth.block and g.kind != "head"},
            "backward": {g.name for g in groups if g.kind == "link" and g.other == birth.block},
        }

    def _rows(self, step: Step, rows: Table, run: Run) -> Table:
        """What a step is trained on."""
        if step.rows == "new":
            return rows
        if step.rows == "rehearsal":
            return self.kept.table
        mistaken = {c for pair in self.confusions() for c in pair}
        blocks = {t for t, block in enumerate(self.columns.columns) if mistaken & set(block.classes)}
        self.roles["confused"] = {
            g.name for g in self.columns.groups() if (g.other in mistaken if g.kind == "head" else g.block in blocks)
        }
        return self.kept.table if mistaken else self.kept.table.take([])

    def _pulled(self, step: Step, b: Mapping[Group, float]) -> list[tuple[nn.Parameter, Tensor, float]]:
        """Parameters that are neither free nor frozen, with their targets."""
        flexible = {group: value for group, value in b.items() if 0 < value < FROZEN}
        return [
            (p, torch.zeros_like(p) if step.vanishes(self.words(group)) else p.detach().clone(), value)
            for group, value in flexible.items()
            for p in self.columns.weights(group)
        ]

    # --- forgetting

    def forget(self, request: Request, run: Run | None = None) -> Ids:
        """Let go of classes: their heads, their rehearsal rows, and the blocks that serve no other class; the residue.

        The units of such a block are free for the next task. If other blocks listen to it, it first decays to 0 while
        they are trained on the rows at hand that stay: the request's `retain`, else those kept for rehearsal. What
        other blocks learnt of the rows by links or in rehearsal stays. EngramError, and nothing changed, for anything
        but classes that are known, and where others listen and no rows are at hand.
        """
        gone = self._known(request)
        run = run or Run()
        freed = {t for t, b in enumerate(self.columns.columns) if len(b.heads) and set(b.classes) <= gone}
        listeners = {s for t in freed for s in self.columns.listeners(t)} - freed
        stays = self._retained(request, gone)
        if listeners and not len(stays):
            raise EngramError(
                f"block {min(listeners)} listens to one that is to be freed, and no rows are at hand to make up for it "
                "with: give the request some rows to retain"
            )
        with run.scope("forget"):
            residue = self._drop(request, gone)
            self.columns.retire(gone)
            if listeners:
                forgotten = (g for g in self.columns.groups() if freed & {g.block, g.other if g.kind == "link" else -1})
                self.roles = {"forgotten": {group.name for group in forgotten}}
                self.train(FORGET, stays, run)
            for t in freed:
                self.columns.clear(t)
        there = {group.name for group in self.columns.groups()}
        self.held.values = {name: b for name, b in self.held.values.items() if name in there}
        return residue

    def _known(self, request: Request) -> set[int]:
        if not isinstance(request.what, Classes):
            raise EngramError("the lifelong framework lets go of whole classes; for single records name a forgetter")
        strangers = set(request.what.labels) - set(self.columns.classes)
        if strangers:
            raise EngramError(f"class {min(strangers)} was never learnt, or is forgotten already; leave it out")
        return set(request.what.labels)

    def _retained(self, request: Request, gone: Collection[int]) -> Table:
        rows = self.kept.table if request.retain is None else request.retain
        return rows.of_classes(set(rows.classes) & set(self.columns.classes) - set(gone)) if len(rows) else rows

    def _drop(self, request: Request, gone: Iterable[int]) -> Ids:
        """Rows of the classes leave every trace; those of which something may stay in weights."""
        if len(self.kept):
            self.kept.drop(self.kept.table.of_classes(gone))
        return () if request.forget is None else self.drop(request.forget)

    def extra_state(self) -> State:
        return {"births": [asdict(birth) for birth in self.births]}

    def load_extra_state(self, state: State) -> None:
        self.births = [Birth(**{**b, "errors": tuple(b["errors"])}) for b in state["births"]]


def _mistaken(features: Tensor, labels: Tensor, k: int) -> float:
    """The leave-one-out error of k nearest neighbours, by features [n, d]."""
    classes, places = torch.unique(labels, return_inverse=True)
    values, rows = nearest(features, features, k, drop_self=True)
    told = vote(places[rows], values, len(classes)).argmax(1)
    return float((told != places).double().mean())


def _deviation(share: float, n: int) -> float:
    """The standard deviation of a share of n rows."""
    return math.sqrt(share * (1 - share) / n)


def _names(columns: Columns, group: Group) -> list[str]:
    return [name for name, _ in columns.get_submodule(group.name).named_parameters()]
