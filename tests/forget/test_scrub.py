"""SCRUB: its limits, its two kinds of steps, and what it does on digits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.forget.digit_three import RECIPE, Split, scores
from torch import nn

from engram.core.request import Request
from engram.data.table import Batch
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.errors import EngramError
from engram.forget.finetune import Finetune
from engram.forget.scrub import SCRUB

FAST = Optimizer(lr=3e-3)


@pytest.fixture(scope="module")
def other(split: Split) -> nn.Module:
    return RECIPE(split[0], 7)


def test_without_max_steps_and_without_alpha_it_is_finetuning(model: nn.Module, request_of_three: Request) -> None:
    same = {"optimizer": FAST, "epochs": 3, "batch_size": 50}
    one = SCRUB(msteps=0, alpha=0.0, gamma=1.0, **same).forget(model, request_of_three, Run(seed=4))  # type: ignore[arg-type]
    two = Finetune(**same).forget(model, request_of_three, Run(seed=4))  # type: ignore[arg-type]
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(one.parameters(), model.parameters(), strict=True))


def test_the_teacher_is_where_the_divergence_has_no_gradient(model: nn.Module, request_of_three: Request) -> None:
    """So the student does not leave by itself: without gamma, gradient descent stays at the start."""
    plain = Optimizer("sgd", lr=0.1, momentum=0.0)
    new = SCRUB(alpha=1.0, gamma=0.0, msteps=1, epochs=2, optimizer=plain, batch_size=512).forget(
        model, request_of_three
    )
    for p, q in zip(model.parameters(), new.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_losses_of_the_two_kinds_of_steps(
    model: nn.Module, other: nn.Module, request_of_three: Request, temperature: float
) -> None:
    forget, retain = request_of_three.forget, request_of_three.retain
    assert forget is not None and retain is not None
    method = SCRUB(alpha=0.3, gamma=0.8, temperature=temperature)
    method.targets(model, request_of_three, Run())
    rows = torch.tensor([4, 9, 0, 30])

    def divergence(batch: Batch) -> torch.Tensor:
        told = torch.softmax(model(**batch.inputs).logits / temperature, 1)
        said = torch.log_softmax(other(**batch.inputs).logits / temperature, 1)
        return temperature**2 * F.kl_div(said, told, reduction="batchmean")

    away, near = forget.batch(rows), retain.batch(rows)
    assert near.labels is not None
    torch.testing.assert_close(method.terms(other, away, None).value, -divergence(away), rtol=1e-4, atol=1e-6)
    error = F.cross_entropy(other(**near.inputs).logits, near.labels)
    wanted = 0.3 * divergence(near) + 0.8 * error
    torch.testing.assert_close(method.terms(other, None, near).value, wanted, rtol=1e-4, atol=1e-6)


def test_max_steps_come_first_in_the_first_epochs_alone(request_of_three: Request) -> None:
    forget, retain = request_of_three.forget, request_of_three.retain
    assert forget is not None and retain is not None
    method = SCRUB(msteps=2, batch_size=100)
    for epoch in range(4):
        found = list(method.batches(request_of_three, epoch, Run()))
        away = [batch.rows for batch, _ in found if batch is not None]
        near = [batch.rows for _, batch in found if batch is not None]
        assert len(torch.unique(torch.cat(near))) == len(retain)
        assert [first is None for first, _ in found] == [False] * len(away) + [True] * len(near)
        assert (len(torch.cat(away)) == len(forget)) if epoch < 2 else not away


def test_without_gamma_no_label_is_needed(model: nn.Module, request_of_three: Request) -> None:
    assert request_of_three.forget is not None and request_of_three.retain is not None
    bare = request_of_three.but(
        forget=request_of_three.forget.unlabelled(), retain=request_of_three.retain.unlabelled()
    )
    same = SCRUB(gamma=0.0, epochs=2, optimizer=FAST)
    one, two = (same.forget(model, request) for request in (bare, request_of_three))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_a_model_of_numbers_is_refused(split: Split) -> None:
    few = split[0].take(range(20))
    assert few.labels is not None
    numbers = few.with_labels(few.labels[:, None].float())
    model = Recipe({"name": "MLP", "hidden": [4]}, epochs=1)(numbers, 0)
    with pytest.raises(EngramError, match="no class probabilities"):
        SCRUB().forget(model, Request.of_records(numbers, numbers.ids[:5]))


def test_columns_of_dead_classes_do_no_harm(split: Split) -> None:
    few = split[0].of_classes([1, 3, 8]).take(range(60))
    model = Recipe({"name": "MLP", "hidden": [8]}, epochs=1)(few, 0)
    new = SCRUB(optimizer=FAST, epochs=3, batch_size=16).forget(model, Request.of_classes(few, (3,)))
    assert predict(new, few)[:, [1, 3, 8]].isfinite().all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_max_steps_forget_what_min_steps_alone_leave(split: Split, request_of_three: Request, seed: int) -> None:
    model = RECIPE(split[0], seed)
    before, good = scores(model, split)
    same = {"optimizer": FAST, "epochs": 4, "batch_size": 64}
    forgotten, kept = scores(SCRUB(msteps=3, **same).forget(model, request_of_three, Run(seed=seed)), split)  # type: ignore[arg-type]
    left, _ = scores(SCRUB(msteps=0, **same).forget(model, request_of_three, Run(seed=seed)), split)  # type: ignore[arg-type]
    assert forgotten < 0.05 < 0.2 < left < before
    assert kept > good - 0.02
