"""Two arms, interleaved, one thread: the ratio of their medians, with the spread of the paired ratios."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

REPEATS = 5
Act = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Ratio:
    """`baseline` seconds over `ours` seconds (above 1: ours is faster), or the inverse where `cost` is set."""

    name: str
    value: float
    low: float
    high: float
    bound: str = ""
    holds: bool | None = None

    def line(self) -> str:
        """One line of the table."""
        verdict = "" if self.holds is None else ("holds" if self.holds else "DOES NOT HOLD")
        return f"{self.name:<72} {self.value:>8.2f}x  [{self.low:.2f}, {self.high:.2f}]  {self.bound:<10} {verdict}"


def seconds(act: Act, clock: Clock = time.process_time) -> float:
    """CPU seconds of one call: other processes on the machine do not count."""
    start = clock()
    act()
    return clock() - start


def speedup(
    name: str,
    ours: Act,
    baseline: Act,
    *,
    least: float | None = None,
    repeats: int = REPEATS,
    clock: Clock = time.process_time,
) -> Ratio:
    """How many times faster `ours` is than `baseline`; `least`: the bound that is claimed.

    `clock`: `time.perf_counter` where the arms work in processes of their own; nothing else may run then.
    """
    pairs = _paired(ours, baseline, repeats, clock)
    ratios = pairs[:, 1] / pairs[:, 0]
    value = float(np.median(pairs[:, 1]) / np.median(pairs[:, 0]))
    bound = "" if least is None else f">= {least:g}"
    return Ratio(
        name, value, float(ratios.min()), float(ratios.max()), bound, None if least is None else value >= least
    )


def overhead(name: str, ours: Act, baseline: Act, *, most: float, repeats: int = REPEATS) -> Ratio:
    """How many times the baseline's time `ours` takes; `most`: the bound that is claimed."""
    pairs = _paired(ours, baseline, repeats)
    ratios = pairs[:, 0] / pairs[:, 1]
    value = float(np.median(pairs[:, 0]) / np.median(pairs[:, 1]))
    return Ratio(name, value, float(ratios.min()), float(ratios.max()), f"<= {most:g}", value <= most)


def _paired(ours: Act, baseline: Act, repeats: int, clock: Clock = time.process_time) -> np.ndarray:
    """Seconds [repeats, 2], interleaved, after one call of each that does not count."""
    ours(), baseline()
    return np.array([[seconds(ours, clock), seconds(baseline, clock)] for _ in range(repeats)])
