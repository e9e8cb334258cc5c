"""Plans of optimisers: what they build, and the rate at every step. The plain schedules stand in the tests of `fit`."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from engram.engine.optimizer import SCHEDULES, Optimizer, Pull
from engram.errors import EngramError

SHARES = st.floats(0, 1, exclude_max=True)


def params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(1))]


@pytest.mark.parametrize(
    ("plan", "kind", "options"),
    [
        (
            Optimizer("sgd", 0.2, momentum=0.8, nesterov=True, weight_decay=0.1),
            torch.optim.SGD,
            {"lr": 0.2, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
        ),
        (Optimizer("adam", 0.3, weight_decay=0.1), torch.optim.Adam, {"lr": 0.3, "weight_decay": 0.1}),
        (Optimizer("adamw", 0.3, weight_decay=0.1), torch.optim.AdamW, {"lr": 0.3, "weight_decay": 0.1}),
    ],
)
def test_a_plan_is_built_over_what_can_be_trained(plan: Optimizer, kind: type, options: dict[str, object]) -> None:
    built = plan.build(iter(params()))
    assert type(built) is kind
    [group] = built.param_groups
    assert [tuple(p.shape) for p in group["params"]] == [(2,), (1,)]
    assert {key: group[key] for key in options} == options


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"name": "adm"}, "unknown optimizer 'adm'; did you mean 'adam'"),
        ({"name": "SGD"}, "unknown optimizer 'SGD'"),
        ({"schedule": "liner"}, "unknown schedule 'liner'; did you mean 'linear'"),
        ({"lr": -0.1}, "lr of the optimizer is -0.1; give 0 or more"),
        ({"lr": math.nan}, "lr of the optimizer is nan"),
        ({"lr": "fast"}, "lr of the optimizer is fast"),
        ({"momentum": -1.0}, "momentum of the optimizer"),
        ({"weight_decay": math.nan}, "weight_decay of the optimizer"),
        ({"warmup": -0.1}, "warmup of the optimizer"),
        ({"clip": -1.0}, "clip of the optimizer"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_before_anything_is_built(plan: dict[str, Any], words: str) -> None:
    with pytest.raises(EngramError, match=words):
        Optimizer(**plan)


@given(warmup=st.floats(0.05, 0.9), share=SHARES, schedule=st.sampled_from(SCHEDULES))
def test_a_warmup_rises_linearly_and_the_schedule_has_the_rest(warmup: float, share: float, schedule: str) -> None:
    plan = Optimizer(schedule=schedule, warmup=warmup, milestones=(0.95,), gamma=0.5)
    rest = (share - warmup) / (1 - warmup)
    after = {
        "constant": 1.0,
        "linear": 1 - rest,
        "cosine": math.cos(math.pi * rest / 2) ** 2,
        "steps": 0.5 if share >= 0.95 else 1.0,  # milestones are shares of the whole training
    }
    wanted = share / warmup if share < warmup else after[schedule]
    assert plan.factor(share) == pytest.approx(wanted, abs=1e-9)


@given(st.lists(SHARES, min_size=2, max_size=6), st.sampled_from(SCHEDULES))
def test_without_a_warmup_rates_never_rise_and_stay_in_0_to_1(shares: list[float], schedule: str) -> None:
    plan = Optimizer(schedule=schedule, milestones=(0.25, 0.5))
    found = [plan.factor(share) for share in sorted(shares)]
    assert all(0 <= one <= 1 for one in found) and all(one >= other for one, other in pairwise(found))
    assert plan.factor(0.0) == 1


def test_milestones_multiply() -> None:
    plan = Optimizer(schedule="steps", milestones=(0.2, 0.5), gamma=0.5)
    assert [plan.factor(k / 10) for k in range(10)] == [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25]


@pytest.mark.parametrize(
    ("plan", "wanted"),
    [
        (Optimizer("sgd", 0.4, schedule="linear"), [0.4, 0.3, 0.2, 0.1, 0.0, 0.0]),
        (Optimizer("sgd", 0.4, warmup=0.5), [0.0, 0.2, 0.4, 0.4, 0.4, 0.4]),
        (Optimizer("sgd", 0.4, schedule="linear", warmup=1.0), [0.0, 0.1, 0.2, 0.3, 0.4, 0.4]),
        (Optimizer("sgd", 0.4), [0.1] * 6),  # a rate that nothing moves is left as it is
    ],
)
def test_the_rate_of_every_group_is_that_of_the_share(plan: Optimizer, wanted: list[float]) -> None:
    built = torch.optim.SGD([{"params": [p], "lr": 0.1} for p in params()], 0.1)
    found = []
    for share in (
        0.0,
        0.25,
        0.5,
        0.75,
        1.0,
        1.25,
    ):  # a training that is longer than it was said to be ends at the last rate
        plan.set_rate(built, share)
        assert len({group["lr"] for group in built.param_groups}) == 1
        found.append(built.param_groups[0]["lr"])
    assert found == pytest.approx(wanted, abs=1e-12)


def test_scaled_changes_the_rate_alone() -> None:
    plan = Optimizer("sgd", 0.2, momentum=0.5, schedule="cosine", clip=1.0)
    assert plan.scaled(0.5) == Optimizer("sgd", 0.1, momentum=0.5, schedule="cosine", clip=1.0)
    assert plan.lr == 0.2


def settled(plan: Optimizer, a: float, t: float, b: float, updates: int) -> float:
    """Where (theta - a)² and a pull of b to t come to rest, from 3."""
    theta = nn.Parameter(torch.tensor([3.0]))
    optimizer, pull = plan.build([theta]), Pull(plan, [(theta, torch.tensor([t]), b)], updates)
    for k in range(updates):
        optimizer.zero_grad()
        (theta - a).square().sum().backward()
        optimizer.step()
        pull(k + 1)
    return theta.item()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("b", [0.0, 1e-6, 0.5, 4.0, 1e3, 1e12])
def test_a_pull_balances_the_loss_and_no_b_is_too_large(momentum: float, b: float) -> None:
    plan = Optimizer("sgd", lr=0.02, momentum=momentum)
    assert settled(plan, 1.0, -2.0, b, 600) == pytest.approx((1.0 - 2.0 * b) / (1 + b), abs=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_pull_follows_the_schedule(schedule: str) -> None:
    plan = Optimizer("adam", lr=0.5, schedule=schedule, warmup=0.2, milestones=(0.5,))
    pull = Pull(plan, [], 10)
    assert [pull.rate(k + 1) for k in range(10)] == [0.5 * plan.factor(k / 10) for k in range(10)]
    assert Pull(Optimizer("sgd", lr=0.1, momentum=0.9), [], 1).rate(1) == pytest.approx(1.0)


def test_what_is_at_its_target_keeps_its_bits() -> None:
    theta = nn.Parameter(torch.rand(100, generator=torch.Generator().manual_seed(0)))
    target = theta.detach().clone()
    Pull(Optimizer("sgd", lr=0.3), [(theta, target, 0.7)], 1)(1)
    assert torch.equal(theta, target)
