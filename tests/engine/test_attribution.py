"""Attribution: datamodels known in closed form, TRAK as influence, and chunks that equal a loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

import engram.engine.attribution as attribution
from engram.data.table import Table
from engram.engine.attribution import (
    Projection,
    SubsetOutputs,
    centred,
    comparable,
    datamodels,
    row_weights,
    subset_outputs,
    trak,
    trak_shift,
)
from engram.engine.optimizer import Optimizer
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.build import build
from engram.models.output import Output
from engram.stats.scores import margin
from engram.stats.seeds import generator

SMALL = Recipe({"name": "MLP", "hidden": [5]}, Optimizer(lr=1e-2), epochs=2, batch_size=8)


class Linear(nn.Module):
    """x W, with weights from outside."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, values: Tensor) -> Output:
        return Output(logits=values @ self.weight)


class Hebb:
    """A recipe: W is the sum over the rows of x yᵀ, so every row adds the same to an output, whatever the others."""

    def __call__(self, table: Table, seed: int, run: Run | None = None) -> nn.Module:
        x, y = table.inputs["values"], table.labels
        assert y is not None
        return Linear(x.T @ targets(y))


def targets(y: Tensor) -> Tensor:
    return y if y.is_floating_point() else torch.nn.functional.one_hot(y, 3).float()


def normal(*shape: int, name: str = "x") -> Tensor:
    return torch.randn(*shape, generator=generator(name, *shape))


def classes(n: int, name: str = "x") -> Table:
    x = normal(n, 6, name=name)
    return Table({"values": x}, x[:, :3].argmax(1))


def numbers(n: int, dtype: torch.dtype = torch.float32) -> Table:
    return Table({"values": normal(n, 6).to(dtype)}, normal(n, 2, name="y"))


def mlp(**options: Any) -> nn.Module:
    spec = {"name": "MLP", "hidden": [5], **options}
    return build(spec, inputs={"values": (6,)}, classes=(0, 1, 2), generator=generator("weights")).eval()


# --- datamodels


@pytest.mark.parametrize("table", [classes(20), numbers(20)], ids=["classes", "numbers"])
def test_datamodels_of_a_model_that_adds_up_its_rows_are_its_products(table: Table) -> None:
    queries = classes(7, "queries")
    found = datamodels(Hebb(), table, queries, models=60, keep=0.7, ridge=1e-8)
    assert table.labels is not None
    products = queries.inputs["values"] @ table.inputs["values"].T  # [q, n]
    wanted = torch.einsum("qn,nc->nqc", products, targets(table.labels))
    torch.testing.assert_close(found, comparable(wanted, table.target), rtol=1e-4, atol=1e-4)
    chosen = datamodels(Hebb(), table, queries, models=60, keep=0.7, ridge=1e-8, rows=[3, 0])
    torch.testing.assert_close(chosen, found[[3, 0]])


@pytest.mark.parametrize("models", [15, 80])
def test_weights_are_those_of_ridge_regression_with_an_intercept(models: int) -> None:
    kept = torch.rand(models, 30, generator=generator("kept")) < 0.8
    outputs = normal(models, 4).double()
    fitted = Ridge(alpha=0.7).fit(kept.double().numpy(), outputs.numpy())
    wanted = torch.from_numpy(fitted.coef_.T)
    torch.testing.assert_close(row_weights(kept, None, 0.7) @ outputs, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(row_weights(kept, [4, 29], 0.7) @ outputs, wanted[[4, 29]], rtol=1e-9, atol=1e-12)


def test_cut_into_pieces_scores_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SubsetOutputs(torch.rand(12, 9, generator=generator("kept")) < 0.7, normal(12, 5, 3))
    whole = found.scores()
    monkeypatch.setattr(attribution, "ENTRIES", 24)  # two outputs at once
    weights = row_weights(found.kept)
    loop = torch.zeros(9, 5, 3)
    for i in range(9):
        for k in range(12):
            loop[i] += weights[i, k] * found.outputs[k]
    for pieces in (whole, found.scores()):
        torch.testing.assert_close(pieces, loop, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.shift([1, 5]), loop[[1, 5]].sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.shift([]), torch.zeros(5, 3))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    table = classes(24)
    whole = subset_outputs(SMALL, table, table.take(range(4)), models=6)
    monkeypatch.setattr(attribution, "BLOCK", 2)
    parts = subset_outputs(SMALL, table, table.take(range(4)), models=6)
    assert torch.equal(whole.kept, parts.kept)
    torch.testing.assert_close(parts.outputs, whole.outputs, rtol=1e-5, atol=1e-5)


def test_a_subset_without_a_class_or_without_rows_is_asked_all_the_same() -> None:
    table = classes(4)
    found = subset_outputs(SMALL, table, table, models=30, keep=0.15)
    assert found.kept.any(1).all() and (found.kept.sum(1) < 3).any()
    assert found.outputs.shape == (30, 4, 3) and found.outputs.isfinite().all()


def test_centred_logits_add_up_to_nothing_and_dead_columns_count_nothing() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 3.0], [2.0, 2.0, 5.0]], requires_grad=True)
    found = centred(logits)
    assert torch.equal(found, torch.tensor([[-1.0, 0.0, 1.0], [-1.0, -1.0, 2.0]]))
    found.square().sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


# --- TRAK


