"""Relabelling: the labels that are drawn, training on them, and what it does on digits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.forget.digit_three import RECIPE, Split, scores
from torch import nn

from engram.core.request import Request
from engram.data.table import Table
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.errors import EngramError
from engram.forget.amnesiac import Amnesiac, relabelled
from engram.forget.finetune import Finetune
from engram.stats.seeds import generator

FAST = Optimizer(lr=1e-3)


def plain(labels: list[int]) -> Table:
    return Table({"values": torch.zeros(len(labels), 1)}, torch.tensor(labels))


@given(labels=st.lists(st.sampled_from([0, 2, 5, 9]), min_size=1, max_size=40), key=st.integers(0, 9))
def test_no_row_gets_its_own_label(labels: list[int], key: int) -> None:
    found = relabelled(plain(labels), torch.tensor([0, 2, 5]), generator("labels", key)).labels
    assert found is not None
    assert set(found.tolist()) <= {0, 2, 5}
    assert not any(new == old for new, old in zip(found.tolist(), labels, strict=True))


def test_all_other_labels_are_equally_likely() -> None:
    found = relabelled(plain([2] * 30_000), torch.tensor([0, 2, 5, 7]), generator("labels")).labels
    assert found is not None
    shares = torch.bincount(found, minlength=8) / 30_000
    assert shares[2] == 0
    assert (shares[[0, 5, 7]] - 1 / 3).abs().max() < 4 * (2 / 9 / 30_000) ** 0.5


def test_what_cannot_be_relabelled_is_refused() -> None:
    with pytest.raises(EngramError, match="no other class"):
        relabelled(plain([1, 2]), torch.tensor([2]), generator("labels"))
    numbers = plain([1, 2]).with_labels(torch.zeros(2, 1))
    with pytest.raises(EngramError, match="class labels"):
        relabelled(numbers, torch.tensor([2]), generator("labels"))


def test_it_is_training_on_the_new_labels(model: nn.Module, request_of_three: Request) -> None:
    """The rows, their order and their batches are those of fine-tuning on the relabelled table."""
    method = Amnesiac(optimizer=FAST, epochs=2)
    new = method.forget(model, request_of_three, Run(seed=3))
    given = request_of_three.but(forget=None, retain=method.table)
    again = Finetune(optimizer=FAST, epochs=2, batch_size=64).forget(model, given, Run(seed=3))
    assert all(torch.equal(p, q) for p, q in zip(new.parameters(), again.parameters(), strict=True))


def test_retain_rows_keep_their_labels_and_no_row_gets_one_of_a_class_that_goes(model: nn.Module, split: Split) -> None:
    request = Request.of_classes(split[0], (3, 5))
    method = Amnesiac()
    method.targets(model, request, Run())
    forget, retain = request.forget, request.retain
    assert forget is not None and retain is not None and method.table.labels is not None
    assert method.table.ids == (*forget.ids, *retain.ids)
    assert set(method.table.labels[: len(forget)].tolist()) == {0, 1, 2, 4, 6, 7, 8, 9}
    assert torch.equal(method.table.labels[len(forget) :], retain.labels)


def test_single_records_may_get_any_other_label(model: nn.Module, split: Split) -> None:
    request = Request.of_records(split[0], split[0].ids[::4])
    method = Amnesiac()
    method.targets(model, request, Run())
    forget = request.forget
    assert forget is not None and forget.labels is not None and method.table.labels is not None
    drawn = method.table.labels[: len(forget)]
    assert set(drawn.tolist()) == set(range(10))
    assert not (drawn == forget.labels).any()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_forgets_a_class_sooner_than_finetuning_and_keeps_the_rest(
    split: Split, request_of_three: Request, seed: int
) -> None:
    model = RECIPE(split[0], seed)
    before, good = scores(model, split)
    forgotten, kept = scores(Amnesiac(optimizer=FAST, epochs=2).forget(model, request_of_three, Run(seed=seed)), split)
    baseline = Finetune(optimizer=FAST, epochs=2, batch_size=64).forget(model, request_of_three, Run(seed=seed))
    assert forgotten < 0.35 < 0.55 < scores(baseline, split)[0] < before
    assert kept > good - 0.03
