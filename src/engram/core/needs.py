"""What a method cannot do without, checked before work starts."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from engram.engine.run import Run
from engram.errors import EngramError


class Need(StrEnum):
    """One thing that a method may need to have at hand. Labels are asked for per side."""

    FORGET_ROWS = "forget-rows"
    FORGET_LABELS = "forget-labels"
    RETAIN_ROWS = "retain-rows"
    RETAIN_LABELS = "retain-labels"
    GENERAL_ROWS = "general-rows"  # rows that are no training data
    STATISTICS = "statistics"  # what prepare() stored while the data were there
    HISTORY = "history"  # updates recorded while training
    RECIPE = "recipe"  # one more model of this kind can be trained
    ORACLES = "oracles"  # retrained models are at hand
    CONCEPT = "concept"
    ANCHOR = "anchor"
    CLASS_NAMES = "class-names"
    BOUNDARIES = "boundaries"  # the stream says where a task ends
    BACKBONE = "backbone"  # a pretrained encoder


Needs = tuple[frozenset[Need], ...]  # any ONE of the sets is enough
NOTHING: Needs = (frozenset(),)


def needs(*alternatives: Iterable[Need]) -> Needs:
    """Alternatives of needs: any one of them is enough."""
    return tuple(frozenset(alternative) for alternative in alternatives)


def satisfied(wanted: Needs, have: frozenset[Need]) -> bool:
    """Is one of the alternatives wholly at hand?"""
    return any(alternative <= have for alternative in wanted)


def lacking(wanted: Needs, have: frozenset[Need]) -> str:
    """What the nearest alternative lacks, as words."""
    nearest = min(wanted, key=lambda alternative: len(alternative - have))
    return ", ".join(sorted(nearest - have))


def require(name: str, wanted: Needs, have: frozenset[Need]) -> None:
    """EngramError that names what is lacking, and the methods of the same wing that would do without it."""
    if not satisfied(wanted, have):
        lack = lacking(wanted, have)
        raise EngramError(f"{name} needs {lack}, which the request does not hold; {_instead(name, have)}")


def require_processes(name: str, declared: str) -> None:
    """EngramError where several processes run a method that is declared for one."""
    count = Run().shard[1]
    if declared == "one" and count > 1:
        raise EngramError(f"{name} works in one process, and there are {count}; start a single one")


def _instead(name: str, have: frozenset[Need]) -> str:
    from engram.catalogue import possible

    wing = name.split(".")[0] if "." in name else "forget"
    options = [option for option in possible({str(need) for need in have}, wing) if option.usable]
    able = [option.method.name + (f" ({option.setting})" if option.setting else "") for option in options]
    return f"with what is at hand one can use {', '.join(able)}" if able else "no method of the catalogue does without"
