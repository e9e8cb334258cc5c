"""Learners side by side: every learner and seed along every stream, under one protocol.

A stream brings classes in the order of a published convention, a few at a time. After every task all test sets so far
are predicted, among all classes seen and among the task's own. What a learner keeps is measured as well as what it
knows: the numbers of its model, the bytes of all its state, the training rows in its buffers, seconds and operations.

Learning rates are chosen on a tuning stream: another class order, on training rows alone, of which a share is held out
to judge by; no test row has a part in it. Every learner has the same number of trials and of seconds, whichever ends
first; the highest average incremental accuracy is frozen. Trials are rows of the table too. A learner that fails has a
row that says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from engram import catalogue
from engram.compare.course import Course, follow
from engram.compare.work import FORMAT, Row, Work, spread, tables
from engram.core.learner import Learner
from engram.core.settings import describe, make, settings
from engram.data.readers import train_test
from engram.data.streams import Stage, class_stream
from engram.data.table import Table
from engram.engine.progress import Progress
from engram.engine.run import Run
from engram.errors import EngramError
from engram.stats.seeds import derive

TABLE = "continual.parquet"
FACTORS = (1.0, 0.1, 10.0, 0.3, 3.0)
HELD_OUT = 0.3  # of the training rows: what the tuning stream is judged by
COUNTING = 6.0  # counting its operations makes a task take about so many times as long
ACCURACIES = (
    "incremental accuracy",
    "final accuracy",
    "task-aware final",
    "forgetting",
    "learning accuracy",
    "sample-mean incremental",
    "backward transfer",
)
COSTS = (
    "parameters",
    "parameters per task",
    "bytes",
    "bytes per task",
    "rows held",
    "GFLOP of the second task",
    "GFLOP of the last task",
    "seconds",
)
MEASURES = (*ACCURACIES, *COSTS)
OVER_TASKS = ("parameters", "bytes", "rows held", "seconds")


@dataclass(frozen=True)
class Stream:
    """Tasks of new classes. `data`: a source, the first `limit` rows of it, images at `image_size`; `test`: another,
    else a share of it. `base`, `increment`: classes of the first task, and of each further one; the remainder comes
    last."""

    data: str = "sklearn:digits"
    test: str | None = None
    base: int = 2
    increment: int = 2
    limit: int | None = None
    image_size: int | None = None

    @property
    def name(self) -> str:
        """What it is called in tables: the data without folder and suffix, and the two numbers."""
        return f"{Path(self.data.rpartition(':')[2]).stem}-{self.base}-{self.increment}"


@dataclass(frozen=True)
class Comparison:
    """`common`: settings that every learner takes which has them (network, epochs …); `own`: those of one learner, by
    its name. With a "name" among them, the learner is the one of that name, and appears under its own: a variant, such
    as {"keep.L2P-small": {"name": "keep.L2P", "pool": 5}}. `seeds`: class orders. `budget`: seconds for the trials of
    a learner on a stream, and `trials` their number. EngramError for two streams of one name, and what is no learner.
    """

    streams: tuple[Stream, ...] = (Stream(),)
    learners: tuple[str, ...] = ()
    common: Mapping[str, Any] | None = None
    own: Mapping[str, Mapping[str, Any]] | None = None
    seeds: tuple[int, ...] = (1993, 1994, 1995)
    trials: int = 3
    budget: float = 60.0
    jobs: int = 1

    def __post_init__(self) -> None:
        names = [stream.name for stream in self.streams]
        for name in names:
            if names.count(name) > 1:
                raise EngramError(f"two streams are called {name}; give their files different names, or compare apart")
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
    """A learner with a seed on a stream; `tuning`: the trials that choose its setting."""

    stream: str
    learner: str
    seed: int
    tuning: bool

    @property
    def name(self) -> str:
        """A file name."""
        return f"{self.stream}-{self.learner}-{'tuning' if self.tuning else self.seed}"


class Contest(Work):
    """A comparison of learners in a directory; it can be interrupted and goes on, with more learners too."""

    free = (*Work.free, "learners")
    measured = MEASURES

    def __init__(self, plan: Comparison, out: str | Path, progress: Progress | None = None) -> None:
        super().__init__(plan, out, progress)
        self.tables = {stream.name: tables(stream, "learners") for stream in plan.streams}

    def stages(self, stream: Stream, seed: int, tuning: bool = False) -> list[Stage]:
        """The tasks in the class order of a seed (a NumPy permutation, as PyCIL has it); for tuning, training rows that
        are held out take the place of the test rows."""
        train, test = held_out(self.tables[stream.name][0]) if tuning else self.tables[stream.name]
        return class_stream(train, test, base=stream.base, increment=stream.increment, order="pycil", seed=seed)

    def cells(self) -> tuple[list[Cell], list[Cell]]:
        """What tunes, and what is reported."""
        plan = self.plan
        pairs = [(stream.name, name) for stream in plan.streams for name in plan.names]
        tuned, seed = {name for name in plan.names if len(trials(plan.spec(name))) > 1}, plan.seeds[0] + 1_000_000
        tuning = [Cell(*pair, seed, True) for pair in pairs if pair[1] in tuned]
        return tuning, [Cell(*pair, seed, False) for pair in pairs for seed in plan.seeds]

    def estimate(self) -> str:
        """How much there is to do."""
        plan, (tuning, reported) = self.plan, self.cells()
        streams = "; ".join(
            f"{s.name} ({len(self.stages(s, 0))} tasks, {len(self.tables[s.name][0])} rows)" for s in plan.streams
        )
        counts = f"learners: {len(plan.names)}; class orders: {len(plan.seeds)}; streams: {streams}"
        return f"{counts}; courses at most: {len(tuning) * plan.trials + len(reported)}"

    def trial(self) -> str:
        """About how long it will take, from the first task of every stream, which every learner takes in for this; one
        that fails counts nothing."""
        seconds = sum(self._seconds(stream, name) for stream in self.plan.streams for name in self.plan.names)
        minutes = round(seconds / self.plan.jobs / 60)
        return f"about {minutes or 'less than 1'} min here, judged by the first task of every learner"

    def _seconds(self, stream: Stream, name: str) -> float:
        plan, stages = self.plan, self.stages(stream, self.plan.seeds[0])
        try:
            learner = configured(plan.spec(name), plan.common or {}, {})
            course = follow(learner, stages[:1], Run(seed=derive(name, plan.seeds[0]))).seconds[0]
        except Exception:
            return 0.0
        course *= sum(len(stage.task.train) for stage in stages) / len(stages[0].task.train)
        tried = plan.trials if len(trials(plan.spec(name))) > 1 else 0
        tuning = min((1 - HELD_OUT) * course * tried, plan.budget + course)
        return tuning + course * (len(plan.seeds) + COUNTING * len(counted(stages)) / len(stages))

    def execute(self) -> list[Row]:
        """Do the work; the rows of the table, which is written with a summary."""
        for stream in self.plan.streams:
            self.stages(stream, 0)  # what cannot be is said before anything is done
        self.claim()
        tuning, reported = self.cells()
        found = self.all(tuning, [{}] * len(tuning))
        chosen = {(row["stream"], row["learner"]): row["setting"] for row in found if row["chosen"]}
        done = self.all(reported, [chosen.get((cell.stream, cell.learner), {}) for cell in reported])
        self.write(TABLE, [*found, *done], summarise(done))
        return [*found, *done]

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
        row, plan = self.row(cell, setting), self.plan
        stream = next(stream for stream in plan.streams if stream.name == cell.stream)
        stages = self.stages(stream, cell.seed, cell.tuning)
        count = counted(stages) if cell.seed == plan.seeds[0] else ()
        try:
            learner = configured(plan.spec(cell.learner), plan.common or {}, setting)
            course = follow(learner, stages, Run(seed=derive(cell.learner, cell.seed)), count)
        except Exception as error:
            return self.failed(row, error)
        return {**row, **course.figures(), **costs(course, count)}


def counted(stages: Sequence[Stage]) -> tuple[int, ...]:
    """The tasks whose operations are counted: the second one and the last."""
    return tuple(sorted({min(1, len(stages) - 1), len(stages) - 1}))


def costs(course: Course, count: Sequence[int]) -> Row:
    """What a learner held and what its tasks cost; operations where they were counted."""
    second, growths = min(1, len(course.sizes) - 1), max(1, len(course.sizes) - 1)
    held: tuple[Sequence[float], ...] = (course.parameters, course.memory, course.rows, course.seconds)
    over = dict(zip(OVER_TASKS, held, strict=True))
    return {
        **{key: values[-1] for key, values in over.items()},
        **{f"{key} per task": (over[key][-1] - over[key][0]) / growths for key in ("parameters", "bytes")},
        "GFLOP of the second task": course.flops[second] / 1e9 if count else None,
        "GFLOP of the last task": course.flops[-1] / 1e9 if count else None,
        "seconds": sum(course.seconds),
        "over tasks": over,
        "accuracy matrix": {"class": course.matrix.tolist(), "task": course.aware.tolist()},
    }


def held_out(train: Table) -> tuple[Table, Table]:
    """Training rows without a share of every class, and that share. A class of a single row stands in both: there is
    nothing else to judge it by."""
    learnt, rest = train_test(train, HELD_OUT)
    single = set(train.classes) - set(rest.classes)
    return learnt, rest.concat(train.of_classes(single)) if single else rest


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
    """By stream and learner, the highest incremental accuracy first."""
    reported = [row for row in rows if not row["tuning"]]
    streams = dict.fromkeys(row["stream"] for row in reported)
    found = [{"stream": name, "learners": _ranked([r for r in reported if r["stream"] == name])} for name in streams]
    return {"format": FORMAT, "accuracies": list(ACCURACIES), "costs": list(COSTS), "streams": found}


def _ranked(rows: Sequence[Row]) -> list[dict[str, Any]]:
    names = dict.fromkeys(row["learner"] for row in rows)
    found = [_entry(name, [row for row in rows if row["learner"] == name]) for name in names]
    return sorted(found, key=lambda entry: -(entry["measures"]["incremental accuracy"] or [-np.inf])[0])


def _entry(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """One learner's means over the class orders."""
    fine = [row for row in rows if not row["error"]]
    return {
        "learner": name,
        "measures": {key: spread([row[key] for row in fine]) for key in MEASURES},
        "failed": sorted({row["error"] for row in rows if row["error"]}),
        "setting": rows[0]["setting"],
        "over tasks": {key: np.mean([row["over tasks"][key] for row in fine], axis=0).tolist() for key in OVER_TASKS}
        if fine
        else {},
        "accuracy matrix": _mean_matrix([row["accuracy matrix"]["class"] for row in fine]),
    }


