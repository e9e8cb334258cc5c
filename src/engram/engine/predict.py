"""What a model says about rows: looked at without changing it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.data.table import IGNORED, MISSING, Batch, Table, Target
from engram.engine.losses import per_row
from engram.engine.run import Run
from engram.errors import EngramError
from engram.stats.multilabel import mean_average_precision

Reader = Callable[[Any, Batch], Tensor]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode without gradients; every part's mode is put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, mode in modes.items():
            module.training = mode


def predict(
    model: nn.Module,
    table: Table,
    output: str | Reader = "logits",
    *,
    batch_size: int = 256,
    run: Run | None = None,
) -> Tensor:
    """What the model gives for every row, [n, …], in the order of the rows, on the CPU.

    `output`: the name of a field of the model's output ("logits", "pooler_output", "novelty"), "loss" for the loss of
    every row [n] by the kind of its label, or a function of (output, batch). An empty table gives an empty tensor.
    """
    read = output if callable(output) else _reader(output)
    device = run.device if run is not None else _device(model)
    found: list[Tensor] = []
    with evaluating(model.to(device)):
        for batch in table.batches(batch_size, shuffle=False):
            moved = batch.to(device)
            found.append(read(model(**moved.inputs), moved).cpu())
    if run is not None:
        run.cost.rows += len(table)
    return torch.cat(found) if found else torch.zeros(0)


def features(model: nn.Module, table: Table, *, batch_size: int = 256, run: Run | None = None) -> Tensor:
    """The representation before the head, [n, d]: what `models.split` calls the features."""
    from engram.models.split import split

    parts = split(model)
    device = run.device if run is not None else _device(model)
    with evaluating(model.to(device)):
        moved = (batch.to(device) for batch in table.batches(batch_size, shuffle=False))
        found = [parts.features(**batch.inputs).cpu() for batch in moved]
    if run is not None:
        run.cost.rows += len(table)
    return torch.cat(found) if found else torch.zeros(0, parts.width)


def accuracy(
    model: nn.Module, table: Table, *, classes: tuple[int, ...] | None = None, run: Run | None = None
) -> float:
    """The share of rows whose label has the largest logit, among `classes` if given; NaN for no rows."""
    return float(hits(model, table, classes=classes, run=run).double().mean())


def error_of(model: nn.Module, table: Table, classes: Sequence[int], run: Run | None = None) -> float:
    """1 - accuracy among `classes`, or where a row may have several labels, 1 - mean average precision.

    `classes`: the columns of the logits that take part; labels [n, k] of 0 and 1 belong to them in this order. A class
    that the model does not have is never told. Rows without a label do not count; NaN where none has one.
    """
    columns = list(classes)
    logits = predict(model, table, run=run)
    room = max(columns, default=-1) + 1 - logits.shape[1]
    scores = F.pad(logits, (0, max(room, 0)), value=-torch.inf)[:, columns]
    return error_of_scores(scores, table, columns)


def error_of_scores(scores: Tensor, table: Table, classes: Sequence[int]) -> float:
    """The same of scores [n, k], one column for each of the classes."""
    assert table.labels is not None
    if table.target == Target.NUMBERS:
        return 1 - mean_average_precision(scores, table.labels)
    known = table.labels != MISSING
    told = torch.tensor(list(classes))[scores[known].argmax(1)]
    return 1 - float((told == table.labels[known]).double().mean())


def hits(model: nn.Module, table: Table, *, classes: tuple[int, ...] | None = None, run: Run | None = None) -> Tensor:
    """Mask [n]: is the label's logit the largest, among `classes` if given? A retired class is never predicted. Of
    token rows: would greedy decoding give the whole answer?"""
    if table.labels is None:
        raise EngramError("accuracy needs labels, and these rows have none")
    if table.target == Target.TOKENS:
        return predict(model, table, _verbatim, run=run)
    logits = predict(model, table, run=run)
    if not len(logits):
        return torch.zeros(0, dtype=torch.bool)
    return _winners(logits, classes) == table.labels


def _verbatim(output: Any, batch: Batch) -> Tensor:
    assert batch.labels is not None
    targets = batch.labels[:, 1:]
    return ((output.logits[:, :-1].argmax(2) == targets) | (targets == IGNORED)).all(1)


def _winners(logits: Tensor, classes: tuple[int, ...] | None) -> Tensor:
    """The winning class [n]; MISSING - 1, which is no label, where no class is live."""
    if classes is not None:
        mask = torch.ones(logits.shape[1], dtype=torch.bool)
        mask[[c for c in classes if c < logits.shape[1]]] = False
        logits = logits.masked_fill(mask, -torch.inf)
    if not logits.shape[1]:
        return torch.full((len(logits),), -2)
    best, winners = logits.max(1)
    return torch.where(torch.isneginf(best), -2, winners)


def _reader(name: str) -> Reader:
    def loss(output: Any, batch: Batch) -> Tensor:
        if batch.labels is None:
            raise EngramError("a loss needs labels, and these rows have none")
        return per_row(output.logits, batch.labels)

    def read(output: Any, batch: Batch) -> Tensor:
        value = getattr(output, name, None)
        if value is None:
            raise EngramError(f"this model's output has no {name!r}")
        return value

    return loss if name == "loss" else read


def _device(model: nn.Module) -> torch.device:
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
