"""Verdicts from planted numbers: pass, fail, unknown with the rows that would decide, none."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import settings as checked
from hypothesis import strategies as st
from scipy.stats import t

from engram.core.finding import Finding, Verdict, figure
from engram.core.verdict import beyond, judge, overall

FIVE = (0.89, 0.90, 0.90, 0.90, 0.91)  # mean .90, standard deviation √.00005


def measured(value: float, half: float, n: int = 1000, reference: tuple[float, ...] = FIVE) -> Finding:
    return Finding("accuracy", value, n, (value - half, value + half), reference=reference, margin=0.05)


@pytest.mark.parametrize(
    ("value", "half", "verdict"),
    [
        (0.90, 0.01, Verdict.PASS),
        (0.91, 0.01, Verdict.PASS),
        (0.90, 0.06, Verdict.UNKNOWN),  # too few rows to tell
        (0.94, 0.02, Verdict.UNKNOWN),
        (0.80, 0.01, Verdict.FAIL),
        (1.00, 0.01, Verdict.FAIL),  # better than retraining is as telling as worse
    ],
)
def test_a_value_within_the_margin_passes_and_one_outside_fails(value: float, half: float, verdict: Verdict) -> None:
    assert measured(value, half).verdict == verdict


def test_the_interval_holds_both_errors() -> None:
    found = judge(measured(0.91, 0.01)).comparison
    assert found is not None
    spread = t.ppf(0.975, 4) * math.sqrt(0.00005) * math.sqrt(1 + 1 / 5)
    assert found.difference == pytest.approx(0.01, abs=1e-12)
    assert (found.high - found.low) / 2 == pytest.approx(math.hypot(0.01, spread), rel=1e-9)


def test_unknown_says_how_many_rows_would_decide() -> None:
    undecided = measured(0.90, 0.06)
    sentence = judge(undecided).sentence
    asked = re.search(r"About (\d+) rows instead of 1000 would decide", sentence)
    assert asked is not None
    n = int(asked[1])
    assert measured(0.90, 0.06 * math.sqrt(1000 / n), n).verdict == Verdict.PASS
    assert measured(0.90, 0.06 * math.sqrt(1000 / (n - 2)), n - 2).verdict == Verdict.UNKNOWN


def test_no_number_of_rows_helps_where_the_oracles_differ_too_much() -> None:
    scattered = measured(0.90, 0.01, reference=(0.7, 0.8, 0.9, 1.0, 1.0))
    assert scattered.verdict == Verdict.UNKNOWN
    assert "No number of rows would decide it" in judge(scattered).sentence


@pytest.mark.parametrize("count", [0, 1, 4])
def test_fewer_than_five_oracles_decide_nothing(count: int) -> None:
    for value in (0.0, 0.9):
        found = judge(measured(value, 0.001, reference=(0.9,) * count))
        assert found.verdict == Verdict.UNKNOWN and f"{count} retrained models are at hand and 5" in found.sentence


def test_oracles_that_could_not_be_measured_do_not_count() -> None:
    assert measured(0.9, 0.001, reference=(*FIVE[:4], math.nan)).verdict == Verdict.UNKNOWN
    assert measured(0.9, 0.001, reference=(*FIVE, math.nan, math.inf)).verdict == Verdict.PASS


@pytest.mark.parametrize(
    ("value", "interval"),
    [(math.nan, (0.8, 0.9)), (math.inf, (0.8, 0.9)), (0.9, None), (0.9, (math.nan, math.nan)), (0.9, (0.8, math.nan))],
)
def test_what_could_not_be_measured_is_unknown(value: float, interval: tuple[float, float] | None) -> None:
    found = Finding("accuracy", value, 1000, interval, reference=FIVE, margin=0.05)
    assert found.verdict == Verdict.UNKNOWN


def test_a_plain_figure_has_no_verdict() -> None:
    assert figure("rows", 3.0, 3, "rows").verdict == Verdict.NONE
    assert figure("rows", math.nan, 3, "rows").verdict == Verdict.NONE


@checked(max_examples=25, deadline=None)
@given(
    shift=st.floats(-0.2, 0.2),
    half=st.floats(0, 0.2),
    reference=st.lists(st.floats(0.7, 0.9), min_size=5, max_size=8).map(tuple),
)
def test_a_wider_interval_never_decides_what_a_narrower_one_did_not(
    shift: float, half: float, reference: tuple[float, ...]
) -> None:
    value = sum(reference) / len(reference) + shift
    narrow, wide = measured(value, half, reference=reference), measured(value, half + 0.05, reference=reference)
    assert wide.verdict in (narrow.verdict, Verdict.UNKNOWN)
    if abs(shift) > 0.05 + 1e-9:
        assert narrow.verdict != Verdict.PASS
    elif abs(shift) < 0.05 - 1e-9:
        assert narrow.verdict != Verdict.FAIL


def test_plain_data_and_back_gives_the_verdict_anew() -> None:
    found = measured(0.8, 0.01)
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["verdict"] == "fail"
    plain["verdict"] = "pass"  # nobody can write one
    again = Finding.from_dict(plain)
    assert again == found and again.verdict == Verdict.FAIL


def test_an_audit_passes_only_if_all_do_and_plain_figures_do_not_count() -> None:
    passed, open_, plain = measured(0.9, 0.01), measured(0.9, 0.06), figure("seconds", 3.0, 1, "s")
    assert overall([passed, passed, plain]) == Verdict.PASS
    assert overall([passed, open_]) == overall([plain]) == overall([]) == Verdict.UNKNOWN


def test_one_failure_among_many_findings_must_be_surer() -> None:
    """Just outside the margin by itself it fails; among ten it may be chance. A clear failure stays one."""
    slight, clear, passed = measured(0.805, 0.035), measured(0.5, 0.02), measured(0.9, 0.01)
    assert slight.verdict == clear.verdict == Verdict.FAIL
    p = beyond(judge(slight).comparison)
    assert 0.01 < p < 0.05 and beyond(judge(clear).comparison) < 1e-6
    assert overall([slight]) == overall([clear, *[passed] * 30]) == Verdict.FAIL
    assert overall([slight, *[passed] * 9]) == Verdict.UNKNOWN


@given(value=st.floats(0, 1), half=st.floats(1e-3, 0.3))
@checked(max_examples=50, deadline=None)
def test_the_p_value_and_the_verdict_agree(value: float, half: float) -> None:
    finding = measured(value, half)
    p = beyond(judge(finding).comparison)
    assert 0 <= p <= 1 and (p < 0.05) == (finding.verdict == Verdict.FAIL)
