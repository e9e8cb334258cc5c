"""Learners side by side: every learner and seed along one stream, under one protocol.

A stream brings classes in the order of a published convention, a few at a time. After every task all test sets so far
are predicted, among all classes seen and among the task's own. What a learner keeps is measured as well as what it
knows: the bytes of its model and of its traces after every task, and how many training rows its buffers hold.

Learning rates are chosen on a tuning stream (another class order): every learner has the same number of trials and of
seconds, whichever ends first; the highest average incremental accuracy is frozen. Trials are rows of the table too. A
learner that fails has a row that says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from engram import catalogue
from engram.compare.work import FORMAT, Row, Work, spread
from engram.core.learner import Learner, fork
from engram.core.settings import describe, make, settings
from engram.data.buffer import Buffer
from engram.data.streams import Stage, class_stream
from engram.engine.cost import flops_of
from engram.engine.predict import hits
from engram.engine.progress import Progress
from engram.engine.run import Run
from engram.errors import EngramError
from engram.stats import continual
from engram.stats.seeds import derive

TABLE = "continual.parquet"
FACTORS = (1.0, 0.1, 10.0, 0.3, 3.0)
MEASURES = (
    "final accuracy",
    "incremental accuracy",
    "sample-mean incremental",
    "task-aware final",
    "forgetting",
    "backward transfer",
    "learning accuracy",
    "bytes",
    "bytes per task",
    "rows held",
    "GFLOP of a task",
    "seconds",
)


@dataclass(frozen=True)
class Comparison:
    """`data`: a source; `test`: another, else a share of it. `base`, `increment`: classes of the first task, and of
    each further one; the remainder comes last. `common`: settings that every learner takes which has them
    (network, epochs …); `own`: those of one learner, by its name. With a "name" among them, the learner is the one of
    that name, and appears under its own: a variant, such as {"keep.L2P-small": {"name": "keep.L2P", "pool": 5}}.
    `budget`: seconds for the trials of a learner, and `trials` their number."""

    data: str = "sklearn:digits"
    test: str | None = None
    limit: int | None = None
    base: int = 2
    increment: int = 2
    learners: tuple[str, ...] = ()
    common: Mapping[str, Any] | None = None
    own: Mapping[str, Mapping[str, Any]] | None = None
    seeds: tuple[int, ...] = (1993, 1994, 1995)
    trials: int = 3
    budget: float = 60.0
    jobs: int = 1

    def __post_init__(self) -> None:
        for name in self.names:
            if not isinstance(make(self.spec(name)), Learner):
                raise EngramError(f"{name} is no learner; see engram methods --wing keep")

    def spec(self, name: str) -> dict[str, Any]:
        """The config of a learner, with its own settings."""
        return {"name": name, **(self.own or {}).get(name, {})}

    @property
    def names(self) -> tuple[str, ...]:
        """The learners; left out, all that need nothing but a stream."""
        if self.learners:
            return tuple(name if "." in name else f"keep.{name}" for name in self.learners)
        usable = [m for m in catalogue.methods() if m.wing == "keep" and any(n <= {"boundaries"} for n in m.needs)]
        return tuple(m.name for m in usable)


@dataclass(frozen=True)
class Cell:
    """A learner with a seed; `tuning`: the trials that choose its setting."""

    learner: str
    seed: int
    tuning: bool

    @property
    def name(self) -> str:
        """A file name."""
        return f"{self.learner}-{'tuning' if self.tuning else self.seed}"


class Contest(Work):
    """A comparison of learners in a directory; it can be interrupted and goes on, with more learners too."""

    free = (*Work.free, "learners")
    measured = MEASURES

    def __init__(self, plan: Comparison, out: str | Path, progress: Progress | None = None) -> None:
        super().__init__(plan, out, progress)
        self.train, self.test = self.rows("learners")

    def stream(self, seed: int) -> list[Stage]:
        """The tasks in the class order of a seed (a NumPy permutation, as PyCIL has it)."""
        plan = self.plan
        return class_stream(self.train, self.test, base=plan.base, increment=plan.increment, order="pycil", seed=seed)

    def cells(self) -> tuple[list[Cell], list[Cell]]:
        """What tunes, and what is reported."""
        names, plan = self.plan.names, self.plan
        tuning = [Cell(name, plan.seeds[0] + 1_000_000, True) for name in names if len(trials(plan.spec(name))) > 1]
        return tuning, [Cell(name, seed, False) for name in names for seed in plan.seeds]

    def estimate(self) -> str:
        """How much there is to do."""
        tuning, reported = self.cells()
        most = len(tuning) * self.plan.trials + len(reported)
        return (
            f"{len(self.plan.names)} learners, {len(self.plan.seeds)} class orders of {len(self.stream(0))} tasks, "
            f"{len(self.train)} training rows: at most {most} courses along the stream"
        )

    def execute(self) -> list[Row]:
        """Do the work; the rows of the table, which is written with a summary."""
        self.claim()
        tuning, reported = self.cells()
        found = self.all(tuning, [{}] * len(tuning))
        chosen = {row["learner"]: row["setting"] for row in found if row["chosen"]}
        rows = [*found, *self.all(reported, [chosen.get(cell.learner, {}) for cell in reported])]
        self.write(TABLE, rows, summarise(rows))
        return rows

    def do(self, cell: Cell, setting: Mapping[str, Any]) -> list[Row]:
        """The trials of a learner, or one course."""
        if not cell.tuning:
            return [self._measured(cell, setting)]
        return self.search(
            trials(self.plan.spec(cell.learner)),
            lambda trial: self._measured(cell, trial),
            lambda row: row["incremental accuracy"],
        )

    def _measured(self, cell: Cell, setting: Mapping[str, Any]) -> Row:
        row = self.row(cell, setting)
        stages = self.stream(cell.seed)
        start = time.process_time()
        try:
            learner = configured(self.plan.spec(cell.learner), self.plan.common or {}, setting)
            course = follow(learner, stages, Run(seed=derive(cell.learner, cell.seed)))
        except Exception as error:
            return self.failed(row, error)
        return {
            **row,
            **course.figures(),
            "bytes": course.memory[-1],
            "bytes per task": (course.memory[-1] - course.memory[0]) / max(1, len(stages) - 1),
            "rows held": _stored(learner),
            "GFLOP of a task": course.flops / 1e9,
            "seconds": time.process_time() - start,
            "accuracy matrix": {"class": course.matrix.tolist(), "task": course.aware.tolist()},
        }


@dataclass(frozen=True)
class Course:
    """What a learner showed along a stream: accuracy [T, T] among all classes seen and among the task's own, the sizes
    of the test sets, bytes held after every task, and the floating-point operations that the second task took."""

    matrix: np.ndarray
    aware: np.ndarray
    sizes: list[int]
    memory: list[int]
    flops: int

    def figures(self) -> dict[str, float]:
        """The protocol's metrics; task means unless said otherwise."""
        return {
            "final accuracy": continual.average_accuracy(self.matrix),
            "incremental accuracy": continual.average_incremental(self.matrix),
            "sample-mean incremental": continual.average_incremental(self.matrix, self.sizes),
            "task-aware final": continual.average_accuracy(self.aware),
            "forgetting": continual.forgetting(self.matrix),
            "backward transfer": continual.backward_transfer(self.matrix),
            "learning accuracy": continual.learning_accuracy(self.matrix),
        }


