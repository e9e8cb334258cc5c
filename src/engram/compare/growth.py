"""What a learner holds, task by task, against what it declares (`growth`).

What it declares has to be what the curve shows, neither less nor more: the simplest growth that explains it. The stream
brings few classes and then many, few rows and then many, so that growth by tasks does not look like growth by classes,
nor growth by rows like either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engram.compare.course import bytes_of
from engram.core.learner import Learner
from engram.core.settings import load_class, settings
from engram.data.buffer import Buffer
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.run import Run
from engram.errors import unknown
from engram.stats.seeds import generator

# what the bytes depend on, by what is declared
TERMS: Mapping[str, tuple[str, ...]] = {
    "flat": (),
    "per class": ("classes",),
    "per class pair": ("classes", "pairs"),
    "per task": ("classes", "tasks"),
    "per row": ("classes", "tasks", "rows"),
}
ROWS, IMAGES = ("values", (8,)), ("pixel_values", (1, 8, 8))
OF_IMAGES = {"keep.OnePrompt", "keep.L2P", "keep.NAPAVQ", "keep.ConTraCon"}  # learners whose networks read images
SETTLED = 0.3  # share of the tasks after which buffers are full
TOLERANCE = 0.035  # of what is held, for what depends on what was learnt: a class without a tail, a change not noticed
LEAD = 0.01  # of what is held: so much closer has a growth of more terms to be


@dataclass(frozen=True)
class Held:
    """After a task: how many tasks, classes and rows came so far, the bytes of all state, and how many rows stand in
    buffers of a fixed size."""

    tasks: int
    classes: int
    rows: int
    bytes: int
    kept: int = 0

    @property
    def pairs(self) -> int:
        """Of classes."""
        return self.classes**2


def small(name: str, tasks: int) -> Learner:
    """The learner of that name as its tests have it; a buffer has room for a row of every class that comes."""
    learner: Learner = load_class(name).tiny()  # type: ignore[attr-defined]
    own = settings(learner)
    other: dict[str, Any] = {
        "buffer": 4 * tasks,
        "sets": 0,  # support sets are those of the last tasks, as large as these happen to be
    }
    if name == "keep.LingoCL":  # its own has names for ten classes
        other = {"encoder": "random", "width": 32}
    return type(learner)(**{**own, **{key: value for key, value in other.items() if key in own}})


def follow(learner: Learner, tasks: int, *, inputs: tuple[str, tuple[int, ...]] = ROWS, seed: int = 0) -> list[Held]:
    """Let a learner take in so many tasks of generated rows; one to three new classes each, and so many rows that
    neither follows from the other. `inputs`: the name and shape of a row."""
    run, found, sizes = Run(seed=seed), [], _sizes(tasks)
    total = sum(new * each for new, each in sizes)
    buffers = [(part, part.size) for part in learner.traces.values() if isinstance(part, Buffer) and part.size < total]
    classes = rows = 0
    for k, (new, each) in enumerate(sizes):
        table = _rows(range(classes, classes + new), each, inputs, k, seed)
        learner.learn(Task(table, None, k, table.classes, table.names), run)
        learner.refresh(run)
        classes, rows = classes + new, rows + len(table)
        kept = sum(len(part) for part, size in buffers if part.size == size)  # one that is made larger has no bound
        found.append(Held(k + 1, classes, rows, bytes_of(learner.state_dict()), kept))
    return found


def shown(curve: Sequence[Held]) -> str:
    """The growth that a curve shows: the one of fewest terms, and among those the closest, that is hardly further off
    than any other; "irregular" if that is beyond the tolerance. So a curve that stays is flat, whatever else fits it.
    """
    off = {growth: excess(growth, curve) for growth in TERMS}
    close = [growth for growth in TERMS if off[growth] <= min(off.values()) + LEAD]
    best = min(close, key=lambda growth: (len(TERMS[growth]), off[growth]))
    return best if off[best] <= TOLERANCE else "irregular"


def excess(growth: str, curve: Sequence[Held]) -> float:
    """How far the curve is from a growth, once buffers are full: the largest residual of a linear fit of the bytes on
    what they depend on, as a share of the bytes at the end. Two things are among it always, since they have bounds: the
    rows in buffers of a fixed size, whose equal shares round down, and the number of classes that came last, which a
    head may know alone. EngramError for an unknown growth."""
    if growth not in TERMS:
        raise unknown("growth", growth, TERMS)
    settled = curve[round(SETTLED * len(curve)) :]
    last = np.diff([held.classes for held in curve], prepend=0)[-len(settled) :]
    terms = [[getattr(held, name) for held in settled] for name in ("kept", *TERMS[growth])]
    x = np.array([np.ones(len(settled)), last, *terms], dtype=float).T
    y = np.array([held.bytes for held in settled], dtype=float)
    return float(np.abs(y - _fit(x, y)).max() / y[-1])


def _fit(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least squares on scaled columns."""
    scaled = x / np.abs(x).max(0).clip(min=1)
    return np.asarray(scaled @ np.linalg.lstsq(scaled, y, rcond=1e-10)[0])


def _sizes(tasks: int) -> list[tuple[int, int]]:
    """New classes and rows of each, per task: two classes, then one, then three; few rows, many, few."""
    shares = (np.arange(tasks) + 0.5) / tasks
    new = np.select([shares < 0.3, shares < 0.65], [2, 1], 3)
    each = np.where((shares > 0.5) & (shares < 0.8), 18, 6) + np.arange(tasks) % 3
    return list(zip(new.tolist(), each.tolist(), strict=True))


def _rows(classes: range, each: int, inputs: tuple[str, tuple[int, ...]], task: int, seed: int) -> Table:
    (name, shape), draws = inputs, generator("growth", seed, task)
    labels = torch.tensor(list(classes)).repeat_interleave(each)
    means = 3 * torch.randn(len(classes), *shape, generator=draws)
    values = means.repeat_interleave(each, 0) + torch.randn(len(labels), *shape, generator=draws)
    ids, names = tuple(f"{task}-{k}" for k in range(len(labels))), {c: f"class {c}" for c in classes}
    return Table({name: values}, labels, ids, names=names)
