"""Forgotten by the outputs, remembered by the representation. On digits, each of them among eight others.

Every row is a digit, which is its label, beside eight more that mean nothing: an untrained encoder cannot tell which
digit counts, so that features must be learnt. Five classes are forgotten. The downstream set are test digits of the
same five classes among other eight; "unrelated" are the other five. Network and settings were looked for on seed 0, so
that an untrained encoder knows little and that forgetters leave nothing of the forgotten classes by accuracy. Bands are
those of the paper's statements: nothing left, or beyond the margin by which verdicts are given.

None of the four forgetters ruins the representation here. SalUn leaves the original farthest, and comes no nearer to
retrained models by it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from engram.audit.representation import BEFORE, Representation, top_related_classes
from engram.core.finding import MARGINS, Finding
from engram.core.forgetter import Forgetter, rows
from engram.core.probe import Subject
from engram.core.request import Request
from engram.data.table import Table
from engram.engine.optimizer import Optimizer
from engram.engine.predict import accuracy
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.forget.amnesiac import Amnesiac
from engram.forget.npo import NPO
from engram.forget.salun import SalUn
from engram.forget.scrub import SCRUB
from engram.reproduce.claims import Claim
from engram.reproduce.digits import digits
from engram.stats.seeds import generator
from engram.stats.similarity import cka

LINKED, UNRELATED = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)
OTHERS = 8
DOWNSTREAM = "transfer/linked"
SPLITS = ("forget", "retain", "test")
TABLES = (*SPLITS, "test-forget", DOWNSTREAM)
RECIPE = Recipe({"name": "MLP", "hidden": [128]}, Optimizer(lr=2e-3), 15, 128, classes=LINKED + UNRELATED)
FORGETTERS: Mapping[str, Forgetter] = {
    "random labels": Amnesiac(epochs=5),
    "SalUn": SalUn(optimizer=Optimizer("sgd", lr=0.05, weight_decay=5e-4), batch_size=64),
    "SCRUB": SCRUB(optimizer=Optimizer(lr=1e-3), msteps=4, batch_size=64),
    "NPO": NPO(optimizer=Optimizer(lr=1e-3), epochs=8, beta=0.5),
}
FORGET = f"{BEFORE} on forget rows"
KNN = "5-NN on features of {} rows"
LOGITS = "agreement of logits with retrained models"
INNER = "agreement of representations with retrained models"


def among_others(table: Table, name: str) -> Table:
    """Every digit followed by eight random rows of the same table: `values` [n, 9·64]."""
    digit = next(iter(table.inputs.values())).flatten(1)
    drawn = [torch.randint(0, len(table), (len(table),), generator=generator(name, k)) for k in range(OTHERS)]
    return Table({"values": torch.cat([digit, *(digit[index] for index in drawn)], 1)}, table.labels, table.ids)


def head_only(model: nn.Module, classes: Sequence[int]) -> nn.Module:
    """A copy whose head no longer has these classes; its encoder is untouched."""
    new = copy.deepcopy(model)
    new.head.retire(classes)  # type: ignore[union-attr,operator]
    return new


@dataclass(frozen=True)
class World:
    """`model`: before forgetting; it knows all ten classes. All retrained models are trained once."""

    run: Run
    probe: Representation
    train: Table
    test: Table
    downstream: Table
    model: nn.Module

    @classmethod
    def of(cls, seed: int, oracles: int = 5) -> World:
        train, test = digits()
        downstream = among_others(test, "downstream").of_classes(LINKED)
        train, test = among_others(train, "train"), among_others(test, "test")
        probe = Representation(oracles=oracles, share=0.4)
        return cls(Run(seed=seed), probe, train, test, downstream, RECIPE(train, seed))

    def with_probe(self, **changes: Any) -> World:
        """The same with other settings of the probe."""
        return replace(self, probe=replace(self.probe, **changes))

    def fresh(self) -> nn.Module:
        """A model that was never trained."""
        return RECIPE.start(self.train, self.run.with_seed(self.run.seed + 100))

    def request(self, classes: Sequence[int]) -> Request:
        """To forget these classes."""
        return Request.of_classes(self.train, tuple(classes))

    def subject(self, model: nn.Module, classes: Sequence[int]) -> Subject:
        """A model that should have forgotten these classes."""
        request, gone = self.request(classes), self.test.of_classes(classes)
        retain, test = rows(request.retain), self.test.without(gone.ids)
        tables = dict(zip(TABLES, (rows(request.forget), retain, test, gone, self.downstream), strict=True))
        return Subject(model, before=self.model, request=request, rows=tables, recipe=RECIPE)

    def examine(
        self, model: nn.Module, classes: Sequence[int] = LINKED, tables: Sequence[str] = TABLES
    ) -> dict[str, Finding]:
        """The findings about such a model on these tables (the retrained models need the retain rows), by name."""
        subject = self.subject(model, classes)
        few = replace(subject, rows={name: subject.rows[name] for name in tables})
        return {finding.name: finding for finding in self.probe.examine(few, self.run)}


def beyond(finding: Finding) -> float:
    """How far a value lies above the mean of the retrained models'."""
    return finding.value - fmean(finding.reference)