def test_on_least_squares_trak_is_influence_and_leaves_one_out_exactly() -> None:
    table, queries = numbers(40, torch.float64), numbers(9, torch.float64)
    x, y = table.inputs["values"], table.labels
    assert y is not None
    y = y.double()

    def solved(rows: list[int]) -> Tensor:
        return torch.linalg.lstsq(x[rows], y[rows]).solution

    model, inverse = Linear(solved(list(range(40)))), torch.linalg.inv(x.T @ x)
    found = trak([model], table, queries).double()
    residual, leverage = y - x @ model.weight.detach(), (x @ inverse * x).sum(1)
    wanted = torch.einsum("qn,nc->nqc", queries.inputs["values"] @ inverse @ x.T, residual)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    for i in (0, 17):
        without = queries.inputs["values"] @ solved([row for row in range(40) if row != i])
        exact = queries.inputs["values"] @ model.weight.detach() - found[i] / (1 - leverage[i])
        torch.testing.assert_close(exact, without, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [10, 10_000])
def test_trak_is_its_formula_written_out(width: int) -> None:
    table, queries, model = classes(37), classes(5, "queries"), mlp()
    project = Projection(
        sum(p.numel() for p in model.parameters()), width, attribution.derive(Run().number("projection"), 0)
    )

    def gradient(value: Tensor) -> Tensor:
        grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        return project(torch.cat([g.flatten() for g in grads])[None])[0].double()

    logits, asked = (model(**part.inputs).logits for part in (table, queries))
    assert table.labels is not None
    margins = margin(logits, table.labels)
    phi = torch.stack([gradient(one) for one in margins])
    inverse = torch.linalg.pinv(phi.T @ phi, rtol=1e-10, hermitian=True)
    pulls = phi * (1 - logits.softmax(1).gather(1, table.labels[:, None])).double()
    wanted = torch.zeros(37, 5, 3, dtype=torch.float64)
    for q in range(5):
        for c in range(3):
            wanted[:, q, c] = pulls @ inverse @ gradient(asked[q, c])
    wanted -= wanted.mean(2, keepdim=True)
    scale = float(wanted.detach().abs().max())
    found = trak([model], table, queries, width=width).double()
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-3, atol=1e-4 * scale)
    torch.testing.assert_close(trak([model], table, queries, width=width, rows=[3]).double(), found[[3]])
    total = trak_shift([model], table, queries, width=width, rows=[3, 9]).double()
    torch.testing.assert_close(total, found[[3, 9]].sum(0), rtol=1e-5, atol=1e-5 * scale)


def test_scores_are_means_over_checkpoints_and_the_model_is_left_alone() -> None:
    table, models = classes(12), [mlp().train(), mlp(hidden=[4])]
    both = trak(models, table, table, width=500)
    assert models[0].training and not models[1].training
    alone = [trak([model], table, table, width=500) for model in models]
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2)


def test_a_projection_is_one_sparse_matrix_of_signs() -> None:
    rows, project = normal(3, 50).double(), Projection(50, 8, 1)
    matrix = project(torch.eye(50).double())
    assert ((matrix != 0).sum(1) == 1).all() and set(matrix.unique().tolist()) == {-1.0, 0.0, 1.0}
    torch.testing.assert_close(project(rows), rows @ matrix, rtol=1e-12, atol=1e-12)
    assert not torch.equal(Projection(50, 8, 2)(rows), project(rows))
    assert torch.equal(Projection(50, 50, 1)(rows), rows)


def test_inner_products_are_kept_in_the_mean() -> None:
    """Over many seeds: no bias, and the variance of a dense matrix of signs, (1 + (a b)² - 2 sum of a² b²) / width."""
    a, b = (row / row.norm() for row in normal(2, 300).double())
    pair = torch.stack([a, 0.6 * a + 0.8 * b])
    pair /= pair.norm(dim=1, keepdim=True)
    found = torch.stack([(z := Projection(300, 40, seed)(pair))[0] @ z[1] for seed in range(2000)])
    variance = (1 + (pair[0] @ pair[1]) ** 2 - 2 * (pair[0] ** 2 @ pair[1] ** 2)) / 40
    assert abs(found.mean() - pair[0] @ pair[1]) < 4 * (variance / 2000) ** 0.5
    assert found.var() == pytest.approx(float(variance), rel=0.15)


def test_inner_products_survive_a_projection() -> None:
    rows = normal(20, 5000).double()
    rows /= rows.norm(dim=1, keepdim=True)
    projected = Projection(5000, 1000, 0)(rows)
    assert (projected @ projected.T - rows @ rows.T).abs().max() < 5 / 1000**0.5


# --- refusals


def test_what_cannot_be_attributed_is_refused() -> None:
    table = classes(8)
    with pytest.raises(EngramError, match="class labels or numbers"):
        datamodels(SMALL, table.unlabelled(), table)
    with pytest.raises(EngramError, match="a label for every row"):
        trak([mlp()], table.with_labels(torch.tensor([0, 1, 2, -1] * 2)), table)
    with pytest.raises(EngramError, match="one checkpoint or more"):
        trak([], table, table)
    with pytest.raises(EngramError, match="positive penalty"):
        row_weights(torch.ones(3, 3, dtype=torch.bool), None, 0.0)
    with pytest.raises(EngramError, match=r"a share in \(0, 1\)"):
        datamodels(SMALL, table, table, keep=1.0)