def follow(learner: Learner, stages: Sequence[Stage], run: Run) -> Course:
    """Take a learner along a stream; every task so far is tested after every task. Operations are counted on a copy of
    the learner, which takes in the second task (the first, if it is the only one) besides."""
    count = len(stages)
    matrix, aware = np.full((count, count), np.nan), np.full((count, count), np.nan)
    memory, counted = [], min(1, count - 1)
    for k, stage in enumerate(stages):
        if k == counted:
            flops = operations(learner, stage, run)
        learner.learn(stage.task, run)
        learner.refresh(run)
        for j, earlier in enumerate(stages[: k + 1]):
            matrix[k, j] = float(hits(learner.model, earlier.test).double().mean())
            own = earlier.task.classes
            aware[k, j] = float(hits(learner.model, earlier.test, classes=own).double().mean())
        memory.append(bytes_of(learner.state_dict()))
    return Course(matrix, aware, [len(stage.test) for stage in stages], memory, flops)


def operations(learner: Learner, stage: Stage, run: Run) -> int:
    """Floating-point operations, as `flops_of` counts them, while a copy of the learner takes in a task."""
    return flops_of(lambda: fork(learner).learn(stage.task, Run(seed=run.seed)))


def bytes_of(state: Any) -> int:
    """The bytes of all tensors in a state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(map(bytes_of, state.values()))
    return sum(map(bytes_of, state)) if isinstance(state, list | tuple) else 0


def trials(spec: Any) -> list[dict[str, Any]]:
    """The settings to try: factors of the learning rate, where a learner or its host has one."""
    return [{}, *({"lr": factor} for factor in FACTORS[1:])] if _has_rate(make(spec)) else [{}]


def configured(spec: Any, common: Mapping[str, Any], setting: Mapping[str, Any]) -> Learner:
    """A learner by name or config with the common settings that it knows; "lr" is a factor of its learning rate, and
    of its host's."""
    learner: Learner = make(_with_common(spec, common))
    return _at_rate(learner, setting["lr"]) if "lr" in setting else learner


