"""Damage: how much of it there is, and that it depends on the generator alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.data.noise import corrupt, corrupted, occlude
from engram.data.table import Table
from engram.errors import EngramError
from engram.stats.seeds import generator


def draws(seed: int = 0) -> torch.Generator:
    return generator("noise test", seed)


@given(share=st.floats(0, 1), height=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_one_rectangle_of_the_share_is_hidden(share: float, height: int, width: int, seed: int) -> None:
    hidden = occlude(torch.ones(5, 2, height, width), share, draws(seed)) == 0
    assert torch.equal(hidden[:, 0], hidden[:, 1])
    for image in hidden[:, 0]:
        lines, columns = image.any(1), image.any(0)
        assert torch.equal(image, lines[:, None] & columns)  # a rectangle, and no gaps in its sides:
        assert all(int((side.int().diff() == 1).sum()) + int(side[0]) <= 1 for side in (lines, columns))
        assert abs(int(image.sum()) - share * height * width) <= math.ceil(height * math.sqrt(share)) / 2 + 1e-9


def test_a_quarter_of_28_by_28_is_14_by_14_anywhere() -> None:
    images = torch.rand(400, 1, 28, 28, generator=draws()) + 1
    damaged = occlude(images, 0.25, draws(), value=0.5)
    hidden = damaged == 0.5
    assert hidden.sum((1, 2, 3)).unique().tolist() == [196]
    assert torch.equal(damaged[~hidden], images[~hidden])
    assert bool(hidden.any(0).all())  # every corner is hidden in some image
    assert torch.equal(damaged, occlude(images, 0.25, draws(), value=0.5))


def test_replaced_and_blurred_values() -> None:
    x = torch.full((200, 100), 0.5)
    replaced = corrupt(x, "replace", 0.3, draws())
    changed = replaced != x
    assert 0.28 < changed.float().mean() < 0.32 and 0.46 < replaced[changed].mean() < 0.54
    blurred = corrupt(x, "gaussian", 0.1, draws())
    assert 0.097 < (blurred - x).std() < 0.103 and abs(float((blurred - x).mean())) < 0.003
    assert corrupt(x, "gaussian", 1.0, draws()).aminmax() == (0, 1)


@pytest.mark.parametrize("kind", ["occlusion", "replace", "gaussian"])
def test_level_nothing_changes_nothing_and_bytes_stay_bytes(kind: str) -> None:
    grey = torch.randint(256, (6, 1, 9, 7), generator=draws(), dtype=torch.uint8)
    assert torch.equal(corrupt(grey, kind, 0.0, draws()), grey)
    damaged, again = (corrupt(grey, kind, 0.6, draws(1)) for _ in range(2))
    assert damaged.dtype == torch.uint8 and not torch.equal(damaged, grey) and torch.equal(damaged, again)
    near = corrupt(grey.float() / 255, kind, 0.6, draws(1)) * 255
    assert (near - damaged.float()).abs().max() <= 0.5 + 1e-3


def test_a_table_keeps_all_but_its_inputs() -> None:
    rows = Table({"pixel_values": torch.ones(4, 1, 4, 4)}, torch.arange(4), names={1: "one"})
    damaged = corrupted(rows, "occlusion", 0.5, draws())
    assert damaged.ids == rows.ids and damaged.labels is rows.labels and damaged.names == rows.names
    assert damaged.inputs["pixel_values"].sum((1, 2, 3)).tolist() == [7.0] * 4  # 3 lines of 8 / 3 pixels, rounded
    assert rows.inputs["pixel_values"].min() == 1


def test_what_cannot_be_damaged_is_refused() -> None:
    with pytest.raises(EngramError, match=r"level of damage lies in 0 to 1, not 1\.5"):
        corrupt(torch.ones(2, 3), "replace", 1.5, draws())
    with pytest.raises(EngramError, match="unknown kind of damage 'oclusion'; did you mean 'occlusion'"):
        corrupt(torch.ones(2, 3), "oclusion", 0.5, draws())
    with pytest.raises(EngramError, match=r"have the shape \(2, 3\)"):
        occlude(torch.ones(2, 3), 0.5, draws())
