"""Every method works on a CUDA device, and at half precision."""

from __future__ import annotations

import pytest
from tests.test_conformance import TINY

from engram.engine.run import Run
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
