"""Seeds and draws are pure functions of names, and stay what they are from version to version."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from engram.stats.seeds import derive, generator, uniform


@pytest.mark.parametrize(
    ("parts", "seed"),
    [
        ((), 6510301506637419378),
        ((0,), 4246866556266386882),
        (("a", 1), 6962120981034877120),
        (("run", 7, None), 8794427171564831085),
    ],
)
def test_seeds_are_frozen(parts: tuple[object, ...], seed: int) -> None:
    assert derive(*parts) == seed


def test_draws_are_frozen() -> None:
    drawn = uniform(torch.tensor([0, 1, 5]), "a", 1, size=2)
    hexes = [
        *("0x1.0aa52123379aep-1", "0x1.7f09c4cd43c5ap-2", "0x1.02d66b127b4b9p-1"),
        *("0x1.2c2c697c45096p-2", "0x1.a1462c172e7fcp-3", "0x1.ae4b0b29479efp-1"),
    ]
    assert drawn.dtype == torch.float64 and drawn.shape == (3, 2)
    assert [x.hex() for x in drawn.flatten().tolist()] == hexes
    assert torch.randint(1000, (3,), generator=generator("a", 1)).tolist() == [267, 525, 598]


@given(st.lists(st.one_of(st.integers(), st.text("ab1"), st.none()), max_size=3), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_a_seed_depends_on_every_part_and_its_place(parts: list[object], last: int) -> None:
    assert derive(*parts) == derive(*parts) and 0 <= derive(*parts) < 2**63
    assert derive(*parts) != derive(*parts, last) != derive(*parts, last + 1)
    assert derive(*parts, 1, 23) != derive(*parts, 12, 3) != derive(*parts, 3, 12)


@given(rows=st.lists(st.integers(0, 2**40), min_size=1, max_size=20), cut=st.integers(0, 20), size=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_the_draws_of_a_row_do_not_depend_on_its_batch(rows: list[int], cut: int, size: int) -> None:
    whole = uniform(torch.tensor(rows), "key", size=size)
    parts = [uniform(torch.tensor(part, dtype=torch.long), "key", size=size) for part in (rows[:cut], rows[cut:])]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(uniform(torch.tensor(rows[::-1]), "key", size=size), whole.flip(0))
    assert not torch.equal(uniform(torch.tensor(rows), "other key", size=size), whole)


@pytest.mark.parametrize("key", ["a", "b", 0])
def test_draws_are_uniform_and_their_columns_apart(key: object) -> None:
    drawn = uniform(torch.arange(4000), key, size=2)
    assert drawn.min() >= 0 and drawn.max() < 1
    for column in drawn.T:
        assert kstest(column.numpy(), "uniform").pvalue > 1e-3
    neighbours = torch.stack([drawn[:, 0], drawn[:, 1]]).mul(4).long()
    cells = torch.bincount(4 * neighbours[0] + neighbours[1], minlength=16)
    assert chisquare(cells.numpy()).pvalue > 1e-3


def test_draws_of_several_keys_have_nothing_to_do_with_each_other() -> None:
    a, b = (uniform(torch.arange(4000), key).flatten() for key in ("a", "b"))
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.05
