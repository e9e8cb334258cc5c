"""Requests: what must go, and what is at hand, read off the request itself."""

from __future__ import annotations

import pytest
import torch

from engram.core.needs import Need
from engram.core.request import Classes, Concept, Records, Request
from engram.data.table import MISSING, Table
from engram.errors import EngramError

F, FL, R, RL = Need.FORGET_ROWS, Need.FORGET_LABELS, Need.RETAIN_ROWS, Need.RETAIN_LABELS


@pytest.fixture
def table() -> Table:
    """Six rows a to f of the classes 0 0 1 1 2 2."""
    return Table({"values": torch.arange(12.0).reshape(6, 2)}, torch.tensor([0, 0, 1, 1, 2, 2]), tuple("abcdef"))


def test_records_split_the_table(table: Table) -> None:
    request = Request.of_records(table, ("e", "b"))
    assert request.what == Records(("e", "b"))
    assert request.forget is not None and request.forget.ids == ("e", "b")  # in the order that was asked for
    assert request.retain is not None and request.retain.ids == ("a", "c", "d", "f")
    assert request.forget.inputs["values"].tolist() == [[8.0, 9.0], [2.0, 3.0]]
    assert request.ids == ("e", "b")


def test_classes_take_all_their_rows(table: Table) -> None:
    request = Request.of_classes(table, (2, 0))
    assert request.what == Classes((2, 0)) and request.ids == ("a", "b", "e", "f")
    assert request.retain is not None and request.retain.classes == (1,)


def test_ids_of_a_class_are_unknown_when_the_rows_are_gone() -> None:
    assert Request(Classes((1,))).ids == ()
    assert Request(Records(("x",))).ids == ("x",)


@pytest.mark.parametrize(
    ("ids", "words"), [((), "the forget set is empty"), (("a", "zz"), "unknown record id 'zz'; there are: a, b, c")]
)
def test_records_that_cannot_be_meant(table: Table, ids: tuple[str, ...], words: str) -> None:
    with pytest.raises(EngramError, match=words):
        Request.of_records(table, ids)


@pytest.mark.parametrize(("labels", "words"), [((), "the forget set is empty"), ((0, 7), "unknown class '7'")])
def test_classes_that_cannot_be_meant(table: Table, labels: tuple[int, ...], words: str) -> None:
    with pytest.raises(EngramError, match=words):
        Request.of_classes(table, labels)


def test_what_is_at_hand(table: Table) -> None:
    request = Request.of_records(table, ("a",), recipe=object(), statistics=None)
    assert request.have() == {F, FL, R, RL, Need.RECIPE}  # what is None is not at hand
    assert request.but(retain=None).have() == {F, FL, Need.RECIPE}
    assert request.but(retain=table.take([])).have() == {F, FL, Need.RECIPE}  # no rows, nothing at hand
    assert request.but(general=table, at_hand={}).have() == {F, FL, R, RL, Need.GENERAL_ROWS}


@pytest.mark.parametrize(
    ("labels", "labelled"),
    [
        (None, False),
        (torch.tensor([0, MISSING]), False),
        (torch.tensor([0, 1]), True),
        (torch.tensor([[0.5], [float("nan")]]), False),
        (torch.tensor([[0.5], [1.5]]), True),
        (torch.tensor([[-100, 4], [-100, -100]]), True),
    ],
)
def test_labels_count_only_where_every_row_has_one(labels: torch.Tensor | None, labelled: bool) -> None:
    rows = Table({"values": torch.zeros(2, 3)}, labels)
    assert Request(Records(("0",)), forget=rows).have() == ({F, FL} if labelled else {F})
    assert Request(Records(("0",)), retain=rows).have() == ({R, RL} if labelled else {R})


def test_concepts_are_at_hand_with_their_anchor() -> None:
    assert Request(Concept("a cat")).have() == {Need.CONCEPT}
    assert Request(Concept("a cat", anchor="a dog")).have() == {Need.CONCEPT, Need.ANCHOR}


def test_a_need_that_does_not_exist(table: Table) -> None:
    with pytest.raises(ValueError, match="recipee"):
        Request.of_records(table, ("a",), recipee=1)


def test_what_is_odd_about_a_request_is_said(table: Table) -> None:
    assert Request.of_records(table, ("a", "c")).remarks() == Request.of_classes(table, (1,)).remarks() == []
    (whole,) = Request.of_records(table, ("c", "d")).remarks()
    assert whole.startswith("the records are all that there are of 1:") and "--classes" in whole
    (lonely,) = Request.of_classes(table, (0, 2)).remarks()
    assert "all rows that stay are of one class (1)" in lonely
    assert Request.of_records(table, tuple("abcdef")).remarks() == []
    assert Request(Records(("x",))).remarks() == []
