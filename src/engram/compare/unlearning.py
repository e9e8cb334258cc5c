"""Forgetters side by side: every method, request and seed under one protocol.

For each seed a model is trained on all rows, and for each request `oracles` models without the rows that must go. A
method sees what it declares to need and nothing else. It is judged by its gaps to the oracles: the mean of the absolute
differences in accuracy on forget, retain and test rows, and in the AUC of a membership attack by loss (forget rows
against test rows of the same classes). 0 is as good as retraining.

Settings are chosen on a tuning request of the same kind (another class, other rows) with the first seed: every method
has the same number of trials and of seconds, whichever ends first, and the setting with the smallest gap is frozen.
Trials are rows of the table too. A method that fails has a row that says so; with two jobs or more, also one that takes
its process down.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from engram import catalogue
from engram.compare.work import FORMAT, Row, Work, spread, tables
from engram.core.forgetter import Forgetter
from engram.core.needs import Need, satisfied
from engram.core.request import Request
from engram.core.settings import make, settings
from engram.data.table import Table
from engram.engine.many import fit_many
from engram.engine.optimizer import Optimizer
from engram.engine.predict import accuracy, predict
from engram.engine.progress import Progress
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.errors import unknown
from engram.files import write_atomic
from engram.models.guards import is_guard
from engram.stats.membership import threshold_attack
from engram.stats.seeds import derive, generator

MEASURES = ("forget accuracy", "retain accuracy", "test accuracy", "membership AUC", "gap", "seconds", "steps", "rows")
KINDS = ("random", "class", "subclass")
TABLE, RANKING = "unlearning.parquet", "ranking.json"
NOTHING = "nothing"  # the model as it was: what a request costs whoever does nothing about it
CALIBRATION = ("forget.Retrain", NOTHING)  # no trials: nothing to set
RATES = ("optimizer", (0.1, 10.0, 0.3, 3.0, 0.03, 30.0))  # times the learning rate of the method's own
SPACE: dict[str, tuple[str, tuple[Any, ...]]] = {
    "forget.SSD": ("alpha", ("auto", 1.5, 3.0, 4.0, 5.0, 6.0, 8.0, 1.2)),
    "forget.Influence": ("strength", (0.3, 0.1, 3.0)),
    "forget.ECO": ("strength", (1.0, 10.0, 100.0)),
}  # what is tried besides a method's own setting, if not its learning rate


@dataclass(frozen=True)
class Comparison:
    """`data`: a source; `test`: another, else a share of it. `requests`: of "random", "class", "subclass". `share`: of
    the rows, for random requests. `budget`: seconds for the trials of a method, and `trials` their number."""

    data: str = "sklearn:digits"
    test: str | None = None
    limit: int | None = None
    image_size: int | None = None
    network: Any = "MLP"
    optimizer: Optimizer = field(default_factory=Optimizer)
    epochs: int = 20
    methods: tuple[str, ...] = ()
    requests: tuple[str, ...] = KINDS
    seeds: tuple[int, ...] = (0, 1, 2)
    share: float = 0.02
    oracles: int = 5
    trials: int = 5
    budget: float = 60.0
    jobs: int = 1

    def __post_init__(self) -> None:
        for kind in self.requests:
            if kind not in KINDS:
                raise unknown("kind of request", kind, KINDS)
        for name in self.names:
            if name != NOTHING:
                make(name, wing="forget")

    @property
    def names(self) -> tuple[str, ...]:
        """The methods, oracle first; left out, all that can be used on classes with rows, labels and a recipe."""
        if self.methods:
            return tuple(_full_name(name) for name in self.methods)
        have = {"forget-rows", "forget-labels", "retain-rows", "retain-labels", "recipe"}
        usable = [m.name for m in catalogue.methods() if m.wing == "forget" and any(n <= have for n in m.needs)]
        return (*CALIBRATION, *(name for name in usable if name not in CALIBRATION))


@dataclass(frozen=True)
class Cell:
    """One piece of work: a method on a request with a seed; `tuning`: the trials that choose its setting."""

    method: str
    kind: str
    seed: int
    tuning: bool

    @property
    def name(self) -> str:
        """A file name."""
        return f"{self.method}-{self.kind}-{'tuning' if self.tuning else self.seed}"


class Contest(Work):
    """A comparison of forgetters in a directory; it can be interrupted and goes on, with more methods too."""

    free = (*Work.free, "methods")
    measured = MEASURES

    def __init__(self, plan: Comparison, out: str | Path, progress: Progress | None = None) -> None:
        super().__init__(plan, out, progress)
        self._requests: dict[tuple[str, bool], Request] = {}
        self.train, self.test = tables(plan, "forgetters")
        self.recipe = Recipe(plan.network, plan.optimizer, plan.epochs, classes=self.train.classes)

    def cells(self) -> tuple[list[Cell], list[Cell]]:
        """What tunes, and what is reported."""
        names, plan = self.plan.names, self.plan
        tuning = [Cell(name, kind, plan.seeds[0], True) for name in names for kind in plan.requests if spaces(name)]
        return tuning, [
            Cell(name, kind, seed, False) for name in names for kind in plan.requests for seed in plan.seeds
        ]

    def estimate(self) -> str:
        """What it will take, from one training on a tenth of the rows."""
        few = self.train.take(range(0, len(self.train), 10))
        self.recipe(few, 0)  # the first one pays for imports
        start = time.perf_counter()
        self.recipe(few, 0)
        one = 10 * (time.perf_counter() - start)
        plan, (tuning, reported) = self.plan, self.cells()
        models = len(plan.seeds) + 2 * len(plan.requests) * plan.oracles
        cost = {name: one * trainings(name) for name in plan.names}
        trials = sum(max(cost[c.method], min(plan.budget, plan.trials * cost[c.method])) for c in tuning)
        total = models * one + (trials + sum(cost[c.method] for c in reported)) / plan.jobs
        return (
            f"{len(plan.names)} methods, {len(plan.requests)} kinds of requests, {len(plan.seeds)} seeds: "
            f"{models} models to train, {len(tuning)} searches, {len(reported)} cells; "
            f"about {max(1.0, total / 60):.0f} minutes, if no method takes longer than the trainings that it needs"
        )

    def execute(self) -> list[Row]:
        """Do the work; the rows of the table, which is written with a summary and a ranking (without guards, and
        without what failed anywhere)."""
        self.claim()
        tuning, reported = self.cells()
        self._models()
        trials = self.all(tuning, [{}] * len(tuning))
        chosen = {(row["method"], row["kind"]): row["setting"] for row in trials if row["chosen"]}
        rows = [*trials, *self.all(reported, [chosen.get((c.method, c.kind), {}) for c in reported])]
        summary = summarise(rows)
        self.write(TABLE, rows, summary)
        names = [entry["method"] for entry in summary["methods"] if not (entry["guard"] or entry["failed"])]
        better = names[: names.index(NOTHING)] if NOTHING in names else names  # those that beat doing nothing
        order = [name for name in better if name not in CALIBRATION]
        made = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "data": self.plan.data, "order": order}
        write_atomic(self.out / RANKING, json.dumps(made, indent=1))
        return rows

    # The models that all share

    def _models(self) -> None:
        for seed in self.plan.seeds:
            self.original(seed)
        for kind in self.plan.requests:
            self.oracles(kind, tuning=True)
            self.oracles(kind, tuning=False)

    def original(self, seed: int) -> nn.Module:
        """The model that must forget."""
        return self._run().phase(f"original {seed}", lambda: self.recipe(self.train, derive("original", seed)))

    def oracles(self, kind: str, *, tuning: bool) -> list[nn.Module]:
        """Models that never saw the rows of a request."""
        request = self.request(kind, tuning)
        rows = self.train.rows_of(request.retain.ids if request.retain is not None else ())
        count = self.plan.oracles
        seeds = [derive("oracle", kind, tuning, k) for k in range(count)]
        run = self._run()
        name = f"oracles {kind} {'tuning' if tuning else 'reported'}"
        return run.phase(name, lambda: fit_many(self.recipe, self.train, [rows] * count, seeds, run))

    def usual(self, kind: str, tuning: bool) -> dict[str, float]:
        """The mean measures of the models that never saw the rows of a request; measured once."""

        def measure() -> dict[str, float]:
            found = [self.measures(oracle, self.request(kind, tuning)) for oracle in self.oracles(kind, tuning=tuning)]
            return {name: float(np.nanmean([one[name] for one in found])) for name in found[0]}

        return self._run().phase(f"measures {kind} {'tuning' if tuning else 'reported'}", measure)

    def request(self, kind: str, tuning: bool) -> Request:
        """The tuning request of a kind, or the one that is reported: another class, other rows."""
        if (kind, tuning) not in self._requests:
            self._requests[kind, tuning] = self._drawn(kind, tuning)
        return self._requests[kind, tuning]

    def _drawn(self, kind: str, tuning: bool) -> Request:
        table, draws = self.train, generator("request", kind, tuning)
        if kind == "random":
            count = max(10, round(self.plan.share * len(table)))
            return Request.of_records(table, table.take(torch.randperm(len(table), generator=draws)[:count]).ids)
        c = table.classes[(0 if tuning else 1) % len(table.classes)]
        if kind == "class":
            return Request.of_classes(table, (c,))
        return Request.of_records(table, _cluster(table.of_classes([c])).ids)

    # The work

    def do(self, cell: Cell, setting: Mapping[str, Any]) -> list[Row]:
        """The trials of a method, or one measurement."""
        if not cell.tuning:
            return [self._measured(cell, setting)]
        return self.search(spaces(cell.method), lambda trial: self._measured(cell, trial), lambda row: -row["gap"])

    def _measured(self, cell: Cell, setting: Mapping[str, Any]) -> Row:
        request = self.request(cell.kind, cell.tuning).but(at_hand={Need.RECIPE: self.recipe})
        model, run = self.original(cell.seed), Run(seed=derive(cell.name))
        row = self.row(cell, setting)
        start = time.process_time()
        try:
            method = configured(cell.method, setting)
            row["needed"] = sorted(map(str, _needed(method, request)))
            new = method.forget(model, _only(request, _needed(method, request)), run)
            seconds = time.process_time() - start
            values = self.measures(new, request)
        except Exception as error:
            return self.failed(row, error)
        means = self.usual(cell.kind, cell.tuning)
        gaps = [abs(values[name] - means[name]) for name in values if np.isfinite(values[name])]
        return {
            **row,
            **values,
            **{f"oracle {name}": value for name, value in means.items()},
            "gap": float(np.mean(gaps)) if all(map(np.isfinite, gaps)) else float("inf"),
            "weights hold it": is_guard(new),
            "seconds": seconds,
            "steps": run.cost.steps,
            "rows": run.cost.rows,
        }

    def measures(self, model: nn.Module, request: Request) -> dict[str, float]:
        """Accuracy on forget, retain and test rows; AUC of telling forget rows from test rows of their classes."""
        assert request.forget is not None and request.retain is not None
        kept = self.test.of_classes([c for c in self.test.classes if c in request.retain.classes])
        like = self.test.of_classes([c for c in self.test.classes if c in request.forget.classes])
        losses = [predict(model, table, "loss").nan_to_num(1e6).clamp(max=1e6) for table in (request.forget, like)]
        return {
            "forget accuracy": accuracy(model, request.forget),
            "retain accuracy": accuracy(model, request.retain),
            "test accuracy": accuracy(model, kept),
            "membership AUC": threshold_attack(*losses).auc.value,
        }

    def _run(self) -> Run:
        return Run(self.out / "models", progress=self.progress)


def spaces(name: str) -> list[dict[str, Any]]:
    """The settings to try for a method, its own first; none where there is nothing to set."""
    if name in CALIBRATION:
        return []
    if name not in SPACE and "optimizer" not in {f.name for f in fields(type(make(name)))}:
        return [{}]
    key, others = SPACE.get(name, RATES)
    return [{}, *({key: value} for value in others)]


def trainings(name: str) -> int:
    """How many models a method trains for a request, by its settings; 1 for one that trains on the model."""
    method: Any = _Nothing() if name == NOTHING else make(name)
    return max(1, int(getattr(method, "models", 1)), int(getattr(method, "oracles", 1)))


def configured(name: str, setting: Mapping[str, Any]) -> Forgetter:
    """A method with a setting; for the optimiser, a factor of its learning rate."""
    if name == NOTHING:
        return _Nothing()
    method: Forgetter = make(name)
    if "optimizer" in setting:
        return type(method)(**{**settings(method), "optimizer": method.optimizer.scaled(setting["optimizer"])})  # type: ignore[attr-defined]
    return type(method)(**{**settings(method), **setting})


class _Nothing(Forgetter):
    """The bound that every method should beat."""

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        return model


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """By method, best first: mean gap over requests and seeds, by request with its spread, cost against retraining, and
    what the trials for its settings cost beside that, mean over requests."""
    reported = [row for row in rows if not row["tuning"]]
    retrained = [row for row in reported if row["method"] == CALIBRATION[0] and not row["error"]]
    base = {(row["kind"], row["seed"]): row["seconds"] for row in retrained}
    found = []
    for name in dict.fromkeys(row["method"] for row in reported):
        mine = [row for row in reported if row["method"] == name]
        fine = [row for row in mine if not row["error"]]
        kinds = {}
        for kind in dict.fromkeys(row["kind"] for row in mine):
            here = [row for row in fine if row["kind"] == kind]
            kinds[kind] = {key: spread([row[key] for row in here]) for key in MEASURES[:5]} if here else None
        shares = [
            row["seconds"] / base[row["kind"], row["seed"]] for row in fine if base.get((row["kind"], row["seed"]))
        ]
        settings = {row["kind"]: row["setting"] for row in mine}
        found.append(
            {
                "method": name,
                "gap": spread([row["gap"] for row in fine]),
                "failed": sorted({row["error"] for row in mine if row["error"]}),
                "guard": any(row.get("weights hold it") for row in fine),
                "kinds": kinds,
                "cost": spread(shares),
                "search": _search([row for row in rows if row["tuning"] and row["method"] == name], base),
                "needed": mine[0].get("needed", []),
                "settings": settings,
            }
        )
    found.sort(key=lambda entry: (len(entry["failed"]) > 0, entry["gap"][0] if entry["gap"] else np.inf))
    return {"format": FORMAT, "methods": found}


def _search(trials: Sequence[Row], base: Mapping[tuple[str, int], float]) -> float:
    """CPU seconds of the trials against those of retraining, mean over the kinds of requests; 0 without trials."""
    spent: dict[tuple[str, int], float] = {}
    for row in trials:
        at = row["kind"], row["seed"]
        spent[at] = spent.get(at, 0.0) + (row["seconds"] or 0.0)
    return float(np.mean([seconds / base[at] for at, seconds in spent.items() if base.get(at)] or [0.0]))


def _cluster(rows: Table) -> Table:
    """The larger half of a class: two means of its inputs."""
    from sklearn.cluster import KMeans

    values = next(iter(rows.batch(torch.arange(len(rows))).inputs.values())).flatten(1)
    halves = KMeans(2, n_init=4, random_state=0).fit_predict(values.double().numpy())
    return rows.take(torch.from_numpy(halves == np.argmax(np.bincount(halves))))


def _needed(method: Forgetter, request: Request) -> frozenset[Need]:
    have = request.have()
    if not satisfied(method.needs, have):
        method.check(request)
    return next(need for need in method.needs if need <= have)


def _only(request: Request, wanted: frozenset[Need]) -> Request:
    """The request with no more than a method asks for."""
    forget, retain = request.forget, request.retain
    if Need.FORGET_LABELS not in wanted and forget is not None:
        forget = forget.unlabelled()
    if Need.RETAIN_LABELS not in wanted and retain is not None:
        retain = retain.unlabelled()
    return request.but(
        forget=forget if Need.FORGET_ROWS in wanted else None,
        retain=retain if Need.RETAIN_ROWS in wanted else None,
        at_hand={need: thing for need, thing in request.at_hand.items() if need in wanted},
    )


def _full_name(name: str) -> str:
    return name if "." in name or name == NOTHING else f"forget.{name}"


def table_rows(summary: Mapping[str, Any]) -> Iterator[str]:
    """The summary as lines of text."""
    yield f"{'method':<26} {'gap to oracles':>16} {'cost':>8}  needs"
    for entry in summary["methods"]:
        gap, cost = (entry[key] or [float("nan")] * 2 for key in ("gap", "cost"))
        failed = f"  failed: {entry['failed'][0]}" if entry["failed"] else ""
        needed = ", ".join(entry["needed"])
        yield f"{entry['method']:<26} {gap[0]:>8.3f} ± {gap[1]:<5.3f} {cost[0]:>7.2f}x  {needed}{failed}"
