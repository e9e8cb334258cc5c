"""KLoM of a method that forgets nothing, of retraining, and of equal populations."""

from __future__ import annotations

from dataclasses import fields, replace
from math import log
from statistics import fmean

import numpy as np
import pytest
from tests.audit.planted import Same, found

from engram.audit.klom import KLoM
from engram.audit.populations import confidences
from engram.core.finding import Verdict
from engram.core.probe import Subject
from engram.data.table import Table
from engram.engine.run import Run
from engram.errors import EngramError
from engram.stats.divergence import histogram_kl

PROBE = KLoM(models=12, bins=6)
MEAN, MOST = "mean KLoM on {} rows", "95th percentile of KLoM on {} rows"


def test_what_was_not_forgotten_lies_far_from_retraining(memorised: Subject, run: Run) -> None:
    findings = found(PROBE, memorised, run)
    forget, test = (findings[MEAN.format(name)] for name in ("forget", "test"))
    assert forget.verdict == Verdict.FAIL
    assert forget.value > 2 * max(forget.reference) and forget.value > 1.5 * test.value
    assert findings[MOST.format("forget")].value == pytest.approx(log(1e5))  # no overlap at all


def test_retraining_is_at_the_floor(retrained: Subject, run: Run) -> None:
    findings = found(PROBE, retrained, run)
    assert len(findings) == 6 and Verdict.FAIL not in [finding.verdict for finding in findings.values()]
    for finding in findings.values():
        assert 0.5 * min(finding.reference) < finding.value < 1.5 * max(finding.reference)


def test_direction_number_and_floor_are_told(memorised: Subject, run: Run) -> None:
    for finding in found(PROBE, memorised, run).values():
        told = finding.protocol
        assert told["direction"] == "KL(unlearned || retrained)"
        assert (told["models of each kind"], told["bins"], told["ceiling"]) == (12, 6, 11.51)
        assert told["floor, retrained against retrained models"] == pytest.approx(fmean(finding.reference), abs=1e-4)
        assert fmean(finding.reference) > 0


def test_the_published_direction_is_taken_of_the_retrained_models(memorised: Subject, run: Run) -> None:
    turned = KLoM(models=12, bins=6, first="retrained")
    there, back = (found(probe, memorised, run)[MEAN.format("forget")] for probe in (PROBE, turned))
    assert back.protocol["direction"] == "KL(retrained || unlearned)" and back.value != there.value
    table = memorised.rows["forget"]
    unlearned, retrained = (
        confidences([one.model for one in memorised.models(role, 12, run)], table, run)
        for role in ("unlearned", "oracle")
    )
    assert back.value == pytest.approx(histogram_kl(retrained, unlearned, bins=6).mean().item())
    with pytest.raises(EngramError, match="did you mean 'retrained'"):
        KLoM(first="retraind").check(memorised)


def test_equal_populations_have_no_distance(memorised: Subject, run: Run) -> None:
    same = Same(**{field.name: getattr(memorised, field.name) for field in fields(Subject)})
    for finding in found(KLoM(models=6), same, run).values():
        assert finding.value == 0 and finding.interval == (0, 0)


def test_the_value_row_by_row_as_numpy_counts(memorised: Subject, run: Run) -> None:
    table = memorised.rows["test"]
    made = [memorised.models(role, 12, run) for role in ("unlearned", "oracle")]
    unlearned, retrained = (confidences([one.model for one in models], table, run).numpy() for models in made)
    rows = []
    for one, other in zip(unlearned.T, retrained.T, strict=True):
        ends = min(one.min(), other.min()), max(one.max(), other.max())
        p, q = (np.histogram(x, 6, ends)[0] / 12 for x in (one, other))
        rows.append((p[p > 0] * np.log(p[p > 0] / q[p > 0].clip(1e-5))).sum())
    findings = found(PROBE, memorised, run)
    assert findings[MEAN.format("test")].value == pytest.approx(np.mean(rows))
    assert findings[MOST.format("test")].value == pytest.approx(np.quantile(rows, 0.95))


def test_what_it_cannot_do_is_refused(memorised: Subject, numbers: Table) -> None:
    with pytest.raises(EngramError, match=r"audit\.KLoM is for classifiers, and the labels of the test rows"):
        PROBE.examine(replace(memorised, rows={**memorised.rows, "test": numbers}))
    with pytest.raises(EngramError, match="class labels on 2 retain rows or more"):
        PROBE.examine(replace(memorised, rows={**memorised.rows, "retain": memorised.rows["retain"].unlabelled()}))
    with pytest.raises(EngramError, match="KLoM asks for forgetter, recipe"):
        PROBE.check(replace(memorised, forgetter=None, recipe=None))
