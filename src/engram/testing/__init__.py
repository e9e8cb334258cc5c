"""What the test suite of engram, and of methods that others add, is written with.

`checks_of(method)` gives the checks that a method of its kind has to pass; each takes the method, configured as for a
quick test (its `tiny()`), and `Material`, and raises AssertionError with a sentence that says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from engram.core.forgetter import Forgetter
from engram.core.learner import Learner
from engram.core.probe import Probe
from engram.core.protector import Protector
from engram.testing.catalogue import check_row
from engram.testing.every import check_config, check_resumes, check_seeded, check_untouched
from engram.testing.forgetters import (
    check_forgetter_is_exact,
    check_forgetter_needs_are_honest,
    check_model_is_untouched,
)
from engram.testing.learners import (
    after_round_trip,
    check_forgetting_is_exact,
    check_learner_needs_are_honest,
    check_looking_changes_nothing,
    check_prediction_is_of_the_row_alone,
    check_round_trip,
    check_traces_are_complete,
)
from engram.testing.material import Material, condition, digits, fingerprint, learnt, outcome
from engram.testing.probes import check_asks_are_honest, check_findings
from engram.testing.protectors import check_protected_rows

__all__ = [
    "Check",
    "Material",
    "after_round_trip",
    "check_asks_are_honest",
    "check_config",
    "check_findings",
    "check_forgetter_is_exact",
    "check_forgetter_needs_are_honest",
    "check_forgetting_is_exact",
    "check_learner_needs_are_honest",
    "check_looking_changes_nothing",
    "check_model_is_untouched",
    "check_prediction_is_of_the_row_alone",
    "check_protected_rows",
    "check_resumes",
    "check_round_trip",
    "check_row",
    "check_seeded",
    "check_traces_are_complete",
    "check_untouched",
    "checks_of",
    "condition",
    "digits",
    "fingerprint",
    "holds",
    "learnt",
    "outcome",
]

F = TypeVar("F", bound=Callable[..., object])


def holds(slug: str, *items: int) -> Callable[[F], F]:
    """Mark a test as the proof of items of a paper's list "what must hold", counted from 1.

    Several papers' items may be proved by one test: apply the marker once for each paper.
    """

    def mark(test: F) -> F:
        proved = [*getattr(test, "__holds__", []), *((slug, item) for item in items)]
        test.__holds__ = proved  # type: ignore[attr-defined]
        return test

    return mark


Check = Callable[[Any, Material], None]
EVERY: tuple[Check, ...] = (check_config, check_untouched, check_seeded, check_resumes)
LEARNER: tuple[Check, ...] = (
    check_prediction_is_of_the_row_alone,
    check_looking_changes_nothing,
    check_learner_needs_are_honest,
    check_traces_are_complete,
    check_forgetting_is_exact,
    check_round_trip,
)
FORGETTER: tuple[Check, ...] = (check_model_is_untouched, check_forgetter_needs_are_honest, check_forgetter_is_exact)
PROBE: tuple[Check, ...] = (check_findings, check_asks_are_honest)
PROTECTOR: tuple[Check, ...] = (check_protected_rows,)


def checks_of(method: Any) -> tuple[Check, ...]:
    """The checks that a method of its kind has to pass."""
    kinds: Mapping[type, tuple[Check, ...]] = {
        Learner: LEARNER,
        Forgetter: FORGETTER,
        Probe: PROBE,
        Protector: PROTECTOR,
    }
    return (*EVERY, *(check for kind, own in kinds.items() if isinstance(method, kind) for check in own))
