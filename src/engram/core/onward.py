"""A learner that was saved goes on: it takes in a new table, or predicts one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from engram.core.learner import Learner
from engram.core.persist import MODEL, is_learner, load_learner, save_learner
from engram.core.settings import name_of
from engram.data.preprocessing import Preprocessing
from engram.data.readers import read_with
from engram.data.table import MISSING, Table, Target
from engram.data.task import Task
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.files import refuse_existing
from engram.models.head import predict_classes
from engram.models.io import digest, load

PREPROCESSING = "preprocessing.json"


def learn_more(
    learner_directory: str | Path,
    source: str,
    out: str | Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    ledger: Any = None,
    **columns: Any,
) -> tuple[str, int]:
    """Let a saved learner take in a table as its next task, and write it to `out`: (its name, rows taken in).

    The table is read as the learner's first one was. `ledger`: is told what the new learner has learnt, and from which
    one it comes. EngramError if there is no learner or the table does not fit.
    """
    refuse_existing(out)
    learner, tasks = load_learner(learner_directory)
    preprocessing = preprocessing_of(learner_directory)
    table, used = read_with(source, preprocessing=preprocessing, **columns)
    if not len(table):
        raise EngramError(f"{source} holds no rows to learn from")
    known = set() if not learner.started else _classes(learner.model)
    new = tuple(c for c in table.classes if c not in known)
    before = None if ledger is None else ledger.holder_of(learner_directory, _weights(learner))
    learner.learn(Task(table, None, tasks, new, table.names), Run(seed=seed, device=device))
    learner.refresh()
    if ledger is not None:  # before the files: a kill between the two leaves no learner that nobody noted
        parent = None if before is None else before.number
        ledger.add_holder("learner", out, table.ids, weights=_weights(learner), parent=parent)
    save_learner(learner, out, tasks=tasks + 1)
    used.save(out)
    return name_of(learner), len(table)


def _weights(learner: Learner) -> str | None:
    return digest(learner.model) if learner.started else None


def predict_rows(
    directory: str | Path, source: str, *, device: str = "cpu", batch_size: int = 256, **columns: Any
) -> list[dict[str, Any]]:
    """One mapping per row: its id, and the predicted class with its name and probability, or the numbers."""
    folder = Path(directory)
    model = load(folder / MODEL) if is_learner(folder) else load(folder)
    preprocessing = preprocessing_of(folder)
    table, _ = read_with(source, preprocessing=preprocessing, **({"label": False} | columns))
    logits = predict(model, table, batch_size=batch_size, run=Run(device=device))
    if preprocessing is not None and preprocessing.target == Target.NUMBERS:
        return [{"id": id, "values": row.tolist()} for id, row in zip(table.ids, logits, strict=True)]
    return _classified(table, logits)


def preprocessing_of(directory: str | Path) -> Preprocessing | None:
    """How the rows of a saved model were read, if that was saved beside it."""
    return Preprocessing.load(Path(directory)) if (Path(directory) / PREPROCESSING).exists() else None


def _classified(table: Table, logits: Tensor) -> list[dict[str, Any]]:
    winners, chances = predict_classes(logits), logits.softmax(1).amax(1)
    return [
        {"id": id, "class": c, "name": table.names.get(c, str(c)), "probability": round(float(p), 6)}
        for id, c, p in zip(table.ids, winners.tolist(), chances.tolist(), strict=True)
        if c != MISSING
    ]


def _classes(model: nn.Module) -> set[int]:
    head = getattr(model, "head", None)
    live = getattr(head, "live", None)
    return set() if live is None else set(live.nonzero()[:, 0].tolist())


def as_lines(rows: list[dict[str, Any]]) -> str:
    """Rows as JSON lines."""
    return "\n".join(json.dumps(row) for row in rows)
