"""Policies of the lifelong learning framework, as data: how stiff every group of weights is while what is learnt.

A group has words: what it is (within, link, head; top in the last hidden layer), whom it belongs to (new or old: the
block and heads that serve the task at hand, or any other), and what part it plays: source (the block that the new one
began from), copied (it began as a copy of that), backward (a link from the new block), confused (a head of a confused
class, or in a block that has one), forgotten. All groups have the word all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from engram.errors import EngramError, unknown

FREE, FROZEN = 0.0, math.inf
HELD = "held"  # each group as stiff as it has become
WORDS = {
    "all", "within", "link", "head", "top", "new", "old",
    "source", "copied", "backward", "confused", "forgotten",
}  # fmt: skip
ROWS = ("new", "rehearsal", "confused")
STARTS = ("fresh", "link", "copy")


def _check_words(pattern: str) -> None:
    for word in pattern.split():
        if word not in WORDS:
            raise unknown("word of a group", word, sorted(WORDS))


@dataclass(frozen=True)
class Step:
    """One training. `b`: words -> how stiff: of the entries all of whose words a group has, the last counts.
    `rows`: the task's ("new", each class against those of the task), or those kept for rehearsal (each against all
    classes), always or only where classes are "confused" among them. `to_zero`: words of the groups that are pulled to
    0 instead of to what they are now. `times`: how often."""

    b: Mapping[str, float | str]
    rows: str = "new"
    to_zero: str = ""
    times: int = 1

    def __post_init__(self) -> None:
        if self.rows not in ROWS:
            raise unknown("choice of rows", self.rows, ROWS)
        for words, b in self.b.items():
            _check_words(words)
            if b != HELD and not (isinstance(b, int | float) and b >= 0):
                raise EngramError(f"b of {words!r} is {b!r}; it has to be a number from 0 to inf, or {HELD!r}")
        _check_words(self.to_zero)

    def stiffness(self, words: set[str]) -> float | str:
        """b of a group with these words; frozen, where no entry speaks of it."""
        found = [b for pattern, b in self.b.items() if words.issuperset(pattern.split())]
        return found[-1] if found else FROZEN

    def vanishes(self, words: set[str]) -> bool:
        """Is a group with these words pulled to 0?"""
        return bool(self.to_zero) and words.issuperset(self.to_zero.split())


@dataclass(frozen=True)
class Policy:
    """What is done when a task comes: `steps`, one after the other.

    `start`: how a new block begins, if an older one's features tell the task's classes clearly better than an
    untrained block's do: a link from it with its weights, a copy of it, or (and otherwise) fresh. `backward`: are there
    links from the new block to that one? `columns`: the most blocks; then the task takes the one that is held least.
    `expands`: does a block grow until it has learnt the task? When a task ends, b of every group becomes `raised` if it
    is new, else `fade` * b; and it grows by `importance` times the mean Fisher information of its weights on the task's
    rows.
    """

    steps: tuple[Step, ...]
    start: str = "fresh"
    backward: bool = False
    columns: int | None = None
    expands: bool = False
    fade: float = 1.0
    raised: float = 0.0
    importance: float = 0.0

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise unknown("start of a block", self.start, STARTS)
        if self.columns is not None and self.columns < 1:
            raise EngramError(f"a network of {self.columns} columns learns nothing; give 1 or more")
        if not 0 < self.fade <= 1:
            raise EngramError(f"what is left of b after a task is {self.fade}; it has to lie above 0, and be at most 1")

    @property
    def rehearses(self) -> bool:
        """Does any step want rows of earlier tasks?"""
        return any(step.rows != "new" for step in self.steps)


KEEP = Step({"all": FROZEN, "new": FREE})
AS_HELD = Step({"all": HELD})

POLICIES: dict[str, Policy] = {
    "learn": Policy((Step({"all": FREE}),), columns=1),
    "no forgetting": Policy((KEEP,), expands=True),
    "forward transfer": Policy((KEEP,), start="link"),
    "few-shot": Policy((Step({"all": FROZEN, "new": FREE, "copied": 0.1}),), start="copy"),
    "confusion reduction": Policy(
        (KEEP, Step({"all": FROZEN, "confused top": 0.1, "confused head": 1e-2}, rows="confused"))
    ),
    "backward transfer": Policy(
        (KEEP, Step({"all": 1e-2, "backward": FREE}, rows="rehearsal")), start="link", backward=True
    ),
    "overall refinement": Policy((KEEP, Step({"all": 1e-2}, rows="rehearsal", times=3))),
    "graceful forgetting": Policy((KEEP,), columns=3, importance=1.0),
    "retention": Policy((AS_HELD,), columns=1, importance=3.0),
    "rain man": Policy((AS_HELD,), columns=1, raised=FROZEN),
    "memory loss": Policy((AS_HELD,), columns=1, raised=3.0, fade=0.1),
    "sleep deprivation": Policy((AS_HELD,), columns=1),
}

# a block that is forgotten, while others listen to it: it decays, and they make up for it
FORGET = Step({"all": 1e-2, "forgotten": 1.0}, rows="rehearsal", to_zero="forgotten")


def policy_of(given: Any) -> Policy:
    """A policy by its name, as a mapping of its fields, or as it is. EngramError for anything else."""
    if isinstance(given, Policy):
        return given
    if isinstance(given, Mapping):
        settings = {key: value for key, value in given.items() if key != "name"}
        known = [field.name for field in fields(Policy)]
        for key in settings:
            if key not in known:
                raise unknown("setting of a policy", key, known)
        return Policy(**{**settings, "steps": tuple(map(_step, settings.get("steps", ())))})
    if given not in POLICIES:
        raise unknown("policy", given, POLICIES)
    return POLICIES[given]


def _step(given: Any) -> Step:
    if isinstance(given, Step):
        return given
    known = [field.name for field in fields(Step)]
    for key in (settings := {key: value for key, value in dict(given).items() if key != "name"}):
        if key not in known:
            raise unknown("setting of a step", key, known)
    return Step(**settings)
