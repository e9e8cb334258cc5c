from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.keep.halves import NEW, SMALL, begun, finals, halves, learnt, same, spent, weights

from engram.core.erasure import forget
from engram.core.learner import fork
from engram.core.request import Request
from engram.data.streams import class_stream
from engram.data.table import Table
from engram.engine.importance import importance
from engram.engine.run import Run
from engram.forget.finetune import Finetune as Repair
from engram.keep.finetune import Finetune
from engram.keep.online_ewc import OnlineEWC
from engram.models import seeded


def test_strength_zero_is_fine_tuning(tiny: Table) -> None:
    tuned = learnt(Finetune(**SMALL), tiny)
    assert same(learnt(OnlineEWC(**SMALL, strength=0.0), tiny), tuned)
    assert not same(learnt(OnlineEWC(**SMALL, strength=1.0), tiny), tuned)


def test_the_fisher_runs_on_with_its_decay(tiny: Table) -> None:
    learner, run = OnlineEWC(**SMALL, gamma=0.7), Run()
    first, second = halves(tiny)
    learner.learn(first, run)
    one = importance(learner.model, first.train)
    learner.learn(second, run)
    two = importance(learner.model, second.train)
    for name, value in two.items():
        wanted = value.clone()
        wanted[: len(one[name])] += 0.7 * one[name]
        assert torch.allclose(learner.importances.values[name], wanted, rtol=1e-12, atol=0)


def test_the_loss_written_down(tiny: Table) -> None:
    learner = begun(OnlineEWC(**SMALL, strength=3.0, gamma=0.5), tiny)
    with seeded(torch.Generator().manual_seed(0)), torch.no_grad():
        for p in learner.model.parameters():
            p.add_(torch.randn_like(p))
    batch = tiny.of_classes(NEW).batch(torch.arange(30))
    output = learner.model(**batch.inputs)
    wanted = -output.logits.double().log_softmax(1)[torch.arange(30), batch.labels].mean()
    for name, p in learner.model.named_parameters():
        moved = (p - learner.anchor[name]).double().square()
        fisher = learner.importances.values[name]
        wanted = wanted + 3.0 / 2 * 0.5 * (fisher * moved[: len(fisher)]).sum()
    assert learner.terms(batch, output).value.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_large_penalty_holds_what_matters_and_leaves_new_rows_of_the_head_free(tiny: Table) -> None:
    first, second = halves(tiny)
    long = {**SMALL, "epochs": 20}
    free, held = Finetune(**long), OnlineEWC(**long, strength=1e6)
    for each in (free, held):
        each.learn(first)
    fisher, anchor = dict(held.importances.values), weights(held)
    assert same(free, held)
    for each in (free, held):
        each.learn(second)
    assert spent(held, anchor, fisher) < 0.02 * spent(free, anchor, fisher)
    assert (held.pull["head.weight"][5:] == 0).all() and (held.pull["head.weight"][:5] > 0).any()


def test_the_anchor_is_the_model_when_the_task_comes_and_rows_are_residue(tiny: Table) -> None:
    learner, run = OnlineEWC(**SMALL), Run()
    first, second = halves(tiny)
    learner.learn(first, run)
    gone = first.train.ids[:5]
    done = forget(learner, Request.of_records(first.train, gone), Repair(epochs=2), run)
    assert set(done.residue) == set(gone) and learner.holds(gone) == ()
    now = weights(learner)
    learner._prepare(second, run)
    learner.start(second, run)
    assert all(torch.equal(learner.anchor[name][: len(p)], p) for name, p in now.items())


def test_forgets_less_than_fine_tuning(digits: Any, take: Callable[..., Any]) -> None:
    stages = class_stream(digits.train, digits.test, base=5, increment=5)
    held, free = finals(take, stages, OnlineEWC(strength=1e4), Finetune())
    assert held > free + 0.08


def test_a_copy_goes_on_learning_the_same(tiny: Table) -> None:
    learner = OnlineEWC.tiny()
    first, second = halves(tiny)
    learner.learn(first)
    twin = fork(learner)
    for each in (learner, twin):
        each.learn(second)
    assert same(learner, twin)
