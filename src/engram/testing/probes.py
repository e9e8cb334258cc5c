"""Checks of probes."""

from __future__ import annotations

import math

from engram.core.probe import Probe, Subject
from engram.core.settings import name_of
from engram.engine.run import Run
from engram.errors import EngramError
from engram.testing.material import Material, condition, ensure


def check_findings(probe: Probe, material: Material) -> None:
    """Findings are finite, with an interval around the value; the subject stays as it was."""
    subject = material.subject()
    before = condition(subject.model)
    findings = probe.examine(subject, Run())
    ensure(condition(subject.model) == before, f"{name_of(probe)} changed the model that it examined")
    ensure(bool(findings), f"{name_of(probe)} found nothing, with everything at hand")
    for finding in findings:
        low, high = finding.interval or (finding.value, finding.value)
        numbers = [
            finding.value,
            low,
            high,
            *finding.reference,
            *(p for curve in finding.curve.values() for p in curve),
        ]
        ensure(all(map(math.isfinite, numbers)), f"the finding {finding.name!r} of {name_of(probe)} is not finite")
        ensure(low <= finding.value <= high, f"the interval of {finding.name!r} does not hold the value")


def check_asks_are_honest(probe: Probe, material: Material) -> None:
    """What it asks for suffices, and it refuses a subject that lacks any of it."""
    full = material.subject()
    probe.check(_only(full, probe.asks))
    probe.examine(_only(full, probe.asks), Run())
    for part in probe.asks - {"model"}:
        try:
            probe.check(_only(full, probe.asks - {part}))
        except EngramError:
            continue
        raise AssertionError(f"{name_of(probe)} asks for {part}, and accepts a subject without")


def _only(subject: Subject, parts: frozenset[str]) -> Subject:
    """The subject with these parts alone."""
    kept = {name: getattr(subject, name) for name in ("before", "request", "forgetter", "learner") if name in parts}
    oracles = subject.models("oracle", 2, Run()) if "oracles" in parts else []
    rows = {name: table for name, table in subject.rows.items() if name in parts}
    recipe = subject.recipe if "recipe" in parts else None
    return Subject(subject.model, rows=rows, recipe=recipe, oracles=tuple(o.model for o in oracles), **kept)
