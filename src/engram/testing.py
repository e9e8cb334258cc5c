"""What the test suite of engram, and of methods that others add, is written with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def holds(slug: str, *items: int) -> Callable[[F], F]:
    """Mark a test as the proof of items of a paper's list "what must hold", counted from 1.

    Several papers' items may be proved by one test: apply the marker once for each paper.
    """

    def mark(test: F) -> F:
        proved = [*getattr(test, "__holds__", []), *((slug, item) for item in items)]
        test.__holds__ = proved  # type: ignore[attr-defined]
        return test

    return mark
