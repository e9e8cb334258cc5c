"""The forgetting score of a method that forgets nothing, of retraining, and of equal populations."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from tests.audit.planted import Same, found

from engram.audit.forgetting_score import ForgettingScore
from engram.audit.populations import confidences
from engram.core.finding import Verdict
from engram.core.probe import Subject
from engram.data.table import Table
from engram.engine.predict import accuracy
from engram.engine.run import Run
from engram.errors import EngramError
from engram.stats.forgetting import forgetting_score, row_epsilons

PROBE = ForgettingScore(models=12)


def test_retraining_earns_more_than_nothing(memorised: Subject, retrained: Subject, run: Run) -> None:
    known, gone = found(PROBE, memorised, run), found(PROBE, retrained, run)
    assert known["forgetting quality"].value < 0.5 * gone["forgetting quality"].value
    assert known["forgetting quality"].verdict == Verdict.FAIL
    assert Verdict.FAIL not in [finding.verdict for finding in gone.values()]
    quality = gone["forgetting quality"]
    assert min(quality.reference) - 0.1 < quality.value < max(quality.reference) + 0.1


def test_equal_populations_earn_all(memorised: Subject, run: Run) -> None:
    same = Same(**{field.name: getattr(memorised, field.name) for field in fields(Subject)})
    findings = found(ForgettingScore(models=6), same, run)
    assert findings["forgetting quality"].value == findings["forgetting score"].value == 1


def test_the_score_is_that_of_its_parts(memorised: Subject, run: Run) -> None:
    made = [[one.model for one in memorised.models(role, 12, run)] for role in ("unlearned", "oracle")]
    epsilons = row_epsilons(*(confidences(models, memorised.rows["forget"], run) for models in made))
    shares = [
        tuple(sum(accuracy(model, memorised.rows[name]) for model in models) / 12 for models in made)
        for name in ("retain", "test")
    ]
    wanted = forgetting_score(epsilons, 12, *shares)  # type: ignore[arg-type]
    assert found(PROBE, memorised, run)["forgetting score"].value == pytest.approx(wanted)


def test_what_it_cannot_do_is_refused(memorised: Subject, numbers: Table) -> None:
    with pytest.raises(EngramError, match=r"audit\.ForgettingScore is for classifiers"):
        PROBE.examine(replace(memorised, rows={**memorised.rows, "forget": numbers}))
    with pytest.raises(EngramError, match="needs 3 models or more"):
        ForgettingScore(models=2).examine(memorised)
