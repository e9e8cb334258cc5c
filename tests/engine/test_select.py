"""Weights that may move, and weights that keep their bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from engram.engine.select import Selection, top
from engram.errors import EngramError
from engram.models.build import build
from engram.stats.seeds import generator


def network() -> nn.Module:
    return build(
        {"name": "MLP", "hidden": [8]}, inputs={"values": (6,)}, classes=range(3), generator=generator("weights")
    )


def scores(model: nn.Module) -> dict[str, Tensor]:
    draws = generator("scores")
    return {name: torch.rand(p.shape, generator=draws, dtype=torch.float64) for name, p in model.named_parameters()}


def test_the_largest_share_over_all_tensors_together() -> None:
    found = top({"a": torch.tensor([[1.0, 9.0], [3.0, 4.0]]), "b": torch.tensor([8.0, 2.0])}, 0.5)
    assert found["a"].tolist() == [[False, True], [False, True]]
    assert found["b"].tolist() == [True, False]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.29, 0.5, 0.7, 1.0])
def test_as_many_as_the_share_says_also_among_equals(share: float) -> None:
    masks = top({"a": torch.ones(60), "b": torch.ones(4, 10)}, share)
    assert sum(int(mask.sum()) for mask in masks.values()) == round(100 * share)
    joined = torch.cat([mask.flatten() for mask in masks.values()])
    assert joined[: round(100 * share)].all()  # the first come first


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_is_between_0_and_1(share: float) -> None:
    with pytest.raises(EngramError, match="between 0 and 1"):
        top({"a": torch.ones(3)}, share)


def test_no_gradient_reaches_a_held_weight_and_the_others_have_the_usual_one() -> None:
    model = network()
    masks = top(scores(model), 0.4)
    x = torch.randn(5, 6, generator=generator("x"))
    plain = torch.autograd.grad(model(values=x).logits.square().sum(), list(model.parameters()))
    seen = torch.autograd.grad(Selection(model, masks).view(model)(values=x).logits.square().sum(), model.parameters())  # type: ignore[arg-type]
    for mask, one, other in zip(masks.values(), seen, plain, strict=True):
        assert torch.equal(one, torch.where(mask, other, 0.0))


def test_the_view_holds_weights_that_were_moved_and_settling_puts_them_back_to_the_bit() -> None:
    model = network()
    masks = top(scores(model), 0.4)
    selection, before = Selection(model, masks), copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.7).add_(0.3)
    moved = copy.deepcopy(model)
    x = torch.randn(5, 6, generator=generator("x"))
    seen = selection.view(model)(values=x).logits
    selection.settle(model)
    assert torch.equal(model(values=x).logits, seen)
    for mask, new, old, far in zip(
        masks.values(), model.parameters(), before.parameters(), moved.parameters(), strict=True
    ):
        assert torch.equal(new[~mask], old[~mask])
        assert torch.equal(new[mask], far[mask])


def test_a_parameter_without_a_mask_is_left_alone() -> None:
    model = network()
    first = next(name for name, _ in model.named_parameters())
    selection = Selection(model, {first: torch.zeros_like(model.get_parameter(first), dtype=torch.bool)})
    before = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    selection.settle(model)
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(new, old if name == first else old + 1.0)
