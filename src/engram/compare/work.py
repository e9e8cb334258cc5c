"""A comparison at work in a directory: cells that are done once, in parallel, and kept as files."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from engram.data.readers import read, read_with, train_test
from engram.data.table import Table, Target
from engram.engine.progress import Progress
from engram.errors import EngramError
from engram.files import write_atomic

FORMAT = 1
CELLS, PLAN, SUMMARY = "cells", "plan.json", "summary.json"
Row = dict[str, Any]


class Cell(Protocol):
    """One piece of work."""

    @property
    def name(self) -> str:
        """A file name, different for every cell."""


class Work:
    """A subclass does one cell (`do`). It is made anew, from its plan and directory, in every process.

    `plan`: a dataclass of plain data with `jobs` and `budget`, which do not change results and may differ when a
    comparison goes on. EngramError for a directory that holds something else.
    """

    free: ClassVar[tuple[str, ...]] = ("jobs", "budget")
    measured: ClassVar[tuple[str, ...]] = ()  # columns that a failure leaves empty

    def __init__(self, plan: Any, out: str | Path, progress: Progress | None = None) -> None:
        self.plan, self.out, self.progress = plan, Path(out), progress

    def search(
        self,
        settings: Sequence[Mapping[str, Any]],
        measure: Callable[[Mapping[str, Any]], Row],
        score: Callable[[Row], float],
    ) -> list[Row]:
        """The rows of as many trials as the plan's `trials` and `budget` (seconds of CPU, so that a busy machine costs
        nobody a trial) allow, at least one; the one with the highest score is chosen, if it did not fail."""
        found: list[Row] = []
        start = time.process_time()
        for setting in settings[: self.plan.trials]:
            if found and time.process_time() - start > self.plan.budget:
                break
            found.append(measure(setting))
        best = max(found, key=lambda row: -np.inf if row["error"] else score(row))
        best["chosen"] = not best["error"]
        return found

    def estimate(self) -> str:
        """How much there is to do; said before the work."""
        raise NotImplementedError

    def trial(self) -> str:
        """How long it will take, from work that is tried for this alone; empty where `estimate` says it."""
        return ""

    def do(self, cell: Any, setting: Mapping[str, Any]) -> list[Row]:
        """The rows of a cell."""
        raise NotImplementedError

    def claim(self) -> None:
        """The directory belongs to this comparison from now on."""
        file = self.out / PLAN
        if self.out.is_file():
            raise EngramError(f"{self.out} is a file; choose another --out")
        plain = json.loads(json.dumps({"format": FORMAT, **asdict(self.plan)}))
        mine = {key: value for key, value in plain.items() if key not in self.free}
        if file.exists() and json.loads(file.read_text()) != mine:
            raise EngramError(f"{self.out} holds another comparison; choose another --out, or repeat its arguments")
        if not file.exists() and self.out.exists() and any(self.out.iterdir()):
            raise EngramError(f"{self.out} holds something else; choose another --out")
        write_atomic(file, json.dumps(mine, indent=1))

    def all(self, cells: Sequence[Any], settings: Iterable[Mapping[str, Any]]) -> list[Row]:
        """The rows of all cells, in their order; those that are there are read."""
        pairs = list(zip(cells, settings, strict=True))
        left = [(cell, setting) for cell, setting in pairs if not self._file(cell).exists()]
        if left and self.progress is not None:
            self.progress.say(f"{len(left)} of {len(cells)} cells to do")
        try:
            self.each(left, "keep")
        except BrokenProcessPool:  # some cell took its process down, and others with it: now one at a time
            for pair in left:
                if not self._file(pair[0]).exists():
                    self._alone(pair)
        return [row for cell in cells for row in json.loads(self._file(cell).read_text())]

    def keep(self, pair: tuple[Cell, Mapping[str, Any]]) -> None:
        """Do a cell with its setting and write its rows."""
        cell, setting = pair
        write_atomic(self._file(cell), json.dumps(self.do(cell, setting)))

    def _alone(self, pair: tuple[Cell, Mapping[str, Any]]) -> None:
        """Do a cell in a process of its own, and if it takes that down, write what is left to say."""
        from joblib import Parallel, delayed

        try:
            Parallel(n_jobs=2)([delayed(_elsewhere)(type(self), self.plan, self.out, "keep", pair)])
        except BrokenProcessPool:
            dead = "it took its process down (out of memory, or a fault in native code)"
            write_atomic(self._file(pair[0]), json.dumps([self.failed(self.row(*pair), dead)]))

    def row(self, cell: Any, setting: Mapping[str, Any]) -> Row:
        """A row of a cell, before anything is measured."""
        return {**asdict(cell), "setting": dict(setting), "chosen": False, "error": ""}

    def failed(self, row: Row, error: Exception | str) -> Row:
        """The row of what may be anybody's method and went wrong: it says so, and the others go on."""
        said = error if isinstance(error, str) else f"{type(error).__name__}: {error}".splitlines()[0]
        return {**row, "error": said, **dict.fromkeys(self.measured)}

    def each(self, things: Sequence[Any], name: str) -> None:
        """Call the method of this name with each of the things, in `jobs` processes."""
        if self.plan.jobs == 1:
            for thing in things:
                getattr(self, name)(thing)
            return
        from joblib import Parallel, delayed

        here = type(self), self.plan, self.out
        Parallel(n_jobs=self.plan.jobs)(delayed(_elsewhere)(*here, name, thing) for thing in things)

    def write(self, name: str, rows: Sequence[Row], summary: Mapping[str, Any]) -> None:
        """Put the table of rows and the summary down."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        flat = [{key: _cell(value) for key, value in row.items()} for row in rows]
        columns = {key: [row.get(key) for row in flat] for key in dict.fromkeys(key for row in flat for key in row)}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink)
        write_atomic(self.out / name, sink.getvalue().to_pybytes())
        write_atomic(self.out / SUMMARY, json.dumps(summary, indent=1))

    def _file(self, cell: Cell) -> Path:
        return self.out / CELLS / f"{cell.name}.json"


def tables(source: Any, what: str) -> tuple[Table, Table]:
    """Training and test rows as a plan or stream says (`data`, `test`, `limit`, `image_size`). EngramError without
    classes: `what` are compared on them."""
    given = {"limit": source.limit, "image_size": source.image_size}
    train, preprocessing = read_with(source.data, **given)
    if train.target != Target.CLASSES:
        raise EngramError(f"{source.data} has {train.target} for labels; {what} are compared on classes")
    if source.test is None:
        return train_test(train, 0.3)
    return train, read(source.test, preprocessing=preprocessing, **given)


def spread(values: Sequence[float | None]) -> list[float] | None:
    """Mean, and half of the 95 % t interval (NaN for a single value); None where there is no number."""
    from engram.stats.intervals import mean

    finite = [value for value in values if value is not None and np.isfinite(value)]
    if not finite:
        return None
    estimate = mean(finite)
    return [estimate.value, estimate.high - estimate.value if len(finite) > 1 else float("nan")]


AT_WORK: dict[str, Work] = {}  # made once in every process


def _elsewhere(kind: type[Work], plan: Any, out: Path, name: str, thing: Any) -> None:
    torch.set_num_threads(1)
    key = f"{kind} {plan} {out}"
    if key not in AT_WORK:
        AT_WORK[key] = kind(plan, out)
    getattr(AT_WORK[key], name)(thing)


def _cell(value: Any) -> Any:
    """What a column of a table can hold."""
    if isinstance(value, Mapping):
        return json.dumps(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else value
