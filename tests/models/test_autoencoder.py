"""Autoencoders and their gate: what they compute, and that files give back the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from engram.errors import EngramError
from engram.models import load, save, seeded
from engram.models.autoencoder import Autoencoder, AutoencoderGate
from engram.models.encoders import MLP


def made(inputs: int = 6, code: int = 3, activation: str = "sigmoid", output: str = "linear") -> Autoencoder:
    with seeded(torch.Generator().manual_seed(0)):
        return Autoencoder(inputs, code, activation, output).double()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gate(count: int = 2) -> AutoencoderGate:
    with seeded(torch.Generator().manual_seed(0)):
        return AutoencoderGate(MLP(5, [4]), [Autoencoder(4, 2, "relu", "sigmoid") for _ in range(count)], 3.0)


@pytest.mark.parametrize(("name", "curve"), [("sigmoid", torch.sigmoid), ("relu", torch.relu), ("linear", lambda x: x)])
def test_code_and_rebuilt_rows_written_down(name: str, curve: Any) -> None:
    model, x = made(activation=name, output=name), normal(5, 6)
    into, out = (cast(nn.Linear, part[0]) for part in (model.encoder, model.decoder))
    code = curve(x @ into.weight.T + into.bias)
    rebuilt = curve(code @ out.weight.T + out.bias)
    found = model(x)
    torch.testing.assert_close(found[0], code)
    torch.testing.assert_close(found[1], rebuilt)
    torch.testing.assert_close(model.decode(model.encode(x)), rebuilt)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    model = made()
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    x = normal(4, 6)
    assert isinstance(again, Autoencoder) and again.config == model.config
    assert all(torch.equal(one, other) for one, other in zip(model(x), again(x), strict=True))


def test_bad_settings_are_named() -> None:
    with pytest.raises(EngramError, match="unknown activation of an autoencoder 'sigmoidal'; did you mean 'sigmoid'"):
        Autoencoder(3, 2, "sigmoidal")
    with pytest.raises(EngramError, match="a code of 0 units holds nothing"):
        Autoencoder(3, 0)


def test_the_gates_logits_are_errors_over_the_temperature() -> None:
    model, x = gate(3), normal(7, 5).float()
    model.standardise(normal(50, 4, seed=2).float() * 3 + 1)
    output = model(values=x)
    f = model.encoder(values=x).pooler_output
    for row in range(7):
        u = 1 / (1 + torch.exp(-(f[row] - model.mean) / model.deviation))
        for k, part in enumerate(model.autoencoders):
            wanted = -((part(u[None])[1][0] - u).norm() ** 2) / 3.0
            assert output.logits[row, k].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_features_are_standardised_and_constant_ones_left_alone() -> None:
    model = gate()
    features = normal(40, 4).float()
    features[:, 2] = 7.0
    model.standardise(features)
    wanted = features.double().std(0, correction=0)
    wanted[2] = 1.0
    torch.testing.assert_close(model.deviation.double(), wanted)
    torch.testing.assert_close(model.squashed(features)[:, 2], torch.full((40,), 0.5))


def test_a_gate_that_has_grown_is_saved_and_loaded(tmp_path: Path) -> None:
    model = gate(1)
    with seeded(torch.Generator().manual_seed(1)):
        model.autoencoders.append(Autoencoder(4, 2, "relu", "sigmoid"))
    model.standardise(normal(50, 4, seed=2).float())
    save(model, tmp_path / "gate")
    again = load(tmp_path / "gate")
    x = normal(7, 5).float()
    assert again(values=x).logits.shape == (7, 2)
    assert torch.equal(again(values=x).logits, model.eval()(values=x).logits)
