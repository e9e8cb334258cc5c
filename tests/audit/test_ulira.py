"""U-LiRA on a method that forgets nothing, on retraining, and on models that are the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import norm
from tests.audit.planted import found

from engram.audit.ulira import ULiRA, crossed
from engram.core.finding import Verdict
from engram.core.probe import Subject
from engram.data.table import Table
from engram.engine.run import Run
from engram.errors import EngramError
from engram.stats.seeds import generator

PROBE = ULiRA(models=12)


def test_a_method_that_forgets_nothing_is_told_from_retraining(memorised: Subject, run: Run) -> None:
    findings = found(PROBE, memorised, run)
    accuracy, area = findings["accuracy of U-LiRA"], findings["AUC of U-LiRA"]
    assert accuracy.value > 0.8 and area.value > 0.9
    assert accuracy.verdict == area.verdict == Verdict.FAIL
    assert findings["TPR of U-LiRA at 0.1% FPR"].value <= findings["TPR of U-LiRA at 1% FPR"].value
    assert accuracy.n == 50 and accuracy.protocol["unlearned models"] == 12


def test_retraining_is_not_told_from_retraining(retrained: Subject, run: Run) -> None:
    findings = found(PROBE, retrained, run)
    accuracy, area = findings["accuracy of U-LiRA"], findings["AUC of U-LiRA"]
    assert abs(accuracy.value - 0.5) < 0.1 and abs(area.value - 0.5) < 0.1
    assert Verdict.FAIL not in [finding.verdict for finding in findings.values()]
    assert len(area.reference) == 8 and abs(np.mean(area.reference) - 0.5) < 0.1


def test_attackers_learn_from_the_other_half() -> None:
    draws = generator("crossed")
    one, other = torch.randn(6, 4, generator=draws), 1 + torch.randn(6, 4, generator=draws)
    found_ = crossed(one, other, pooled=False)
    assert found_.shape == (4, 2, 2, 3)
    for half, (known, judged) in enumerate(((range(3), range(3, 6)), (range(3, 6), range(3)))):
        for row in range(4):
            laws = [norm(x[known, row].mean(), x[known, row].std()) for x in (one.double(), other.double())]
            for kind, x in enumerate((one, other)):
                wanted = [laws[0].logpdf(x[k, row]) - laws[1].logpdf(x[k, row]) for k in judged]
                assert found_[row, half, kind].numpy() == pytest.approx(np.array(wanted), rel=1e-5, abs=1e-6)


def test_samples_of_one_law_give_one_half_on_average() -> None:
    right = []
    for k in range(40):
        odds = crossed(*torch.randn(2, 8, 20, generator=generator("one law", k)), pooled=True)
        right.append(((odds[:, :, 0] > 0).double().mean() + (odds[:, :, 1] <= 0).double().mean()).item() / 2)
    assert np.mean(right) == pytest.approx(0.5, abs=3 * np.std(right) / 40**0.5)


def test_what_it_cannot_do_is_refused(memorised: Subject, numbers: Table) -> None:
    rows = {**memorised.rows, "forget": numbers}
    with pytest.raises(EngramError, match=r"audit\.ULiRA is for classifiers"):
        PROBE.examine(replace(memorised, rows=rows))
    with pytest.raises(EngramError, match="needs 4 models or more of each kind to say anything, not 2"):
        ULiRA(models=2).examine(memorised)
    with pytest.raises(EngramError, match="ULiRA asks for forgetter, which is not at hand"):
        PROBE.check(replace(memorised, forgetter=None))
