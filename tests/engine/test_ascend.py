"""Projected ascent: it stays within its set, finds known maxima, is a plain loop of its optimiser, and resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engram.engine.ascend import ascend, ball
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.errors import EngramError

SGD = Optimizer("sgd", lr=0.1, momentum=0.0)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.floats(0, 1), st.integers(0, 99))
def test_the_ball_is_a_projection(eps: float, seed: int) -> None:
    start, far = numbers(40, seed=seed), 4 * numbers(40, seed=seed + 1) - 2
    near = ball(eps, 0.0, 1.0)(far, start)
    assert float((near - start).abs().max()) <= eps + 1e-15
    assert near.min() >= 0 and near.max() <= 1
    assert torch.equal(ball(eps, 0.0, 1.0)(near, start), near)
    other = ball(eps, 0.0, 1.0)(numbers(40, seed=seed + 2), start)  # no allowed point is nearer
    assert bool(((near - far).abs() <= (other - far).abs() + 1e-15).all())


def test_a_ball_of_one_point_and_one_without_a_range() -> None:
    start = numbers(9)
    assert torch.equal(ball(0.0)(start + 1, start), start)
    assert torch.equal(ball(2.0)(start + 5, start), start + 2)
    assert torch.equal(ball(2.0, low=0.5)(start - 5, start), torch.full_like(start, 0.5))


@pytest.mark.parametrize(
    ("settings", "sentence"), [((-0.1,), "below 0"), ((float("nan"),), "below 0"), ((1.0, 1.0, 0.0), "nothing lies")]
)
def test_a_ball_that_cannot_be(settings: tuple[float, ...], sentence: str) -> None:
    with pytest.raises(EngramError, match=sentence):
        ball(*settings)


def test_a_concave_objective_ends_at_the_nearest_allowed_point_to_its_peak() -> None:
    x, peak = numbers(30), 3 * numbers(30, seed=1) - 1
    found = ascend(x, lambda z: -(z - peak).square().sum(), project=ball(0.3, 0.0, 1.0), steps=100, optimizer=SGD)
    torch.testing.assert_close(found, ball(0.3, 0.0, 1.0)(peak, x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("plan", [SGD, Optimizer(lr=0.05), Optimizer("adamw", lr=0.05, weight_decay=0.1)])
def test_it_is_a_plain_loop_with_a_projection_after_each_step(plan: Optimizer) -> None:
    x, weights = numbers(6, 2), numbers(6, 2, seed=1) - 0.5

    def objective(z: Tensor) -> Tensor:
        return (weights * z).sum() + z.sin().square().sum()

    point = x.clone().requires_grad_()
    optimizer = plan.build([point])  # type: ignore[list-item]
    for _ in range(7):
        optimizer.zero_grad()
        (-objective(point)).backward()
        optimizer.step()
        point.data = torch.minimum(torch.maximum(point.data, x - 0.2), x + 0.2)
    kept = x.clone()
    found = ascend(x, objective, project=ball(0.2), steps=7, optimizer=plan, every=3)
    torch.testing.assert_close(found, point.detach(), rtol=0, atol=1e-15)
    assert torch.equal(x, kept) and not found.requires_grad


def test_the_start_is_projected_first_and_no_step_is_taken_for_zero() -> None:
    x = torch.tensor([-0.5, 0.5, 1.5])
    assert torch.equal(ascend(x, torch.sum, project=ball(1.0, 0.0, 1.0), steps=0), torch.tensor([0.0, 0.5, 1.0]))


@pytest.mark.parametrize(("steps", "every", "calls"), [(7, 3, 3), (6, 3, 2), (4, 1, 4), (2, 5, 1)])
def test_renewals_come_before_each_so_many_steps_with_the_point_as_it_is(steps: int, every: int, calls: int) -> None:
    seen: list[tuple[int, float]] = []
    ascend(
        torch.zeros(1),
        torch.sum,
        project=ball(100.0),
        steps=steps,
        optimizer=SGD,
        renew=lambda x, k: seen.append((k, float(x))),
        every=every,
    )
    assert [k for k, _ in seen] == list(range(calls))
    assert [value for _, value in seen] == pytest.approx([0.1 * every * k for k in range(calls)])


def test_an_interrupted_ascent_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engram.engine.fit.CHECKPOINT_EVERY", -1.0)
    renewed: list[int] = []

    def climb(run: Run, die_at: int | None = None) -> Tensor:
        slopes = [torch.ones(4)]

        def renew(x: Tensor, k: int) -> None:
            if k == die_at:
                raise KeyboardInterrupt
            renewed.append(k)
            slopes[0] = torch.rand(4, generator=run.generator("slopes", k)) - x

        def objective(x: Tensor) -> Tensor:
            return ((slopes[0] + torch.randn(4)) * x).sum()  # drawn under the run's seed

        return ascend(torch.zeros(4), objective, project=ball(0.5), steps=11, renew=renew, every=2, run=run)

    whole = climb(Run())
    with pytest.raises(KeyboardInterrupt):
        climb(Run(tmp_path), die_at=3)
    renewed.clear()
    assert torch.equal(climb(Run(tmp_path)), whole)
    assert renewed == [3, 4, 5]
    assert not torch.equal(climb(Run(seed=1)), whole)


def test_a_renewal_before_less_than_one_step_is_refused() -> None:
    with pytest.raises(EngramError, match="every=0"):
        ascend(torch.zeros(1), torch.sum, project=ball(1.0), steps=1, every=0)
