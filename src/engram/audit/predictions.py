"""Do predictions on the forget rows spread as those of retrained models do? The W1 distance, for regressors above all.

Tarun, Chundawat, Mandal, Kankanhalli: Deep Regression Unlearning. ICML 2023, arXiv 2210.08196.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from engram.audit.populations import LEAST, over_rows
from engram.core.finding import Finding
from engram.core.probe import Measured, Probe, Subject, compared_pairwise, oracles_of
from engram.core.settings import name_of
from engram.data.table import Table, Target
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.errors import EngramError


@dataclass(kw_only=True, eq=False)
class Predictions(Probe):
    """Wasserstein-1 distance between the predictions on the forget rows and those of retrained models, the mean over
    these and over the columns; beside it, that of every retrained model from the other ones.

    For numbers in their own unit; for classes, the columns are the probabilities. `margin`: a share of the standard
    deviation of the retrained models' predictions. It compares what is predicted, not for which row. Interval:
    bootstrap over the rows. EngramError for token rows. Cost: one forward pass over the forget rows per model.
    """

    oracles: int = 5
    margin: float = 0.05

    asks: ClassVar[frozenset[str]] = frozenset({"model", "forget", "oracles"})

    @classmethod
    def tiny(cls) -> Predictions:
        """A setting for checks on a handful of rows."""
        return cls(oracles=2)

    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        self.check(subject)
        run = run or Run()
        forget = subject.rows["forget"]
        if forget.target == Target.TOKENS or len(forget) < LEAST:
            raise EngramError(f"{name_of(self)} wants {LEAST} forget rows or more whose labels are numbers or classes")
        oracles = oracles_of(subject, self.oracles, run)
        models = [subject.model, *oracles]
        classes = any(table.target == Target.CLASSES for table in subject.rows.values())
        said = _alike([_said(model, forget, classes, run) for model in models])
        known = dict(zip(map(id, models), said, strict=True))
        unit = torch.cat([known[id(oracle)] for oracle in oracles]).std(0).mean().item()

        def distance(model: nn.Module, others: Sequence[nn.Module]) -> Measured:
            return over_rows(torch.stack([known[id(one)] for one in (model, *others)], 1), _apart, run)

        return [
            compared_pairwise(
                "W1 distance of predictions on forget rows",
                distance,
                subject.model,
                oracles,
                n=len(forget),
                unit="probability" if classes else "unit of the prediction",
                margin=self.margin * unit,
                protocol={"margin, in standard deviations of retrained predictions": self.margin},
            )
        ]


def _said(model: nn.Module, table: Table, classes: bool, run: Run) -> Tensor:
    """Predictions [n, k] float64: class probabilities, or numbers."""
    said = predict(model, table, run=run).double()
    return torch.softmax(said, 1).nan_to_num() if classes else said.reshape(len(said), -1)


def _alike(said: Sequence[Tensor]) -> list[Tensor]:
    """All with as many columns: a class that a model never heard of has probability 0."""
    width = max(x.shape[1] for x in said)
    return [nn.functional.pad(x, (0, width - x.shape[1])) for x in said]


def _apart(said: np.ndarray) -> float:
    """The mean W1 between the first model's columns and every other one's, from [n, models, k].

    Between equally many rows, W1 is the mean distance of the sorted values.
    """
    x = np.sort(said, axis=0)
    return float(np.abs(x[:, 1:] - x[:, :1]).mean())