def claims(seeds: Iterable[int]) -> list[Claim]:
    """The audit of an edited head, of published forgetters, of an untrained and of a retrained model."""
    found = [_measured(seed) for seed in seeds]
    far = (MARGINS["CKA"], 1.0)
    says = "state-of-the-art methods ruin the representation or stay close to the original model"
    bands: dict[str, tuple[str, tuple[float, float]]] = {
        LEFT: ("0 by accuracy, with the last layer alone", (0.0, 0.0)),
        SAME: ("1: the encoder did not move", (1 - 1e-6, 1 + 1e-6)),
        NEARER.format("an edit of the head"): ("flagged, whatever the logits say", far),
        **{NEARER.format(name): (says, far) for name in FORGETTERS},
        WORST: ("by logits they look like retraining", (0.85, 1.0)),
        SHORT: ("by representations they do not", (MARGINS["CKA"], 1.0)),
        CONTROL_LOGITS: ("near 1", (0.9, 1.0)),
        CONTROL_INNER: ("near 1", (0.9, 1.0)),
        COLLAPSE: ("transfer collapses", (0.2, 1.0)),
        TOP: ("larger for related classes than for others", (0.02, 1.0)),
        RANKED: ("the classes that matter for the downstream data", (5, 5)),
        BIASED: ("a floor of the published estimate, 0.80", (0.78, 0.82)),
        UNBIASED: ("0.00 to 0.004", (-0.01, 0.01)),
    }
    return [Claim(name, paper, band, tuple(row[name] for row in found)) for name, (paper, band) in bands.items()]


LEFT = "accuracy left on the forget rows after an edit of the head"
SAME = "CKA of the edited model with the original on forget rows"
NEARER = "CKA with the original on forget rows, above that of retrained models: {}"
WORST = "agreement of logits with retrained models, the least of the forgetters'"
SHORT = "agreement of representations of retrained models, less the best forgetter's"
CONTROL_LOGITS = "agreement of logits of retrained models with each other"
CONTROL_INNER = "agreement of representations of retrained models with each other"
COLLAPSE = "k-NN accuracy on test rows: fall from retrained models to an untrained one"
TOP = "gap of k-NN accuracy on the downstream set, original to retrained: related less unrelated classes forgotten"
RANKED = "classes of the downstream set among the five most related ones"
BIASED = "biased CKA of independent Gaussian features, 512 rows of 2048 numbers"
UNBIASED = "unbiased CKA of the same"


def _measured(seed: int) -> dict[str, float]:
    world = World.of(seed)
    edited = head_only(world.model, LINKED)
    by_head = world.examine(edited, tables=SPLITS)
    untrained = world.examine(world.fresh(), tables=("retain", "test"))
    request = world.request(LINKED)
    forgot = {
        name: world.examine(method.forget(world.model, request, world.run), tables=SPLITS)
        for name, method in FORGETTERS.items()
    }
    original = top_related_classes(world.model, world.downstream, 5)
    return {
        LEFT: accuracy(edited, rows(request.forget)),
        SAME: by_head[FORGET].value,
        NEARER.format("an edit of the head"): beyond(by_head[FORGET]),
        **{NEARER.format(name): beyond(findings[FORGET]) for name, findings in forgot.items()},
        WORST: min(findings[LOGITS].value for findings in forgot.values()),
        SHORT: fmean(by_head[INNER].reference) - max(findings[INNER].value for findings in forgot.values()),
        CONTROL_LOGITS: fmean(by_head[LOGITS].reference),
        CONTROL_INNER: fmean(by_head[INNER].reference),
        COLLAPSE: -beyond(untrained[KNN.format("test")]),
        TOP: scenario_gap(world, original) - scenario_gap(world, UNRELATED),
        RANKED: float(len(set(original) & set(LINKED))),
        **_floors(seed),
    }


def nearness_of_an_edited_head(seed: int, oracles: int = 2) -> float:
    """How far CKA with the original on forget rows lies above that of retrained models, the head alone edited."""
    world = World.of(seed, oracles)
    return beyond(world.examine(head_only(world.model, LINKED), tables=("forget", "retain"))[FORGET])


def scenario_gap(world: World, classes: Sequence[int]) -> float:
    """|k-NN accuracy on the downstream set of the original less that of models retrained without these classes|."""
    few = world.with_probe(oracles=min(world.probe.oracles, 3))
    findings = few.examine(world.model, classes, ("retain", DOWNSTREAM))
    return abs(beyond(findings[KNN.format(DOWNSTREAM)]))


def _floors(seed: int) -> dict[str, float]:
    x, y = (_gaussian(seed, name) for name in ("x", "y"))
    return {BIASED: cka(x, y, unbiased=False), UNBIASED: cka(x, y)}


def _gaussian(*key: object) -> Tensor:
    return torch.randn(512, 2048, generator=generator("floor", *key))
