"""Forgetters that follow a gradient, and retraining, against each other on digits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.forget.digit_three import RECIPE, Split, scores
from torch import Tensor, nn

from engram.core.needs import Need
from engram.core.request import Request
from engram.core.unlearning import usual_loss
from engram.data.table import Table
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.errors import EngramError
from engram.forget.finetune import Finetune
from engram.forget.gradient_ascent import GradientAscent
from engram.forget.gradient_difference import GradientDifference
from engram.forget.npo import NPO
from engram.forget.retrain import Retrain
from engram.stats.seeds import derive
from engram.testing import holds

FAST = Optimizer(lr=1e-3)


@pytest.fixture(scope="module")
def request_of_three(split: Split) -> Request:
    return Request.of_classes(split[0], (3,), recipe=RECIPE)


def test_retraining_is_the_recipe_on_the_rest(model: nn.Module, request_of_three: Request, split: Split) -> None:
    new = Retrain(seed=5).forget(model, request_of_three)
    assert request_of_three.retain is not None
    again = RECIPE(request_of_three.retain, derive("retrain", 0, 5))
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), again.parameters(), strict=True))
    assert scores(new, split)[0] == 0
    with pytest.raises(EngramError, match="recipe"):
        Retrain().forget(model, request_of_three.but(at_hand={}))


def test_difference_keeps_what_ascent_ruins(model: nn.Module, request_of_three: Request, split: Split) -> None:
    difference = GradientDifference(optimizer=FAST, epochs=8, retain_ratio=3).forget(model, request_of_three)
    ascent = GradientAscent(optimizer=FAST, epochs=20).forget(model, request_of_three)
    forgotten, kept = scores(difference, split)
    assert forgotten < 0.1
    assert kept > 0.8
    assert scores(ascent, split)[1] < kept - 0.2


def test_ascent_is_the_negative_of_descent_on_the_forget_rows(model: nn.Module, request_of_three: Request) -> None:
    """One full-batch step of plain SGD, by hand."""
    assert request_of_three.forget is not None
    rows = request_of_three.forget
    plain = Optimizer("sgd", lr=0.01, momentum=0.0)
    new = GradientAscent(optimizer=plain, epochs=1, batch_size=len(rows)).forget(model, request_of_three)
    twin = copy.deepcopy(model)
    usual_loss(twin, rows.batch(torch.arange(len(rows)))).value.backward()
    for p, q in zip(twin.parameters(), new.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(q.detach(), p.detach() + 0.01 * p.grad, rtol=1e-5, atol=1e-7)


def test_finetuning_needs_the_retain_rows_alone(model: nn.Module, request_of_three: Request, split: Split) -> None:
    alone = request_of_three.but(forget=None, at_hand={})
    new = Finetune(epochs=2, optimizer=FAST).forget(model, alone)
    assert scores(new, split)[1] > 0.9
    with pytest.raises(EngramError, match="retain-rows"):
        Finetune().forget(model, alone.but(retain=None))


def test_the_argument_is_untouched_and_the_result_has_its_flags(model: nn.Module, request_of_three: Request) -> None:
    model.requires_grad_(True)
    before = [p.detach().clone() for p in model.parameters()]
    new = GradientDifference(optimizer=FAST, epochs=1).forget(model, request_of_three)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.requires_grad for p in new.parameters())


def test_a_frozen_part_stays_frozen(request_of_three: Request, model: nn.Module) -> None:
    half = copy.deepcopy(model)
    half.encoder.requires_grad_(False)  # type: ignore[union-attr,operator]
    new = GradientDifference(optimizer=FAST, epochs=1).forget(half, request_of_three)
    frozen, moved = new.encoder.parameters(), new.head.parameters()  # type: ignore[union-attr,operator]
    assert all(torch.equal(a, b) for a, b in zip(frozen, half.encoder.parameters(), strict=True))  # type: ignore[union-attr,operator]
    assert not all(torch.equal(a, b) for a, b in zip(moved, half.head.parameters(), strict=True))  # type: ignore[union-attr,operator]


class Given(nn.Module):
    """A model whose log-probability of class 0 is log sigmoid of its only parameter per row."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, values: Tensor) -> object:
        from engram.models.output import Output

        rows = values[:, 0].long()
        logits = torch.stack([self.values[rows], torch.zeros_like(self.values[rows])], 1)
        return Output(logits=logits)


