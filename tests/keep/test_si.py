from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.keep.halves import SMALL, begun, finals, halves, learnt, same
from torch import Tensor

from engram.core.learner import fork
from engram.data.streams import class_stream
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.losses import by_target
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.finetune import Finetune
from engram.keep.si import SI
from engram.models import Identity, Predictor, ValueHead, seeded

XI = 0.1


def test_strength_zero_is_fine_tuning(tiny: Table) -> None:
    tuned = learnt(Finetune(**SMALL), tiny)
    assert same(learnt(SI(**SMALL, strength=0.0), tiny), tuned)
    assert not same(learnt(SI(**SMALL, strength=1.0), tiny), tuned)


class Quadratic:
    """Least squares by hand, in float64: the loss, its gradient, and gradient descent with momentum."""

    def __init__(self, seed: int) -> None:
        draws = np.random.default_rng(seed)
        self.x, self.y = draws.normal(size=(20, 3)), draws.normal(size=20)

    @property
    def task(self) -> Task:
        ids = tuple(f"{self.y[0]} {i}" for i in range(20))
        values = torch.tensor(self.x, dtype=torch.float32)
        return Task(Table({"values": values}, torch.tensor(self.y[:, None], dtype=torch.float32), ids))

    def loss(self, w: np.ndarray) -> float:
        return float(np.mean((self.x @ w[:3] + w[3] - self.y) ** 2))

    def gradient(self, w: np.ndarray) -> np.ndarray:
        error = self.x @ w[:3] + w[3] - self.y
        return 2 * np.append(self.x.T @ error, error.sum()) / 20

    def descend(
        self, w: np.ndarray, stiff: np.ndarray, steps: int, lr: float, momentum: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where w gets to under a pull to where it began, and its path integral of the gradient of the loss alone."""
        anchor, speed, omega = w.copy(), np.zeros(4), np.zeros(4)
        for _ in range(steps):
            g = self.gradient(w)
            speed = momentum * speed + g + 2 * stiff * (w - anchor)
            omega -= g * -lr * speed
            w = w - lr * speed
        return w, omega


def start() -> Predictor:
    with seeded(torch.Generator().manual_seed(0)):
        return Predictor(Identity(3), ValueHead(3, 1))


def vector(parts: dict[str, Tensor]) -> np.ndarray:
    return np.append(*(parts[f"head.{name}"].detach().double().numpy().flatten() for name in ("weight", "bias")))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_omega_is_the_path_integral_on_a_quadratic_computed_by_hand(momentum: float) -> None:
    model, lr, steps = start(), 0.02, 30
    plan = Optimizer("sgd", lr=lr, momentum=momentum)
    learner = SI(network=model, optimizer=plan, epochs=steps, batch_size=20, strength=0.5, xi=XI)
    w, total = vector(dict(model.named_parameters())), np.zeros(4)
    for seed in (0, 1):
        quadratic = Quadratic(seed)
        learner.learn(quadratic.task)
        reached, omega = quadratic.descend(w, 0.5 * total, steps, lr, momentum)
        total = np.maximum(0, total + omega / ((reached - w) ** 2 + XI))
        w = reached
        assert np.allclose(vector(dict(learner.model.named_parameters())), w, atol=1e-5)
        assert np.allclose(vector(learner.path.sums), omega, rtol=1e-4, atol=1e-5)
        assert np.allclose(vector(learner.importances.values), total, rtol=1e-4, atol=1e-4)


def test_in_small_steps_the_path_integrals_sum_to_the_fall_of_the_loss() -> None:
    model, quadratic = start(), Quadratic(0)
    before = quadratic.loss(vector(dict(model.named_parameters())))
    learner = SI(network=model, optimizer=Optimizer("sgd", lr=1e-3), epochs=300, batch_size=20)
    learner.learn(quadratic.task)
    fall = before - quadratic.loss(vector(dict(learner.model.named_parameters())))
    assert vector(learner.path.sums).sum() == pytest.approx(fall, rel=0.01)


def test_importances_are_never_negative(tiny: Table) -> None:
    learner = begun(SI(**SMALL), tiny)
    assert any((value > 0).any() for value in learner.importances.values.values())
    learner.path.sums = {name: torch.full_like(p, -1e9) for name, p in learner.path.sums.items()}
    learner.end(halves(tiny)[1], Run())
    assert all((value == 0).all() for value in learner.importances.values.values())


def test_the_loss_has_the_penalty(tiny: Table) -> None:
    learner, run = SI(**SMALL, strength=2.0), Run()
    first, second = halves(tiny)
    learner.learn(first, run)
    learner._prepare(second, run)
    learner.start(second, run)
    with seeded(torch.Generator().manual_seed(0)), torch.no_grad():
        for p in learner.model.parameters():
            p.add_(torch.randn_like(p))
    batch = second.train.batch(torch.arange(30))
    output = learner.model(**batch.inputs)
    wanted = by_target(output.logits, batch.labels).value.double()  # type: ignore[arg-type]
    for name, p in learner.model.named_parameters():
        omega = learner.importances.values[name]
        wanted = wanted + 2.0 * (omega * (p - learner.anchor[name]).double().square()[: len(omega)]).sum()
    assert learner.terms(batch, output).value.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_clipped_gradient_is_refused() -> None:
    with pytest.raises(EngramError, match="clip"):
        SI(optimizer=Optimizer(clip=1.0))


def test_forgets_less_than_fine_tuning(digits: Any, take: Callable[..., Any]) -> None:
    stages = class_stream(digits.train, digits.test, base=5, increment=5)
    held, free = finals(take, stages, SI(strength=10.0), Finetune())
    assert held > free + 0.08


def test_a_copy_goes_on_learning_the_same(tiny: Table) -> None:
    learner = SI.tiny()
    first, second = halves(tiny)
    learner.learn(first)
    twin = fork(learner)
    for each in (learner, twin):
        each.learn(second)
    assert same(learner, twin)
