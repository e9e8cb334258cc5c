"""Every method works on a CUDA device, and at half precision."""

from __future__ import annotations

import pytest
import torch
from tests.test_conformance import TINY

from engram.engine.run import Run
from engram.models.seeding import seeded
from engram.testing import Material, digits, outcome


@pytest.fixture(scope="module")
def material() -> Material:
    return digits()


@pytest.mark.parametrize("name", TINY)
def test_at_half_precision(name: str, material: Material) -> None:
    outcome(TINY[name], material, Run(precision="bfloat16"))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TINY)
def test_on_a_gpu(name: str, precision: str, material: Material) -> None:
    outcome(TINY[name], material, Run(device="cuda", precision=precision))


@pytest.mark.gpu
def test_draws_on_a_gpu_follow_the_seed() -> None:
    kept = torch.cuda.get_rng_state()
    with seeded(torch.Generator().manual_seed(3)):
        first = torch.rand(5, device="cuda")
    with seeded(torch.Generator().manual_seed(3)):
        assert torch.equal(torch.rand(5, device="cuda"), first)
    assert torch.equal(torch.cuda.get_rng_state(), kept)