def _has_rate(learner: Learner) -> bool:
    given = settings(learner)
    return "optimizer" in given or ("host" in given and _has_rate(_host(given["host"])))


def _at_rate(learner: Learner, factor: float) -> Learner:
    given = settings(learner)
    if "optimizer" in given:
        given["optimizer"] = given["optimizer"].scaled(factor)
    if "host" in given:
        given["host"] = describe(_at_rate(_host(given["host"]), factor))
    return type(learner)(**given)


def _host(spec: Any) -> Learner:
    """The learner that another one works on."""
    host: Learner = make(spec, wing="keep")
    return host


def _with_common(spec: Any, common: Mapping[str, Any]) -> dict[str, Any]:
    """A learner's config with the common settings that it knows and does not say itself; so with its host's."""
    given = {"name": spec} if isinstance(spec, str) else dict(spec)
    plain = make(given)
    known = {field.name for field in fields(plain)}
    shared = {key: value for key, value in common.items() if key in known}
    host = {"host": _with_common(plain.host, common)} if "host" in known else {}
    return {**shared, **given, **host}


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """By learner, the highest incremental accuracy first."""
    reported = [row for row in rows if not row["tuning"]]
    found = []
    for name in dict.fromkeys(row["learner"] for row in reported):
        mine = [row for row in reported if row["learner"] == name]
        fine = [row for row in mine if not row["error"]]
        measures = {key: spread([row[key] for row in fine]) for key in MEASURES}
        failed = sorted({row["error"] for row in mine if row["error"]})
        found.append(
            {
                "learner": name,
                "measures": measures,
                "failed": failed,
                "setting": mine[0]["setting"],
                "accuracy matrix": _mean_matrix([row["accuracy matrix"]["class"] for row in fine]),
            }
        )
    found.sort(key=lambda entry: -(entry["measures"]["incremental accuracy"] or [-np.inf])[0])
    return {"format": FORMAT, "learners": found}


def _mean_matrix(matrices: Sequence[list[list[float]]]) -> list[list[float]]:
    """Row k: accuracy on every task so far after the k-th, mean over class orders."""
    if not matrices:
        return []
    return [row[: k + 1].tolist() for k, row in enumerate(np.mean(matrices, axis=0))]


def table_rows(summary: Mapping[str, Any]) -> Iterator[str]:
    """The summary as lines of text."""
    yield f"{'learner':<26} {'incremental':>16} {'final':>8} {'forgetting':>10} {'rows held':>9} {'kB':>9}"
    for entry in summary["learners"]:
        values = {key: (value or [float("nan")] * 2) for key, value in entry["measures"].items()}
        failed = f"  failed: {entry['failed'][0]}" if entry["failed"] else ""
        mean, half = values["incremental accuracy"]
        rest = [f"{values[key][0]:>{width}}" for key, width in (("final accuracy", "8.3f"), ("forgetting", "10.3f"))]
        held = f"{values['rows held'][0]:>9.0f} {values['bytes'][0] / 1024:>9.0f}"
        yield f"{entry['learner']:<26} {mean:>8.3f} ± {half:<5.3f} {' '.join(rest)} {held}{failed}"


def _stored(learner: Learner) -> int:
    """Training rows in buffers."""
    return sum(len(trace) for trace in learner.traces.values() if isinstance(trace, Buffer))
