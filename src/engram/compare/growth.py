"""What a learner holds, task by task, against what it declares (`growth`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engram.compare.continual import bytes_of
from engram.core.learner import Learner
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.run import Run
from engram.errors import unknown
from engram.stats.seeds import generator

# what the bytes may depend on, by what is declared; buffers of a fixed size fill up and then stay
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
TOLERANCE = 0.035  # of what is held: buffers with equal shares for all classes round down


@dataclass(frozen=True)
class Held:
    """After a task: how many tasks, classes and rows came so far, and the bytes of all state."""

    tasks: int
    classes: int
    rows: int
    bytes: int

    @property
    def pairs(self) -> int:
        """Of classes."""
        return self.classes**2


def follow(learner: Learner, tasks: int, *, inputs: tuple[str, tuple[int, ...]] = ROWS, seed: int = 0) -> list[Held]:
    """Let a learner take in so many tasks of generated rows; one to three new classes each, and so many rows that
    neither follows from the other. `inputs`: the name and shape of a row."""
    run, found = Run(seed=seed), []
    classes = rows = 0
    for k, (new, each) in enumerate(_sizes(tasks)):
        table = _rows(range(classes, classes + new), each, inputs, k, seed)
        learner.learn(Task(table, None, k, table.classes, table.names), run)
        learner.refresh(run)
        classes, rows = classes + new, rows + len(table)
        found.append(Held(k + 1, classes, rows, bytes_of(learner.state_dict())))
    return found


def excess(growth: str, curve: Sequence[Held]) -> float:
    """How far the curve is from what is declared, once buffers are full: the largest residual of a linear fit of the
    bytes on what they may depend on, as a share of the bytes at the end. EngramError for an unknown growth."""
    if growth not in TERMS:
        raise unknown("growth", growth, TERMS)
    settled = curve[round(SETTLED * len(curve)) :]
    y = np.array([held.bytes for held in settled], dtype=float)
    x = np.array([[1.0, *(getattr(held, name) for name in TERMS[growth])] for held in settled])
    return float(np.abs(y - _fit(x, y)).max() / y[-1])


def _fit(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least squares on scaled columns."""
    scaled = x / np.abs(x).max(0)
    return np.asarray(scaled @ np.linalg.lstsq(scaled, y, rcond=None)[0])


def _sizes(tasks: int) -> list[tuple[int, int]]:
    """New classes and rows of each, per task."""
    draws = np.random.default_rng(5)
    return [(int(draws.integers(1, 4)), int(draws.integers(6, 18))) for _ in range(tasks)]


def _rows(classes: range, each: int, inputs: tuple[str, tuple[int, ...]], task: int, seed: int) -> Table:
    (name, shape), draws = inputs, generator("growth", seed, task)
    labels = torch.tensor(list(classes)).repeat_interleave(each)
    means = 3 * torch.randn(len(classes), *shape, generator=draws)
    values = means.repeat_interleave(each, 0) + torch.randn(len(labels), *shape, generator=draws)
    ids, names = tuple(f"{task}-{k}" for k in range(len(labels))), {c: f"class {c}" for c in classes}
    return Table({name: values}, labels, ids, names=names)
