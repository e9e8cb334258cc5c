"""Conditions: read, never evaluated."""

from __future__ import annotations

import pytest
import torch

from engram.data.table import Table
from engram.data.where import matches
from engram.errors import EngramError


def table() -> Table:
    return Table(
        {"values": torch.arange(5.0)[:, None]},
        torch.tensor([3, 1, -1, 3, 0]),
        ("a", "b", "c", "d", "e"),
        {
            "alphabet": ["Greek", "Latin", "Greek", "Thai's", "7"],
            "drawer": torch.tensor([1, 2, 3, 4, 5]),
            "score": torch.tensor([[0.5], [1.5], [2.5], [3.5], [4.5]]),
            "box": torch.zeros(5, 4),
        },
        {0: "zero", 1: "one", 3: "three"},
    )


@pytest.mark.parametrize(
    ("condition", "ids"),
    [
        ("label == 3", "ad"),
        ("label == 'three'", "ad"),
        ("label != 'three'", "bce"),
        ("  label<1 ", "ce"),
        ("label == -1", "c"),
        ('alphabet == "Greek"', "ac"),
        ("alphabet != 'Greek'", "bde"),
        ('alphabet == "Thai\'s"', "d"),
        ("alphabet == 7", "e"),
        ("drawer >= 4", "de"),
        ("drawer <= 1.5", "a"),
        ("score > 2.4", "cde"),
        ("id == 'b'", "b"),
        ("id >= 'd'", "de"),
        ("drawer == 99", ""),
    ],
)
def test_rows_for_which_the_comparison_holds(condition: str, ids: str) -> None:
    assert table().where(condition).ids == tuple(ids)


def test_numbers_as_labels() -> None:
    rows = table().with_labels(torch.tensor([0.1, 0.9, 0.4, 0.6, float("nan")]))
    assert rows.where("label > 0.5").ids == ("b", "d")
    assert matches(rows, "label > 0.5").tolist() == [False, True, False, True, False]


@pytest.mark.parametrize(
    "condition",
    [
        "label",
        "label = 3",
        "label == 3 or label == 1",
        "1 < drawer < 3",
        "3 == label",
        "label == drawer.name",
        "label == [1, 3]",
        "label == None",
        "label in (1, 3)",
        "drawer == __import__('os').getpid()",
        "label == ",
        "",
    ],
)
def test_anything_but_one_comparison_is_refused(condition: str) -> None:
    with pytest.raises(EngramError, match=r"is no condition; write one comparison, as in 'label == 3'"):
        table().where(condition)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("alphabett == 'Greek'", "unknown column 'alphabett'; did you mean 'alphabet'"),
        ("label == 'thre'", "unknown class 'thre'; did you mean 'three'"),
        ("drawer == 'x'", "the column 'drawer' holds numbers"),
        ("box == 0", "the column 'box' holds 4 values a row"),
    ],
)
def test_what_is_not_there_is_named(condition: str, message: str) -> None:
    with pytest.raises(EngramError, match=message):
        table().where(condition)


def test_unlabelled_rows_have_no_column_label() -> None:
    with pytest.raises(EngramError, match="unknown column 'label'"):
        table().unlabelled().where("label == 3")


def test_a_bare_word_is_text() -> None:
    table = Table({}, torch.tensor([0, 1, 1]), names={0: "cat", 1: "dog"}).with_column("town", ["bern", "rome", "bern"])
    assert table.where("label == dog").ids == ("1", "2")
    assert table.where("town != bern").ids == ("1",)