def npo_loss(beta: float, ratios: Tensor) -> Tensor:
    """NPO's loss of rows whose log-ratio to the reference is given."""
    method = NPO(beta=beta, retain_weight=0.0)
    table = Table({"values": torch.arange(float(len(ratios)))[:, None]}, torch.zeros(len(ratios), dtype=torch.long))
    reference = Given(torch.zeros(len(ratios), dtype=torch.float64))
    logp = math.log(0.5) + ratios  # log p of class 0 that gives the wanted ratio
    values = logp - torch.log1p(-logp.exp())
    batch = table.batch(torch.arange(len(ratios)))
    method.targets(reference, Request.of_records(table, table.ids), Run())
    return method.terms(Given(values), batch, None).value.detach()


@holds("npo", 1)
def test_npo_becomes_gradient_ascent_as_beta_goes_to_zero() -> None:
    ratios = -torch.linspace(0.01, 5, 20, dtype=torch.float64)
    beta = 1e-4
    # classifier losses are computed in float32, so that (2 / beta) log 2 costs digits: compare the differences
    exact = (2 / beta) * torch.nn.functional.softplus(beta * ratios).mean()
    assert abs(float(exact) - 2 / beta * math.log(2) - float(ratios.mean())) < 1e-3
    coarse = float(npo_loss(0.05, ratios)) - 2 / 0.05 * math.log(2)
    assert abs(coarse - float((ratios + 0.05 * ratios**2 / 4).mean())) < 5e-3


@holds("npo", 2)
def test_at_the_reference_npo_has_the_gradient_of_the_mean_log_probability(
    model: nn.Module, request_of_three: Request
) -> None:
    beta = 0.3
    method = NPO(beta=beta, retain_weight=0.0)
    assert request_of_three.forget is not None
    method.targets(model, request_of_three, Run())
    batch = request_of_three.forget.batch(torch.arange(len(request_of_three.forget)))
    loss = method.terms(model, batch, None).value
    assert abs(float(loss.detach()) - 2 / beta * math.log(2)) < 1e-5
    params = list(model.parameters())
    found = torch.autograd.grad(loss, params)
    wanted = torch.autograd.grad(-usual_loss(model, batch).value, params)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@holds("npo", 3)
def test_ascent_runs_away_linearly_and_npo_logarithmically() -> None:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(8, 32, generator=draws, dtype=torch.float64)
    signs = torch.where(torch.rand(8, generator=draws) < 0.5, -1.0, 1.0).double()

    def drift(weight_of: object, steps: int) -> list[float]:
        w = torch.zeros(32, dtype=torch.float64)
        found = []
        for step in range(1, steps + 1):
            z = signs * (x @ w)
            logp = torch.nn.functional.logsigmoid(z)
            weight = weight_of(logp - math.log(0.5))  # type: ignore[operator]
            w = w - (weight * torch.sigmoid(-z) * signs) @ x / 8
            if step in (steps // 4, steps):
                found.append(float((x @ w).square().mean().sqrt()))
        return found

    ascent = drift(lambda r: torch.ones_like(r), 8000)
    gentle = drift(lambda r: 2 * torch.sigmoid(0.1 * r), 8000)
    assert ascent[1] / ascent[0] > 3.5
    assert gentle[1] / gentle[0] < 1.6


def test_npo_with_retain_rows_forgets_a_class_and_keeps_the_rest(
    model: nn.Module, request_of_three: Request, split: Split
) -> None:
    new = NPO(beta=0.5, optimizer=FAST, epochs=8, retain_ratio=3).forget(model, request_of_three)
    forgotten, kept = scores(new, split)
    assert forgotten < 0.1
    assert kept > 0.85


def test_npo_needs_retain_rows_only_with_a_retain_weight() -> None:
    assert Need.RETAIN_ROWS not in NPO(retain_weight=0.0).needs[0]
    assert Need.RETAIN_ROWS in NPO().needs[0]


@pytest.mark.parametrize("method", [GradientDifference(), GradientAscent(), NPO(retain_weight=0.0)])
def test_forgetting_everything_is_refused_by_approximate_methods(
    method: GradientDifference, model: nn.Module, split: Split
) -> None:
    few = split[0].take(range(20))
    with pytest.raises(EngramError, match="all of the data"):
        method.forget(model, Request.of_records(few, few.ids))
