"""Seeding, nearest keys and moving-average codebooks, against slow formulations and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engram.errors import EngramError
from engram.stats import kmeans
from engram.stats.kmeans import assign, ema_codebook, plus_plus
from engram.stats.seeds import generator


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator("rows", seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 7), st.integers(0, 99))
def test_assigned_is_the_nearest_live_key(codebooks: int, n: int, size: int, seed: int) -> None:
    x, keys = normal(codebooks, n, 3, seed=seed), normal(codebooks, size, 3, seed=seed + 1)
    live = torch.rand(codebooks, size, generator=generator("live", seed)) < 0.6
    live[:, 0] = True
    found = assign(x, keys, live)
    for c in range(codebooks):
        for row in range(n):
            distances = [float((x[c, row] - keys[c, j]).square().sum()) if live[c, j] else np.inf for j in range(size)]
            assert int(found[c, row]) == int(np.argmin(distances))


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, keys = normal(4, 50, 3), normal(4, 20, 3, seed=1)
    whole = assign(x, keys)
    monkeypatch.setattr(kmeans, "CELLS", 7 * 4 * 20)
    assert torch.equal(assign(x, keys), whole)
    assert torch.equal(whole[2], assign(x[2], keys[2]))


def test_equals_go_to_the_first_and_none_live_to_place_0() -> None:
    keys = torch.tensor([[1.0], [1.0], [3.0]], dtype=torch.float64)
    assert assign(torch.tensor([[0.0], [2.0], [9.0]], dtype=torch.float64), keys).tolist() == [0, 0, 2]
    assert assign(keys, keys, torch.zeros(3, dtype=torch.bool)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("power", "share"), [(2, 0.9), (1, 0.75)])
def test_a_centre_is_drawn_by_its_distance_from_the_known(power: float, share: float) -> None:
    x = torch.tensor([[0.0], [1.0], [3.0]])
    known, draws = torch.zeros(1, 1), generator("draws")
    found = torch.cat([plus_plus(x, 1, away_from=known, power=power, generator=draws) for _ in range(2000)])
    assert set(found.flatten().tolist()) == {1.0, 3.0}
    assert float((found == 3).double().mean()) == pytest.approx(share, abs=4 * (share * (1 - share) / 2000) ** 0.5)


def test_the_first_centre_is_any_row_and_all_are_different_rows() -> None:
    x, draws = normal(6, 2), generator("draws")
    firsts = torch.cat([plus_plus(x, 1, generator=draws) for _ in range(1200)])
    counts = (firsts[:, None] == x).all(2).sum(0)
    assert int(counts.sum()) == 1200 and counts.min() > 130 and counts.max() < 270
    assert len(plus_plus(x, 6, generator=draws).unique(dim=0)) == 6
    assert plus_plus(x, 0, generator=draws).shape == (0, 2)


def test_one_centre_lands_in_each_of_far_groups() -> None:
    groups = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]], dtype=torch.float64)
    x = (groups[:, None] + 0.1 * normal(3, 50, 2)).reshape(150, 2)
    for seed in range(20):
        centres = plus_plus(x, 3, generator=generator("seeding", seed))
        assert assign(groups, centres).unique().numel() == 3


def test_more_centres_than_places_are_refused() -> None:
    x = torch.tensor([[0.0], [0.0], [1.0]])
    with pytest.raises(EngramError, match="fewer than 3 places"):
        plus_plus(x, 3, generator=generator("x"))
    with pytest.raises(EngramError, match="fewer than 1 places"):
        plus_plus(x[:0], 1, generator=generator("x"))


def slowly(x: Tensor, keys: Tensor, counts: Tensor, sums: Tensor, decay: float) -> tuple[list[float], Tensor]:
    """One step of one codebook, key by key, without revival: new counts, and keys."""
    nearest = [min(range(len(keys)), key=lambda j: float((row - keys[j]).square().sum())) for row in x]
    new_counts, new_sums = [], []
    for j in range(len(keys)):
        mine = [row for row, place in zip(x, nearest, strict=True) if place == j]
        total = torch.stack(mine).sum(0) if mine else torch.zeros(x.shape[1], dtype=x.dtype)
        new_counts.append(decay * float(counts[j]) + (1 - decay) * len(mine))
        new_sums.append(decay * sums[j] + (1 - decay) * total)
    everything = sum(new_counts)
    smooth = [(n + 1e-5) / (everything + len(keys) * 1e-5) * everything for n in new_counts]
    return new_counts, torch.stack([s / n for s, n in zip(new_sums, smooth, strict=True)])


def test_a_step_is_the_definition_and_codebooks_do_not_mix() -> None:
    keys = normal(2, 5, 3, seed=1)
    counts = torch.rand(2, 5, generator=generator("counts"), dtype=torch.float64) + 1
    sums = keys * counts[..., None]
    for step in range(3):
        x = normal(2, 30, 3, seed=10 + step)
        wanted = [slowly(x[c], keys[c], counts[c], sums[c], 0.9) for c in range(2)]
        ema_codebook(x, keys, counts, sums, decay=0.9, revive=0, generator=generator("draws"))
        for c in range(2):
            torch.testing.assert_close(counts[c], torch.tensor(wanted[c][0], dtype=torch.float64), rtol=1e-12, atol=0)
            torch.testing.assert_close(keys[c], wanted[c][1], rtol=1e-10, atol=1e-12)


def test_a_key_that_few_rows_choose_becomes_a_row_of_the_batch() -> None:
    x = normal(20, 2)
    keys = torch.tensor([[0.0, 0.0], [90.0, 90.0]], dtype=torch.float64)
    counts, sums = torch.tensor([10.0, 1.0], dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    ema_codebook(x, keys, counts, sums, decay=0.95, revive=0.1, generator=generator("draws"))
    assert counts[0] == 0.95 * 10 + 0.05 * 20 and counts[1] == 0.1 * 20 / 2
    assert (x == keys[1]).all(1).any()
    assert torch.equal(sums[1], keys[1])


def test_keys_settle_on_the_means_of_their_rows() -> None:
    groups = torch.tensor([[-5.0, 0.0], [5.0, 0.0], [0.0, 8.0]], dtype=torch.float64)
    x = (groups[:, None] + 0.2 * normal(3, 100, 2)).reshape(300, 2)
    keys, draws = groups + 1.0, generator("draws")
    counts, sums = torch.ones(3, dtype=torch.float64), keys.clone()
    for _ in range(600):
        ema_codebook(x, keys, counts, sums, generator=draws)
    torch.testing.assert_close(keys, x.reshape(3, 100, 2).mean(1), rtol=0, atol=1e-5)
