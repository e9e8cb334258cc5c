"""The one place where verdicts come from: equivalence with retrained models, or no verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from scipy.special import ndtr, ndtri

from engram.core.finding import ORACLES_NEEDED, Finding, Verdict, finite
from engram.stats.intervals import Comparison, equivalence, holm

SENTENCES = {
    Verdict.PASS: "The same as retraining, within the margin: the interval of the difference lies inside it.",
    Verdict.FAIL: "Different from retraining: the interval of the difference lies outside the margin.",
    Verdict.UNKNOWN: "Not decided: the interval of the difference reaches across the margin.",
    Verdict.NONE: "A plain figure: nothing to compare it with was asked for.",
}


@dataclass(frozen=True)
class Judgement:
    """A verdict, what it rests on, and why, in one sentence."""

    verdict: Verdict
    comparison: Comparison | None
    sentence: str


def judge(finding: Finding) -> Judgement:
    """Compare a finding with the oracles' values.

    pass: the 95 % interval of (value - oracles) lies within [-margin, margin]; fail: wholly outside; else unknown,
    with the number of rows that would decide. The interval holds the sampling error of the value and the spread of the
    oracles. Fewer than 5 oracles, or none, cannot decide anything.
    """
    if finding.margin is None:
        return Judgement(Verdict.NONE, None, SENTENCES[Verdict.NONE])
    values = tuple(value for value in finding.reference if finite(value))
    if not finite(finding.value) or finding.interval is None:
        return Judgement(Verdict.UNKNOWN, None, "Not decided: the value could not be measured.")
    if len(values) < ORACLES_NEEDED:
        why = f"Not decided: {len(values)} retrained models are at hand and {ORACLES_NEEDED} are needed."
        return Judgement(Verdict.UNKNOWN, None, why)
    found = equivalence(finding.value, finding.interval, finding.n, values, finding.margin)
    low, high = found.low, found.high
    if -finding.margin <= low and high <= finding.margin:
        return Judgement(Verdict.PASS, found, SENTENCES[Verdict.PASS])
    if low > finding.margin or high < -finding.margin:
        return Judgement(Verdict.FAIL, found, SENTENCES[Verdict.FAIL])
    return Judgement(Verdict.UNKNOWN, found, f"{SENTENCES[Verdict.UNKNOWN]} {_would_decide(found, finding.n)}")


def overall(findings: Sequence[Finding]) -> Verdict:
    """The verdict of an audit. pass: all findings that have a verdict pass, which needs no correction. fail: some
    finding fails, and still does when it is one of so many (Holm; all of them together are wrong once in 20 audits).
    Else unknown.
    """
    judged = [judgement for judgement in map(judge, findings) if judgement.verdict != Verdict.NONE]
    if any(holm([beyond(judgement.comparison) for judgement in judged])):
        return Verdict.FAIL
    passed = bool(judged) and all(judgement.verdict == Verdict.PASS for judgement in judged)
    return Verdict.PASS if passed else Verdict.UNKNOWN


def beyond(found: Comparison | None) -> float:
    """The p-value of a difference that lies outside the margin: one less the level of the widest interval that would
    still lie wholly outside, by the normal shape of the 95 % one; below 0.05 exactly where that one does. 1 for a
    difference within the margin, or none."""
    if found is None or not abs(found.difference) > found.margin:
        return 1.0
    half = found.difference - found.low if found.difference > 0 else found.high - found.difference
    excess = (abs(found.difference) - found.margin) / half if half > 0 else inf
    return float(2 * ndtr(-excess * ndtri(0.975)))


def _would_decide(found: Comparison, n: int) -> str:
    if found.n_needed is None:
        return "No number of rows would decide it at this spread of the retrained models; more of these might."
    return f"About {found.n_needed} rows instead of {n} would decide it if the difference stayed as it is."
