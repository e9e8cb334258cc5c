"""The feature cache: computed once, never mistaken, and able to let go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from engram.data.table import Table
from engram.engine.cache import FeatureCache
from engram.engine.predict import features
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.errors import EngramError


@pytest.fixture
def model(split: tuple[Table, Table]) -> nn.Module:
    return Recipe({"name": "MLP", "hidden": [8]}).start(split[0], Run())


def test_once_per_weights_and_rows(model: nn.Module, split: tuple[Table, Table], tmp_path: Path) -> None:
    cache, rows = FeatureCache(tmp_path), split[0].take(range(50))
    first = cache.features(model, rows)
    assert torch.equal(first, features(model, rows))
    run = Run()
    assert torch.equal(cache.features(model, rows, run), first)
    assert run.cost.rows == 0
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    assert not torch.equal(cache.features(model, rows), first)
    cache.features(model, rows.take(range(49)))
    assert len(list(tmp_path.iterdir())) == 3


def test_rows_can_be_let_go(model: nn.Module, split: tuple[Table, Table], tmp_path: Path) -> None:
    cache, rows = FeatureCache(tmp_path), split[0].take(range(50))
    cache.features(model, rows.take(range(25)))
    cache.features(model, rows.take(range(25, 50)))
    assert cache.holds(rows.ids) == rows.ids
    assert cache.drop(rows.take([3])) == ()
    assert cache.holds(rows.ids) == rows.ids[25:]


def test_a_damaged_file_is_named(model: nn.Module, split: tuple[Table, Table], tmp_path: Path) -> None:
    cache, rows = FeatureCache(tmp_path), split[0].take(range(5))
    cache.features(model, rows)
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(EngramError, match=path.name):
        cache.features(model, rows)
    with pytest.raises(EngramError, match=path.name):
        cache.holds(rows.ids)
