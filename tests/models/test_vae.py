"""The variational autoencoder: its two terms, the code's draw, its shape."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from engram.errors import EngramError
from engram.models.seeding import seeded
from engram.models.vae import VAE


def made(inputs: int = 6, latent: int = 3, hidden: Sequence[int] = (5, 4), output: str = "linear") -> VAE:
    with seeded(torch.Generator().manual_seed(0)):
        return VAE(inputs, latent, hidden, output).double()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_divergence_is_that_of_two_normals() -> None:
    vae, x = made(), normal(7, 6)
    mean, logvar = vae.encode(x)
    wanted = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(vae(x)[1], wanted)


def test_error_is_the_squared_distance_of_a_row_from_its_decoded_code() -> None:
    vae, x, noise = made(), normal(7, 6), normal(7, 3, seed=2)
    mean, logvar = vae.encode(x)
    for given, code in ((None, mean), (noise, mean + logvar.exp().sqrt() * noise)):
        wanted = torch.stack([(one - other).norm() ** 2 for one, other in zip(vae.decode(code), x, strict=True)])
        torch.testing.assert_close(vae(x, given)[0], wanted)


def test_draws_of_the_code_have_the_mean_and_variance_that_were_encoded() -> None:
    vae, x = made(), normal(1, 6).expand(20000, 6)
    vae.decoder = nn.Sequential()  # tells the code itself
    vae.decode = lambda code: seen.append(code) or x  # type: ignore[method-assign,assignment,func-returns-value]
    seen: list[Tensor] = []
    vae(x, normal(20000, 3, seed=3))
    mean, logvar = vae.encode(x[:1])
    torch.testing.assert_close(seen[0].mean(0), mean[0], rtol=0, atol=0.05)
    torch.testing.assert_close(seen[0].var(0), logvar[0].exp(), rtol=0.05, atol=0)


@pytest.mark.parametrize("hidden", [(), (5,), (5, 4)])
def test_the_decoder_has_the_encoders_widths_in_reverse(hidden: tuple[int, ...]) -> None:
    layers = [m for m in made(hidden=hidden).modules() if isinstance(m, nn.Linear)]
    shapes = [(m.in_features, m.out_features) for m in layers]
    down, up = (6, *hidden), (3, *hidden[::-1], 6)
    ends = [(down[-1], 3)] * 2
    assert shapes == [*pairwise(down), *ends, *pairwise(up)]


def test_a_sigmoid_ends_the_decoder_where_it_is_asked_for() -> None:
    codes = 100 * normal(50, 3)
    bounded, free = (made(output=output).decode(codes) for output in ("sigmoid", "linear"))
    torch.testing.assert_close(bounded, torch.sigmoid(free))
    assert free.abs().max() > 1


def test_an_unknown_output_is_named() -> None:
    with pytest.raises(EngramError, match="unknown output 'sigmoidal'; did you mean 'sigmoid'"):
        made(output="sigmoidal")
