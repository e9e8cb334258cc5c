"""A loss whose force dies out unlearns without the collapse of gradient ascent: three small worlds.

Logistic regression on eight points: how fast the logits run away. The paper's synthetic benchmark, a head on random
features: how far the unlearned model is from a retrained one, on forget and on retain rows. Forty invented facts in a
small GPT-2: what ascent and NPO leave of the facts that were to stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engram.core.request import Request
from engram.core.unlearning import GradientForgetter
from engram.data.table import Table
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.forget.gradient_ascent import GradientAscent
from engram.forget.gradient_difference import GradientDifference
from engram.forget.npo import NPO, rejection
from engram.models.output import Output
from engram.reproduce.claims import Claim
from engram.reproduce.facts import SmallGPT2, facts, recall
from engram.stats.seeds import generator

WIDTH, FEATURES, RETAIN, FORGET, TEST = 16, 128, 1000, 200, 1000
STEPS = 2000


def claims(seeds: Iterable[int]) -> list[Claim]:
    """Drift, divergence from retraining, facts left. About 12 s a seed."""
    seeds = list(seeds)
    drifts = [(drift(None, seed), drift(0.1, seed)) for seed in seeds]
    gaps = [benchmark(seed) for seed in seeds]
    left = [language(seed) for seed in seeds]
    measured = "{} (independent run of the published benchmark)"
    return [
        Claim("growth of logits fourfold in time, ascent", "linear: 4", (3.5, 4.5), tuple(a for a, _ in drifts)),
        Claim("the same, NPO at beta 0.1", "logarithmic", (1.0, 1.6), tuple(b for _, b in drifts)),
        *(
            Claim(says, measured.format(figure), band, tuple(gap[method, part] for gap in gaps))
            for says, method, part, figure, band in (
                ("divergence from retraining, forget rows, NPO+RT", "NPO+RT", "forget", "0.005 to 0.04", (0.0, 0.06)),
                ("divergence from retraining, retain rows, NPO+RT", "NPO+RT", "retain", "0.02 to 0.03", (0.0, 0.05)),
            )
        ),
        *(
            Claim(
                f"divergence from retraining, {part} rows, GA+RT less NPO+RT",
                "above 0 on both",
                (0.0, 0.5),
                tuple(gap["GA+RT", part] - gap["NPO+RT", part] for gap in gaps),
            )
            for part in ("forget", "retain")
        ),
        Claim(
            "facts kept by a language model, ascent",
            "utility 0 on TOFU (open-unlearning)",
            (0.0, 0.2),
            tuple(a for a, _, _ in left),
        ),
        Claim(
            "facts kept, NPO+RT",
            "utility 0.54 of 0.63 on TOFU (open-unlearning)",
            (0.9, 1.0),
            tuple(b for _, b, _ in left),
        ),
        Claim("facts left that were to go, NPO+RT", "like retraining", (0.0, 0.1), tuple(c for _, _, c in left)),
    ]


def drift(beta: float | None, seed: int, steps: int = 8000) -> float:
    """Growth of the logits' root mean square from a quarter of the steps to all, of logistic regression on 8 points in
    32 dimensions that NPO (None: gradient ascent) pushes away from labels drawn at random; lr 1."""
    sizes = course(beta, seed, steps)
    return sizes[-1] / sizes[steps // 4 - 1]


def course(beta: float | None, seed: int, steps: int) -> list[float]:
    """The logits' root mean square after each step."""
    draws = generator("drift", seed)
    x = torch.randn(8, 32, generator=draws, dtype=torch.float64)
    x *= 1.0 - 2.0 * torch.randint(2, (8, 1), generator=draws)  # log p(label) = log sigmoid(x w)
    gram, z, sizes = x @ x.T / 8, torch.zeros(8, dtype=torch.float64), []  # all that matters of w is z = x w
    for _ in range(steps):
        z = z - gram @ (_force(z, beta) * torch.sigmoid(-z))
        sizes.append(float(z.square().mean().sqrt()))
    return sizes


def _force(z: Tensor, beta: float | None) -> Tensor:
    """The weight of every point's log-probability in the gradient of the loss."""
    if beta is None:
        return torch.ones_like(z)
    ratio = (torch.nn.functional.logsigmoid(z) - math.log(0.5)).requires_grad_()
    (found,) = torch.autograd.grad(rejection(ratio, beta).value, ratio)
    return found * len(z)


# --- the synthetic benchmark