def _mean_matrix(matrices: Sequence[list[list[float]]]) -> list[list[float]]:
    """Row k: accuracy on every task so far after the k-th, mean over class orders."""
    if not matrices:
        return []
    return [row[: k + 1].tolist() for k, row in enumerate(np.mean(matrices, axis=0))]


def table_rows(summary: Mapping[str, Any]) -> Iterator[str]:
    """The summary as lines of text."""
    for stream in summary["streams"]:
        yield f"{stream['stream']:<26} {'incremental':>16} {'final':>8} {'forgetting':>10} {'rows held':>9} {'kB':>9}"
        yield from map(_line, stream["learners"])


def _line(entry: Mapping[str, Any]) -> str:
    values = {key: (value or [float("nan")] * 2) for key, value in entry["measures"].items()}
    failed = f"  failed: {entry['failed'][0]}" if entry["failed"] else ""
    mean, half = values["incremental accuracy"]
    rest = [f"{values[key][0]:>{width}}" for key, width in (("final accuracy", "8.3f"), ("forgetting", "10.3f"))]
    held = f"{values['rows held'][0]:>9.0f} {values['bytes'][0] / 1024:>9.0f}"
    around = f"± {half:<5.3f}" if half == half else " " * 7  # of a single class order there is none
    return f"{entry['learner']:<26} {mean:>8.3f} {around} {' '.join(rest)} {held}{failed}"
