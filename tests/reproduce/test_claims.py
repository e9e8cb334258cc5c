"""Every experiment runs at its smallest size, and says what it measured."""

from __future__ import annotations

import math

import pytest

from engram import catalogue
from engram.reproduce.claims import Claim, reproduce, table

OUTSIDE = {
    "rehearsal-free": {"final accuracy of prediction distillation, sigmoid head"},
    "deep-regression-unlearning": {  # holds on the mean of three seeds or five, not at every one
        "how much farther Blindspot's forget error is from that of retrained models than the next best method's"
    },
}  # does not hold here, and is said
HAVE = [
    "nmc-baseline",
    "fetril",
    "acu",
    "ssd",
    "laf",
    "npo",
    "rehearsal-free",
    "discrete-key-value-bottleneck",
    "are-we-truly-forgetting",
    "deep-regression-unlearning",
    "datamodel-matching",
]


@pytest.mark.parametrize("slug", HAVE)
def test_smoke(slug: str) -> None:
    claims = reproduce(slug, "smoke")
    assert claims
    outside = {claim.says for claim in claims if not claim.inside}
    assert outside <= OUTSIDE.get(slug, set())
    text = table(slug, "smoke", claims)
    assert all(claim.says in text for claim in claims)


def test_every_paper_that_works_has_an_experiment() -> None:
    assert {paper.slug for paper in catalogue.papers() if paper.status.startswith("works")} <= set(HAVE)


def test_inside_is_the_mean_within_the_band() -> None:
    claim = Claim("x", "y", (0.0, 1.0), (0.5, 1.2))
    assert claim.inside and claim.mean == pytest.approx(0.85)
    assert not Claim("x", "y", (0.0, 0.8), (0.5, 1.2)).inside
    assert math.isnan(Claim("x", "y", (0, 1), (0.5,)).half_width)
    assert "OUTSIDE" in table("ssd", "small", [Claim("x", "y", (0.0, 0.8), (0.9, 0.9))])