class Logistic(nn.Module):
    """Two classes on given features [n, d], without an intercept."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, values: Tensor) -> Output:
        z = values @ self.weight
        return Output(logits=torch.stack([z, torch.zeros_like(z)], 1))


class World(NamedTuple):
    """Training and test rows, and two models: of all training rows, and of those that stay."""

    retain: Table
    forget: Table
    tests: dict[str, Table]
    model: nn.Module
    retrained: nn.Module


def world(seed: int) -> World:
    """Random features of Gaussian points: around -1 the first class is likelier, around +1, on the forget rows, the
    second. Two heads are trained by 20,000 steps of gradient descent."""
    draws = generator("random features", seed)
    features = torch.randn(WIDTH, FEATURES, generator=draws, dtype=torch.float64) / WIDTH**0.5
    retain, tests_retain = (_rows(n, -1.0, features, draws, "retain") for n in (RETAIN, TEST))
    forget, tests_forget = (_rows(n, 1.0, features, draws, "forget") for n in (FORGET, TEST))
    model, retrained = _fitted(retain.concat(forget)), _fitted(retain)
    return World(retain, forget, {"forget": tests_forget, "retain": tests_retain}, model, retrained)


def benchmark(seed: int) -> dict[tuple[str, str], float]:
    """KL(retrained || unlearned) in nats, mean over fresh rows, by method ("before": none) and kind of rows."""
    there = world(seed)
    request = Request.of_records(there.retain.concat(there.forget), there.forget.ids)
    models = {name: method.forget(there.model, request, Run(seed=seed)) for name, method in methods().items()}
    return {
        (name, part): divergence(there.retrained, model, table)
        for name, model in {"before": there.model, **models}.items()
        for part, table in there.tests.items()
    }


def methods() -> dict[str, GradientForgetter]:
    """Ascent and NPO, each with the loss of the retain rows, at the learning rates of the benchmark; full batches."""
    slow, fast = (Optimizer("sgd", lr=lr, momentum=0.0) for lr in (5e-4, 5e-3))
    ratio = RETAIN / FORGET
    return {
        "GA+RT": GradientDifference(optimizer=slow, epochs=STEPS, batch_size=FORGET, retain_ratio=ratio),
        "NPO+RT": NPO(beta=1.0, optimizer=fast, epochs=STEPS, batch_size=FORGET, retain_ratio=ratio),
    }


def divergence(reference: nn.Module, model: nn.Module, table: Table) -> float:
    """KL(reference || model) in nats, mean over rows."""
    p, q = (predict(m, table).log_softmax(1) for m in (reference, model))
    return float((p.exp() * (p - q)).sum(1).mean())


def _rows(n: int, center: float, features: Tensor, draws: torch.Generator, name: str) -> Table:
    noise = torch.randn(n, WIDTH, generator=draws, dtype=torch.float64)
    score = noise.sum(1) / WIDTH**0.5 + 1
    likelier = torch.rand(n, generator=draws, dtype=torch.float64) < torch.sigmoid(score)
    labels = (~likelier if center < 0 else likelier).long()
    values = ((noise + center) @ features).relu()
    return Table({"values": values}, labels, tuple(f"{name}, {row}" for row in range(n)))


def _fitted(table: Table, steps: int = 20_000, lr: float = 0.05) -> Logistic:
    assert table.labels is not None
    x, y = table.inputs["values"], 1.0 - table.labels.double()
    weight = torch.zeros(FEATURES, dtype=torch.float64)
    for _ in range(steps):
        weight += lr / len(x) * (y - torch.sigmoid(x @ weight)) @ x
    return Logistic(weight)


# --- facts


def language(seed: int) -> tuple[float, float, float]:
    """The share of facts kept by ascent and by NPO+RT, and the share left of those that were to go by NPO+RT."""
    table = facts(40, seed)
    model = SmallGPT2(40)(table, seed)
    gone, kept = table.take(range(10)), table.take(range(10, 40))
    request, plan = Request.of_records(table, gone.ids), Optimizer("adamw", lr=1e-3)
    ascent = GradientAscent(optimizer=plan, epochs=40, batch_size=10).forget(model, request, Run(seed=seed))
    method = NPO(optimizer=plan, epochs=150, batch_size=10, retain_ratio=3.0)
    gentle = method.forget(model, request, Run(seed=seed))
    return recall(ascent, kept), recall(gentle, kept), recall(gentle, gone)
