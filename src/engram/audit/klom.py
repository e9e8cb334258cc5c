"""KLoM: how far the margins of unlearned models lie from those of retrained ones, row by row.

Georgiev, Rinberg, Park, Garg, Ilyas, Madry, Neel: Attribute-to-Delete: Machine Unlearning via Datamodel Matching.
ICLR 2025, arXiv 2410.23232.

For every row x the margins of N unlearned and of N retrained models, within ±100, are counted in 20 equal bins over the
range of both; KLoM(x) = KL(unlearned || retrained), the second one's shares at least 1e-5 where the first has any. Two
samples of one law do not give 0: the floor (retrained models against retrained ones, at the same N) is the reference.
Published code asks for KL(retrained || unlearned), `first="retrained"`: its numbers compare with that one alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np
from torch import Tensor

from engram.audit.populations import (
    CLIP,
    PopulationProbe,
    Populations,
    class_rows,
    confidences,
    over_rows,
    parted,
    populations,
)
from engram.core.finding import Finding
from engram.core.probe import Subject
from engram.data.table import Table
from engram.engine.run import Run
from engram.errors import unknown
from engram.stats.divergence import histogram_kl

LEAST_SHARE = 1e-5
KINDS = ("unlearned", "retrained")


@dataclass(kw_only=True, eq=False)
class KLoM(PopulationProbe):
    """Mean and 95th percentile of KLoM over the rows, in nats, on forget, retain and test rows.

    It examines the method rather than one model: `models` originals are trained on all rows and forget the request,
    and twice as many are retrained without it. `first`: which of both, "unlearned" or "retrained", the divergence is
    taken of. The published right edge is open; here it is closed. `margin` in nats.
    Intervals: bootstrap over the rows. EngramError for rows without class labels. Cost: 3 `models` trainings, `models`
    times forgetting; shared with ULiRA and ForgettingScore.
    """

    bins: int = 20
    first: str = "unlearned"
    margin: float = 0.1

    @classmethod
    def tiny(cls) -> KLoM:
        """A setting for checks on a handful of rows."""
        return cls(models=4, bins=3)

    def check(self, subject: Subject) -> None:
        """EngramError as of any probe of populations, and for an unknown direction."""
        super().check(subject)
        if self.first not in KINDS:
            raise unknown("side of the divergence", self.first, KINDS)

    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        run = run or Run()
        self.check(subject)
        tables = {name: class_rows(self, subject, name) for name in self.tables}
        made = populations(subject, self.models, run)
        return [finding for name, table in tables.items() for finding in self._of(name, table, made, run)]

    def _of(self, name: str, table: Table, made: Populations, run: Run) -> list[Finding]:
        unlearned, retrained = (confidences(models, table, run) for models in (made.unlearned, made.retrained))
        sides = unlearned, retrained[: len(unlearned)]
        rows = self._rows(*(sides if self.first == "unlearned" else sides[::-1]))
        floors = [self._rows(one, other) for one, other in parted(retrained, run)]
        found = []
        for title, statistic in (("mean KLoM", np.mean), ("95th percentile of KLoM", _most)):
            value, interval = over_rows(rows, statistic, run)
            floor = tuple(float(statistic(other.numpy())) for other in floors)
            common: dict[str, Any] = {"unit": "nats", "reference": floor, "margin": self.margin}
            protocol = self._protocol(len(unlearned), float(np.mean(floor)))
            found.append(Finding(f"{title} on {name} rows", value, len(table), interval, protocol=protocol, **common))
        return found

    def _rows(self, one: Tensor, other: Tensor) -> Tensor:
        return histogram_kl(one, other, bins=self.bins, clip=CLIP, floor=LEAST_SHARE)

    def _protocol(self, n: int, floor: float) -> dict[str, Any]:
        return {
            "direction": f"KL({self.first} || {KINDS[1 - KINDS.index(self.first)]})",
            "models of each kind": n,
            "bins": self.bins,
            "right edge": "closed",
            "floor, retrained against retrained models": round(floor, 4),
            "ceiling": round(log(1 / LEAST_SHARE), 2),
        }


def _most(x: np.ndarray) -> float:
    return float(np.quantile(x, 0.95))
