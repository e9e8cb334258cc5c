"""Findings: measured facts, and from these alone a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

MARGINS = {"accuracy": 0.02, "AUC": 0.05, "CKA": 0.05, "distance": 0.05}
ORACLES_NEEDED = 5


class Verdict(StrEnum):
    """pass: the same as retraining, within the margin. fail: not. unknown: these rows or oracles cannot tell.
    none: there is nothing to compare with by design (a plain figure)."""

    PASS = "pass"
    FAIL = "fail"
    UNKNOWN = "unknown"
    NONE = "none"


@dataclass(frozen=True)
class Finding:
    """One measured fact.

    `value` with its sampling `interval` (95 %) from `n` rows; `unit` says in which terms ("accuracy", "AUC", "CKA",
    …); `better`: "lower", "higher", or "reference": nearest to the oracles. `reference`: the oracles' values, all of
    them. `margin`: how far from the oracles still counts as the same, in the unit of the value; None for a plain
    figure. `protocol`: how it was measured, as printable words. `curve`: points to plot, by name.
    """

    name: str
    value: float
    n: int
    interval: tuple[float, float] | None = None
    better: str = "reference"
    unit: str = "accuracy"
    reference: tuple[float, ...] = ()
    margin: float | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)
    curve: Mapping[str, list[float]] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """See `core.verdict.judge`: the only place where verdicts come from."""
        from engram.core.verdict import judge

        return judge(self).verdict

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with the verdict."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**plain, "verdict": str(self.verdict)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Finding:
        """The finding that `as_dict` described; its verdict is worked out again."""
        known = {f.name: plain[f.name] for f in fields(cls)}
        interval, reference = known["interval"], known["reference"]
        known["interval"] = None if interval is None else (float(interval[0]), float(interval[1]))
        return cls(**{**known, "reference": tuple(reference)})


def figure(name: str, value: float, n: int, unit: str, **more: Any) -> Finding:
    """A plain figure: no margin, hence no verdict."""
    return Finding(name, value, n, unit=unit, **more)


def finite(value: float) -> bool:
    """Neither NaN nor infinite."""
    return math.isfinite(value)
