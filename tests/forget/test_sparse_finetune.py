"""Sparse fine-tuning: without the penalty, one step of it, its decay, and what it does on digits."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.forget.digit_three import RECIPE, Split
from torch import nn

from engram.core.request import Request
from engram.core.unlearning import usual_loss
from engram.engine.optimizer import Optimizer
from engram.engine.predict import accuracy, predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.forget.finetune import Finetune
from engram.forget.sparse_finetune import SparseFinetune, l1

SGD = Optimizer("sgd", lr=0.01)


@pytest.mark.parametrize("optimizer", [SGD, Optimizer(lr=1e-3)], ids=["sgd", "adam"])
def test_without_the_penalty_it_is_finetuning(
    model: nn.Module, request_of_three: Request, optimizer: Optimizer
) -> None:
    same = {"optimizer": optimizer, "epochs": 3, "batch_size": 50}
    one = SparseFinetune(gamma=0.0, **same).forget(model, request_of_three, Run(seed=5))  # type: ignore[arg-type]
    two = Finetune(**same).forget(model, request_of_three, Run(seed=5))  # type: ignore[arg-type]
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_one_step_by_hand(model: nn.Module, request_of_three: Request) -> None:
    retain = request_of_three.retain
    assert retain is not None
    lr, gamma = 0.01, 0.3
    plain = Optimizer("sgd", lr=lr, momentum=0.0)
    new = SparseFinetune(gamma=gamma, optimizer=plain, epochs=1, batch_size=len(retain)).forget(model, request_of_three)
    twin = copy.deepcopy(model)
    usual_loss(twin, retain.batch(torch.arange(len(retain)))).value.backward()
    for p, q in zip(twin.parameters(), new.parameters(), strict=True):
        assert p.grad is not None
        wanted = p.detach() - lr * (p.grad + gamma * p.detach().sign())
        torch.testing.assert_close(q.detach(), wanted, rtol=1e-5, atol=1e-7)


def test_the_penalty_fades_linearly_and_an_epoch_is_all_retain_rows(request_of_three: Request) -> None:
    method = SparseFinetune(gamma=0.8, epochs=4, batch_size=100)
    assert request_of_three.retain is not None
    for epoch, weight in enumerate((0.8, 0.6, 0.4, 0.2)):
        found = list(method.batches(request_of_three, epoch, Run()))
        assert [w for _, w in found] == pytest.approx([weight] * len(found))
        assert sum(len(batch) for batch, _ in found) == len(request_of_three.retain)


def test_the_penalty_is_over_every_parameter() -> None:
    model = nn.ParameterList([torch.tensor([[1.5, -2.0]]), torch.tensor([-0.25])])
    assert float(l1(model).detach()) == 3.75


def test_it_needs_the_retain_rows_alone(model: nn.Module, request_of_three: Request) -> None:
    alone = request_of_three.but(forget=None)
    one, two = (SparseFinetune(epochs=1).forget(model, request) for request in (alone, request_of_three))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    with pytest.raises(EngramError, match="retain-rows"):
        SparseFinetune().forget(model, alone.but(retain=None))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_forgets_more_than_finetuning_with_smaller_weights_and_keeps_the_rest(
    split: Split, request_of_three: Request, seed: int
) -> None:
    model = RECIPE(split[0], seed)
    gone = split[1].of_classes([3])
    rest = split[1].without(gone.ids)
    same = {"optimizer": SGD, "epochs": 10, "batch_size": 256}
    sparse = SparseFinetune(gamma=0.03, **same).forget(model, request_of_three, Run(seed=seed))  # type: ignore[arg-type]
    plain = Finetune(**same).forget(model, request_of_three, Run(seed=seed))  # type: ignore[arg-type]
    assert accuracy(sparse, gone) < accuracy(plain, gone) - 0.1 < accuracy(model, gone) - 0.3
    assert float(predict(sparse, gone, "loss").mean()) > float(predict(plain, gone, "loss").mean())
    assert accuracy(sparse, rest) > accuracy(model, rest) - 0.02
    assert float(l1(sparse).detach()) < 0.75 * float(l1(plain).detach())
