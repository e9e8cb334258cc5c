"""Tables: the kind of the target, rows by id, batches whose order is a function of (seed, epoch)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.data.table import MISSING, Batch, Table, Target
from engram.errors import EngramError


def table(n: int = 7, start: int = 0) -> Table:
    """Rows whose every column says which row it is."""
    rows = torch.arange(start, start + n)
    return Table(
        {"values": torch.stack([rows, -rows], 1).float(), "pixel_values": rows.to(torch.uint8)[:, None]},
        rows % 3,
        tuple(f"r{row}" for row in rows.tolist()),
        {"weight": rows * 10, "site": [f"site {row}" for row in rows.tolist()]},
        {0: "zero", 1: "one", 2: "two"},
    )


def numbers_of(rows: Table) -> list[int]:
    """The numbers of the rows, after a look at whether all columns agree on them."""
    found = rows.inputs["values"][:, 0].long()
    weight = rows.extra["weight"]
    assert isinstance(weight, torch.Tensor) and rows.labels is not None
    assert rows.inputs["pixel_values"][:, 0].tolist() == found.tolist()
    assert rows.labels.tolist() == (found % 3).tolist()
    assert (weight == found * 10).all()
    assert list(rows.extra["site"]) == [f"site {row}" for row in found.tolist()]
    assert rows.ids == tuple(f"r{row}" for row in found.tolist())
    return found.tolist()


@pytest.mark.parametrize(
    ("labels", "target", "shape"),
    [
        (torch.tensor([0, 1, -1]), Target.CLASSES, (3,)),
        (torch.tensor([True, False, True]), Target.CLASSES, (3,)),
        (torch.tensor([0.5, 1.0, math.nan]), Target.NUMBERS, (3, 1)),
        (torch.zeros(3, 2, dtype=torch.float64), Target.NUMBERS, (3, 2)),
        (torch.zeros(3, 5, dtype=torch.int32), Target.TOKENS, (3, 5)),
        (None, Target.NONE, None),
    ],
)
def test_the_target_follows_from_the_labels(
    labels: torch.Tensor | None, target: Target, shape: tuple[int, ...] | None
) -> None:
    rows = Table({"values": torch.zeros(3, 1)}, labels)
    assert rows.target == target
    assert (None if rows.labels is None else tuple(rows.labels.shape)) == shape
    assert rows.ids == ("0", "1", "2")


def test_classes_are_those_that_occur_without_the_missing_ones() -> None:
    assert Table({}, torch.tensor([5, MISSING, 2, 5])).classes == (2, 5)
    assert Table({}, torch.tensor([5.0, 2.0])).classes == ()


def test_rows_by_number_by_mask_and_by_id() -> None:
    rows = table()
    assert numbers_of(rows.take([4, 0])) == [4, 0]
    assert numbers_of(rows.take(torch.tensor([True, False] * 3 + [True]))) == [0, 2, 4, 6]
    assert numbers_of(rows.take([])) == []
    assert numbers_of(rows.select(["r5", "r1"])) == [5, 1]
    assert numbers_of(rows.without(["r0", "r6", "stranger"])) == [1, 2, 3, 4, 5]
    assert rows.without(["stranger"]) is rows
    assert numbers_of(rows.of_classes([1])) == [1, 4]
    assert rows.shapes == {"values": (2,), "pixel_values": (1,)}


def test_an_unknown_id_is_named_with_the_nearest() -> None:
    with pytest.raises(EngramError, match="unknown record id 'r66'; did you mean 'r6'"):
        table().select(["r1", "r66"])


@pytest.mark.parametrize("labels", [None, torch.zeros(2, 1), torch.zeros(2, 4, dtype=torch.long)])
def test_rows_of_a_class_need_class_labels(labels: torch.Tensor | None) -> None:
    with pytest.raises(EngramError, match="no class labels"):
        Table({"values": torch.zeros(2, 1)}, labels).of_classes([0])


def test_put_together() -> None:
    joined = table(3).concat(table(2, start=10), Table({}), table(1, start=4))
    assert numbers_of(joined) == [0, 1, 2, 10, 11, 4]
    assert numbers_of(Table({}).concat(table(2))) == [0, 1]
    assert numbers_of(table(2).take([]).concat(table(2))) == [0, 1]


def test_put_together_keeps_the_names_of_both_and_the_extra_columns_they_share() -> None:
    other = Table(table(2).inputs, torch.tensor([3, 3]), ("a", "b"), {"site": ["x", "y"]}, {3: "three", 0: "naught"})
    joined = table(2).concat(other)
    assert joined.names == {0: "zero", 1: "one", 2: "two", 3: "three"}
    assert joined.extra == {"site": ["site 0", "site 1", "x", "y"]}


@pytest.mark.parametrize(
    "other",
    [
        Table({"values": torch.zeros(1, 2)}, torch.zeros(1, dtype=torch.long)),
        table(1).unlabelled(),
        table(1).with_labels(torch.zeros(1, 1)),
        Table({**table(1).inputs, "values": torch.zeros(1, 3)}, torch.zeros(1, dtype=torch.long)),
        Table({**table(1).inputs, "pixel_values": torch.zeros(1, 1)}, torch.zeros(1, dtype=torch.long)),
    ],
    ids=["column", "unlabelled", "target", "shape", "type"],
)
def test_unlike_tables_are_not_put_together(other: Table) -> None:
    with pytest.raises(EngramError, match="cannot be put together"):
        table(2).concat(other)


def test_unequal_lengths_are_named() -> None:
    with pytest.raises(EngramError, match="'values': 3"):
        Table({"values": torch.zeros(3, 1)}, ids=("a", "b"))


def test_checked_names_a_double_id_and_the_first_row_that_is_not_finite() -> None:
    assert table().checked().ids == table().ids
    with pytest.raises(EngramError, match="'b' stands in the table more than once"):
        Table({"values": torch.zeros(4, 1)}, ids=("a", "b", "c", "b")).checked()
    for bad in (math.nan, math.inf):
        with pytest.raises(EngramError, match=r"'values' holds NaN or infinity \(first in row 'b'\)"):
            Table({"values": torch.tensor([[0.0], [bad], [bad]])}, ids=("a", "b", "c")).checked()


def test_a_batch_holds_images_between_0_and_1_and_its_row_numbers() -> None:
    rows = Table({"pixel_values": torch.tensor([[[[0]]], [[[51]]], [[[255]]]], dtype=torch.uint8)})
    batch = rows.batch(torch.tensor([2, 1]))
    assert batch.inputs["pixel_values"].flatten().tolist() == pytest.approx([1.0, 0.2])
    assert batch.rows.tolist() == [2, 1] and len(batch) == 2 and batch.labels is None
    assert rows.inputs["pixel_values"].dtype == torch.uint8
    assert batch.to("cpu") is batch


def rows_in(batches: list[Batch]) -> list[int]:
    return [row for batch in batches for row in batch.rows.tolist()]


@given(n=st.integers(1, 40), size=st.integers(1, 12), seed=st.integers(0, 3), epoch=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_every_row_comes_once_in_an_order_of_seed_and_epoch_alone(n: int, size: int, seed: int, epoch: int) -> None:
    rows = table(n)
    batches = list(rows.batches(size, seed=seed, epoch=epoch))
    assert sorted(rows_in(batches)) == list(range(n))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert rows_in(batches) == rows_in(list(rows.batches(n, seed=seed, epoch=epoch)))
    for batch in batches:
        assert batch.labels is not None
        assert batch.labels.tolist() == (batch.rows % 3).tolist()
        assert (batch.extra["weight"] == batch.rows * 10).all() and "site" not in batch.extra


def test_epochs_and_seeds_differ_and_no_shuffling_means_the_order_of_rows() -> None:
    rows = table(30)
    orders = [rows_in(list(rows.batches(7, seed=s, epoch=e))) for s, e in [(0, 0), (0, 1), (1, 0)]]
    assert len({tuple(order) for order in orders}) == 3
    assert rows_in(list(rows.batches(7, shuffle=False))) == list(range(30))
    assert len(list(rows.batches(7, drop_last=True))) == 4


def test_the_processes_together_have_the_batch_of_one() -> None:
    rows = table(23)
    whole = list(rows.batches(6, seed=3))
    parts = [list(rows.batches(6, seed=3, shard=(rank, 3))) for rank in range(3)]
    for batch, *pieces in zip(whole, *parts, strict=True):
        assert sorted(batch.rows.tolist()) == sorted(rows_in(pieces))


def test_the_digest_tells_contents_apart() -> None:
    rows = table()
    assert rows.digest == table().digest
    assert rows.with_column("weight", torch.zeros(7)).digest == rows.digest
    others = [
        rows.take([1, 0, 2, 3, 4, 5, 6]),
        rows.unlabelled(),
        rows.with_labels(torch.zeros(7)),
        Table({"values": rows.inputs["values"]}, rows.labels, rows.ids),
    ]
    assert len({rows.digest, *(other.digest for other in others)}) == 5
