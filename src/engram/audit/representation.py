"""Does the representation still know what the outputs deny?

Kim, Cha, Kim: Are We Truly Forgetting? A Critical Re-examination of Machine Unlearning Evaluation Protocols.
Engineering Applications of Artificial Intelligence 167 (2026), arXiv 2503.06991.

Forget accuracy can reach zero by bending the last layer alone, while the encoder stays as it was. So features are
compared: linear CKA with retrained models on the full matrix (averages over small batches stand on a high floor), k-NN
and linear-probe accuracy on them; retrained models among each other say what to expect. CKA with the model before
forgetting, beside the oracles' CKA with it, shows an encoder that never moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engram.core.finding import MARGINS, Finding
from engram.core.probe import Measured, Probe, Subject, compared, compared_pairwise, labelled, oracles_of
from engram.data.table import Table, Target
from engram.engine.predict import features
from engram.engine.run import Run
from engram.stats.intervals import proportion
from engram.stats.knn import nearest, vote
from engram.stats.seeds import generator
from engram.stats.similarity import cka

PARTS = 10  # of a delete-a-group jackknife


@dataclass(kw_only=True, eq=False)
class Representation(Probe):
    """CKA on all rows; k-NN and linear-probe transfer on the test rows and on every "transfer/…" table.

    `neighbours`: k of the cosine k-NN. `share`: of a table, what the probes are judged on. `limit`: rows of a table
    that are looked at (drawn by seed). Cost: one forward pass per model and table; CKA O(n d²).
    """

    neighbours: int = 5
    share: float = 0.2
    limit: int = 2000
    oracles: int = 5
    margin: float = MARGINS["CKA"]
    accuracy_margin: float = MARGINS["accuracy"]

    asks: ClassVar[frozenset[str]] = frozenset({"model"})

    @classmethod
    def tiny(cls) -> Representation:
        """A setting for checks on a handful of rows."""
        return cls(oracles=2, neighbours=1)

    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        run = run or Run()
        tables = {name: self._some(table, name, run) for name, table in subject.rows.items() if len(table) >= 4}
        oracles = oracles_of(subject, self.oracles, run)
        look = _Look(run)
        found: list[Finding] = []
        for name, table in tables.items():
            found += self._similarity(name, table, subject, oracles, look)
            known = labelled(table)
            if known.target == Target.CLASSES and len(known) >= 20 and (name == "test" or name.startswith("transfer")):
                found += self._transfer(name, known, subject.model, oracles, look, run)
        return found

    def _similarity(
        self, name: str, table: Table, subject: Subject, oracles: Sequence[nn.Module], look: _Look
    ) -> list[Finding]:
        common: dict[str, Any] = {"n": len(table), "unit": "CKA", "margin": self.margin}

        def to_oracles(model: nn.Module, others: Sequence[nn.Module]) -> Measured:
            return _cka([(look(model, table), look(other, table)) for other in others])

        found = []
        if oracles:
            title = f"CKA with retrained models on {name} rows"
            found.append(compared_pairwise(title, to_oracles, subject.model, oracles, **common))
        if subject.before is not None:
            old = look(subject.before, table)
            title = f"CKA with the model before forgetting on {name} rows"
            found.append(compared(title, lambda m: _cka([(look(m, table), old)]), subject.model, oracles, **common))
        return found

    def _transfer(
        self, name: str, table: Table, model: nn.Module, oracles: Sequence[nn.Module], look: _Look, run: Run
    ) -> list[Finding]:
        """k-NN and linear probe, fitted on one part of the table's rows and judged on the other."""
        from engram.stats.linear import logistic

        order = torch.randperm(len(table), generator=generator(run.seed, "transfer split", name))
        held = order[: max(1, int(self.share * len(table)))]
        bank = order[len(held) :]
        assert table.labels is not None
        labels = table.labels

        def knn(m: nn.Module) -> Measured:
            x = look(m, table)
            values, index = nearest(x[held], x[bank], min(self.neighbours, len(bank)))
            return _right(vote(labels[bank][index], values, int(labels.max()) + 1).argmax(1) == labels[held])

        def linear(m: nn.Module) -> Measured:
            x = look(m, table).double()
            mean, sd = x[bank].mean(0), x[bank].std(0).clamp(min=1e-6)
            fitted = logistic((x[bank] - mean) / sd, labels[bank])
            scores = ((x[held] - mean) / sd) @ fitted.weight + (0.0 if fitted.bias is None else fitted.bias)
            return _right(fitted.classes[scores.argmax(1)] == labels[held])

        common: dict[str, Any] = {"n": len(held), "unit": "accuracy", "margin": self.accuracy_margin}
        found = [compared(f"{self.neighbours}-NN on features of {name} rows", knn, model, oracles, **common)]
        if len(labels[bank].unique()) > 1:
            found.append(compared(f"linear probe on features of {name} rows", linear, model, oracles, **common))
        return found

    def _some(self, table: Table, name: str, run: Run) -> Table:
        if len(table) <= self.limit:
            return table
        order = torch.randperm(len(table), generator=generator(run.seed, "rows to look at", name))
        return table.take(order[: self.limit].sort().values)


class _Look:
    """Features of a model on a table, computed once."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.known: dict[tuple[int, int], Tensor] = {}
        self.alive: list[Any] = []

    def __call__(self, model: nn.Module, table: Table) -> Tensor:
        key = (id(model), id(table))
        if key not in self.known:
            self.known[key] = features(model, table, run=self.run).double()
            self.alive += [model, table]  # so that no other object gets their ids
        return self.known[key]


def _cka(pairs: Sequence[tuple[Tensor, Tensor]]) -> Measured:
    """Mean unbiased CKA over pairs, with a jackknife interval over ten groups of rows."""
    n = len(pairs[0][0])
    value = sum(cka(x, y) for x, y in pairs) / len(pairs)
    parts = min(PARTS, n // 4)
    if parts < 2:
        return value, (value - 1, value + 1)
    group = torch.arange(n) % parts
    left_out = torch.tensor(
        [sum(cka(x[group != g], y[group != g]) for x, y in pairs) / len(pairs) for g in range(parts)]
    ).double()
    half = 1.96 * float(((parts - 1) * left_out.var(correction=0)).sqrt())
    return value, (value - half, value + half)


def _right(mask: Tensor) -> Measured:
    found = proportion(int(mask.sum()), len(mask))
    return found.value, (found.low, found.high)
