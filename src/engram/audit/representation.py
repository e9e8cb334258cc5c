"""Does the representation still know what the outputs deny?

Kim, Cha, Kim: Are We Truly Forgetting? A Critical Re-examination of Machine Unlearning Evaluation Protocols.
Engineering Applications of Artificial Intelligence 167 (2026), arXiv 2503.06991.

Forget accuracy can reach zero by bending the last layer alone, while the encoder stays as it was. So features are
compared, on every table: linear CKA with retrained models, k-NN and linear-probe accuracy; retrained models among each
other say what to expect. CKA with the model before forgetting, beside the oracles' CKA with it, shows an encoder that
never moved. Which classes are forgotten matters: those that a downstream set needs (`top_related_classes`) tell more
than random ones.

CKA is the unbiased one of all rows at once. The published means over batches of 512 rows in a fixed order stand on a
floor: for independent Gaussian features of 2048 numbers they give 0.80. Published k-NN code runs the whole network, so
that its features are the class scores; `layer="logits"` does the same.

The paper's scores of agreement with retraining have no readable formula; proposed here, over pairs of a model and an
oracle: AGL = product over labelled tables of (1 - |gap of accuracy|), transfer tables left out; AGR = mean over tables
of CKA · (1 - |gap of k-NN accuracy|); H-LR = their harmonic mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engram.core.finding import MARGINS, Finding, Verdict
from engram.core.probe import Measured, Probe, Subject, compared, compared_pairwise, oracles_of
from engram.data.table import MISSING, Table, Target
from engram.engine.predict import accuracy, features, predict
from engram.engine.run import Run
from engram.errors import EngramError, unknown
from engram.stats.gaps import tug_of_war
from engram.stats.intervals import proportion
from engram.stats.knn import nearest, vote
from engram.stats.seeds import generator
from engram.stats.similarity import cka, harmonic_mean, representation_agreement

PARTS = 10  # of a delete-a-group jackknife
LEAST = 20  # labelled rows for k-NN and linear probes
LAYERS = ("features", "logits")
TRANSFER = "transfer"
BEFORE = "CKA with the model before forgetting"


@dataclass(kw_only=True, eq=False)
class Representation(Probe):
    """CKA and k-NN on every table, linear probes on those that no model was trained on (test and transfer); and with
    oracles the agreement of logits and of representations with theirs, as plain figures.

    `neighbours`: k of the cosine k-NN, by majority. `share`: of a table, what k-NN and linear probes are judged on.
    `limit`: rows of a table that are looked at (drawn by seed). `layer`: "features", before the head, or "logits".
    Cost: one forward pass per model and table; CKA O(n d²); k-NN O(n² d).
    """

    neighbours: int = 5
    share: float = 0.2
    limit: int = 2000
    layer: str = "features"
    oracles: int = 5
    margin: float = MARGINS["CKA"]
    accuracy_margin: float = MARGINS["accuracy"]

    asks: ClassVar[frozenset[str]] = frozenset({"model"})

    @classmethod
    def tiny(cls) -> Representation:
        """A setting for checks on a handful of rows."""
        return cls(oracles=2, neighbours=1)

    def check(self, subject: Subject) -> None:
        """EngramError for what is not at hand, and for an unknown layer."""
        super().check(subject)
        if self.layer not in LAYERS:
            raise unknown("layer", self.layer, LAYERS)

    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        self.check(subject)
        run = run or Run()
        sets = [_Set(name, table, self, run) for name, table in subject.rows.items() if len(table) >= 4]
        oracles = oracles_of(subject, self.oracles, run)
        found = [finding for one in sets for finding in self._of_set(one, subject, oracles)]
        return [*found, *_agreements(sets, subject.model, oracles)]

    def _of_set(self, one: _Set, subject: Subject, oracles: Sequence[nn.Module]) -> list[Finding]:
        found, model, before = [], subject.model, subject.before
        alike: dict[str, Any] = {"n": len(one.table), "unit": "CKA", "margin": self.margin}
        if one.constant(model):
            alike["protocol"] = {"features": "the same for all rows, and constant features have no CKA"}

        def similarity(m: nn.Module, others: Sequence[nn.Module]) -> Measured:
            return one.similarity(m, others, interval=m is model)  # nobody asks for those of the oracles

        if oracles:
            title = f"CKA with retrained models on {one.name} rows"
            found.append(compared_pairwise(title, similarity, model, oracles, **alike))
        if before is not None:
            title = f"{BEFORE} on {one.name} rows"
            found.append(compared(title, lambda m: similarity(m, [before]), model, oracles, **alike))
        judged: dict[str, Any] = {"n": len(one.held), "unit": "accuracy", "margin": self.accuracy_margin}
        for title, measure in one.transfers():
            found.append(compared(f"{title} on features of {one.name} rows", measure, model, oracles, **judged))
        return found


class Reading(StrEnum):
    """What the findings of `Representation` come to."""

    REMEMBERED = "remembered"
    DESTROYED = "destroyed"
    DIFFERENT = "different from retraining"
    RETRAINED = "as after retraining"
    UNDECIDED = "undecided"


def reading(findings: Sequence[Finding]) -> Reading:
    """The verdicts of `Representation`'s findings in one word; it rests on these verdicts alone.

    remembered: nearer to the model before forgetting than retrained models are, or better at k-NN or linear probes.
    destroyed: not that, but worse at k-NN or linear probes. different: some other finding fails. as after retraining:
    all pass. undecided: none fails, some cannot be decided, or there are none.
    """
    judged = [finding for finding in findings if finding.margin is not None]
    failed = [finding for finding in judged if finding.verdict == Verdict.FAIL]
    above = {f.name: f.value > fmean(f.reference) for f in failed if f.unit == "accuracy" or f.name.startswith(BEFORE)}
    if any(above.values()):
        return Reading.REMEMBERED
    if any(not above.get(finding.name, True) for finding in failed if finding.unit == "accuracy"):
        return Reading.DESTROYED
    if failed:
        return Reading.DIFFERENT
    passed = bool(judged) and all(finding.verdict == Verdict.PASS for finding in judged)
    return Reading.RETRAINED if passed else Reading.UNDECIDED


def top_related_classes(model: nn.Module, table: Table, k: int, run: Run | None = None) -> tuple[int, ...]:
    """The k classes that a model's mean softmax over the rows of a downstream set is largest for, largest first.

    The paper names no rule of ranking; this one is ours. Equal classes in order of their ids. EngramError where the
    model has fewer than k live classes, or the table no rows.
    """
    logits = predict(model, table, run=run).double()
    if not len(logits):
        raise EngramError("no class is related to a table without rows; give rows of the downstream set")
    live = int((~logits.isneginf()).any(0).sum())
    if not 1 <= k <= live:
        raise EngramError(f"the model has {live} live classes; ask for 1 to {live} related ones, not {k}")
    order = torch.softmax(logits, 1).mean(0).sort(descending=True, stable=True).indices
    return tuple(order[:k].tolist())


class _Set:
    """What models make of one table, each of them looked at once."""

    def __init__(self, name: str, table: Table, plan: Representation, run: Run) -> None:
        self.name, self.plan, self.run = name, plan, run
        self.table = _some(table, plan.limit, generator(run.seed, "rows to look at", name))
        self.known: dict[tuple[str, tuple[int, ...]], Any] = {}
        self.rows = _labelled(self.table)
        order = torch.randperm(len(self.rows), generator=generator(run.seed, "transfer split", name))
        self.held, self.bank = order.tensor_split([max(1, int(plan.share * len(order)))])

    def similarity(self, model: nn.Module, others: Sequence[nn.Module], *, interval: bool) -> Measured:
        """Mean unbiased CKA with the others; the interval is by a jackknife over ten groups of rows, or of no width."""
        value = fmean(self.cka(model, other) for other in others)
        half = self._half_width(model, others) if interval else 0.0
        return value, (value - half, value + half)

    def cka(self, model: nn.Module, other: nn.Module) -> float:
        """Of two models, in whichever order."""
        return self._once("CKA", lambda: cka(self._features(model), self._features(other)), model, other)

    def _half_width(self, model: nn.Module, others: Sequence[nn.Module]) -> float:
        x, ys = self._features(model), [self._features(other) for other in others]
        parts = min(PARTS, len(x) // 4)
        if parts < 2:
            return 1.0
        group = torch.arange(len(x)) % parts
        kept = [group != k for k in range(parts)]
        left_out = torch.tensor([fmean(cka(x[rows], y[rows]) for y in ys) for rows in kept]).double()
        return 1.96 * float(((parts - 1) * left_out.var(correction=0)).sqrt())

    def transfers(self) -> list[tuple[str, Callable[[nn.Module], Measured]]]:
        """The measures by fitting one part of the rows and judging the other, as far as the rows allow."""
        if not self.transfer:
            return []
        linear = [("linear probe", self.linear)] if self.name.startswith(("test", TRANSFER)) else []
        return [(f"{self.plan.neighbours}-NN", self.knn), *linear]

    @property
    def transfer(self) -> bool:
        """Whether there are labelled rows enough, of two classes or more."""
        return len(self.rows) >= LEAST and len(self.labels[self.bank].unique()) > 1

    @property
    def labels(self) -> Tensor:
        """Classes of the labelled rows."""
        assert self.table.labels is not None
        return self.table.labels[self.rows]

    def knn(self, model: nn.Module) -> Measured:
        """Share of the held rows that get their class from the majority of their nearest neighbours."""
        return self._once("k-NN", lambda: self._knn(model), model)

    def linear(self, model: nn.Module) -> Measured:
        """The same by softmax regression on standardised features."""
        return self._once("linear", lambda: self._linear(model), model)

    def accuracy(self, model: nn.Module) -> float:
        """By the model's own head, on the labelled rows."""
        return self._once("accuracy", lambda: accuracy(model, self.table.take(self.rows), run=self.run), model)

    def pair(self, model: nn.Module, other: nn.Module) -> tuple[float, float]:
        """CKA of two models, and the gap of their k-NN accuracies (0 where there is none)."""
        return self.cka(model, other), self.knn(model)[0] - self.knn(other)[0] if self.transfer else 0.0

    def _knn(self, model: nn.Module) -> Measured:
        x, labels = self._features(model)[self.rows], self.labels
        values, index = nearest(x[self.held], x[self.bank], min(self.plan.neighbours, len(self.bank)))
        votes = vote(labels[self.bank][index], values, int(labels.max()) + 1)
        return _right(votes.argmax(1) == labels[self.held])

    def _linear(self, model: nn.Module) -> Measured:
        from engram.stats.linear import logistic

        x, labels = self._features(model)[self.rows], self.labels
        x = (x - x[self.bank].mean(0)) / x[self.bank].std(0).clamp(min=1e-6)
        fitted = logistic(x[self.bank], labels[self.bank])
        scores = x[self.held] @ fitted.weight + fitted.bias
        return _right(fitted.classes[scores.argmax(1)] == labels[self.held])

    def _features(self, model: nn.Module) -> Tensor:
        """[n, d] float64."""
        return self._once("features", lambda: self._look(model), model)

    def constant(self, model: nn.Module) -> bool:
        """Whether all rows have the same features."""
        x = self._features(model)
        return bool((x == x[:1]).all())

    def _look(self, model: nn.Module) -> Tensor:
        if self.plan.layer == "features":
            return features(model, self.table, run=self.run).double()
        logits = predict(model, self.table, run=self.run).double()
        return logits[:, logits.isfinite().all(0)]  # retired classes have no scores

    def _once(self, what: str, make: Callable[[], Any], *models: nn.Module) -> Any:
        key = (what, tuple(sorted(map(id, models))))  # the models outlive the set
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]


