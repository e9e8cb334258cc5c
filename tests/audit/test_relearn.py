"""Relearn time and the anamnesis index: hidden memory, retraining, ruins; by a plain loop; for numbers too."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tests.audit.planted import Says, found
from torch.nn.functional import cross_entropy

from engram.audit.relearn import AIN, RelearnTime
from engram.core.finding import Verdict
from engram.core.probe import Subject
from engram.data.table import Table
from engram.engine.optimizer import Optimizer
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.errors import EngramError
from engram.stats.seeds import derive
from engram.testing import condition, holds

SETTINGS = {"lr": 5e-3, "epochs": 60, "batch_size": 40, "excess": 1.0, "repeats": 3}


def test_hidden_memory_comes_back_at_once(memorised: Subject, run: Run) -> None:
    subject = replace(memorised, oracles=tuple(one.model for one in memorised.models("oracle", 5, run)))
    time, index = found(RelearnTime(**SETTINGS), subject, run)["relearn time"], found(AIN(**SETTINGS), subject, run)
    assert time.value == 1 and min(time.reference) > 5 and time.verdict == Verdict.FAIL
    ratio = index["anamnesis index"]
    assert ratio.value < 0.2 and ratio.verdict == Verdict.FAIL and time.n == 3
    assert all(0.5 < value < 2 for value in ratio.reference)
    assert ratio.protocol["batches for retrained models"] == pytest.approx(sum(time.reference) / 5, abs=0.01)


@holds("deep-regression-unlearning", 6)
def test_retraining_against_itself_is_one(retrained: Subject, run: Run) -> None:
    twin = copy.deepcopy(retrained.model)
    before = condition(retrained.model), condition(twin)
    finding = found(AIN(**SETTINGS), replace(retrained, recipe=None, oracles=(twin,)), run)["anamnesis index"]
    assert finding.value == 1 and finding.interval == (1, 1)
    assert (condition(retrained.model), condition(twin)) == before  # copies were trained


def test_a_ruin_takes_longer_than_retrained_models(memorised: Subject, retrained: Subject, run: Run) -> None:
    ruin = copy.deepcopy(retrained.model)
    with torch.no_grad():
        for parameter in ruin.parameters():
            parameter.mul_(-3)
    findings = [
        found(AIN(**SETTINGS), replace(s, recipe=memorised.recipe), run)
        for s in (replace(retrained, model=ruin), retrained)
    ]
    ruined, usual = (f["anamnesis index"] for f in findings)
    assert ruined.value > 1.2 > usual.value and usual.verdict != Verdict.FAIL


def test_the_time_is_that_of_a_plain_loop(retrained: Subject, run: Run) -> None:
    probe = RelearnTime(**{**SETTINGS, "repeats": 2}, oracles=0)
    found_ = found(probe, retrained, run)["relearn time"].value
    forget, retain, before = retrained.rows["forget"], retrained.rows["retain"], retrained.before
    assert before is not None and forget.labels is not None
    images, labels = forget.inputs["pixel_values"], forget.labels
    target = 2 * cross_entropy(before(pixel_values=images).logits, labels).item()
    times = []
    for repeat in range(2):
        twin = copy.deepcopy(retrained.model)
        optimizer = torch.optim.Adam(twin.parameters(), 5e-3)
        batches = [
            batch
            for epoch in range(60)
            for batch in retain.concat(forget).batches(40, seed=derive(run.seed, "relearn order", repeat), epoch=epoch)
        ]
        for k, batch in enumerate(batches, 1):
            optimizer.zero_grad()
            cross_entropy(twin(**batch.inputs).logits, batch.labels).backward()
            optimizer.step()
            if cross_entropy(twin(pixel_values=images).logits, labels).item() <= target:
                times.append(k)
                break
    assert found_ == pytest.approx(sum(times) / 2)


def test_where_retrained_models_are_too_slow_there_is_no_verdict(memorised: Subject, run: Run) -> None:
    short = {**SETTINGS, "epochs": 1}
    for probe in (RelearnTime(**short), AIN(**short)):
        (finding,) = found(probe, memorised, run).values()
        assert finding.interval is None and finding.verdict == Verdict.UNKNOWN and len(finding.reference) == 5


def test_retired_classes_are_taken_up_again(memorised: Subject, run: Run) -> None:
    retired = copy.deepcopy(memorised.model)
    retired.head.retire(range(10))  # type: ignore[union-attr,operator]
    (finding,) = found(RelearnTime(**SETTINGS, oracles=0), replace(memorised, model=retired), run).values()
    assert 1 < finding.value <= 180


def test_numbers_are_relearnt_too(run: Run) -> None:
    x = torch.linspace(-1, 1, 60).unsqueeze(1)
    table = Table({"values": x}, 3 * (x > 0.5).float())
    forget, retain = (table.take(mask) for mask in (x[:, 0] > 0.5, x[:, 0] <= 0.5))
    recipe = Recipe({"name": "MLP", "hidden": [32]}, Optimizer(lr=1e-2), epochs=60)
    model, rows = recipe(table, 0), {"forget": forget, "retain": retain}
    subject = Subject(model, before=model, rows=rows, recipe=recipe)
    (finding,) = found(AIN(lr=1e-2, epochs=40, batch_size=20, excess=0.5, repeats=2), subject, run).values()
    assert finding.value < 0.2 and len(finding.reference) == 5


def test_what_it_cannot_do_is_refused(memorised: Subject) -> None:
    bare = {**memorised.rows, "forget": memorised.rows["forget"].unlabelled()}
    with pytest.raises(EngramError, match=r"audit\.RelearnTime trains on forget and retain rows, and one side has no"):
        RelearnTime().examine(replace(memorised, rows=bare))
    with pytest.raises(EngramError, match=r"audit\.AIN needs 2 repeats or more for an interval, not 1"):
        AIN(repeats=1).examine(memorised)
    with pytest.raises(EngramError, match="has no parameters"):
        RelearnTime().examine(replace(memorised, model=Says(lambda x: x)))
    with pytest.raises(EngramError, match="AIN asks for oracles"):
        AIN().check(replace(memorised, recipe=None))
    with pytest.raises(EngramError, match="before"):
        RelearnTime().check(replace(memorised, before=None))
