"""Probes and what they look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engram.core.finding import Finding
from engram.core.forgetter import Forgetter
from engram.core.learner import Learner
from engram.core.needs import require_processes
from engram.core.request import Request
from engram.core.settings import describe, name_of
from engram.data.table import MISSING, Table, Target
from engram.engine.many import fit_many
from engram.engine.recipe import Recipe, Trainer
from engram.engine.run import Run
from engram.errors import EngramError
from engram.stats.seeds import derive, generator

ROLES = {
    "original": ("retain", "forget"),
    "oracle": ("retain",),
    "unlearned": ("retain", "forget"),
    "shadow": ("retain", "forget"),
}  # role -> the tables that its models are trained on


@dataclass(frozen=True)
class Trained:
    """A model, the rows that it was trained on, and its seed."""

    model: nn.Module
    rows: Table
    seed: int


@dataclass(frozen=True, eq=False)
class Subject:
    """What is examined: a model, and whatever else is known about it.

    `before`: the model before it forgot. `rows`: tables by name ("forget", "retain", "test", "transfer/…").
    `references`: further models by name. `recipe`: trains one more model of this kind. `oracles`: retrained models that
    are at hand. `forgetter`, `learner`: for probes that apply or fork them.
    """

    model: nn.Module
    before: nn.Module | None = None
    request: Request | None = None
    rows: Mapping[str, Table] = field(default_factory=dict)
    references: Mapping[str, nn.Module] = field(default_factory=dict)
    recipe: Trainer | None = None
    oracles: tuple[nn.Module, ...] = ()
    forgetter: Forgetter | None = None
    learner: Learner | None = None

    def has(self) -> frozenset[str]:
        """The names of the parts that are there; rows by their own names."""
        rows = {name for name, table in self.rows.items() if len(table)}
        parts = {
            "model": self.model,
            "before": self.before,
            "request": self.request,
            "recipe": self.recipe,
            "forgetter": self.forgetter,
            "learner": self.learner,
            "oracles": self.oracles or (self.recipe if "retain" in rows else None),
        }
        named = {name for name, part in parts.items() if part is not None}
        return frozenset(named | rows | {name.split("/")[0] for name in rows})

    def models(self, role: str, n: int, run: Run) -> list[Trained]:
        """`n` models in a role, trained once per run and shared by all probes.

        original: trained on retain and forget rows. oracle: without the forget rows (those at hand come first; their
        rows are empty where the retain rows are not at hand). unlearned: the originals after the forgetter. shadow: on
        a random half of all rows each, every second one on the other half of the one before.
        """
        if role not in ROLES:
            raise EngramError(f"unknown role {role!r}; there are {', '.join(ROLES)}")
        made: list[Trained] = []
        if role == "oracle":
            rows = self.rows.get("retain", Table({}))
            made = [Trained(model, rows, -1 - k) for k, model in enumerate(self.oracles[:n])]
        wanted = range(len(made), n)
        if role == "unlearned":
            self.models("original", n, run)
        if len(wanted) > 1 and role != "unlearned" and isinstance(self.recipe, Recipe):
            run.share(f"{role} models to {n} of {self._digest(role, run)}", lambda: self._together(role, wanted, run))
        with run.progress(f"train {n} {role} models", len(wanted)) as advance:
            for k in wanted:
                made.append(self._model(role, k, run))
                advance(1)
        return made

    def _together(self, role: str, wanted: range, run: Run) -> None:
        """Train those models that are not there yet; each is shared under the name by which `_model` asks for it."""
        assert self.recipe is not None
        missing = run.phase("missing", lambda: [k for k in wanted if not run.has_shared(self._name(role, k, run))])
        if not missing:
            return
        table = self._trained_on(role)
        rows = [self._rows(role, k, len(table), run) for k in missing]
        made = fit_many(self.recipe, table, rows, [self._seed(role, k, run) for k in missing], run)
        for k, model in zip(missing, made, strict=True):
            run.share(self._name(role, k, run), partial(_itself, model))

    def _model(self, role: str, k: int, run: Run) -> Trained:
        table = self._trained_on(role)
        table = table.take(self._rows(role, k, len(table), run)) if role == "shadow" else table
        seed = self._seed(role, k, run)
        make = self._unlearned if role == "unlearned" else self._train
        return Trained(run.share(self._name(role, k, run), lambda: make(table, seed, k, run)), table, seed)

    def _seed(self, role: str, k: int, run: Run) -> int:
        return derive(run.seed, "original" if role == "unlearned" else role, k)

    def _name(self, role: str, k: int, run: Run) -> str:
        return f"{role} {k} of {self._digest(role, run)}"

    def _digest(self, role: str, run: Run) -> str:
        """What the models of a role depend on."""
        parts: list[object] = [run.seed, repr(self.recipe), *(self._table(name).digest for name in ROLES[role])]
        if role == "unlearned" and self.forgetter is not None and self.request is not None:
            parts += [describe(self.forgetter), self.request.what, self.request.ids]
        return f"{derive(*parts):016x}"

    def _trained_on(self, role: str) -> Table:
        first, *others = [self._table(name) for name in ROLES[role]]
        return first.concat(*others) if others else first

    def _rows(self, role: str, k: int, n: int, run: Run) -> Tensor:
        """Row numbers that the k-th model is trained on."""
        if role != "shadow":
            return torch.arange(n)
        order = torch.randperm(n, generator=generator(run.seed, "halves", k // 2))
        return order.tensor_split(2)[k % 2]

    def _table(self, name: str) -> Table:
        if name not in self.has():
            raise EngramError(f"more models cannot be trained: the subject holds no {name} rows")
        return self.rows[name]

    def _train(self, table: Table, seed: int, k: int, run: Run) -> nn.Module:
        if self.recipe is None:
            raise EngramError("one more model cannot be trained: the subject holds no recipe")
        return self.recipe(table, seed, run)

    def _unlearned(self, table: Table, seed: int, k: int, run: Run) -> nn.Module:
        if self.forgetter is None or self.request is None:
            raise EngramError("unlearned models need a forgetter and a request in the subject")
        original = self._model("original", k, run).model
        return self.forgetter.forget(original, self.request, run.with_seed(seed))


@dataclass(kw_only=True, eq=False)
class Probe:
    """Examines a model and returns findings. It changes nothing, and it cannot write a verdict."""

    asks: ClassVar[frozenset[str]] = frozenset({"model"})
    processes: ClassVar[str] = "exact"

    def check(self, subject: Subject) -> None:
        """EngramError naming the parts of the subject that this probe asks for and that are not there."""
        require_processes(name_of(self), self.processes)
        missing = self.asks - subject.has()
        if missing:
            raise EngramError(f"{type(self).__name__} asks for {', '.join(sorted(missing))}, which is not at hand")

    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        """Findings about the subject."""
        raise NotImplementedError


def _itself(model: nn.Module) -> nn.Module:
    return model


Measured = tuple[float, tuple[float, float]]  # a value and its sampling interval
Measure = Callable[[nn.Module], Measured]


def oracles_of(subject: Subject, n: int, run: Run) -> list[nn.Module]:
    """Up to `n` retrained models, as many as can be had: none without oracles and without a recipe."""
    can_train = subject.recipe is not None and "retain" in subject.has()
    return [made.model for made in subject.models("oracle", n if can_train else min(n, len(subject.oracles)), run)]


def compared(
    name: str, measure: Measure, model: nn.Module, oracles: Sequence[nn.Module], *, n: int, margin: float, **more: Any
) -> Finding:
    """The finding of one measure on a model, beside the same measure on every oracle.

    Without oracles the finding has no reference, and its verdict is unknown.
    """
    value, interval = measure(model)
    return Finding(name, value, n, interval, reference=tuple(measure(o)[0] for o in oracles), margin=margin, **more)


def compared_pairwise(
    name: str,
    measure: Callable[[nn.Module, Sequence[nn.Module]], Measured],
    model: nn.Module,
    oracles: Sequence[nn.Module],
    *,
    n: int,
    margin: float,
    **more: Any,
) -> Finding:
    """The finding of how a model stands to the oracles, beside how every oracle stands to the other ones.

    `measure(model, others)`: how near or far, for distances, gaps and similarities. At least one oracle.
    """
    value, interval = measure(model, oracles)
    rest = [[*oracles[:k], *oracles[k + 1 :]] for k in range(len(oracles))]
    reference = tuple(measure(o, others)[0] for o, others in zip(oracles, rest, strict=True) if others)
    return Finding(name, value, n, interval, reference=reference, margin=margin, **more)


def against_oracles(
    name: str,
    measure: Measure,
    subject: Subject,
    run: Run,
    *,
    n: int,
    oracles: int,
    margin: float,
    **more: Any,
) -> Finding:
    """`compared` for the subject's model and as many oracles of it as can be had."""
    found = oracles_of(subject, oracles, run)
    return compared(name, measure, subject.model, found, n=n, margin=margin, **more)


def labelled(table: Table) -> Table:
    """The rows that have a label: a class, or numbers without NaN. Token rows stay; unlabelled tables become empty."""
    if table.labels is None:
        return table.take([])
    if table.target == Target.TOKENS:
        return table
    known = ~table.labels.isnan().any(1) if table.target == Target.NUMBERS else table.labels != MISSING
    return table if bool(known.all()) else table.take(known)
