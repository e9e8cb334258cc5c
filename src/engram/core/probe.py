"""Probes and what they look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from engram.core.finding import Finding
from engram.core.forgetter import Forgetter
from engram.core.learner import Learner
from engram.core.recipe import Trainer
from engram.core.request import Request
from engram.core.settings import describe
from engram.data.table import Table
from engram.engine.run import Run
from engram.errors import EngramError
from engram.stats.seeds import derive

ROLES = ("original", "oracle", "unlearned", "shadow")


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
        parts = {
            "model": self.model,
            "before": self.before,
            "request": self.request,
            "recipe": self.recipe,
            "forgetter": self.forgetter,
            "learner": self.learner,
            "oracles": self.oracles or self.recipe,
        }
        named = {name for name, part in parts.items() if part is not None}
        rows = {name for name, table in self.rows.items() if len(table)}
        return frozenset(named | rows | {name.split("/")[0] for name in rows})

    def models(self, role: str, n: int, run: Run) -> list[Trained]:
        """`n` models in a role, trained once per run and shared by all probes.

        original: trained on forget and retain rows. oracle: without the forget rows (those at hand come first).
        unlearned: originals after the forgetter. shadow: on a random half of all rows each.
        """
        if role not in ROLES:
            raise EngramError(f"unknown role {role!r}; there are {', '.join(ROLES)}")
        made: list[Trained] = []
        if role == "oracle":
            made = [Trained(model, self.rows["retain"], -1 - k) for k, model in enumerate(self.oracles[:n])]
        with run.progress(f"train {n} {role} models", n - len(made)) as advance:
            for k in range(len(made), n):
                made.append(self._model(role, k, run))
                advance(1)
        return made

    def _model(self, role: str, k: int, run: Run) -> Trained:
        table, seed = self._rows_for(role, k), derive(run.seed, role if role != "unlearned" else "original", k)
        make = self._unlearned if role == "unlearned" else self._train
        identity = derive(self._identity(role), *table.ids)
        model = run.share(f"{role} {k} of {identity:016x}", lambda: make(table, seed, run))
        return Trained(model, table, seed)

    def _identity(self, role: str) -> str:
        """What models of a role depend on besides their rows and seed."""
        method = self.forgetter if role == "unlearned" else None
        return f"{self.recipe!r} {method and describe(method)} {role == 'unlearned' and self.request and self.request.ids}"

    def _rows_for(self, role: str, k: int) -> Table:
        if role == "oracle":
            return self.rows["retain"]
        everything = self.rows["retain"].concat(self.rows["forget"])
        if role != "shadow":
            return everything
        draws = torch.Generator().manual_seed(derive("shadow", k))
        return everything.take(torch.randperm(len(everything), generator=draws)[: len(everything) // 2])

    def _train(self, table: Table, seed: int, run: Run) -> nn.Module:
        if self.recipe is None:
            raise EngramError("one more model cannot be trained: the subject holds no recipe")
        return self.recipe(table, seed, run)

    def _unlearned(self, table: Table, seed: int, run: Run) -> nn.Module:
        if self.forgetter is None or self.request is None:
            raise EngramError("unlearned models need a forgetter and a request in the subject")
        original = self._train(table, seed, run)
        return self.forgetter.forget(original, self.request, run.with_seed(seed))


@dataclass(kw_only=True, eq=False)
class Probe:
    """Examines a model and returns findings. It changes nothing, and it cannot write a verdict."""

    asks: ClassVar[frozenset[str]] = frozenset({"model"})
    processes: ClassVar[str] = "exact"

    def check(self, subject: Subject) -> None:
        """EngramError naming the parts of the subject that this probe asks for and that are not there."""
        missing = self.asks - subject.has()
        if missing:
            raise EngramError(f"{type(self).__name__} asks for {', '.join(sorted(missing))}, which is not at hand")

    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        """Findings about the subject."""
        raise NotImplementedError


Measure = Callable[[nn.Module], tuple[float, tuple[float, float]]]


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
    """The finding of one measure on the subject's model, beside the same measure on every oracle.

    `measure(model)` gives a value and its sampling interval. Without oracles and without a recipe the finding has no
    reference, and its verdict is unknown.
    """
    value, interval = measure(subject.model)
    found = subject.models("oracle", oracles, run) if "oracles" in subject.has() else []
    reference = tuple(measure(trained.model)[0] for trained in found)
    return Finding(name, value, n, interval, reference=reference, margin=margin, **more)
