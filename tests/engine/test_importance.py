"""Importances: the quick forms against one row at a time, and the exact Fisher against enumeration."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engram.data.table import MISSING, Batch, Table
from engram.engine import persample
from engram.engine.importance import importance
from engram.engine.losses import per_row
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.build import build
from engram.stats.seeds import generator

SHAPE = (1, 8, 8)
SPECS: dict[str, Any] = {
    "MLP": {"name": "MLP", "hidden": [10, 6], "norm": "layer"},
    "ConvNet": {"name": "ConvNet", "widths": [4, 6]},
    "ViT": {"name": "ViT", "patch_size": 4, "width": 8, "depth": 1, "heads": 2},
}


def rows(n: int = 11) -> Table:
    """Images of the classes 0 to 2; one of them has no label."""
    draws = generator("images")
    labels = torch.randint(3, (n,), generator=draws)
    labels[2] = MISSING
    return Table({"pixel_values": torch.randn(n, *SHAPE, generator=draws)}, labels)


def network(name: str) -> nn.Module:
    """A model whose running statistics are not those of a new one, in training mode."""
    model = build(SPECS[name], inputs={"pixel_values": SHAPE}, classes=range(3), generator=generator(name)).train()
    with torch.no_grad():
        model(**rows().batch(torch.arange(11)).inputs)
    return model


def row_by_row(model: nn.Module, table: Table, power: int = 2, norm: bool = False) -> dict[str, Tensor]:
    """The mean of |gradient| ** power over batches of one row."""
    model = copy.deepcopy(model).eval()
    params = dict(model.named_parameters())
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in params.items()}
    for batch in table.batches(1, shuffle=False):
        logits = model(**batch.inputs).logits
        if norm:
            loss = logits[torch.isfinite(logits)].square().sum()
        else:
            assert batch.labels is not None
            loss = F.cross_entropy(logits, batch.labels, ignore_index=MISSING, reduction="sum")
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        for name, grad in zip(params, grads, strict=True):
            total[name] += 0 if grad is None else grad.double().abs() ** power
    return {name: value / len(table) for name, value in total.items()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float = 1e-4) -> None:
    """Relative to each parameter; where gradients vanish (the bias of keys), rounding is on the scale of the model."""
    assert found.keys() == wanted.keys()
    scale = max(float(value.max()) for value in wanted.values())
    for name, value in wanted.items():
        assert found[name].dtype == torch.float64 and found[name].shape == value.shape
        assert torch.allclose(found[name], value, rtol=rtol, atol=1e-6 * scale), name


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("norm", [False, True], ids=["ce", "norm"])
@pytest.mark.parametrize("name", SPECS)
def test_per_row_fisher_is_the_loop_over_single_rows(name: str, norm: bool, power: int) -> None:
    model = network(name)
    found = importance(model, rows(), loss="norm" if norm else "ce", power=power, batch_size=4)
    same(found, row_by_row(model, rows(), power, norm))


@pytest.mark.parametrize(("name", "factored"), [("MLP", True), ("ConvNet", True), ("ViT", False)])
def test_which_models_need_a_gradient_per_row(name: str, factored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("one gradient per row")

    monkeypatch.setattr(persample, "gradients", refuse)
    model, batch = network(name).eval(), rows().batch(torch.arange(5))
    if factored:
        assert persample.power_sums(model, batch, per_row, 2)  # type: ignore[arg-type]
    else:
        with pytest.raises(AssertionError, match="one gradient per row"):
            persample.power_sums(model, batch, per_row, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SPECS)
def test_gradients_of_every_row(name: str) -> None:
    model, batch = network(name).eval(), rows().batch(torch.arange(11))
    found = persample.gradients(model, batch, per_row)  # type: ignore[arg-type]
    squares = {key: value.double().square().mean(0) for key, value in found.items()}
    same(squares, row_by_row(model, rows()))


def test_unborn_and_retired_classes() -> None:
    model = build(SPECS["MLP"], inputs={"pixel_values": SHAPE}, classes=(4, 0, 2, 1), generator=generator("head"))
    model.head.retire((4,))  # type: ignore[union-attr, operator]
    for norm in (False, True):
        found = importance(model, rows(), loss="norm" if norm else "ce")
        same(found, row_by_row(model, rows(), norm=norm))
        assert (found["head.weight"][0] == 0).all() and (found["head.weight"][1:] > 0).any(1).all()
    everything = importance(model, rows(), labels="all")
    assert all(torch.isfinite(value).all() for value in everything.values())


def test_rows_of_tokens_pass_through_linear_layers() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.utils.skip_init(nn.Linear, 8, 8) for _ in range(2))
            with torch.no_grad():
                for p in self.parameters():
                    p.copy_(torch.randn(p.shape, generator=generator(tuple(p.shape))))

        def forward(self, pixel_values: Tensor) -> Any:
            hidden = torch.relu(self.one(pixel_values[:, 0]))
            return type("Out", (), {"logits": self.two(hidden).mean(1)})

    same(importance(Tokens(), rows()), row_by_row(Tokens(), rows()))


# --- the exact Fisher


def softmax_regression() -> tuple[nn.Module, Table]:
    x = torch.randn(5, 3, generator=generator("five"))
    model = build("Identity", inputs={"values": (3,)}, classes=range(4), generator=generator("w"))
    return model, Table({"values": x}, torch.tensor([0, 3, 1, 1, 2]))


@pytest.mark.parametrize("power", [1, 2])
def test_all_labels_is_the_enumeration_over_classes(power: int) -> None:
    model, table = softmax_regression()
    x, W, b = (t.detach().double() for t in (table.inputs["values"], model.head.weight, model.head.bias))  # type: ignore
    p = torch.softmax(x @ W.T + b, 1)
    weight, bias = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for i in range(5):
        for c in range(4):  # d(-log p_c)/dW = (p - e_c) xᵀ
            delta = (p[i] - F.one_hot(torch.tensor(c), 4)).abs()
            weight += p[i, c] * (delta[:, None] * x[i].abs()) ** power / 5
            bias += p[i, c] * delta**power / 5
    found = importance(model, table.unlabelled(), labels="all", power=power, batch_size=2)
    assert torch.allclose(found["head.weight"], weight, atol=1e-5)
    assert torch.allclose(found["head.bias"], bias, atol=1e-5)


def test_all_labels_of_a_model_without_a_closed_form() -> None:
    model, table = network("ViT").eval(), rows(3).unlabelled()
    total: dict[str, Tensor] = {}
    for row in range(3):
        one = table.take([row])
        p = torch.softmax(model(**one.batch(torch.arange(1)).inputs).logits.detach(), 1)[0].double()
        for c in range(3):
            for name, value in row_by_row(model, one.with_labels(torch.tensor([c]))).items():
                total[name] = total.get(name, torch.zeros_like(value)) + p[c] * value / 3
    same(importance(model, table, labels="all"), total)


def test_labels_of_the_model_are_its_predictions() -> None:
    model, table = softmax_regression()
    told = model(**table.batch(torch.arange(5)).inputs).logits.argmax(1)
    same(importance(model, table.unlabelled(), labels="model"), row_by_row(model, table.with_labels(told)))


def test_sampled_labels_have_the_exact_fisher_as_their_mean() -> None:
    model, table = softmax_regression()
    many = table.unlabelled().take(torch.arange(5).repeat(800))
    sampled = importance(model, many, labels="sampled", run=Run(seed=1))
    exact = importance(model, table, labels="all")
    assert torch.allclose(sampled["head.weight"], exact["head.weight"], rtol=0.15, atol=0.02)
    again = importance(model, many, labels="sampled", run=Run(seed=1))
    assert torch.equal(sampled["head.weight"], again["head.weight"])
    assert not torch.equal(
        sampled["head.weight"], importance(model, many, labels="sampled", run=Run(seed=2))["head.weight"]
    )


# --- the form of published code


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("name", SPECS)
def test_the_batch_form_is_the_loop_over_batches_and_depends_on_their_size(name: str, power: int) -> None:
    model, table = network(name), rows()
    twin = copy.deepcopy(model).eval()
    params = dict(twin.named_parameters())
    found = {size: importance(model, table, per_sample=False, batch_size=size, power=power) for size in (1, 4)}
    total = {key: torch.zeros_like(p, dtype=torch.float64) for key, p in params.items()}
    for start in (0, 4, 8):
        batch = table.batch(torch.arange(start, min(start + 4, 11)))
        loss = F.cross_entropy(twin(**batch.inputs).logits, batch.labels, ignore_index=MISSING)
        for key, grad in zip(params, torch.autograd.grad(loss, list(params.values())), strict=True):
            total[key] += grad.double().abs() ** power / 3
    same(found[4], total)
    same(found[1], row_by_row(model, table, power))
    assert not torch.allclose(found[4]["head.weight"], found[1]["head.weight"], rtol=0.05)


# --- what stays as it was, and what is refused


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("options", [{}, {"labels": "all"}, {"per_sample": False}], ids=["rows", "all", "batches"])
def test_the_model_is_unchanged(name: str, options: dict[str, Any]) -> None:
    model = network(name)
    model.encoder.eval()  # type: ignore[union-attr, operator]
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    importance(model, rows(), **options)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_only_trainable_parameters_have_one() -> None:
    model = network("ConvNet")
    whole = importance(model, rows())
    model.encoder.requires_grad_(False)  # type: ignore[union-attr, operator]
    found = importance(model, rows())
    assert set(found) == {"head.weight", "head.bias"}
    same(found, {name: whole[name] for name in found})


def test_numbers_as_labels() -> None:
    model = build("Identity", inputs={"values": (2,)}, outputs=1, generator=generator("v"))
    table = Table({"values": torch.tensor([[1.0, 2.0], [3.0, -1.0]])}, torch.tensor([1.0, -2.0]))
    x = table.inputs["values"]
    error = 2 * (model(values=x).logits.detach() - table.labels)
    found = importance(model, table)
    assert torch.allclose(found["head.weight"][0], (error * x).square().mean(0).double(), rtol=1e-5)


def test_rows_are_counted_and_no_rows_give_nothing() -> None:
    run, model = Run(), network("MLP")
    importance(model, rows(), run=run)
    assert run.cost.rows == 11
    empty = importance(model, rows().take([]))
    assert all(not value.any() for value in empty.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "mse"}, "unknown loss 'mse'"),
        ({"labels": "tru"}, "did you mean 'true'"),
        ({}, "labels='model' does without"),
        ({"labels": "all", "per_sample": False}, "does not go with per_sample=False"),
    ],
)
def test_what_cannot_be_meant(options: dict[str, Any], words: str) -> None:
    with pytest.raises(EngramError, match=words):
        importance(network("MLP"), rows().unlabelled(), **options)


def test_a_batch_of_no_rows() -> None:
    batch = Batch({"pixel_values": torch.zeros(0, *SHAPE)}, torch.zeros(0, dtype=torch.long), torch.arange(0))
    sums = persample.power_sums(network("MLP").eval(), batch, per_row, 2)  # type: ignore[arg-type]
    assert all(not value.any() for value in sums.values())
