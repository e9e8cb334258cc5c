"""Can the vectors that an old encoder has stored be searched with those of the new one?

Shen, Xiong, Xia, Soatto: Towards Backward-Compatible Representation Learning. CVPR 2020, arXiv 2003.11942; protocol of
Zhou et al.: BT². ICCV 2023, arXiv 2211.03989.

Three tests, written query/gallery: old/old is what there is, new/old is searching with new queries in what is stored,
new/new is what encoding everything anew would bring. Each gives the share of queries with a row of their class among
the first 1 and 5, and the mean average precision. An upgrade is backward-compatible when new/old is above old/old.

Vectors are what comes before the head, at unit length. Those of different widths are cut to the smaller one, without
bringing them to unit length again, as in published code. A query is not ranked against itself: the row of its id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.core.finding import Finding, figure
from engram.core.probe import Probe, Subject, labelled
from engram.core.settings import name_of
from engram.data.table import Table, Target
from engram.engine.predict import features
from engram.engine.run import Run
from engram.errors import EngramError
from engram.stats.intervals import mean, proportion
from engram.stats.ranking import Ranking, cmc_map
from engram.stats.seeds import generator

FIRST = (1, 5)
INDEPENDENT = "independent"


@dataclass(kw_only=True, eq=False)
class Compatibility(Probe):
    """Retrieval by class, old/old, new/old and new/new, and how far new/old lies above old/old: plain figures.

    The old encoder is the subject's `before`, the new one its `model`. The test rows are queries and gallery at once;
    rows named "gallery", where there are some, are the gallery instead. With an independently trained model under the
    reference "independent", also the share of its gain that new/old realises (update gain) and what compatibility costs
    new/new (its price), both in mean average precision. `limit`: rows of a table that are looked at (drawn by seed).

    Queries whose class has no row in the gallery are left out. EngramError for rows without class labels. Cost: a
    forward pass of each encoder over queries and gallery, O(q g (d + log g)).
    """

    limit: int = 5000

    asks: ClassVar[frozenset[str]] = frozenset({"model", "before", "test"})

    @classmethod
    def tiny(cls) -> Compatibility:
        """A setting for checks on a handful of rows."""
        return cls(limit=20)

    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        self.check(subject)
        run = run or Run()
        search = self.search(subject, run)
        assert subject.before is not None
        old, new = search.encoded(subject.before), search.encoded(subject.model)
        tests = {"old/old": search(old, old), "new/old": search(new, old), "new/new": search(new, new)}
        alone = subject.references.get(INDEPENDENT)
        best = None if alone is None else search.encoded(alone)
        return [
            *(finding for name, ranking in tests.items() for finding in _figures(name, ranking)),
            _gain(tests["new/old"], tests["old/old"]),
            *([] if best is None else _price(search(best, best), tests)),
        ]

    def search(self, subject: Subject, run: Run) -> Search:
        """The queries and the gallery of a subject."""
        queries = self._rows(subject, "test", run)
        return Search(queries, self._rows(subject, "gallery", run) if "gallery" in subject.has() else queries, run)

    def _rows(self, subject: Subject, name: str, run: Run) -> Table:
        rows = subject.rows[name]
        if rows.target == Target.CLASSES:
            rows = labelled(rows)
        if rows.target != Target.CLASSES or len(rows) < 2:
            raise EngramError(f"{name_of(self)} wants 2 {name} rows or more with class labels: that says what is alike")
        draws = generator(run.seed, "compatibility", name)
        kept = torch.randperm(len(rows), generator=draws)[: self.limit].sort().values
        return rows if len(rows) <= self.limit else rows.take(kept)


@dataclass(frozen=True)
class Search:
    """Queries and a gallery, which may be the same rows."""

    queries: Table
    gallery: Table
    run: Run

    def encoded(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Vectors of the queries [q, d] and of the gallery [g, d], at unit length, float64."""
        queries = self._vectors(model, self.queries)
        return queries, queries if self.gallery is self.queries else self._vectors(model, self.gallery)

    def __call__(self, asking: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor]) -> Ranking:
        """Queries of one encoder in the gallery of another."""
        x, y = asking[0], stored[1]
        width = min(x.shape[1], y.shape[1])
        labels = [torch.as_tensor(table.labels) for table in (self.queries, self.gallery)]
        places = self.gallery.positions
        own = torch.tensor([places.get(id, -1) for id in self.queries.ids])
        return cmc_map(1 - x[:, :width] @ y[:, :width].T, *labels, ks=FIRST, drop_self=own)

    def _vectors(self, model: nn.Module, table: Table) -> Tensor:
        return F.normalize(features(model, table, run=self.run).double(), dim=1)


def _figures(name: str, ranking: Ranking) -> list[Finding]:
    n = len(ranking.average_precision)
    found = []
    for k in FIRST:
        share = proportion(round(ranking.cmc[k] * n), n)
        found.append(
            figure(f"{name}: right among the first {k}", share.value, n, "share", interval=(share.low, share.high))
        )
    precise = mean(ranking.average_precision) if n > 1 else None
    interval = None if precise is None else (precise.low, precise.high)
    return [*found, figure(f"{name}: mean average precision", ranking.map, n, "mAP", interval=interval)]


def _gain(new: Ranking, old: Ranking) -> Finding:
    """Query by query: the same ones count in both."""
    apart = mean(new.average_precision - old.average_precision)
    interval = (apart.low, apart.high) if apart.n > 1 else None
    return figure("new/old above old/old", apart.value, apart.n, "mAP", interval=interval, better="higher")


def _price(best: Ranking, tests: dict[str, Ranking]) -> list[Finding]:
    n = len(best.average_precision)
    found = [figure("price of compatibility", best.map - tests["new/new"].map, n, "mAP", better="lower")]
    room = best.map - tests["old/old"].map
    if room > 0:  # there is something to gain
        share = (tests["new/old"].map - tests["old/old"].map) / room
        found.append(figure("update gain", share, n, "share of the independent model's gain", better="higher"))
    return found
