"""Buffers: what they keep, what they draw, and that nothing is left of what is dropped."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from engram.data.buffer import Buffer
from engram.data.table import Table
from engram.errors import EngramError

RULES = ("reservoir", "fifo", "per_class")


def table(n: int, classes: int = 3, start: int = 0) -> Table:
    """Rows whose every column says which row it is."""
    rows = torch.arange(start, start + n)
    return Table(
        {"pixel_values": rows.to(torch.uint8).reshape(-1, 1, 1, 1)},
        rows % classes,
        tuple(f"r{row}" for row in rows.tolist()),
        {"weight": rows * 10, "site": [f"site {row}" for row in rows.tolist()]},
        dict(enumerate("abc")),
    )


def intact(rows: Table) -> bool:
    """Do all columns of every row still belong together, as the rows were offered?"""
    numbers = torch.tensor([int(id[1:]) for id in rows.ids])
    return (
        rows.inputs["pixel_values"].flatten().tolist() == numbers.tolist()
        and rows.inputs["pixel_values"].dtype == torch.uint8
        and torch.equal(torch.as_tensor(rows.extra["weight"]), numbers * 10)
        and list(rows.extra["site"]) == [f"site {row}" for row in numbers.tolist()]
    )


def filled(rule: str, size: int = 6, n: int = 20, seed: int = 0) -> Buffer:
    buffer = Buffer(size, rule, seed)
    buffer.offer(table(n))
    return buffer


def pieces(rows: Table, cuts: list[int]) -> list[Table]:
    edges = [0, *sorted(cuts), len(rows)]
    return [rows.take(range(a, b)) for a, b in pairwise(edges)]


@given(
    rule=st.sampled_from(RULES),
    size=st.integers(3, 12),
    n=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 40), max_size=4),
)
@settings(max_examples=25, deadline=None)
def test_rows_offered_in_pieces_or_twice_leave_the_same_rows(rule: str, size: int, n: int, cuts: list[int]) -> None:
    rows = table(n)
    whole, cut = Buffer(size, rule, 5), Buffer(size, rule, 5)
    whole.offer(rows)
    for piece in pieces(rows, [min(c, n) for c in cuts]):
        cut.offer(piece)
    assert whole.table.ids == cut.table.ids and intact(cut.table)
    assert len(whole) <= min(size, n) and (len(whole) == min(size, n) or rule == "per_class")
    assert list(whole.table.ids) == sorted(whole.table.ids, key=lambda id: int(id[1:]))  # order of arrival
    if rule != "fifo":
        whole.offer(rows)
        assert set(whole.table.ids) == set(cut.table.ids)


def test_a_reservoir_holds_every_row_with_the_same_chance() -> None:
    counts: Counter[str] = Counter()
    for seed in range(400):
        buffer = Buffer(6, seed=seed)
        for piece in pieces(table(20), [3, 11]):
            buffer.offer(piece)
        counts.update(buffer.table.ids)
    assert len(counts) == 20
    # fixed sample sizes make the counts vary less than independent ones, so this is on the safe side
    assert chisquare(list(counts.values())).pvalue > 1e-3


def test_a_reservoir_asks_for_no_order_of_rows() -> None:
    buffer = Buffer(6)
    buffer.offer(table(20).take(torch.arange(20).flip(0)))
    assert set(buffer.table.ids) == set(filled("reservoir").table.ids)
    assert set(filled("reservoir", seed=1).table.ids) != set(filled("reservoir").table.ids)


def test_fifo_holds_the_latest_rows() -> None:
    buffer = Buffer(4, "fifo")
    for piece in pieces(table(11), [3, 4, 9]):
        buffer.offer(piece)
    assert buffer.table.ids == ("r7", "r8", "r9", "r10")


def test_per_class_shares_the_room_and_cuts_old_classes_when_new_ones_come() -> None:
    buffer, rows = Buffer(10, "per_class"), table(60)
    held: list[set[str]] = []
    for classes, quota in (([0], 10), ([1], 5), ([2], 3)):
        buffer.offer(rows.of_classes(classes))
        labels = buffer.table.labels
        assert labels is not None
        assert Counter(labels.tolist()) == {c: quota for c in range(classes[0] + 1)}
        held.append(set(buffer.table.of_classes([0]).ids))
    assert held[0] > held[1] > held[2]


def test_per_class_needs_classes_and_room_for_them() -> None:
    with pytest.raises(EngramError, match="needs class labels; these rows have numbers"):
        Buffer(4, "per_class").offer(table(3).with_labels(torch.zeros(3)))
    with pytest.raises(EngramError, match="of size 2 cannot hold a row of each of 3 classes"):
        Buffer(2, "per_class").offer(table(3))


@pytest.mark.parametrize("rule", RULES)
def test_draws_are_different_rows_of_the_generator_alone(rule: str) -> None:
    buffer = filled(rule)

    def draw(n: int, seed: int = 3, exclude: tuple[str, ...] = ()) -> Table:
        return buffer.draw(n, torch.Generator().manual_seed(seed), exclude)

    assert draw(4).ids == draw(4).ids
    assert len(set(draw(4).ids)) == 4 and intact(draw(4)) and set(draw(4).ids) <= set(buffer.table.ids)
    assert len({draw(6, seed).ids for seed in range(5)}) > 1
    assert set(draw(99).ids) == set(buffer.table.ids)
    left = buffer.table.ids[2:]
    assert set(draw(99, exclude=buffer.table.ids[:2]).ids) == set(left)


def test_draws_are_uniform() -> None:
    buffer, draws = filled("reservoir"), torch.Generator().manual_seed(0)
    counts = Counter(id for _ in range(600) for id in buffer.draw(2, draws).ids)
    assert set(counts) == set(buffer.table.ids) and chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_dropped_rows_are_gone_and_the_others_stay_where_they_were(rule: str) -> None:
    buffer = filled(rule)
    before = buffer.table.ids
    gone = table(20).select([before[1], before[4], next(id for id in table(20).ids if id not in before)])
    assert buffer.holds(gone.ids) == (before[1], before[4])
    assert buffer.drop(gone) == ()
    assert buffer.holds(gone.ids) == ()
    assert buffer.table.ids == tuple(id for id in before if id not in gone.ids) and intact(buffer.table)
    state = json.dumps(buffer.state_dict(), default=lambda tensor: tensor.tolist())
    assert not any(f'"{id}"' in state for id in gone.ids)
    buffer.offer(table(30, start=20))
    assert len(buffer) == 6 and intact(buffer.table) and buffer.holds(gone.ids) == ()


def test_a_reservoir_is_a_sample_of_all_rows_again_when_enough_came_after_a_drop() -> None:
    dropped, never = Buffer(6), Buffer(6)
    rows = table(240)
    dropped.offer(rows.take(range(20)))
    gone = dropped.table.take([0, 1, 2])
    dropped.drop(gone)
    dropped.offer(rows.take(range(20, 240)))
    never.offer(rows.without(gone.ids))
    assert set(dropped.table.ids) == set(never.table.ids)


@pytest.mark.parametrize("rule", RULES)
def test_everything_may_be_dropped_and_other_rows_come(rule: str) -> None:
    buffer = filled(rule)
    assert buffer.drop(table(20)) == () and len(buffer) == 0
    assert len(buffer.draw(3, torch.Generator())) == 0
    other = Table({"values": torch.zeros(2, 5)}, torch.tensor([8, 9]), ("x", "y"))
    buffer.offer(other)
    assert buffer.table.ids == ("x", "y")
    with pytest.raises(EngramError, match="cannot be put together"):
        buffer.offer(table(3))


@pytest.mark.parametrize("rule", RULES)
def test_a_buffer_goes_on_from_its_state_as_if_it_had_not_stopped(rule: str) -> None:
    buffer = filled(rule)
    state = buffer.state_dict()
    assert plain(state)
    again = Buffer(6, rule)
    again.load_state_dict(state)
    for one in (buffer, again):
        one.offer(table(20, start=20))
        one.drop(one.table.take([2]))
    assert again.table.digest == buffer.table.digest and intact(again.table)
    assert again.table.names == {0: "a", 1: "b", 2: "c"}
    assert again.draw(3, torch.Generator()).ids == buffer.draw(3, torch.Generator()).ids


def plain(value: Any) -> bool:
    """Nothing but tensors, and what JSON has."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(entry) for key, entry in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or isinstance(value, str | int | float | torch.Tensor)


def test_an_unlabelled_or_fresh_buffer_has_a_state_too() -> None:
    for rows in (table(0), table(4).unlabelled()):
        buffer, again = Buffer(3), Buffer(3)
        buffer.offer(rows)
        again.load_state_dict(buffer.state_dict())
        assert again.table.ids == buffer.table.ids and again.table.labels is None


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(EngramError, match="unknown rule of a buffer 'resevoir'; did you mean 'reservoir'"):
        Buffer(3, "resevoir")
    with pytest.raises(EngramError, match="of size 0 holds nothing"):
        Buffer(0)
