"""Every method of the catalogue keeps the promises of its kind."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from engram.catalogue import Method, methods
from engram.core.learner import Learner
from engram.core.settings import load_class
from engram.testing import Check, Material, after_round_trip, check_round_trip, check_row, checks_of, digits


def _class(row: Method) -> Any:
    try:
        return load_class(row.name)
    except (ImportError, AttributeError):
        return None


ROWS = methods()
CLASSES = {row.name: cls for row in ROWS if (cls := _class(row)) is not None}
TINY = {name: cls.tiny() for name, cls in CLASSES.items() if hasattr(cls, "tiny")}
LEARNERS = {name: method for name, method in TINY.items() if isinstance(method, Learner)}


def _pairs() -> list[Any]:
    return [
        pytest.param(name, check, id=f"{name}-{check.__name__}")
        for name, method in TINY.items()
        for check in checks_of(method)
    ]


@pytest.fixture(scope="module")
def material() -> Material:
    return digits()


@pytest.fixture(scope="module")
def round_trips(material: Material) -> dict[str, str]:
    """All learners in one fresh process: starting one takes seconds."""
    return after_round_trip(LEARNERS, material)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_of_the_catalogue_has_its_class(row: Method) -> None:
    assert find_spec(row.module) is not None, f"there is no module {row.module}"
    assert row.name in CLASSES, f"{row.module} has no class {row.name.split('.')[1]}"
    assert row.name in TINY, f"{row.name} has no tiny() to be checked with"


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in CLASSES], ids=lambda row: row.name)
def test_the_catalogue_agrees_with_the_class(row: Method) -> None:
    check_row(row)


@pytest.mark.parametrize(("name", "check"), _pairs())
def test_method(name: str, check: Check, material: Material, request: pytest.FixtureRequest) -> None:
    if check is check_round_trip:
        check_round_trip(TINY[name], material, request.getfixturevalue("round_trips")[name])
    else:
        check(TINY[name], material)
