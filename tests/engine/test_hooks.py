"""Layers read during a forward pass: what is read, and that nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from engram.engine.hooks import capture
from engram.errors import EngramError
from engram.models.seeding import seeded


@pytest.fixture
def model() -> nn.Sequential:
    with seeded(torch.Generator().manual_seed(0)):
        return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 2)))


def test_outputs_of_the_last_pass_with_their_gradient(model: nn.Sequential) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    with capture(model, ("0", "1.0")) as seen:
        assert seen == {}
        model(-x)
        out = model(x)
    assert set(seen) == {"0", "1.0"}
    torch.testing.assert_close(seen["0"], x @ model[0].weight.T + model[0].bias, rtol=0, atol=1e-6)
    torch.testing.assert_close(model[1][1](seen["1.0"]), out, rtol=0, atol=0)
    [gradient] = torch.autograd.grad(seen["1.0"].sum(), model[0].bias)
    torch.testing.assert_close(gradient, (1 - seen["1.0"] ** 2).sum(0), rtol=0, atol=1e-6)


def test_only_own_handles_are_taken_off_even_after_an_error(model: nn.Sequential) -> None:
    others: list[Tensor] = []
    model[0].register_forward_hook(lambda _, __, output: others.append(output))
    with pytest.raises(RuntimeError), capture(model, ["0", "1"]):
        model(torch.zeros(2, 5))
    assert [len(part._forward_hooks) for part in model.modules()] == [0, 1, 0, 0, 0]
    with capture(model, ["0"]) as seen:
        pass
    model(torch.zeros(2, 3))
    assert seen == {} and len(others) == 1


def test_a_layer_that_cannot_be_read_is_named(model: nn.Sequential) -> None:
    with pytest.raises(EngramError, match=r"unknown layer '1\.5'; did you mean '1\.[01]'"), capture(model, ["1.5"]):
        pass
    with seeded(torch.Generator().manual_seed(0)):
        pair = nn.Sequential(nn.LSTM(3, 2))
    with pytest.raises(EngramError, match=r"'0' \(LSTM\) gives a tuple"), capture(pair, ["0"]):
        pair(torch.zeros(1, 2, 3))
    assert not pair[0]._forward_hooks
    with capture(model, ["0"]), pytest.raises(EngramError, match="unknown layer"), capture(model, ["0", "no"]):
        pass
    assert not model[0]._forward_hooks
