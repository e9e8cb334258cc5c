from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.keep.halves import SMALL, begun, finals, halves, learnt, same

from engram.core.erasure import forget
from engram.core.learner import fork
from engram.core.request import Request
from engram.data.buffer import Buffer
from engram.data.streams import class_stream
from engram.data.table import Table
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.forget.finetune import Finetune as Repair
from engram.keep.derpp import LIVE, LOGITS, DERpp, distance
from engram.keep.finetune import Finetune


def logits(learner: DERpp) -> torch.Tensor:
    return torch.as_tensor(learner.kept.table.extra[LOGITS])


def test_with_both_weights_zero_it_is_fine_tuning(tiny: Table) -> None:
    tuned = learnt(Finetune(**SMALL), tiny)
    assert same(learnt(DERpp(**SMALL, alpha=0.0, beta=0.0), tiny), tuned)
    for one in ({"alpha": 0.0}, {"beta": 0.0}):
        assert not same(learnt(DERpp(**SMALL, **one), tiny), tuned)  # type: ignore[arg-type]


def test_the_loss_written_down(tiny: Table) -> None:
    learner = begun(DERpp(**SMALL, buffer=20, replayed=7, alpha=0.3, beta=0.6), tiny)
    second = halves(tiny)[1]
    new, dark, plain = next(iter(learner.batches(second, 0, Run())))
    assert len(new) == 30 and len(dark) == len(plain) == 7
    assert not torch.equal(dark.inputs["pixel_values"], plain.inputs["pixel_values"])
    found = learner.step((new, dark, plain), second).value.item()

    def said(batch: Any) -> torch.Tensor:
        return learner.model(**batch.inputs).logits.detach().double()  # type: ignore[no-any-return]

    def entropy(batch: Any) -> float:
        return float(-said(batch).log_softmax(1)[torch.arange(len(batch)), batch.labels].mean())

    square = float((said(dark) - dark.extra[LOGITS].double()).square().mean())
    assert found == pytest.approx(entropy(new) + 0.3 * square + 0.6 * entropy(plain), rel=1e-5)


def test_rows_held_and_logits_are_those_of_the_model_before_its_update(tiny: Table) -> None:
    """One epoch of one batch: every row is stored with what the untrained model says."""
    learner, run = DERpp(network=SMALL["network"], epochs=1, batch_size=64, buffer=60), Run()
    untrained = DERpp(network=SMALL["network"], epochs=0, batch_size=64)
    first = halves(tiny)[0]
    for each in (learner, untrained):
        each.learn(first, Run())
    assert sorted(learner.kept.table.ids) == sorted(first.train.ids)
    wanted = predict(untrained.model, learner.kept.table, run=run)
    assert torch.equal(logits(learner), wanted)
    assert not torch.allclose(logits(learner), predict(learner.model, learner.kept.table), atol=1e-3)


def test_the_buffer_is_the_reservoir_of_all_rows(tiny: Table) -> None:
    learner, reservoir = learnt(DERpp(**SMALL, buffer=20), tiny), Buffer(20)
    reservoir.offer(tiny)
    assert set(learner.kept.table.ids) == set(reservoir.table.ids)


def test_rows_enter_in_different_epochs(tiny: Table) -> None:
    learner, run = DERpp(network=SMALL["network"], epochs=4, batch_size=64, buffer=60), Run()
    sizes = []
    real = learner.batches

    def batches(task: Any, epoch: int, run: Run) -> Any:
        yield from real(task, epoch, run)
        sizes.append(len(learner.kept))

    learner.batches = batches  # type: ignore[method-assign]
    learner.learn(halves(tiny)[0], run)
    assert sizes == sorted(set(sizes)) and sizes[-1] == 30


def test_a_class_that_is_born_gets_the_logits_of_its_birth(tiny: Table) -> None:
    learner, run = DERpp(**SMALL, buffer=20), Run()
    first, second = halves(tiny)
    learner.learn(first, run)
    before = logits(learner).clone()
    learner._prepare(second, run)
    learner.start(second, run)
    now = predict(learner.model, learner.kept.table)
    assert torch.equal(logits(learner)[:, :5], before)
    assert torch.equal(logits(learner)[:, 5:], now[:, 5:])
    assert torch.as_tensor(learner.kept.table.extra[LIVE]).all()


def test_the_distance_passes_over_classes_that_were_not_live() -> None:
    now = torch.tensor([[1.0, 2.0, -torch.inf], [3.0, 0.0, -torch.inf]], requires_grad=True)
    stored = torch.tensor([[0.0, 5.0, 1.0], [1.0, 0.0, 0.0]])
    live = torch.tensor([[True, False, True], [True, True, False]])
    found = distance(now, stored, live).value
    assert found.item() == pytest.approx((1 + 4 + 0) / 3)
    found.backward()
    assert now.grad is not None and now.grad.isfinite().all()


def test_forgetting_renews_the_stored_logits(tiny: Table) -> None:
    """What the model knew of forgotten rows is in the logits of other rows too, and must not be taught back."""
    learner, run = DERpp(**SMALL, buffer=20), Run()
    first, second = halves(tiny)
    learner.learn(first, run)
    gone = learner.kept.table.ids[:5]
    done = forget(learner, Request.of_records(first.train, gone), Repair(epochs=3), run)
    assert set(done.residue) == set(gone) and learner.holds(gone) == () and len(learner.kept) == 15
    assert torch.equal(logits(learner), predict(learner.model, learner.kept.table))
    learner.learn(second, run)
    assert logits(learner).shape == (20, 10)


def test_replay_keeps_what_fine_tuning_loses(digits: Any, take: Callable[..., Any]) -> None:
    stages = class_stream(digits.train, digits.test, base=2, increment=2)
    kept, lost = finals(take, stages, DERpp(buffer=100), Finetune())
    assert kept > lost + 0.3


def test_logits_keep_classes_of_a_task_apart_better_than_labels(digits: Any, take: Callable[..., Any]) -> None:
    stages = class_stream(digits.train, digits.test, base=2, increment=2)
    both, labels = (
        sum(take(DERpp(buffer=100, alpha=alpha), stages, Run(seed=seed)).task_aware.mean() for seed in range(2)) / 2
        for alpha in (1.0, 0.0)
    )
    assert both > labels + 0.01


def test_a_copy_goes_on_learning_the_same(tiny: Table) -> None:
    learner = DERpp.tiny()
    first, second = halves(tiny)
    learner.learn(first)
    twin = fork(learner)
    for each in (learner, twin):
        each.learn(second)
    assert same(learner, twin) and torch.equal(logits(learner), logits(twin))  # type: ignore[arg-type]
