"""Handwritten digits, 8 × 8, as a table with fixed train and test rows; and how learners are taken along a
stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from engram.core.learner import Learner
from engram.data.streams import Stage
from engram.data.table import Table
from engram.engine.predict import accuracy
from engram.engine.run import Run


class Digits(NamedTuple):
    """1257 training and 540 test rows of `pixel_values` [1, 8, 8] in [0, 1]."""

    train: Table
    test: Table


class Course(NamedTuple):
    """What a learner showed along a stream of T tasks.

    matrix      [T, T] accuracy on test set j after task i, among all classes seen
    task_aware  [T] the last row, among the classes of task j alone
    curve       accuracy on the rows of all tasks seen so far, after each
    """

    matrix: np.ndarray
    task_aware: np.ndarray
    curve: list[float]


@pytest.fixture(scope="session")
def digits() -> Digits:
    data = load_digits()
    table = Table(
        {"pixel_values": torch.tensor(data.images[:, None] / 16, dtype=torch.float32)},
        torch.tensor(data.target),
    )
    train, test = train_test_split(np.arange(len(table)), test_size=0.3, stratify=data.target, random_state=0)
    return Digits(table.take(train), table.take(test))


@pytest.fixture(scope="session")
def tiny(digits: Digits) -> Table:
    """Six rows of each class."""
    return digits.train.take([row for c in range(10) for row in _first(digits.train, c, 6)])


@pytest.fixture(scope="session")
def take() -> Callable[..., Course]:
    """take(learner, stages, run): learn the tasks in order, and look after each."""
    return _take


def _take(learner: Learner, stages: Sequence[Stage], run: Run | None = None) -> Course:
    run = run or Run()
    matrix, curve = np.full((len(stages), len(stages)), np.nan), []
    for i, stage in enumerate(stages):
        learner.learn(stage.task, run)
        learner.refresh(run)
        tests = [seen.test for seen in stages[: i + 1]]
        matrix[i, : i + 1] = [accuracy(learner.model, test) for test in tests]
        curve.append(accuracy(learner.model, tests[0].concat(*tests[1:])))
    aware = [accuracy(learner.model, stage.test, classes=stage.test.classes) for stage in stages]
    return Course(matrix, np.array(aware), curve)


def _first(table: Table, label: int, n: int) -> list[int]:
    assert table.labels is not None
    return (table.labels == label).nonzero()[:n, 0].tolist()
