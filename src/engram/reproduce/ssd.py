"""Dampening forgets a class without any training. On digits: a network forgets each of the ten classes in turn."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from engram.core.request import Request
from engram.data.table import Table
from engram.engine.optimizer import Optimizer
from engram.engine.predict import accuracy
from engram.engine.recipe import Recipe
from engram.forget.ssd import SSD
from engram.reproduce.claims import Claim
from engram.reproduce.digits import digits

ALPHAS = (1.0, 2.0, 3.0, 5.0, 8.0, 10.0, 20.0, 50.0)
ALLOWED = 0.10  # points of retain accuracy that the search for alpha may cost


def claims(seeds: Iterable[int]) -> list[Claim]:
    """Forget and retain accuracy, mean over the ten classes; alpha as in the reference run, by the retain rows."""
    train, test = digits()
    forgotten, kept, caps = [], [], []
    for seed in seeds:
        recipe = Recipe({"name": "MLP", "hidden": [128]}, Optimizer(lr=1e-3), epochs=30)
        model = recipe(train, seed)
        outcomes = [_forget(model, train, test, c) for c in train.classes]
        forgotten.append(sum(f for f, _ in outcomes) / 10)
        kept.append(sum(r for _, r in outcomes) / 10)
        caps.append(_moved_at_ten(model, train))
    return [
        Claim(
            "accuracy left on the forgotten class, mean of ten", "0.115 (reference run)", (0.0, 0.25), tuple(forgotten)
        ),
        Claim("accuracy on the other classes, mean of ten", "0.90 to 0.98 (reference run)", (0.85, 1.0), tuple(kept)),
        Claim(
            "weights moved by the per-row form at alpha 15",
            "0: alpha is bounded by n / n_f, about 10",
            (0.0, 0.0),
            tuple(caps),
        ),
    ]


def _forget(model: nn.Module, train: Table, test: Table, c: int) -> tuple[float, float]:
    """Forget one class at the alpha that leaves least of it and costs the retain rows at most ten points."""
    request = Request.of_classes(train, (c,))
    assert request.retain is not None and request.forget is not None
    floor = accuracy(model, request.retain) - ALLOWED
    best: tuple[float, nn.Module] = (1.0, model)
    for alpha in ALPHAS:
        new = SSD(alpha=alpha, per_sample=False).forget(model, request)
        left = accuracy(new, request.forget)
        if accuracy(new, request.retain) >= floor and left < best[0]:
            best = (left, new)
    here = test.of_classes([c])
    return accuracy(best[1], here), accuracy(best[1], test.without(here.ids))


def _moved_at_ten(model: nn.Module, train: Table) -> float:
    """How many parameters the per-row form moves beyond its bound."""
    new = SSD(alpha=15.0).forget(model, Request.of_classes(train, (0,)))
    return float(sum(int((a != b).sum()) for a, b in zip(model.parameters(), new.parameters(), strict=True)))
