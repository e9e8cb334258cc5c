"""SalUn: the mask, the weights that keep their bits, its limits, and what it does on digits."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.forget.digit_three import RECIPE, Split, scores, weights
from torch import Tensor, nn

from engram.core.request import Request
from engram.core.unlearning import usual_loss
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.errors import EngramError
from engram.forget.amnesiac import Amnesiac
from engram.forget.finetune import Finetune
from engram.forget.salun import SalUn

FAST = Optimizer(lr=1e-3)
HEAVY = Optimizer("sgd", lr=0.05, momentum=0.9, weight_decay=0.1)


def by_hand(model: nn.Module, request: Request, share: float) -> Tensor:
    """The mask over all weights in one vector: the largest gradients of all forget rows at once."""
    twin = copy.deepcopy(model)
    assert request.forget is not None
    usual_loss(twin, request.forget.batch(torch.arange(len(request.forget)))).value.backward()
    sizes = torch.cat([p.grad.abs().flatten() for p in twin.parameters() if p.grad is not None])
    threshold = sizes.sort(descending=True).values[round(share * len(sizes)) - 1]
    return sizes >= threshold


@pytest.mark.parametrize("optimizer", [FAST, HEAVY], ids=["adam", "weight decay"])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_weights_outside_the_mask_keep_their_bits(
    model: nn.Module, request_of_three: Request, share: float, optimizer: Optimizer
) -> None:
    new = SalUn(share=share, optimizer=optimizer, epochs=2).forget(model, request_of_three)
    mask, before, after = by_hand(model, request_of_three, share), weights(model), weights(new)
    assert abs(int(mask.sum()) - share * len(mask)) < 1
    assert torch.equal(after[~mask], before[~mask])
    assert (after[mask] != before[mask]).float().mean() > 0.95


def test_a_share_of_one_is_random_labelling_and_of_none_moves_nothing(
    model: nn.Module, request_of_three: Request
) -> None:
    same = {"optimizer": HEAVY, "epochs": 2, "batch_size": 64}
    whole = SalUn(share=1.0, **same).forget(model, request_of_three, Run(seed=2))  # type: ignore[arg-type]
    plain = Amnesiac(**same).forget(model, request_of_three, Run(seed=2))  # type: ignore[arg-type]
    assert torch.equal(weights(whole), weights(plain))
    none = SalUn(share=0.0, **same).forget(model, request_of_three)  # type: ignore[arg-type]
    assert torch.equal(weights(none), weights(model))


def test_the_chosen_weights_move_as_if_the_others_took_no_gradient(model: nn.Module, request_of_three: Request) -> None:
    """One full-batch step of plain gradient descent: the usual one, inside the mask."""
    assert request_of_three.forget is not None and request_of_three.retain is not None
    n = len(request_of_three.forget) + len(request_of_three.retain)
    same = {"optimizer": Optimizer("sgd", lr=0.1, momentum=0.0), "epochs": 1, "batch_size": n}
    masked = SalUn(share=0.3, **same).forget(model, request_of_three)  # type: ignore[arg-type]
    free = Amnesiac(**same).forget(model, request_of_three)  # type: ignore[arg-type]
    mask = by_hand(model, request_of_three, 0.3)
    torch.testing.assert_close(weights(masked), torch.where(mask, weights(free), weights(model)), rtol=0, atol=1e-6)


def test_a_frozen_part_has_no_share_in_the_mask(model: nn.Module, request_of_three: Request) -> None:
    half = copy.deepcopy(model)
    half.encoder.requires_grad_(False)  # type: ignore[union-attr,operator]
    new = SalUn(share=0.5, optimizer=FAST, epochs=2).forget(half, request_of_three)
    changed = [int((p != q).sum()) for p, q in zip(new.parameters(), half.parameters(), strict=True)]
    own = sum(p.numel() for p in half.head.parameters())  # type: ignore[union-attr,operator]
    assert sum(changed[:-2]) == 0
    assert 0.45 * own < sum(changed) <= 0.5 * own


def test_a_share_above_one_is_refused(model: nn.Module, request_of_three: Request) -> None:
    with pytest.raises(EngramError, match="between 0 and 1"):
        SalUn(share=1.5).forget(model, request_of_three)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_half_of_the_weights_forget_a_class_sooner_than_finetuning_them_all(
    split: Split, request_of_three: Request, seed: int
) -> None:
    model = RECIPE(split[0], seed)
    before, good = scores(model, split)
    same = {"optimizer": FAST, "epochs": 2, "batch_size": 64}
    forgotten, kept = scores(SalUn(**same).forget(model, request_of_three, Run(seed=seed)), split)  # type: ignore[arg-type]
    left, _ = scores(Finetune(**same).forget(model, request_of_three, Run(seed=seed)), split)  # type: ignore[arg-type]
    assert forgotten < 0.35 < 0.55 < left < before
    assert kept > good - 0.03
