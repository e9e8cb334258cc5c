"""Streams: which classes arrive when, and that learners see no test row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.data.streams import Stage, class_stream, domain_stream, few_shot, online, single, stream
from engram.data.table import Column, Table
from engram.errors import EngramError


def table(classes: int, each: int = 3, name: str = "train", first: int = 0) -> Table:
    labels = torch.arange(classes).repeat(each) + first
    ids = tuple(f"{name}-{row}" for row in range(len(labels)))
    sites = ["north" if row % 2 else "south's" for row in range(len(labels))]
    extra: dict[str, Column] = {"site": sites, "year": torch.arange(len(labels)) // classes}
    return Table({"values": torch.arange(float(len(labels)))[:, None]}, labels, ids, extra, {0: "nought"})


def stages(classes: int, **settings: object) -> list[Stage]:
    return class_stream(table(classes), table(classes, 2, "test"), **settings)  # type: ignore[arg-type]


def arrived(found: list[Stage]) -> list[int]:
    return [c for stage in found for c in stage.task.classes]


# The first ten of 100 classes in published experiments: PyCIL with its seed 1993 (a NumPy permutation), the
# list of iCaRL; CODA-Prompt with seed 0 keeps the natural order.
FIRST_TEN = {
    ("natural", 0): [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    ("pycil", 1993): [68, 56, 78, 8, 23, 84, 90, 65, 74, 76],
    ("icarl", 0): [87, 0, 52, 58, 44, 91, 68, 97, 51, 15],
    ("coda", 0): [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
}


@pytest.mark.parametrize(("order", "seed"), FIRST_TEN)
def test_published_orders(order: str, seed: int) -> None:
    found = stages(100, base=10, increment=10, order=order, seed=seed)
    assert list(found[0].task.classes) == FIRST_TEN[order, seed]
    assert sorted(arrived(found)) == list(range(100))


def test_mammoth_reads_the_permutation_of_pycil_the_other_way_round() -> None:
    there = arrived(stages(100, base=10, increment=10, order="pycil", seed=1993))
    back = arrived(stages(100, base=10, increment=10, order="mammoth", seed=1993))
    assert [there[c] for c in back] == list(range(100))


@pytest.mark.parametrize(
    ("classes", "base", "increment", "sizes"),
    [
        (100, 50, 10, [50] + [10] * 5),
        (100, 50, 5, [50] + [5] * 10),
        (100, 40, 3, [40] + [3] * 20),
        (100, 0, 10, [10] * 10),
        (100, 0, 5, [5] * 20),
        (10, 2, 2, [2] * 5),
        (10, 4, 4, [4, 4, 2]),
        (10, 10, 1, [10]),
    ],
)
def test_base_and_increment(classes: int, base: int, increment: int, sizes: list[int]) -> None:
    found = stages(classes, base=base, increment=increment, tasks=len(sizes))
    assert [len(stage.task.classes) for stage in found] == sizes
    assert [stage.task.index for stage in found] == list(range(len(sizes)))
    with pytest.raises(EngramError, match=f"are {len(sizes)} tasks, not {len(sizes) + 1}"):
        stages(classes, base=base, increment=increment, tasks=len(sizes) + 1)


@given(
    classes=st.integers(2, 12),
    increment=st.integers(1, 5),
    order=st.sampled_from(["natural", "pycil", "mammoth", "avalanche", "coda"]),
    seed=st.integers(0, 9),
)
@settings(max_examples=25, deadline=None)
def test_tasks_part_the_rows_by_class_and_leak_no_test_row(classes: int, increment: int, order: str, seed: int) -> None:
    train, test = table(classes, first=3), table(classes, 2, "test", first=3)
    found = class_stream(train, test, base=0, increment=increment, order=order, seed=seed)  # type: ignore[arg-type]
    assert sorted(id for stage in found for id in stage.task.train.ids) == sorted(train.ids)
    assert sorted(id for stage in found for id in stage.test.ids) == sorted(test.ids)
    for stage in found:
        assert stage.task.train.classes == stage.test.classes == tuple(sorted(stage.task.classes))
        assert all(id.startswith("train") for id in stage.task.train.ids)
        assert stage.task.valid is None and stage.task.names == {0: "nought"}


def test_class_ids_stay_what_they_are_in_the_table() -> None:
    train, test = table(4, first=7), table(4, name="test", first=7)
    found = class_stream(train, test, base=2, increment=2, order="pycil", seed=1993)
    expected = [7 + c for c in np.random.RandomState(1993).permutation(4)]
    assert arrived(found) == expected
    for stage in found:
        labels = stage.task.train.labels
        assert labels is not None and set(labels.tolist()) == set(stage.task.classes)


def test_domains_come_in_order_of_appearance_with_all_classes_each() -> None:
    found = domain_stream(table(5, 4), table(5, 2, "test"), "site")
    assert [stage.task.train.extra["site"][0] for stage in found] == ["south's", "north"]
    assert [stage.task.classes for stage in found] == [(0, 1, 2, 3, 4), ()]
    for stage in found:
        value = stage.task.train.extra["site"][0]
        assert set(stage.task.train.extra["site"]) == set(stage.test.extra["site"]) == {value}
    assert sum(len(stage.task.train) for stage in found) == 20


def test_domains_by_a_column_of_numbers_that_no_test_row_has() -> None:
    found = domain_stream(table(5, 2), table(5, 2, "test"), "year")
    assert [len(stage.task.train) for stage in found] == [5, 5]
    with pytest.raises(EngramError, match=r"task 2 .*has no test rows"):
        domain_stream(table(5, 3), table(5, 2, "test"), "year")
    with pytest.raises(EngramError, match="unknown column 'sight'; did you mean 'site'"):
        domain_stream(table(5, 3), table(5, 2, "test"), "sight")


@given(batch=st.integers(1, 9), seed=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_the_online_cut_shows_each_row_once_and_tells_no_boundaries(batch: int, seed: int) -> None:
    found = stages(6, base=2, increment=2)
    pieces = list(online(found, batch, seed))
    seen = [id for piece in pieces for id in piece.train.ids]
    assert sorted(seen) == sorted(id for stage in found for id in stage.task.train.ids)
    assert [piece.index for piece in pieces] == list(range(len(pieces)))
    assert all(len(piece.train) <= batch and piece.classes == piece.train.classes for piece in pieces)
    boundary = len(found[0].task.train)
    assert set(seen[:boundary]) == set(found[0].task.train.ids)
    assert seen == [id for piece in online(found, 100, seed) for id in piece.train.ids]


def test_streams_by_name() -> None:
    train, test = table(6), table(6, 2, "test")
    by_class = stream(train, test, "class", base=2, increment=2)
    assert [s.task.classes for s in stream(train, test, "task", base=2, increment=2)] == [
        s.task.classes for s in by_class
    ]
    assert [s.task.classes for s in by_class] == [(0, 1), (2, 3), (4, 5)]
    assert len(stream(train, test, "domain", column="site")) == 2
    assert [len(s.task.train) for s in stream(train, test, "few-shot", base=2, ways=2, shots=2)] == [6, 4, 4]
    (whole,) = stream(train, test, "single")
    assert whole.task.train is train and whole.test is test and single(train, test)[0].task == whole.task
    with pytest.raises(EngramError, match="unknown scenario 'clas'; did you mean 'class'"):
        stream(train, test, "clas")


def test_few_shots_after_a_base_with_all_rows() -> None:
    train, test = table(8, 5), table(8, 2, "test")
    found = few_shot(train, test, base=4, ways=2, shots=3, order="pycil", seed=3)
    whole = class_stream(train, test, base=4, increment=2, order="pycil", seed=3)
    assert [s.task.classes for s in found] == [s.task.classes for s in whole]
    assert found[0].task.train.ids == whole[0].task.train.ids
    for few, all_ in zip(found[1:], whole[1:], strict=True):
        labels = few.task.train.labels
        assert labels is not None and labels.bincount().unique().tolist() == [0, 3]
        assert set(few.task.train.ids) < set(all_.task.train.ids) and few.test.ids == all_.test.ids


def test_few_shots_are_drawn_by_seed_and_class_whatever_the_order() -> None:
    train, test = table(6, 20), table(6, 2, "test")

    def drawn(seed: int, **settings: object) -> set[str]:
        stages = few_shot(train, test, ways=2, shots=3, seed=seed, **settings)  # type: ignore[arg-type]
        return {id for stage in stages for id in stage.task.train.ids}

    assert drawn(1, base=0) == drawn(1, base=0, order="pycil") != drawn(2, base=0)
    assert len(drawn(1, base=0)) == 18
    assert len(drawn(1, base=2, tasks=2)) == 40 + 6


def test_few_shots_that_cannot_be_had() -> None:
    train, test = table(6), table(6, 2, "test")
    with pytest.raises(EngramError, match="class 2 has 3 training rows, fewer than 4 shots"):
        few_shot(train, test, base=2, ways=2, shots=4)
    with pytest.raises(EngramError, match="4 tasks of 1 shots cannot be had: there are 3 tasks"):
        few_shot(train, test, base=2, ways=2, shots=1, tasks=4)


def test_what_cannot_be_a_class_stream_is_refused() -> None:
    rows = table(4)
    with pytest.raises(EngramError, match="needs class labels; this table's target is numbers"):
        class_stream(rows.with_labels(torch.zeros(12)), rows, base=2, increment=2)
    with pytest.raises(EngramError, match=r"task 1 .*has no test rows"):
        class_stream(rows, rows.of_classes([0, 1]), base=2, increment=2)
    with pytest.raises(EngramError, match="the icarl order is for 100 classes, not 4"):
        class_stream(rows, rows, base=2, increment=2, order="icarl")


def test_a_task_without_some_rows_announces_only_the_classes_that_are_left() -> None:
    task = stages(4, base=4, increment=1)[0].task
    gone = {id for id in task.train.of_classes([2]).ids}
    left = task.without(gone)
    assert left.classes == (0, 1, 3) and len(left.train) == 9 and len(task.train) == 12
