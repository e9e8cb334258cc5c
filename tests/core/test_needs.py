"""Needs are alternatives: any one of them is enough, and what lacks is named with what would do without."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import settings as checked
from hypothesis import strategies as st

from engram.core.needs import NOTHING, Need, needs, require, satisfied
from engram.errors import EngramError

F, FL, R, RL, S = Need.FORGET_ROWS, Need.FORGET_LABELS, Need.RETAIN_ROWS, Need.RETAIN_LABELS, Need.STATISTICS
SSD = needs({F, FL, S}, {F, FL, R, RL})
SETS = st.frozensets(st.sampled_from(list(Need)))


@pytest.mark.parametrize(
    ("have", "enough"),
    [({F, FL, S}, True), ({F, FL, R, RL}, True), ({F, FL, R}, False), ({S, R, RL}, False), (set(), False)],
)
def test_one_alternative_is_enough(have: set[Need], enough: bool) -> None:
    assert satisfied(SSD, frozenset(have)) is enough


def test_nothing_is_always_satisfied() -> None:
    assert satisfied(NOTHING, frozenset())


@checked(max_examples=25, deadline=None)
@given(wanted=st.lists(SETS, min_size=1, max_size=3), have=SETS, more=SETS)
def test_more_at_hand_never_hurts(wanted: list[frozenset[Need]], have: frozenset[Need], more: frozenset[Need]) -> None:
    before, after = satisfied(needs(*wanted), have), satisfied(needs(*wanted), have | more)
    assert before == any(alternative <= have for alternative in wanted)
    assert after or not before


def test_the_nearest_alternative_says_what_lacks() -> None:
    with pytest.raises(EngramError) as error:
        require("forget.SSD", SSD, frozenset({F, R, RL}))
    assert str(error.value).startswith("forget.SSD needs forget-labels, which")
    with pytest.raises(EngramError, match=r"needs statistics, which"):
        require("forget.SSD", SSD, frozenset({F, FL}))


def test_the_error_names_methods_of_the_wing_that_would_do() -> None:
    with pytest.raises(EngramError) as error:
        require("forget.SSD", SSD, frozenset({F, FL}))
    assert "forget.GradientAscent" in str(error.value)
    assert "forget.NPO (retain_weight=0)" in str(error.value)  # it does with another setting than its default
    assert "keep." not in str(error.value) and "forget.Retrain" not in str(error.value)
    with pytest.raises(EngramError, match="no method of the catalogue does without"):
        require("forget.SSD", SSD, frozenset())


def test_what_is_satisfied_passes_in_silence() -> None:
    require("forget.SSD", SSD, frozenset({F, FL, R, RL}))
