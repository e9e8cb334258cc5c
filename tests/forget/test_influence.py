"""Influence: exact on least squares, a Newton step on softmax regression, and what it does on digits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.forget.digit_three import RECIPE, Split
from torch import Tensor, nn

from engram.core.request import Request
from engram.core.unlearning import usual_loss
from engram.data.table import Table
from engram.engine.curvature import flat, trainable
from engram.engine.importance import importance
from engram.engine.predict import accuracy, predict
from engram.errors import EngramError
from engram.forget.finetune import Finetune
from engram.forget.influence import Influence
from engram.models.output import Output
from engram.stats.seeds import generator

GONE = [str(row) for row in range(0, 60, 4)]


class Linear(nn.Module):
    """x W, float64, with weights from outside."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, values: Tensor) -> Output:
        return Output(logits=values @ self.weight)


def inputs(d: int = 5) -> Tensor:
    return torch.randn(60, d, generator=generator("x"), dtype=torch.float64)


def regression() -> Table:
    x = inputs()
    noise = torch.randn(60, 2, generator=generator("noise"), dtype=torch.float64)
    return Table({"values": x}, x @ torch.randn(5, 2, generator=generator("w"), dtype=torch.float64) + noise)


def classes() -> Table:
    x = inputs()
    return Table({"values": x}, (x[:, :3] + 0.8 * inputs(8)[:, 5:]).argmax(1))


def ridge(table: Table, penalty: float) -> Tensor:
    """Minimises the mean over rows and values of squared errors, plus penalty/2 |W|²."""
    x, y = table.inputs["values"], table.labels
    assert y is not None
    scale = 2 / y.numel()
    return torch.linalg.solve(scale * x.T @ x + penalty * torch.eye(x.shape[1]).double(), scale * x.T @ y.double())


def softmax_regression(table: Table, penalty: float) -> Tensor:
    """Minimises the mean cross-entropy plus penalty/2 |W|², by Newton's method."""
    x, y = table.inputs["values"], table.labels
    assert y is not None
    truth = torch.nn.functional.one_hot(y, 3).double()
    W = torch.zeros(x.shape[1], 3, dtype=torch.float64)
    for _ in range(30):
        W = W - newton(x, truth, W, penalty)
    return W


def newton(x: Tensor, truth: Tensor, W: Tensor, penalty: float) -> Tensor:
    """(Hessian + penalty I)⁻¹ (gradient + penalty W), written out: [d, C]."""
    p = torch.softmax(x @ W, 1)
    slope = x.T @ (p - truth) / len(x) + penalty * W
    bends = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    H = torch.einsum("ni,nj,nab->iajb", x, x, bends).reshape(W.numel(), -1) / len(x)
    return torch.linalg.solve(H + penalty * torch.eye(W.numel()).double(), slope.flatten()).reshape(W.shape)


def exact(**settings: Any) -> Influence:
    return Influence(tol=1e-10, iters=200, **settings)


@pytest.mark.parametrize("penalty", [1e-3, 0.1, 3.0])
@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_on_least_squares_it_is_the_closed_form_without_the_rows(curvature: str, penalty: float) -> None:
    table = regression()
    before = Linear(ridge(table, penalty))
    new = exact(curvature=curvature, damping=penalty, batch_size=7).forget(before, Request.of_records(table, GONE))
    wanted = ridge(table.without(GONE), penalty)
    assert float((wanted - before.weight.detach()).norm() / wanted.norm()) > 1e-3
    torch.testing.assert_close(new.get_parameter("weight").detach(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_on_softmax_regression_it_is_the_newton_step(curvature: str) -> None:
    table, penalty = classes(), 0.05
    start = softmax_regression(table, penalty)
    new = exact(curvature=curvature, damping=penalty).forget(Linear(start), Request.of_records(table, GONE))
    rest = table.without(GONE)
    assert rest.labels is not None
    truth = torch.nn.functional.one_hot(rest.labels, 3).double()
    step = newton(rest.inputs["values"], truth, start, penalty)
    found = new.get_parameter("weight").detach()
    torch.testing.assert_close(found, start - step, rtol=1e-4, atol=1e-6)
    retrained = softmax_regression(rest, penalty)
    assert float((found - retrained).norm()) < 0.1 * float((start - retrained).norm())


def test_strength_scales_the_step() -> None:
    table = regression()
    start, request = ridge(table, 0.1), Request.of_records(table, GONE)
    one, half, none = (
        exact(damping=0.1, strength=s).forget(Linear(start), request).get_parameter("weight").detach() - start
        for s in (1.0, 0.5, 0.0)
    )
    torch.testing.assert_close(half, 0.5 * one)
    assert torch.equal(none, torch.zeros_like(none))


def pull(model: nn.Module, request: Request) -> Tensor:
    """The gradient of the mean loss of all rows less that of the retain rows."""
    assert request.forget is not None and request.retain is not None
    found = []
    for table in (request.forget.concat(request.retain), request.retain):
        loss = usual_loss(model, table.batch(torch.arange(len(table)))).value
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return (found[0] - found[1]).double()


def test_the_diagonal_divides_by_the_fisher_of_the_retain_rows(model: nn.Module, request_of_three: Request) -> None:
    new = Influence(curvature="fisher", damping=0.02).forget(model, request_of_three)
    assert request_of_three.retain is not None
    wanted = pull(model, request_of_three) / (flat(importance(model, request_of_three.retain)) + 0.02)
    torch.testing.assert_close(flat(trainable(new)) - flat(trainable(model)), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton", "fisher"])
def test_with_much_damping_it_is_a_gradient_step(model: nn.Module, request_of_three: Request, curvature: str) -> None:
    new = Influence(curvature=curvature, damping=1e4, strength=1e4).forget(model, request_of_three)
    found = flat(trainable(new)) - flat(trainable(model))
    torch.testing.assert_close(found, pull(model, request_of_three), rtol=1e-2, atol=1e-5)


def test_a_curvature_that_points_down_is_refused_with_what_to_do() -> None:
    model = Linear(torch.zeros(5, 2, dtype=torch.float64))
    table = regression()
    with pytest.raises(EngramError, match="raise damping"):
        Influence(damping=-50.0).forget(model, Request.of_records(table, GONE))
    with pytest.raises(EngramError, match=r"curvature 'fischer'.*'fisher'"):
        Influence(curvature="fischer").forget(model, Request.of_records(table, GONE))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_step_forgets_a_class_that_finetuning_leaves_and_keeps_the_rest(
    split: Split, request_of_three: Request, seed: int
) -> None:
    model = RECIPE(split[0], seed)
    gone = split[1].of_classes([3])
    rest = split[1].without(gone.ids)
    new = Influence().forget(model, request_of_three)
    left = Finetune(epochs=2).forget(model, request_of_three)
    assert accuracy(new, gone) < 0.1 < 0.4 < accuracy(left, gone)
    assert accuracy(new, rest) > accuracy(model, rest) - 0.02
    assert predict(new, rest).isfinite().all()
