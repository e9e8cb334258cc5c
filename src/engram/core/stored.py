"""What lies beside models: recipes, prepared statistics, the accounts of requests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import nn

from engram.core.persist import MODEL, is_learner
from engram.core.settings import typed
from engram.data.table import Table
from engram.engine.journal import flatten, unflatten
from engram.engine.recipe import Recipe
from engram.errors import EngramError, at_least, unknown
from engram.files import LEFT, SUMS, check_sums, new_directory
from engram.models import io

FORMAT = 1
ACCOUNT, STATISTICS = "erasure.json", "statistics.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


def read_recipe(path: str | Path, model: str | Path, table: Table) -> Recipe:
    """A recipe from a YAML file: network (left out: an untrained model like that of the directory), optimizer, epochs,
    batch_size."""
    try:
        given = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise EngramError(f"the recipe {path} cannot be read: {str(error).splitlines()[0]}") from error
    known = ("network", "optimizer", "epochs", "batch_size")
    if not isinstance(given, dict):
        raise EngramError(f"the recipe {path} is no mapping; it may say {', '.join(known)}")
    for key in given:
        if key not in known:
            raise unknown("key of a recipe", key, known)
    given = {"network": {"fresh": str(home_of(Path(model)))}, **given}
    if isinstance(given.get("optimizer"), str):
        given["optimizer"] = {"name": given["optimizer"]}
    recipe = Recipe(**typed(Recipe, given), classes=table.classes)
    at_least("epochs of a recipe", recipe.epochs, 1)
    return recipe


def write_statistics(
    out: str | Path, found: Mapping[str, Any], *, model: nn.Module, method: Mapping[str, Any], rows: int
) -> None:
    """Statistics as a directory: statistics.json and statistics.safetensors, whole or not at all."""
    tensors: dict[str, Any] = {}
    tree = flatten(dict(found), tensors)
    entry = {"format": FORMAT, "model": io.digest(model), "method": dict(method), "rows": rows, "statistics": tree}
    with new_directory(out) as fresh:
        (fresh / "statistics.safetensors").write_bytes(save_bytes(tensors))
        (fresh / STATISTICS).write_text(json.dumps(entry, indent=1))


def read_statistics(path: str | Path, model: nn.Module) -> dict[str, Any]:
    """What `write_statistics` wrote. EngramError if it is damaged, or of another model."""
    folder = Path(path)
    entry = read_json(folder / STATISTICS)
    check_sums(folder)
    if entry.get("model") != io.digest(model):
        raise EngramError(f"the statistics in {folder} were prepared for another model than this one")
    try:
        tensors = load_bytes((folder / "statistics.safetensors").read_bytes())
        return dict(unflatten(entry["statistics"], tensors))
    except (OSError, SafetensorError, KeyError) as error:
        raise EngramError(f"the statistics in {folder} cannot be read: {error}") from error


def model_in(directory: Path) -> nn.Module:
    """The model of a model's or a learner's directory."""
    return io.load(home_of(directory))


def home_of(directory: Path) -> Path:
    """Where the model of a model's or a learner's directory stands."""
    return directory / MODEL if is_learner(directory) else directory


def copy_beside(old: Path, new: Path) -> None:
    """Copy what belongs to a model and is not its weights (tokenizer, processor, preprocessing), as far as it is not
    there."""
    for file in old.iterdir():
        if file.is_file() and not (new / file.name).exists() and _beside(file.name):
            shutil.copyfile(file, new / file.name)


def _beside(name: str) -> bool:
    return not name.endswith(WEIGHTS) and name not in (io.CONFIG, ACCOUNT, SUMS) and not LEFT.fullmatch(name)


def account_of(directory: Path) -> dict[str, Any]:
    """What `engram forget` wrote beside a model; empty if it did not make this one."""
    if not (directory / ACCOUNT).exists():
        return {}
    check_sums(directory, ACCOUNT)
    return read_json(directory / ACCOUNT)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. EngramError names a file that is missing or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise EngramError(f"{path} cannot be read: {error}") from error
