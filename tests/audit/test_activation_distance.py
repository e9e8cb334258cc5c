"""Activation distance: the worked numbers, an untouched model, one more retrained one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.audit.planted import Says, found

from engram.audit.activation_distance import ActivationDistance
from engram.core.finding import Verdict
from engram.core.probe import Subject
from engram.data.table import Table
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.errors import EngramError


@pytest.mark.parametrize(("norm", "value"), [(2, 0.454606), (1, 0.733333)])
def test_the_worked_numbers(numbers: Table, norm: float, value: float) -> None:
    logits = torch.tensor([0.7, 0.2, 0.1]).log()
    one, other = Says(lambda x: logits.expand(len(x), 3)), Says(lambda x: torch.ones(len(x), 3))
    rows = {"forget": numbers.unlabelled()}
    finding = found(ActivationDistance(norm=norm), Subject(one, rows=rows, oracles=(other,)))
    assert [f.value for f in finding.values()] == pytest.approx([value], abs=5e-7)
    assert found(ActivationDistance(), Subject(one, rows=rows, oracles=(one,))).popitem()[1].value == 0


def test_an_untouched_model_is_far_and_one_more_retrained_is_not(
    memorised: Subject, retrained: Subject, run: Run
) -> None:
    name = "activation distance (L2) on forget rows"
    known, gone = (found(ActivationDistance(), subject, run)[name] for subject in (memorised, retrained))
    assert known.verdict == Verdict.FAIL and known.value > max(known.reference) + 0.2
    assert gone.verdict != Verdict.FAIL and len(gone.reference) == 5
    table = memorised.rows["forget"]
    p = predict(memorised.model, table).softmax(1)
    others = [predict(one.model, table).softmax(1) for one in memorised.models("oracle", 5, run)]
    wanted = sum((p - q).norm(dim=1).mean().item() for q in others) / 5
    assert known.value == pytest.approx(wanted, abs=1e-6)


def test_a_model_of_numbers_is_refused(memorised: Subject, numbers: Table) -> None:
    guess = Says(lambda x: x)
    for table in (numbers, numbers.unlabelled()):
        subject = Subject(guess, rows={"forget": table}, oracles=(guess,))
        with pytest.raises(EngramError, match=r"audit\.ActivationDistance compares class probabilities"):
            ActivationDistance().examine(subject)
    with pytest.raises(EngramError, match="asks for oracles"):
        ActivationDistance().check(replace(memorised, recipe=None))
