"""Gaussian fine-tuning: the law of its targets, that they are drawn once, and its task loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engram.core.request import Request
from engram.data.readers import read
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.errors import EngramError
from engram.forget.blindspot import Blindspot
from engram.forget.finetune import Finetune
from engram.forget.gaussian import GaussianFineTune, drawn_targets, row_errors
from engram.testing import Check, Material, checks_of, holds

RECIPE = Recipe({"name": "MLP", "hidden": [16]}, Optimizer(lr=1e-2), epochs=4, batch_size=16)


def diabetes() -> Table:
    """Real regression rows: ten measurements, and the progression of the illness a year on, in hundreds."""
    table = read("sklearn:diabetes")
    assert table.labels is not None
    return table.with_labels(table.labels / 100)


@pytest.fixture(scope="module")
def regression() -> Material:
    """Two tasks of thirty patients each, as the conformance suite wants its rows."""
    table = diabetes()
    first, second = table.take(range(30)), table.take(range(30, 60))
    return Material((Task(first), Task(second)), table.take(range(60, 80)), RECIPE)


@pytest.mark.parametrize(
    "method", [GaussianFineTune.tiny(), Blindspot.tiny()], ids=lambda method: type(method).__name__
)
@pytest.mark.parametrize("check", checks_of(Blindspot.tiny()), ids=lambda check: check.__name__)
def test_the_promises_of_forgetters_are_kept_on_numbers(
    method: GaussianFineTune | Blindspot, check: Check, regression: Material
) -> None:
    check(method, regression)


@holds("deep-regression-unlearning", 5)
def test_targets_have_the_mean_and_spread_of_all_training_targets(regression: Material) -> None:
    base = diabetes().labels
    assert base is not None
    labels = torch.cat([base, -3 * base], 1)
    n = 20_000
    drawn = drawn_targets(labels, n, torch.Generator().manual_seed(0)).double()
    mean, sd = labels.double().mean(0), labels.double().std(0, correction=0)
    assert drawn.shape == (n, 2)
    assert ((drawn.mean(0) - mean).abs() < 3 * sd / n**0.5).all()
    assert ((drawn.std(0) - sd).abs() < 3 * sd / (2 * n) ** 0.5).all()
    assert abs(float(torch.corrcoef(drawn.T)[0, 1])) < 3 / n**0.5  # each column has draws of its own
    few = Request.of_records(regression.train, regression.gone)
    assert few.forget is not None and few.retain is not None
    relabelled = GaussianFineTune().relabelled(few, Run(seed=3)).labels
    assert relabelled is not None and regression.train.labels is not None
    noise = torch.randn(len(few.forget), 1, generator=Run(seed=3).generator("targets"), dtype=torch.float64)
    everything = regression.train.labels.double()
    torch.testing.assert_close(
        relabelled.double(), everything.mean() + everything.std(correction=0) * noise, rtol=1e-6, atol=1e-6
    )


class Watched(GaussianFineTune):
    """Notes the targets that every row is trained with."""

    def loss(self, model: Any, batch: Any) -> Mean:
        for x, y in zip(batch.inputs["values"], batch.labels, strict=True):
            SEEN.setdefault(tuple(x.tolist()), []).append(float(y))
        return super().loss(model, batch)


SEEN: dict[tuple[float, ...], list[float]] = {}


@holds("deep-regression-unlearning", 5)
def test_targets_are_drawn_once(regression: Material) -> None:
    SEEN.clear()
    request = Request.of_records(regression.train, regression.gone)
    Watched(epochs=3, batch_size=16).forget(regression.model(), request, Run(seed=1))
    assert len(SEEN) == len(regression.train)
    assert all(len(targets) == 3 and len(set(targets)) == 1 for targets in SEEN.values())
    assert request.forget is not None and request.retain is not None
    for table, kept in ((request.retain, True), (request.forget, False)):
        assert table.labels is not None
        for x, y in zip(table.inputs["values"], table.labels, strict=True):
            assert (SEEN[tuple(x.tolist())][0] == float(y)) == kept


def test_a_second_request_of_a_run_draws_anew(regression: Material) -> None:
    run, request = Run(), Request.of_records(regression.train, regression.gone)
    model = regression.model()
    once, twice = (GaussianFineTune(batch_size=16).forget(model, request, run) for _ in range(2))
    assert not torch.equal(predict(once, regression.test), predict(twice, regression.test))


def test_classes_are_drawn_by_their_shares_and_tokens_are_refused() -> None:
    labels = torch.tensor([0] * 700 + [4] * 300)
    drawn = drawn_targets(labels, 10_000, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0, 4}
    assert abs(float((drawn == 4).double().mean()) - 0.3) < 3 * (0.21 / 10_000) ** 0.5
    with pytest.raises(EngramError, match="tokens"):
        drawn_targets(torch.zeros(4, 3, dtype=torch.long), 2, torch.Generator())


@pytest.mark.parametrize("error", ["squared", "absolute"])
def test_errors_of_rows_by_hand(error: str) -> None:
    outputs = torch.tensor([[1.0, 2.0], [0.0, -4.0], [5.0, 5.0]])
    targets = torch.tensor([[0.0, 4.0], [float("nan"), -1.0], [float("nan"), float("nan")]])
    wanted = {"squared": [2.5, 9.0, 0.0], "absolute": [1.5, 3.0, 0.0]}[error]
    assert row_errors(outputs, targets, error).tolist() == wanted


def test_a_target_that_is_missing_has_no_gradient() -> None:
    outputs = torch.tensor([[1.0], [-torch.inf]], requires_grad=True)
    row_errors(outputs, torch.tensor([[torch.nan], [-torch.inf]]), "absolute").sum().backward()
    assert outputs.grad is not None and outputs.grad.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("shapes", [((3, 1), (3,)), ((3,), (3, 1)), ((3, 1), (3, 2))])
def test_shapes_that_would_broadcast_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    outputs, targets = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(EngramError, match="one shape"):
        row_errors(outputs, targets)


def test_an_unknown_error_is_named() -> None:
    with pytest.raises(EngramError, match="unknown error 'square'; did you mean 'squared'"):
        row_errors(torch.zeros(1, 1), torch.zeros(1, 1), "square")


def test_it_forgets_what_fine_tuning_keeps() -> None:
    """On the patients with the slowest progression, against fine-tuning for as many epochs; at each of three seeds."""
    table = diabetes()
    assert table.labels is not None
    gone = table.take(table.labels[:, 0] < table.labels.quantile(0.2))
    request = Request.of_records(table, gone.ids)
    recipe = Recipe({"name": "MLP", "hidden": [32]}, Optimizer(lr=3e-3), epochs=30, batch_size=32)
    apart = []
    for seed in range(3):
        model = recipe(table, seed)
        plan: dict[str, Any] = {"optimizer": Optimizer(lr=3e-3), "epochs": 5, "batch_size": 32}
        drawn = GaussianFineTune(**plan).forget(model, request, Run(seed=seed))
        kept = Finetune(**plan).forget(model, request, Run(seed=seed))
        apart.append(_mean_error(drawn, gone) - _mean_error(kept, gone))
    assert min(apart) > 0


def _mean_error(model: nn.Module, table: Table) -> float:
    labels = table.labels
    assert isinstance(labels, Tensor)
    return float((predict(model, table) - labels).abs().mean())
