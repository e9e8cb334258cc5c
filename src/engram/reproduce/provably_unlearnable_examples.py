"""Noise that raises the Bayes error makes images hard to learn from. On two moons, and on digits with a small CNN.

Digits are an easy set, whose classes a change of 0.2 a pixel cannot make overlap: what the paper reports of CIFAR-10,
that clean and protected images together teach less than the clean ones alone, is measured here and does not hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.data.table import Table, shuffled
from engram.engine.ascend import ascend, ball
from engram.engine.optimizer import Optimizer
from engram.engine.predict import accuracy
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.protect.bayes_error_noise import BayesErrorNoise, bayes_error
from engram.reproduce.claims import Claim
from engram.reproduce.digits import digits
from engram.stats.seeds import generator

EPS, SIGMA = 0.3, 0.3  # of the moons
NOISE = 0.2  # of the digits
BELOW = 0.005  # accuracy that is lower by less counts as the same: under three of the 540 test rows
CNN = {"name": "ConvNet", "widths": [16, 32]}
RECIPE = Recipe(CNN, Optimizer(lr=1e-2, schedule="cosine"), epochs=15, batch_size=64)
METHOD = BayesErrorNoise(eps=NOISE, steps=60, refresh=3, optimizer=Optimizer(lr=0.02), recipe=replace(RECIPE, epochs=8))


def claims(seeds: Iterable[int]) -> list[Claim]:
    """The Bayes error before and after, and test accuracy on clean digits; half of the training rows are protected."""
    on_moons = [_moons(seed) for seed in seeds]
    found = [_digits(seed) for seed in range(len(on_moons))]
    before, after, random = zip(*on_moons, strict=True)
    rise, alone, together, minimising = zip(*found, strict=True)
    return [
        Claim("Bayes error of two moons after the ascent", "0.318, from 0.066", (0.25, 0.45), after),
        Claim(
            "the same over that of random signs of the same size",
            "1.9 (0.166)",
            (1.5, 4.0),
            tuple(a / r for a, r in zip(after, random, strict=True)),
        ),
        Claim("Bayes error of two moons before", "0.066", (0.03, 0.1), before),
        Claim("rise of the Bayes error of digits, features of fresh networks", "it rises", (0.1, 0.9), rise),
        Claim("accuracy of protected digits alone minus that of clean ones", "below 0", (-1.0, -0.01), alone),
        Claim(
            "accuracy of clean and protected digits minus that of the clean ones",
            "-0.21 (CIFAR-10)",
            (-1.0, -BELOW),
            together,
        ),
        Claim(
            "the same with error-minimising noise", "0.01 (CIFAR-10, best of those before)", (-BELOW, 1.0), minimising
        ),
    ]


def moons(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """scikit-learn's two moons, noise 0.1: points [n, 2], float64, and classes [n]."""
    from sklearn.datasets import make_moons

    x, y = make_moons(n, noise=0.1, random_state=seed)
    return torch.tensor(x), torch.tensor(y)


def _moons(seed: int) -> tuple[float, float, float]:
    """The Bayes error of 600 points before and after 200 steps, and with random signs."""
    z, labels = moons(600, seed)
    moved = ascend(
        z, lambda x: bayes_error(x, labels, SIGMA), project=ball(EPS), steps=200, optimizer=Optimizer(lr=0.01)
    )
    signs = torch.randint(0, 2, z.shape, generator=generator("signs", seed)) * 2 - 1
    before, after, random = (float(bayes_error(x, labels, SIGMA)) for x in (z, moved, z + EPS * signs))
    return before, after, random


def _digits(seed: int) -> tuple[float, float, float, float]:
    """Rise of the error; accuracy minus that of the clean half: protected half, both, both with the other noise."""
    train, test = digits()
    order = shuffled(len(train), seed, 0)
    clean, own = train.take(order[: len(train) // 2]), train.take(order[len(train) // 2 :])
    protected = METHOD.protect(own)
    tables = (clean, protected, clean.concat(protected), clean.concat(error_minimising(own, seed)))
    half, *others = (accuracy(RECIPE(table, seed), test) for table in tables)
    alone, together, minimising = (other - half for other in others)
    return METHOD.estimate(protected) - METHOD.estimate(own), alone, together, minimising


def error_minimising(
    table: Table,
    seed: int,
    rounds: int = 6,
    steps: int = 20,
    *,
    eps: float = NOISE,
    network: Any = CNN,
    lr: float = 0.02,
    run: Run | None = None,
) -> Table:
    """Images that a network finds too easy to learn anything from, by turns with its training, an epoch each.

    Huang et al.: Unlearnable Examples: Making Personal Data Unexploitable. ICLR 2021, arXiv 2101.04898.
    """
    run = run or Run()
    assert table.labels is not None
    labels = table.labels.to(run.device)
    trained: list[nn.Module] = []

    def renew(x: Tensor, k: int) -> None:
        start = trained[-1].requires_grad_(True) if trained else network
        recipe = replace(RECIPE, network=start, optimizer=Optimizer(lr=1e-2), epochs=1)
        moved = replace(table, inputs={"pixel_values": x.cpu()})
        trained.append(recipe(moved, seed, run).requires_grad_(False))

    def easier(x: Tensor) -> Tensor:
        return -F.cross_entropy(trained[-1](pixel_values=x).logits, labels)

    moved = ascend(
        table.inputs["pixel_values"],
        easier,
        project=ball(eps, 0.0, 1.0),
        steps=rounds * steps,
        optimizer=Optimizer(lr=lr),
        renew=renew,
        every=steps,
        run=run,
    )
    return replace(table, inputs={"pixel_values": moved.cpu()})
