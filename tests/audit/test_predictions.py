"""W1 of predictions: shifts, SciPy, an untouched model and one more retrained one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import wasserstein_distance
from tests.audit.planted import Says, found

from engram.audit.predictions import Predictions
from engram.core.finding import Verdict
from engram.core.probe import Subject
from engram.data.table import Table
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.errors import EngramError

NAME = "W1 distance of predictions on forget rows"


def test_a_shift_is_the_distance_and_the_order_of_rows_does_not_matter(numbers: Table) -> None:
    plain, moved, mirrored = Says(lambda x: 2 * x), Says(lambda x: 2 * x + 0.3), Says(lambda x: -2 * x)
    subject = Subject(moved, rows={"forget": numbers}, oracles=(plain, mirrored))
    finding = found(Predictions(), subject)[NAME]
    assert finding.value == pytest.approx(0.3) and finding.reference == pytest.approx((0, 0), abs=1e-6)
    assert finding.interval is not None and finding.interval[1] < 0.8
    assert finding.margin == pytest.approx(0.05 * predict(plain, numbers).repeat(2, 1).std().item(), rel=1e-3)


def test_a_regressor_that_still_knows_is_far_and_a_retrained_one_is_not(run: Run) -> None:
    draws = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(200, 2, generator=draws) - 1
    y = 2 * (x[:, :1] > 0.4) + x[:, 1:] / 10
    table = Table({"values": x}, y)
    forget, retain = (table.take(mask) for mask in (x[:, 0] > 0.4, x[:, 0] <= 0.4))
    recipe = Recipe({"name": "MLP", "hidden": [32]}, Optimizer(lr=1e-2), epochs=40)
    rows = {"forget": forget, "retain": retain}
    cases = [Subject(recipe(known, 9), rows=rows, recipe=recipe) for known in (table, retain)]
    known, gone = (found(Predictions(), subject, run)[NAME] for subject in cases)
    assert known.verdict == Verdict.FAIL and known.value > 10 * gone.value
    assert gone.verdict != Verdict.FAIL and gone.unit == "unit of the prediction"
    others = [predict(one.model, forget)[:, 0] for one in cases[0].models("oracle", 5, run)]
    mine = predict(cases[0].model, forget)[:, 0]
    assert known.value == pytest.approx(sum(wasserstein_distance(mine, other) for other in others) / 5, rel=1e-5)


def test_of_classes_the_probabilities_are_compared(memorised: Subject, retrained: Subject, run: Run) -> None:
    known, gone = (found(Predictions(), subject, run)[NAME] for subject in (memorised, retrained))
    assert known.unit == "probability" and known.value > 1.5 * gone.value > 0
    unlabelled = {**memorised.rows, "forget": memorised.rows["forget"].unlabelled()}
    assert found(Predictions(), replace(memorised, rows=unlabelled), run)[NAME].unit == "probability"


def test_what_it_cannot_do_is_refused(numbers: Table) -> None:
    guess = Says(lambda x: x)
    words = Table({"input_ids": torch.ones(3, 4, dtype=torch.int64)}, torch.ones(3, 4, dtype=torch.int64))
    for table in (words, numbers.take([0])):
        with pytest.raises(EngramError, match="2 forget rows or more whose labels are numbers or classes"):
            Predictions().examine(Subject(guess, rows={"forget": table}, oracles=(guess,)))
