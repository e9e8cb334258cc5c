"""Accuracy on the rows that stay, on those that went, and on test rows, beside retrained models.

RA, FA and TA of the unlearning literature are the accuracies on retain, forget and test rows. None of them has an ideal
value of its own: what is right is what models score that never saw the forget rows. A forget accuracy far below theirs
is as telling as one far above.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from engram.core.finding import MARGINS, Finding
from engram.core.probe import Measured, Probe, Subject, compared, labelled, oracles_of
from engram.data.table import Table, Target
from engram.engine.predict import hits, predict
from engram.engine.run import Run
from engram.stats.intervals import mean, proportion


@dataclass(kw_only=True, eq=False)
class Accuracy(Probe):
    """One finding per table of the subject: the share of rows whose label wins, with a Wilson interval; for numbers,
    the mean squared error with a t interval, as a plain figure (a margin depends on the unit).

    `rows`: names of tables; None takes all that have labels. `oracles`: how many retrained models to compare with.
    Cost: one forward pass over the tables for the model and for each oracle.
    """

    rows: tuple[str, ...] | None = None
    oracles: int = 5
    margin: float = MARGINS["accuracy"]

    asks: ClassVar[frozenset[str]] = frozenset({"model"})

    @classmethod
    def tiny(cls) -> Accuracy:
        """A setting for checks on a handful of rows."""
        return cls(oracles=2)

    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        run = run or Run()
        tables = {
            name: labelled(table) for name, table in subject.rows.items() if self.rows is None or name in self.rows
        }
        usable = {name: table for name, table in tables.items() if len(table) and table.target != Target.TOKENS}
        oracles = oracles_of(subject, self.oracles, run) if usable else []
        return [self._finding(name, table, subject.model, oracles, run) for name, table in usable.items()]

    def _finding(self, name: str, table: Table, model: nn.Module, oracles: list[nn.Module], run: Run) -> Finding:
        if table.target == Target.NUMBERS:
            error = mean(predict(model, table, "loss", run=run).double())
            return Finding(
                f"squared error on {name} rows", error.value, len(table), (error.low, error.high), "lower", ""
            )
        return compared(
            f"accuracy on {name} rows",
            lambda m: _share(m, table, run),
            model,
            oracles,
            n=len(table),
            margin=self.margin,
        )


def _share(model: nn.Module, table: Table, run: Run) -> Measured:
    found = proportion(int(hits(model, table, run=run).sum()), len(table))
    return found.value, (found.low, found.high)
