"""Claims of papers as small experiments: what the paper says, what is expected here, what was measured.

A module `reproduce/SLUG.py` (hyphens as underscores) gives `claims(seeds) -> list[Claim]`. Bands come from the paper or
from an independent check of the method on the same data, and stand in the file before anything is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from engram import catalogue
from engram.errors import EngramError

SEEDS = {"smoke": 1, "small": 3, "full": 5}


@dataclass(frozen=True)
class Claim:
    """`says`: the claim. `paper`: the paper's figure, in words. `band`: where the mean over seeds is expected here,
    ends included. `values`: what was measured, one value per seed."""

    says: str
    paper: str
    band: tuple[float, float]
    values: tuple[float, ...] = field(default_factory=tuple)

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return sum(self.values) / len(self.values)

    @property
    def half_width(self) -> float:
        """Half of the 95 % t interval over seeds; NaN for one seed."""
        if len(self.values) < 2:
            return math.nan
        from engram.stats.intervals import mean

        found = mean(self.values)
        return (found.high - found.low) / 2

    @property
    def inside(self) -> bool:
        """Does the mean lie within the band?"""
        return self.band[0] <= self.mean <= self.band[1]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "claim": self.says,
            "paper": self.paper,
            "band": list(self.band),
            "values": list(self.values),
            "inside": self.inside,
        }


def reproduce(slug: str, scale: str = "small") -> list[Claim]:
    """A paper's claims, measured. `scale`: smoke (1 seed), small (3), full (5).

    EngramError for a paper that has no experiment.
    """
    catalogue.paper(slug)
    name = f"engram.reproduce.{slug.replace('-', '_')}"
    if find_spec(name) is None:
        have = ", ".join(paper.slug for paper in catalogue.papers() if _exists(paper.slug))
        raise EngramError(f"there is no experiment for {slug!r} yet; there are: {have}")
    return list(import_module(name).claims(range(SEEDS[scale])))


def table(slug: str, scale: str, claims: Sequence[Claim]) -> str:
    """The claims as text."""
    paper = catalogue.paper(slug)
    lines = [f"{paper.title} (arXiv {paper.arxiv}), {SEEDS[scale]} seed(s), CPU"]
    for claim in claims:
        around = "" if math.isnan(claim.half_width) else f" ± {claim.half_width:.3g}"
        verdict = "inside: holds here" if claim.inside else "OUTSIDE: does not hold here"
        lines += [
            f"- {claim.says}",
            f"    paper: {claim.paper}",
            f"    expected {claim.band[0]:g} to {claim.band[1]:g}, measured {claim.mean:.4g}{around}  {verdict}",
        ]
    return "\n".join(lines)


def _exists(slug: str) -> bool:
    return find_spec(f"engram.reproduce.{slug.replace('-', '_')}") is not None
