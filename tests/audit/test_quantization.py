"""Rounded weights: the numbers, and a memory that only hides below the rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.audit.planted import found
from torch import nn

from engram.audit.quantization import Quantization, rounded
from engram.core.finding import Verdict
from engram.core.probe import Subject
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.seeding import seeded
from engram.reproduce.facts import SmallGPT2

NAME = "probability that 4 bits add on {} rows"


def test_worked_numbers() -> None:
    layer = nn.Linear(3, 2, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.7, -0.34, 0.06], [0.0, 0.0, 0.0]]))
        layer.bias.fill_(0.123)
    new = rounded(layer, 4)  # seven steps of 0.1 a side
    assert torch.allclose(new.weight, torch.tensor([[0.7, -0.3, 0.1], [0.0, 0.0, 0.0]]))  # type: ignore[arg-type]
    assert torch.equal(new.bias, layer.bias)  # type: ignore[arg-type]
    assert float(layer.weight[0, 1].detach()) == pytest.approx(-0.34)  # the model itself stays


def test_embeddings_stay_and_conv1d_has_its_outputs_behind() -> None:
    with seeded(torch.Generator().manual_seed(0)):
        model = SmallGPT2(world=5).untrained()
    new = rounded(model, 3)
    own, other = dict(model.named_parameters()), dict(new.named_parameters())
    assert torch.equal(own["transformer.wte.weight"], other["transformer.wte.weight"])
    weight = other["transformer.h.0.attn.c_attn.weight"]  # [in, out]
    assert all(len(weight[:, k].detach().unique()) <= 7 for k in range(weight.shape[1]))
    assert any(len(weight[k].detach().unique()) > 7 for k in range(weight.shape[0]))
    again = rounded(new, 3)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(new.parameters(), again.parameters(), strict=True))


def test_a_memory_below_the_rounding_comes_back(memorised: Subject, run: Run) -> None:
    """A step along the forget rows' gradient, too small for the grid: forgotten in full precision, known in 4 bits."""
    model = memorised.model
    coarse = rounded(model, 4)
    forget = memorised.rows["forget"].batch(torch.arange(50))
    hidden = rounded(model, 4)
    grid = {n: (p.detach().amax() - p.detach().amin()) / 14 for n, p in coarse.named_parameters()}
    for _ in range(30):
        loss = nn.functional.cross_entropy(hidden(**forget.inputs).logits, forget.labels)  # type: ignore[arg-type]
        for (name, p), g in zip(
            hidden.named_parameters(), torch.autograd.grad(loss, list(hidden.parameters())), strict=True
        ):
            with torch.no_grad():
                bound = 0.3 * grid[name] if p.ndim > 1 else 0.0
                old = dict(coarse.named_parameters())[name]
                p.copy_((p + 0.1 * grid[name] * g.sign()).clamp(old - bound, old + bound))
    findings = found(Quantization(oracles=3), replace(memorised, model=hidden), run)
    on_forget = findings[NAME.format("forget")]
    assert on_forget.value > 0.2 > max(on_forget.reference) and on_forget.verdict != Verdict.PASS


def test_eight_bits_add_nothing(memorised: Subject, run: Run) -> None:
    findings = found(Quantization(bits=8, oracles=0), memorised, run)
    assert all(abs(finding.value) < 0.02 for finding in findings.values()) and len(findings) == 2


def test_one_bit_is_refused(memorised: Subject) -> None:
    with pytest.raises(EngramError, match="needs 2 bits or more"):
        Quantization(bits=1).examine(memorised)
