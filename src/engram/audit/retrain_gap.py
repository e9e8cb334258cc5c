"""The distance to retraining: accuracy gaps, outputs on the forget rows, and one product of all.

A retrained model differs from other retrained models too. Every measure of how far the model is from the oracles stands
beside the same measure of each oracle against the other ones: that is what "no farther than retraining" means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from engram.core.finding import MARGINS, Finding
from engram.core.probe import Measured, Probe, Subject, compared_pairwise, labelled, oracles_of
from engram.core.settings import name_of
from engram.data.table import Table, Target
from engram.engine.predict import hits, predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.stats.divergence import js
from engram.stats.gaps import mean_gap, tug_of_war
from engram.stats.intervals import mean

TABLES = ("forget", "retain", "test")


@dataclass(kw_only=True, eq=False)
class RetrainGap(Probe):
    """Mean gap of the accuracies on forget, retain and test rows; the tug-of-war product of (1 - gap); on forget rows
    the activation distance (L2 between softmax outputs) and the Jensen-Shannon divergence, in nats.

    `oracles`: how many; two or more are needed to say anything. EngramError for rows without class labels. Cost: one
    forward pass over all rows per model.
    """

    oracles: int = 5
    margin: float = MARGINS["accuracy"]
    distance_margin: float = MARGINS["distance"]

    asks: ClassVar[frozenset[str]] = frozenset({"model", "forget", "retain", "test", "oracles"})

    @classmethod
    def tiny(cls) -> RetrainGap:
        """A setting for checks on a handful of rows."""
        return cls(oracles=2)

    def check(self, subject: Subject) -> None:
        """EngramError for what is not at hand, and for rows without class labels."""
        super().check(subject)
        for name in TABLES:
            table = labelled(subject.rows[name])
            if not len(table):
                raise EngramError(f"{name_of(self)} needs class labels, and no {name} row has one")
            if table.target != Target.CLASSES:
                raise EngramError(
                    f"{name_of(self)} is for classifiers, and the labels of the {name} rows are {table.target}"
                )

    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        self.check(subject)
        run = run or Run()
        tables = {name: labelled(subject.rows[name]) for name in TABLES}
        models = [subject.model, *oracles_of(subject, self.oracles, run)]
        known = {id(model): _Outputs(model, tables, run) for model in models}
        forget, everything = len(tables["forget"]), min(map(len, tables.values()))

        def gap(model: nn.Module, others: Sequence[nn.Module]) -> Measured:
            gaps = [known[id(model)].gaps(known[id(other)]) for other in others]
            return _over([mean_gap(g) for g in gaps], known[id(model)].half_width)

        def tug(model: nn.Module, others: Sequence[nn.Module]) -> Measured:
            return _over([tug_of_war(known[id(model)].gaps(known[id(o)])) for o in others], known[id(model)].half_width)

        def distance(model: nn.Module, others: Sequence[nn.Module]) -> Measured:
            return _mean_row([_l2(known[id(model)].chances, known[id(other)].chances) for other in others])

        def divergence(model: nn.Module, others: Sequence[nn.Module]) -> Measured:
            return _mean_row([js(*_alike(known[id(model)].chances, known[id(other)].chances)) for other in others])

        measures = [
            ("mean accuracy gap", gap, everything, "accuracy", self.margin, "lower"),
            ("tug of war", tug, everything, "product", self.margin, "higher"),
            ("activation distance on forget rows", distance, forget, "distance", self.distance_margin, "lower"),
            ("Jensen-Shannon divergence on forget rows", divergence, forget, "nats", self.distance_margin, "lower"),
        ]
        return [
            compared_pairwise(
                name,
                measure,
                models[0],
                models[1:],
                n=n,
                unit=unit,
                margin=margin,
                protocol={"smaller or larger": better},
            )
            for name, measure, n, unit, margin, better in measures
        ]


class _Outputs:
    """What one model says: accuracies by table, and its probabilities on the forget rows."""

    def __init__(self, model: nn.Module, tables: Mapping[str, Table], run: Run) -> None:
        right = {name: hits(model, table, run=run).double() for name, table in tables.items()}
        self.accuracy = {name: float(found.mean()) for name, found in right.items()}
        variance = sum(float(found.var(correction=0)) / len(found) for found in right.values())
        self.half_width = 1.96 * variance**0.5 / len(right)
        self.chances = torch.softmax(predict(model, tables["forget"], run=run).double(), 1).nan_to_num()

    def gaps(self, other: _Outputs) -> list[float]:
        return [abs(self.accuracy[name] - other.accuracy[name]) for name in self.accuracy]


def _over(values: Sequence[float], half: float) -> Measured:
    value = sum(values) / len(values)
    return value, (value - half, value + half)


def _mean_row(found: Sequence[Tensor]) -> Measured:
    estimate = mean(torch.stack(list(found)).mean(0))
    return estimate.value, (estimate.low, estimate.high)


def _l2(p: Tensor, q: Tensor) -> Tensor:
    p, q = _alike(p, q)
    return (p - q).norm(dim=1)


def _alike(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the same number of classes: a class that one of them never heard of has probability 0."""
    width = max(p.shape[1], q.shape[1])
    p, q = (torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (p, q))
    return p, q
