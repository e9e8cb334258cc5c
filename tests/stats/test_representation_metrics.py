"""CKA as an audit of representations needs it, and how agreements are put together."""

from __future__ import annotations

from math import nan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engram.errors import EngramError
from engram.stats.gaps import tug_of_war
from engram.stats.seeds import generator
from engram.stats.similarity import cka, harmonic_mean, representation_agreement
from engram.testing import holds

shares = st.floats(0, 1)


def random(n: int, d: int, *key: object) -> Tensor:
    return torch.randn(n, d, generator=generator("representation metrics", n, d, *key), dtype=torch.float64)


@holds("are-we-truly-forgetting", 1)
@settings(max_examples=25, deadline=None)
@given(st.integers(4, 30), st.integers(1, 12), st.floats(0.01, 100), st.booleans(), st.integers(0, 99))
def test_cka_is_one_up_to_rotation_scale_and_shift(n: int, d: int, scale: float, negative: bool, key: int) -> None:
    x, shift = random(n, d, key), 10 * random(1, d, key, "shift")
    turned = (-scale if negative else scale) * x @ torch.linalg.qr(random(d, d, key, "turn")).Q + shift
    assert cka(x, turned, unbiased=False) == pytest.approx(1, abs=1e-6)
    assert cka(x, turned) == pytest.approx(1, abs=1e-6)


@holds("are-we-truly-forgetting", 1)
@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_cka_is_symmetric_and_a_share(n: int, dx: int, dy: int, key: int) -> None:
    x, y = random(n, dx, key), random(n, dy, key, "other")
    y[:, 0] += x[:, 0]
    value = cka(x, y, unbiased=False)
    assert value == pytest.approx(cka(y, x, unbiased=False), abs=1e-12)
    assert -1e-12 <= value <= 1 + 1e-12
    if n >= 4:
        assert cka(x, y) == pytest.approx(cka(y, x), abs=1e-12) and cka(x, y) <= 1 + 1e-12


@pytest.mark.parametrize(("n", "d", "floor"), [(512, 2048, 0.80), (512, 512, 0.50), (5000, 512, 0.09)])
def test_independent_features_stand_on_a_floor_unless_the_estimate_is_unbiased(n: int, d: int, floor: float) -> None:
    x, y = random(n, d, "x"), random(n, d, "y")
    assert cka(x, y, unbiased=False) == pytest.approx(floor, abs=0.006)
    assert abs(cka(x, y)) < 0.005


def test_batches_of_one_class_each_are_not_the_whole() -> None:
    """Two representations that agree on classes and on nothing else, sorted by class: only between batches alike."""
    centres = 8 * torch.eye(4, dtype=torch.float64).repeat_interleave(32, 0)
    x, y = (centres + random(128, 4, side) for side in "xy")
    batches = [cka(x[k : k + 32], y[k : k + 32]) for k in range(0, 128, 32)]
    assert cka(x, y) > 0.8 and max(batches) < 0.3
    order = torch.randperm(128, generator=generator("shuffled"))
    assert cka(x[order], y[order]) == pytest.approx(cka(x, y), abs=1e-12)


def test_agreement_of_representations_as_worked_out() -> None:
    assert representation_agreement([0.9, 0.5], [0.1, -0.2]) == pytest.approx(0.605)
    assert representation_agreement([1.0, 1.0 + 1e-9], [0.0, 0.0]) == 1
    assert representation_agreement([nan, -0.2, 1.0], [0.0, 0.0, 0.25]) == pytest.approx(0.25)
    for similarities, gaps in (([], []), ([0.5], [0.1, 0.2])):
        with pytest.raises(EngramError, match="one CKA and one gap a set"):
            representation_agreement(similarities, gaps)


@holds("are-we-truly-forgetting", 6)
@settings(max_examples=25, deadline=None)
@given(st.lists(shares, min_size=1, max_size=5), st.lists(shares, min_size=1, max_size=5), st.data())
def test_the_joint_agreement_lies_between_both(
    gaps: list[float], similarities: list[float], data: st.DataObject
) -> None:
    of_knn = [data.draw(shares) for _ in similarities]
    logits, inner = tug_of_war(gaps), representation_agreement(similarities, of_knn)
    both = harmonic_mean(logits, inner)
    assert 0 <= both <= 1
    assert min(logits, inner) - 1e-12 <= both <= max(logits, inner) + 1e-12


@holds("are-we-truly-forgetting", 6)
def test_the_joint_agreement_at_its_ends() -> None:
    same = tug_of_war([0.0, 0.0]), representation_agreement([1.0, 1.0], [0.0, 0.0])
    assert same == (1, 1) and harmonic_mean(*same) == 1
    assert harmonic_mean(tug_of_war([1.0, 0.0]), 0.7) == 0 == harmonic_mean(0.7, representation_agreement([0.0], [0]))
    assert harmonic_mean(0, 0) == 0
    assert harmonic_mean(0.9, 0.6) == pytest.approx(0.72)
