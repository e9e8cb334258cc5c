"""Gradients and curvature products over batches, against the whole matrices of small models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from engram.core.unlearning import usual_loss
from engram.data.table import MISSING, Table
from engram.engine.curvature import Curvature, flat, mean_gradient, shaped, trainable
from engram.engine.losses import by_target
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.build import build
from engram.stats.seeds import generator

CLASSES = (0, 1, 3)  # the column of class 2 is dead


def rows(n: int = 11, numbers: bool = False) -> Table:
    draws = generator("rows", n)
    x = torch.randn(n, 4, generator=draws)
    labels = torch.randn(n, 2, generator=draws) if numbers else torch.tensor(CLASSES)[x[:, :3].argmax(1)]
    return Table({"values": x}, labels)


def network(hidden: tuple[int, ...] = (3,), numbers: bool = False) -> nn.Module:
    spec = {"name": "MLP", "hidden": list(hidden), "activation": "gelu"} if hidden else {"name": "Identity"}
    told = {"outputs": 2} if numbers else {"classes": CLASSES}
    return build(spec, inputs={"values": (4,)}, generator=generator("weights", hidden), **told).eval()  # type: ignore[arg-type]


def of_weights(model: nn.Module, table: Table, read: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `read` makes of the logits, as a function of all parameters in one vector."""
    params, batch = trainable(model), table.batch(torch.arange(len(table)))
    sizes = [p.numel() for p in params.values()]

    def value(vector: Tensor) -> Tensor:
        parts = zip(params.items(), vector.split(sizes), strict=True)
        weights = {name: part.reshape(p.shape) for (name, p), part in parts}
        return read(functional_call(model, weights, (), batch.inputs).logits)

    return value


def loss_of(table: Table) -> Callable[[Tensor], Tensor]:
    assert table.labels is not None
    return lambda logits: by_target(logits, table.labels).value  # type: ignore[arg-type]


def point(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainable(model).values()])


def matrix(curvature: Curvature, n: int) -> Tensor:
    return torch.stack([curvature(row) for row in torch.eye(n, dtype=torch.float64)])


@pytest.mark.parametrize("numbers", [False, True])
def test_the_mean_gradient_is_that_of_all_rows_at_once_in_batches_of_any_size(numbers: bool) -> None:
    model, table = network(numbers=numbers), rows(numbers=numbers)
    whole = usual_loss(model, table.batch(torch.arange(len(table)))).value
    wanted = torch.autograd.grad(whole, list(model.parameters()))
    for size in (1, 4, 100):
        found = mean_gradient(model, table, batch_size=size)
        assert list(found) == [name for name, _ in model.named_parameters()]
        for one, other in zip(found.values(), wanted, strict=True):
            assert one.dtype == torch.float64
            torch.testing.assert_close(one.float(), other, rtol=1e-5, atol=1e-7)


def test_rows_without_a_label_count_nothing() -> None:
    model, table = network(), rows()
    assert table.labels is not None
    half = table.with_labels(torch.where(torch.arange(len(table)) % 2 == 0, table.labels, MISSING))
    known = table.take(torch.arange(0, len(table), 2))
    v = torch.randn(len(point(model)), generator=generator("v"), dtype=torch.float64)
    for one, other in ((half, known),):
        torch.testing.assert_close(flat(mean_gradient(model, one, batch_size=3)), flat(mean_gradient(model, other)))
        for kind in ("hessian", "gauss-newton"):
            torch.testing.assert_close(Curvature(model, one, kind, batch_size=3)(v), Curvature(model, other, kind)(v))


@pytest.mark.parametrize("numbers", [False, True])
def test_the_hessian_is_that_of_autograd(numbers: bool) -> None:
    model, table = network(numbers=numbers), rows(numbers=numbers)
    wanted = torch.autograd.functional.hessian(of_weights(model, table, loss_of(table)), point(model))
    found = matrix(Curvature(model, table, "hessian", batch_size=4), len(point(model)))
    torch.testing.assert_close(found.float(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("numbers", [False, True])
def test_gauss_newton_is_built_of_the_jacobian(numbers: bool) -> None:
    model, table = network(numbers=numbers), rows(numbers=numbers)
    alive = [0, 1] if numbers else list(CLASSES)
    told = of_weights(model, table, lambda logits: logits[:, alive])
    J = torch.autograd.functional.jacobian(told, point(model)).flatten(0, 1).double()

    def loss(logits: Tensor) -> Tensor:
        dense = (
            logits if numbers else torch.full((len(table), 4), -torch.inf).index_copy(1, torch.tensor(alive), logits)
        )
        return loss_of(table)(dense)

    logits = told(point(model))
    H = torch.autograd.functional.hessian(loss, logits).reshape(logits.numel(), -1).double()
    found = matrix(Curvature(model, table, "gauss-newton", batch_size=4), len(point(model)))
    torch.testing.assert_close(found, J.T @ H @ J, rtol=1e-4, atol=1e-6)
    assert float(torch.linalg.eigvalsh((found + found.T) / 2)[0]) > -1e-6


@pytest.mark.parametrize("numbers", [False, True])
def test_for_a_linear_model_the_two_are_one(numbers: bool) -> None:
    model, table = network((), numbers), rows(numbers=numbers)
    one, other = (matrix(Curvature(model, table, kind), len(point(model))) for kind in ("hessian", "gauss-newton"))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_only_what_takes_gradients_counts_and_looking_changes_nothing() -> None:
    model, run = network(), Run()
    model.encoder.requires_grad_(False)  # type: ignore[union-attr,operator]
    before = [p.detach().clone() for p in model.parameters()]
    vector = flat(mean_gradient(model, rows(), run=run))
    assert len(vector) == sum(p.numel() for p in model.head.parameters())  # type: ignore[union-attr,operator]
    assert len(Curvature(model, rows(), run=run)(vector)) == len(vector)
    assert run.cost.rows == 2 * len(rows())
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))


def test_a_vector_is_cut_as_it_was_joined() -> None:
    params = trainable(network())
    again = shaped(flat(params), params)
    assert all(torch.equal(again[name], p) for name, p in params.items())


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(EngramError, match=r"curvature 'hesian'.*'hessian'"):
        Curvature(network(), rows(), "hesian")
