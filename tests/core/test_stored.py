"""Recipes as files: what is read, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from engram.core.stored import read_recipe
from engram.data.readers import read
from engram.engine.optimizer import Optimizer
from engram.errors import EngramError


def recipe(folder: Path, text: str) -> Path:
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def test_a_recipe_arrives_with_its_types(tmp_path: Path) -> None:
    """YAML reads 1e-3 as text."""
    table = read("sklearn:digits", limit=20)
    found = read_recipe(recipe(tmp_path, "optimizer: {name: sgd, lr: 1e-3}\nepochs: 3"), tmp_path, table)
    assert found.optimizer == Optimizer("sgd", 0.001) and found.epochs == 3
    assert found.network == {"fresh": str(tmp_path)} and found.classes == table.classes
    assert read_recipe(recipe(tmp_path, "optimizer: adamw"), tmp_path, table).optimizer == Optimizer("adamw")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 3", "is no mapping"),
        ("epoch: 3", "did you mean 'epochs'"),
        ("epochs: 0", "epochs of a recipe is 0; give 1 or more"),
        ("epochs: -2", "epochs of a recipe is -2"),
        ("epochs: few", "Recipe: epochs takes int, not 'few'"),
        ("batch_size: -1", "batch_size of a recipe is -1"),
        ("optimizer: 3", "optimizer of Recipe is 3; give its settings"),
        ("optimizer: {lrr: 1}", "did you mean 'lr'"),
        ("optimizer: {lr: .nan}", "lr of the optimizer is nan"),
        ("optimizer: {name: adm}", "did you mean 'adam'"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_named(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(EngramError, match=words):
        read_recipe(recipe(tmp_path, text), tmp_path, read("sklearn:digits", limit=20))