def _agreements(sets: Sequence[_Set], model: nn.Module, oracles: Sequence[nn.Module]) -> list[Finding]:
    """AGL, AGR and H-LR of a model with the oracles, beside those of each oracle with the other ones."""
    splits = [one for one in sets if len(one.rows) and not one.name.startswith(TRANSFER)]
    if not oracles or not splits:
        return []

    def logits(m: nn.Module, others: Sequence[nn.Module]) -> float:
        return fmean(tug_of_war([one.accuracy(m) - one.accuracy(other) for one in splits]) for other in others)

    def inner(m: nn.Module, others: Sequence[nn.Module]) -> float:
        pairs = ([one.pair(m, other) for one in sets] for other in others)
        return fmean(representation_agreement([c for c, _ in found], [gap for _, gap in found]) for found in pairs)

    measures = {
        "agreement of logits with retrained models": logits,
        "agreement of representations with retrained models": inner,
        "harmonic mean of both agreements": lambda m, others: harmonic_mean(logits(m, others), inner(m, others)),
    }
    rows = sum(len(one.table) for one in sets)
    rest = [(oracle, [other for other in oracles if other is not oracle]) for oracle in oracles]
    return [
        Finding(
            name,
            measure(model, oracles),
            rows,
            unit="agreement",
            better="higher",
            reference=tuple(measure(oracle, others) for oracle, others in rest if others),
            protocol={"formula": "engram's own; the published one is not readable"},
        )
        for name, measure in measures.items()
    ]


def _labelled(table: Table) -> Tensor:
    """The numbers [k] of the rows that have a class; none for other targets."""
    if table.target != Target.CLASSES or table.labels is None:
        return torch.zeros(0, dtype=torch.long)
    return (table.labels != MISSING).nonzero()[:, 0]


def _some(table: Table, limit: int, draws: torch.Generator) -> Table:
    """At most so many rows, drawn, in their order."""
    if len(table) <= limit:
        return table
    return table.take(torch.randperm(len(table), generator=draws)[:limit].sort().values)


def _right(mask: Tensor) -> Measured:
    found = proportion(int(mask.sum()), len(mask))
    return found.value, (found.low, found.high)
