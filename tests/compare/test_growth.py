"""What learners hold grows as they declare."""

from __future__ import annotations

import pytest

from engram import catalogue
from engram.compare.growth import IMAGES, OF_IMAGES, ROWS, TOLERANCE, Held, excess, follow
from engram.core.settings import load_class
from engram.errors import EngramError

LEARNERS = [row.name for row in catalogue.methods() if row.wing == "keep"]


@pytest.mark.parametrize("name", LEARNERS)
def test_bytes_grow_as_declared(name: str) -> None:
    learner = load_class(name).tiny()  # type: ignore[attr-defined]
    if name == "keep.LingoCL":  # its own has names for ten classes
        learner = type(learner)(host=learner.host, encoder="random", width=32)
    curve = follow(learner, 12, inputs=IMAGES if name in OF_IMAGES else ROWS)
    assert excess(learner.growth, curve) <= TOLERANCE


def test_the_excess_is_what_the_terms_do_not_explain() -> None:
    flat = [Held(k, 2 * k, k * k, 1000) for k in range(1, 11)]
    assert excess("flat", flat) < 1e-12
    rows = [Held(k, 2 * k, k * k, 1000 + 5 * k * k) for k in range(1, 11)]
    assert excess("per row", rows) == pytest.approx(0, abs=1e-12) and excess("per task", rows) > 0.01
    with pytest.raises(EngramError, match="per class"):
        excess("per clas", rows)
