"""A learner that was saved goes on: it takes in a new table, or predicts one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engram.core.learner import Learner, batched
from engram.core.persist import MODEL, load_learner, save_learner
from engram.core.reading import columns_for, generates, known_of, preprocessing_of, rows_for
from engram.core.settings import name_of
from engram.core.stored import copy_beside, home_of
from engram.data.readers import read_with
from engram.data.table import MISSING, Ids, Table, Target
from engram.data.task import Task
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.errors import EngramError, at_least
from engram.files import refuse_existing
from engram.models.head import predict_classes
from engram.models.io import digest, load


def learn_more(
    learner_directory: str | Path,
    source: str,
    out: str | Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    precision: str = "float32",
    batch_size: int | None = None,
    ledger: Any = None,
    **columns: Any,
) -> tuple[str, int]:
    """Let a saved learner take in a table as its next task, and write it to `out`: (its name, rows taken in).

    The table is read as the learner's first one was. `batch_size`: becomes the learner's own, for later tasks too.
    `ledger`: is told what the new learner has learnt, and from which one it comes. EngramError if there is no learner
    or the table does not fit.
    """
    refuse_existing(out)
    run = Run(seed=seed, device=device, precision=precision)
    learner, tasks = load_learner(learner_directory)
    if batch_size is not None:
        learner = batched(learner, batch_size)
    table, save = _more(learner, Path(learner_directory), source, columns)
    if not len(table):
        raise EngramError(f"{source} holds no rows to learn from")
    if learner.started:
        columns_for(table, learner.model)
    known = set() if not learner.started else _classes(learner.model)
    new = tuple(c for c in table.classes if c not in known)
    before = None if ledger is None else ledger.holder_of(learner_directory, _weights(learner))
    learner.learn(Task(table, None, tasks, new, table.names), run)
    learner.refresh(run)
    if ledger is not None:  # before the files: a kill between the two leaves no learner that nobody noted
        parent = None if before is None else before.number
        ledger.add_holder("learner", out, table.ids, weights=_weights(learner), parent=parent)
    save_learner(learner, out, tasks=tasks + 1, beside=save)
    return name_of(learner), len(table)


def _more(
    learner: Learner, home: Path, source: str, columns: Mapping[str, Any]
) -> tuple[Table, Callable[[Path], None]]:
    """The new rows, read as the first ones were, and what writes beside the new learner how that was."""
    if learner.started and generates(learner.model):
        return rows_for(home / MODEL, learner.model, source, **columns), lambda fresh: copy_beside(home, fresh)
    table, used = read_with(source, preprocessing=preprocessing_of(home), **columns)

    def save(fresh: Path) -> None:
        used.save(fresh)
        copy_beside(home, fresh)

    return table, save


def _weights(learner: Learner) -> str | None:
    return digest(learner.model) if learner.started else None


def predict_rows(
    directory: str | Path,
    source: str,
    *,
    device: str = "cpu",
    precision: str = "float32",
    batch_size: int = 256,
    **columns: Any,
) -> list[dict[str, Any]]:
    """One mapping per row: its id, and the predicted class with its name and probability, or the numbers."""
    at_least("the batch size", batch_size, 1)
    run, folder = Run(device=device, precision=precision), Path(directory)
    home = home_of(folder)
    model, known = load(home), known_of(home)
    if generates(model):
        raise EngramError(f"{folder} holds a language model, whose answers are text; predict tells classes and numbers")
    table = rows_for(home, model, source, **({"label": False} | columns))
    with run.autocast():
        logits = predict(model, table, batch_size=batch_size, run=run)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if known is not None and known.target == Target.NUMBERS:
        return [{"id": id, "values": row.tolist()} for id, row in zip(table.ids, logits, strict=True)]
    named = getattr(getattr(model, "config", None), "id2label", None) or {}
    return _classified(table.ids, logits, named if known is None else dict(enumerate(known.classes)))


def _classified(ids: Ids, logits: Tensor, names: Mapping[int, str]) -> list[dict[str, Any]]:
    winners, chances = predict_classes(logits), logits.softmax(1).amax(1)
    return [
        {"id": id, "class": c, "name": names.get(c, str(c)), "probability": round(float(p), 6)}
        for id, c, p in zip(ids, winners.tolist(), chances.tolist(), strict=True)
        if c != MISSING
    ]


def _classes(model: nn.Module) -> set[int]:
    head = getattr(model, "head", None)
    live = getattr(head, "live", None)
    return set() if live is None else set(live.nonzero()[:, 0].tolist())
