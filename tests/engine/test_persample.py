"""Per-row gradients of layers as they may stand in foreign models; engram's own stand in the tests of importances."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engram.data.table import Batch
from engram.engine import persample
from engram.engine.persample import gradients, power_sums
from engram.models.output import Output
from engram.models.seeding import seeded
from engram.stats.seeds import generator

Maker = Callable[[], nn.Module]


class Net(nn.Module):
    """Any body from [B, …] to [B, …], its outputs taken as logits."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Output:
        return Output(logits=self.body(x).flatten(1))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Tied(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self[2].weight = self[0].weight


class ByWeight(nn.Sequential):
    """Uses a layer's weight, and never calls the layer."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 4, bias=False), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self[1](torch.tanh(F.linear(x, self[0].weight)))


class Unused(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 3), nn.Linear(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self[0](x)


class RowsAsOne(nn.Module):
    """A layer that sees the pieces of all rows as rows of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.tanh(self.layer(x.reshape(-1, 3)))
        return self.last(pieces.reshape(len(x), 2, 4).mean(1))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.full((6,), 0.5)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.scale * x))


def _frozen() -> nn.Module:
    body = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    body[2].requires_grad_(False)
    body[4].bias.requires_grad_(False)
    return body


chain = nn.Sequential
IMAGE, VECTOR = (2, 7, 6), (6,)
FACTORED: dict[str, tuple[Maker, tuple[int, ...]]] = {
    "stride, dilation and padding": (lambda: nn.Conv2d(2, 3, (3, 2), (2, 1), (2, 1), (1, 2)), IMAGE),
    "a convolution without bias": (lambda: nn.Conv2d(2, 3, 3, bias=False), IMAGE),
    "batch norm of images": (lambda: chain(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3)), IMAGE),
    "batch norm of vectors": (lambda: chain(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), VECTOR),
    "layer norm over two dimensions": (
        lambda: chain(nn.LayerNorm((7, 6)), nn.Flatten(), nn.Linear(84, 2)),
        IMAGE,
    ),
    "linear on sequences": (
        lambda: chain(nn.Linear(6, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)),
        (5, 6),
    ),
    "linear on sequences of sequences": (lambda: chain(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 2)), IMAGE),
    "frozen parts": (_frozen, VECTOR),
    "a layer that nothing uses": (Unused, VECTOR),
}
SINGLE: dict[str, tuple[Maker, tuple[int, ...]]] = {
    "groups": (lambda: nn.Conv2d(2, 4, 3, groups=2), IMAGE),
    "padding by name": (lambda: nn.Conv2d(2, 3, 3, padding="same"), IMAGE),
    "padding by reflection": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), IMAGE),
    "another kind of layer": (lambda: chain(nn.Conv1d(5, 3, 2), nn.Flatten(), nn.Linear(15, 2)), (5, 6)),
    "a parameter of its own": (Own, VECTOR),
    "a layer used twice": (Twice, VECTOR),
    "a weight in two layers": (Tied, VECTOR),
    "an output that is overwritten": (
        lambda: chain(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)),
        VECTOR,
    ),
    "a weight without its layer": (ByWeight, VECTOR),
    "rows that are cut": (RowsAsOne, VECTOR),
}
ALL = {**FACTORED, **SINGLE}


def network(name: str) -> nn.Module:
    make, _ = ALL[name]
    with seeded(generator(name)):
        model = Net(make()).eval()
    for key, value in model.named_buffers():
        if value.is_floating_point():
            value += torch.rand(value.shape, generator=generator(name, key))
    return model


def batch(name: str, n: int = 11) -> Batch:
    shape = ALL[name][1]
    return Batch({"x": torch.randn(n, *shape, generator=generator("x", name))}, torch.arange(n) % 3, torch.arange(n))


def row_loss(logits: Tensor, labels: Tensor | None) -> Tensor:
    assert labels is not None
    return (1 + labels) * torch.sin(logits).sum(1)


def loop(model: nn.Module, rows: Batch) -> dict[str, Tensor]:
    """The gradient of every row by itself, [B, …]."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found: dict[str, list[Tensor]] = {name: [] for name in params}
    assert rows.labels is not None
    for k in range(len(rows)):
        loss = row_loss(model(x=rows.inputs["x"][k : k + 1]).logits, rows.labels[k : k + 1])[0]
        for name, g in zip(params, torch.autograd.grad(loss, [*params.values()], allow_unused=True), strict=True):
            found[name].append(torch.zeros_like(params[name]) if g is None else g)
    return {name: torch.stack(values) for name, values in found.items()}


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].shape == value.shape, name
        assert torch.allclose(found[name].double(), value.double(), rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("name", ALL)
def test_sums_of_powers_are_those_of_a_loop_over_rows(name: str, power: int) -> None:
    model, rows = network(name), batch(name)
    sums = {key: g.double().abs().pow(power).sum(0) for key, g in loop(model, rows).items()}
    found = power_sums(model, rows, row_loss, power)
    assert {value.dtype for value in found.values()} == {torch.float64}
    close(found, sums)


@pytest.mark.parametrize("name", SINGLE)
def test_gradients_are_those_of_a_loop_over_rows(name: str) -> None:
    close(gradients(network(name), batch(name), row_loss), loop(network(name), batch(name)))


@pytest.mark.parametrize("name", ALL)
def test_which_layers_need_a_gradient_per_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = persample.gradients

    def watched(model: nn.Module, rows: Batch, loss: persample.RowLoss) -> dict[str, Tensor]:
        calls.append(len(rows))
        return real(model, rows, loss)

    monkeypatch.setattr(persample, "gradients", watched)
    monkeypatch.setattr(persample, "CHUNK", 4)
    power_sums(network(name), batch(name), row_loss, 2)
    assert calls == ([4, 4, 3] if name in SINGLE else [])


@pytest.mark.parametrize("size", [1, 4, 11, 32])
@pytest.mark.parametrize("name", ["groups", "a convolution without bias"])
def test_chunks_change_nothing(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = power_sums(network(name), batch(name), row_loss, 2)
    monkeypatch.setattr(persample, "CHUNK", size)
    close(power_sums(network(name), batch(name), row_loss, 2), wanted)


@pytest.mark.parametrize("name", ["frozen parts", "a parameter of its own"])
def test_no_gradient_stays_behind(name: str) -> None:
    model = network(name)
    power_sums(model, batch(name), row_loss, 2)
    gradients(model, batch(name), row_loss)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["frozen parts", "a parameter of its own"])
def test_rows_without_labels(name: str) -> None:
    def norm(logits: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is None
        return logits.square().sum(1)

    model, rows = network(name), batch(name)
    unlabelled = Batch(rows.inputs, None, rows.rows)
    sums = {key: g.double().square().sum(0) for key, g in gradients(model, unlabelled, norm).items()}
    close(power_sums(model, unlabelled, norm, 2), sums)
