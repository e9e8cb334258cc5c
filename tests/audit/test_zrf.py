"""Zero-retrain forgetting of untrained, untouched and retrained models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.audit.planted import RECIPE, Says, found

from engram.audit.zrf import ZRF
from engram.core.finding import Verdict
from engram.core.probe import Subject
from engram.data.table import Table
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.engine.teacher import untrained
from engram.errors import EngramError
from engram.stats.divergence import zrf

NAME = "zero-retrain forgetting"


def test_an_untrained_network_is_at_one_and_retrained_ones_are_not(memorised: Subject, run: Run) -> None:
    fresh = RECIPE.start(memorised.rows["retain"], Run(seed=77))
    blank, known = (found(ZRF(), replace(memorised, model=model), run)[NAME] for model in (fresh, memorised.model))
    assert 1 >= blank.value > 0.98 > max(blank.reference)
    assert known.value < 0.85 and blank.verdict == Verdict.FAIL


def test_one_more_retrained_model_does_not_fail(retrained: Subject, run: Run) -> None:
    assert found(ZRF(), retrained, run)[NAME].verdict != Verdict.FAIL


def test_both_values_are_those_of_the_outputs(memorised: Subject) -> None:
    run = Run(seed=3)
    findings = found(ZRF(oracles=0), memorised, run)
    random = untrained(memorised.model, Run(seed=3).generator("untrained network"))
    p, q = (predict(model, memorised.rows["forget"]).double().softmax(1) for model in (memorised.model, random))
    assert findings[NAME].value == pytest.approx(zrf(p, q))
    assert findings[f"{NAME}, as published"].value == pytest.approx(zrf(p, q, as_published=True))
    assert findings[f"{NAME}, as published"].verdict == Verdict.NONE


def test_a_model_without_weights_knows_what_its_untrained_copy_knows(numbers: Table) -> None:
    constant = Says(lambda x: torch.tensor([1.0, 2.0, 0.0]).expand(len(x), 3))
    findings = found(ZRF(), Subject(constant, rows={"forget": numbers.unlabelled()}))
    assert findings[NAME].value == pytest.approx(1) and findings[NAME].verdict == Verdict.UNKNOWN


def test_a_model_of_numbers_is_refused(numbers: Table) -> None:
    with pytest.raises(EngramError, match=r"audit\.ZRF compares class probabilities"):
        ZRF().examine(Subject(Says(lambda x: x), rows={"forget": numbers}))
