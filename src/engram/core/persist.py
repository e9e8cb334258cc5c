"""Learners as directories: the model, which loads by itself, and the traces beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from torch import nn

from engram.core.learner import Learner
from engram.core.settings import describe, make
from engram.engine.journal import flatten, unflatten
from engram.errors import EngramError
from engram.files import check_sums, new_directory
from engram.models import io

FORMAT = 1
LEARNER, TRACES, MODEL = "learner.json", "traces.safetensors", "model"


def save_learner(
    learner: Learner, directory: str | Path, *, tasks: int = 0, beside: Callable[[Path], object] | None = None
) -> None:
    """Write a learner, whole or not at all: `model/` (config and weights; `load` or `from_pretrained` read it),
    `learner.json` (settings, state without tensors, how many tasks it has had), `traces.safetensors`. `beside(folder)`
    writes what belongs to it (preprocessing, a tokenizer)."""
    state = learner.state_dict()
    tensors: dict[str, Any] = {}
    tree = flatten({"traces": state["traces"], "extra": state["extra"]}, tensors)
    entry = {
        "format": FORMAT,
        "learner": _portable(describe(learner)),
        "tasks": tasks,
        "model": learner.started,
        "state": tree,
    }
    with new_directory(directory) as fresh:
        if learner.started:
            io.save(learner.model, fresh / MODEL)
        (fresh / TRACES).write_bytes(save_bytes(tensors))
        (fresh / LEARNER).write_text(json.dumps(entry, indent=1))
        if beside is not None:
            beside(fresh)


def load_learner(directory: str | Path) -> tuple[Learner, int]:
    """The learner that `save_learner` wrote, and how many tasks it has had. EngramError names a damaged file."""
    folder = Path(directory)
    if not (folder / LEARNER).exists():
        raise EngramError(f"{folder} holds no learner ({LEARNER} is missing); {io.nearby(folder)}")
    entry = _read(folder / LEARNER, lambda path: json.loads(path.read_text()))
    found = entry.get("format") if isinstance(entry, dict) else None
    if found != FORMAT:
        raise EngramError(f"{folder / LEARNER} has format {found}; this version reads format {FORMAT}")
    check_sums(folder)
    state = _read(folder / TRACES, lambda path: unflatten(entry["state"], load_file(path)))
    learner: Learner = make(entry["learner"])
    model = list(io.pack(io.load(folder / MODEL))) if entry.get("model", (folder / MODEL).is_dir()) else None
    learner.load_state_dict({"model": model, **state})
    return learner, entry["tasks"]


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise EngramError(f"{path} cannot be read: {error}") from error


def load(directory: str | os.PathLike[str]) -> nn.Module | Learner:
    """What stands in a directory: a model (engram's own, or what `save_pretrained` wrote) or a learner. EngramError
    names a file that is missing or damaged, and refuses weights in pickle format."""
    return load_learner(Path(directory))[0] if is_learner(directory) else io.load(Path(directory))


def is_learner(directory: str | os.PathLike[str]) -> bool:
    """Does a learner stand in this directory?"""
    return (Path(directory) / LEARNER).exists()


def _portable(described: dict[str, Any]) -> dict[str, Any]:
    """Settings as they can be made again: a module that was handed over is in the saved model already."""
    packed = {key for key, value in described.items() if isinstance(value, dict) and {"format", "class"} <= set(value)}
    return {key: value for key, value in described.items() if key not in packed}
