"""What learners hold grows as they declare, neither less nor more."""

from __future__ import annotations

import numpy as np
import pytest

from engram import catalogue
from engram.compare.growth import IMAGES, OF_IMAGES, ROWS, TERMS, Held, excess, follow, shown, small
from engram.errors import EngramError

LEARNERS = [row.name for row in catalogue.methods() if row.wing == "keep"]
TASKS = 16


@pytest.mark.parametrize("name", LEARNERS)
def test_bytes_grow_as_declared(name: str) -> None:
    learner = small(name, TASKS)
    curve = follow(learner, TASKS, inputs=IMAGES if name in OF_IMAGES else ROWS)
    assert shown(curve) == learner.growth


@pytest.fixture(scope="module")
def stream() -> list[Held]:
    """The tasks, classes and rows of 50 tasks, of a learner that keeps the mean of every class."""
    return follow(small("keep.NMC", 50), 50)


def holding(stream: list[Held], kept: int = 0, **each: float) -> list[Held]:
    """The same stream with these bytes for each task, class and so on, besides a thousand."""
    bytes_of = [1000 + sum(value * getattr(held, name) for name, value in each.items()) for held in stream]
    return [Held(h.tasks, h.classes, h.rows, round(bytes), kept) for h, bytes in zip(stream, bytes_of, strict=True)]


@pytest.mark.parametrize("tasks", [TASKS, 50])
def test_each_growth_is_told_from_every_other(tasks: int) -> None:
    """A body of a thousand bytes, and as much again or more in what grows."""
    stream = follow(small("keep.NMC", tasks), tasks)
    for growth, terms in TERMS.items():
        term = terms[-1] if terms else "bytes"
        most = getattr(stream[-1], term)
        each = {term: 2000 / most} if terms else {}
        assert shown(holding(stream, **each)) == growth


def test_a_head_of_every_class_does_not_hide_what_grows_besides(stream: list[Held]) -> None:
    assert shown(holding(stream, classes=20, tasks=40)) == "per task"
    assert shown(holding(stream, classes=20, rows=2)) == "per row"
    assert shown(holding(stream, classes=20, pairs=0.2)) == "per class pair"


def test_a_curve_that_stays_is_flat_and_one_that_jumps_is_irregular(stream: list[Held]) -> None:
    assert shown(holding(stream, classes=0.2)) == "flat"  # 2 % more for 99 classes
    assert excess("flat", holding(stream)) < 1e-12
    jumps = [Held(h.tasks, h.classes, h.rows, 1000 + 1000 * (h.tasks > 30)) for h in stream]
    assert shown(jumps) == "irregular"


def test_what_has_a_bound_is_no_growth(stream: list[Held]) -> None:
    """Equal shares of a buffer, rounded down, and a head that knows the last classes alone."""
    sizes = np.diff([held.classes for held in stream], prepend=0)
    shares = [200 // held.classes * held.classes for held in stream]
    bounded = [
        Held(h.tasks, h.classes, h.rows, 1000 + 40 * kept + 300 * int(new), kept)
        for h, kept, new in zip(stream, shares, sizes, strict=True)
    ]
    assert shown(bounded) == "flat"
    assert shown([Held(h.tasks, h.classes, h.rows, h.bytes) for h in bounded]) == "irregular"


def test_rows_that_all_stay_are_no_buffer() -> None:
    assert not any(held.kept for held in follow(small("keep.Joint", 6), 6))
    assert [held.kept for held in follow(small("keep.Replay", 6), 6)][-1] == 24


def test_the_excess_is_what_the_terms_do_not_explain() -> None:
    rows = [Held(k, 2 * k, k * k, 1000 + 5 * k * k) for k in range(1, 11)]
    assert excess("per row", rows) == pytest.approx(0, abs=1e-12) and excess("per task", rows) > 0.01
    with pytest.raises(EngramError, match="per class"):
        excess("per clas", rows)
