"""Matching what data attribution predicts comes close to retraining. On drawn rows, of which a shifted group must go.

The paper's tables are not reproduced (residual networks on CIFAR-10, a hundred models of each kind). Measured are its
two steps: how well the prediction fits, on softmax regression, and how near the margins of unlearned networks come to
those of retrained ones, on a small network.

On retain rows, datamodel matching should come close to the floor of KLoM, and does so in part: at seed 0 it is 0.33
nats above the floor of 0.89, doing nothing 0.60. What is missing is the prediction's noise, which falls with the
models it is fitted on (2400 in place of 800: 0.14 above the floor), and not the matching: with the change of the
logits known, as its mean over retrained models, seeds 0 to 2 are 0.05, 0.01 and 0.11 above their floors, doing nothing
0.60, 0.74 and 0.58.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

from engram.core.needs import Need
from engram.core.request import Request
from engram.data.table import Table
from engram.engine.attribution import centred
from engram.engine.many import fit_many
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.forget.datamodel_matching import DatamodelMatching
from engram.forget.gradient_ascent import GradientAscent
from engram.forget.oracle_matching import OracleMatching
from engram.reproduce.claims import Claim
from engram.stats.divergence import histogram_kl
from engram.stats.scores import margin
from engram.stats.seeds import generator

ROWS, GONE, INPUTS, CLASSES = 200, 20, 20, (0, 1, 2)
RATES = (1e-3, 3e-3, 1e-2)  # of gradient ascent; the largest that does the retain rows no harm is taken
MATCHING, EPOCHS = Optimizer(lr=1e-2, schedule="cosine"), 60
SOFTMAX = Recipe("Identity", Optimizer(lr=0.1, weight_decay=0.03, schedule="cosine"), 60, 256, CLASSES)
NETWORK = Recipe(
    {"name": "MLP", "hidden": [16]}, Optimizer(lr=0.03, weight_decay=0.01, schedule="cosine"), 60, 256, CLASSES
)


def claims(seeds: Iterable[int]) -> list[Claim]:
    """How well retraining is predicted, and how near to it the margins of unlearned networks come."""
    seeds = list(seeds)
    predictions, networks = [prediction(seed) for seed in seeds], [network(seed) for seed in seeds]
    return [
        Claim(
            "squared error of the predicted logits, as a share of that of doing nothing",
            "no figure; 0.24 in an independent check",
            (0.0, 1 / 3),
            tuple(one.error() for one in predictions),
        ),
        Claim(
            "correlation of predicted and true change of the logits",
            "no figure; 0.89 in an independent check",
            (0.8, 1.0),
            tuple(one.correlation() for one in predictions),
        ),
        Claim(
            "KLoM on forget rows: oracle matching above the floor, as a share of doing nothing above it",
            "the ceiling of the method",
            (-0.1, 0.2),
            tuple(one.share("oracle matching") for one in networks),
        ),
        Claim(
            "the same for datamodel matching",
            "close to retraining",
            (0.0, 0.6),
            tuple(one.share("datamodel matching") for one in networks),
        ),
        Claim(
            "KLoM on forget rows: datamodel matching minus gradient ascent, nats",
            "beats iterative methods",
            (-12.0, 0.0),
            tuple(one.klom("datamodel matching") - one.klom("gradient ascent") for one in networks),
        ),
        Claim(
            "KLoM on retain rows: datamodel matching minus the floor, nats",
            "close to retraining",
            (-0.2, 0.7),
            tuple(one.klom("datamodel matching", "retain") - one.klom("retrained", "retain") for one in networks),
        ),
    ]


def world(seed: int) -> Request:
    """200 rows of 20 inputs in three classes with noise; the first 20, which must go, lie elsewhere on one axis."""
    draws = generator("rows", seed)
    x = torch.randn(ROWS, INPUTS, generator=draws)
    x[:GONE, 0] += 2.0
    scores = x @ torch.randn(INPUTS, len(CLASSES), generator=generator("truth", seed))
    table = Table({"values": x}, (scores + torch.randn(ROWS, len(CLASSES), generator=draws)).argmax(1))
    return Request.of_records(table, table.ids[:GONE])


def everything(request: Request) -> Table:
    """Forget rows, then retain rows."""
    assert request.forget is not None and request.retain is not None
    return request.forget.concat(request.retain)


@dataclass(frozen=True)
class Prediction:
    """Softmax regression, with and without the forget rows, and what datamodels predict.

    It is trained to its optimum: what is left of the draws of a start would be noise in every regression.
    """

    seed: int = 0
    models: int = 600

    @cached_property
    def request(self) -> Request:
        """With what `prepare` stores at hand."""
        request = world(self.seed)
        method = DatamodelMatching(models=self.models, recipe=SOFTMAX)
        stored = method.prepare(self.trained[0], everything(request), Run(seed=self.seed))
        return request.but(at_hand={Need.STATISTICS: stored})

    @cached_property
    def trained(self) -> tuple[nn.Module, nn.Module]:
        """On all rows, and without the forget rows."""
        rows = everything(world(self.seed))
        return SOFTMAX(rows, 0), SOFTMAX(rows.take(range(GONE, ROWS)), 0)

    def changes(self, multiplier: float = 1.0) -> tuple[Tensor, Tensor]:
        """How the centred logits change on all rows, predicted and in truth: [n, C]."""
        rows, (model, retrained) = everything(self.request), self.trained
        before, after = (centred(predict(one, rows)) for one in (model, retrained))
        found = DatamodelMatching(multiplier=multiplier).predicted(model, self.request, rows, Run())
        return centred(found) - before, after - before

    def error(self, multiplier: float = 1.0) -> float:
        """Squared error of the predicted logits; 1 is that of predicting no change."""
        predicted, true = self.changes(multiplier)
        return float((predicted - true).square().mean() / true.square().mean())

    def correlation(self) -> float:
        """Over rows and classes."""
        return float(torch.corrcoef(torch.stack([change.flatten() for change in self.changes()]))[0, 1])


@dataclass(frozen=True)
class Margins:
    """A small network: originals, retrained and unlearned ones, and the divergence of their margins row by row.

    Of the retain rows a prediction by fewer models says little: with 600 it is no nearer to retraining than doing
    nothing. Oracle matching takes an oracle of its own for each model: with the mean of ten for all, the unlearned
    models would all say the same, and less variously than retrained ones do.
    """

    seed: int = 0
    each: int = 50
    models: int = 800

    @cached_property
    def request(self) -> Request:
        return world(self.seed)

    @cached_property
    def populations(self) -> dict[str, list[nn.Module]]:
        """Models by what was done to them; "oracle" is what all are compared with, "retrained" a second lot of it."""
        request, rows, run = self.request, everything(self.request), Run(seed=self.seed)
        whole, rest = torch.arange(ROWS), torch.arange(GONE, ROWS)
        before = fit_many(NETWORK, rows, [whole] * self.each, range(self.each), run)
        retrained = fit_many(NETWORK, rows, [rest] * (2 * self.each), range(1000, 1000 + 2 * self.each), run)
        oracles, others = retrained[: self.each], retrained[self.each :]
        settings: dict[str, Any] = {"optimizer": MATCHING, "epochs": EPOCHS, "retain_ratio": 9.0}
        method = DatamodelMatching(models=self.models, recipe=NETWORK, **settings)
        stored = request.but(at_hand={Need.STATISTICS: method.prepare(before[0], rows, run)})
        own = [request.but(at_hand={Need.ORACLES: [other]}) for other in others]
        matching = OracleMatching(oracles=1, **settings)
        return {
            "oracle": oracles,
            "retrained": others,
            "nothing": before,
            "oracle matching": [matching.forget(model, one) for model, one in zip(before, own, strict=True)],
            "datamodel matching": [method.forget(model, stored) for model in before],
            **{f"ascent at {rate}": self._ascent(before, rate) for rate in RATES},
        }

    def klom(self, name: str, on: str = "forget") -> float:
        """Mean over the rows of KL(oracles || models of that name), in nats."""
        name = self._gentle() if name == "gradient ascent" else name
        table = getattr(self.request, on)
        oracles, models = (margins(self.populations[kind], table) for kind in ("oracle", name))
        return float(histogram_kl(oracles, models).mean())

    def share(self, name: str) -> float:
        """KLoM on forget rows above the floor, 1 for doing nothing."""
        floor = self.klom("retrained")
        return (self.klom(name) - floor) / (self.klom("nothing") - floor)

    def _ascent(self, models: list[nn.Module], rate: float) -> list[nn.Module]:
        method = GradientAscent(optimizer=Optimizer(lr=rate), epochs=5)
        return [method.forget(model, self.request) for model in models]

    def _gentle(self) -> str:
        most = self.klom("nothing", "retain")
        harmless = [rate for rate in RATES if self.klom(f"ascent at {rate}", "retain") <= most]
        return f"ascent at {max(harmless, default=RATES[0])}"


@cache
def prediction(seed: int) -> Prediction:
    """That of a seed; measured once in a process."""
    return Prediction(seed)


@cache
def network(seed: int) -> Margins:
    """Those of a seed; measured once in a process."""
    return Margins(seed)


def margins(models: Iterable[nn.Module], table: Table) -> Tensor:
    """Margins of the labels, [N, n] float64."""
    assert table.labels is not None
    return torch.stack([margin(predict(model, table).double(), table.labels) for model in models])
