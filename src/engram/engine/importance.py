"""How much each parameter matters to a set of rows: Fisher diagonals and their relatives."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from engram.data.table import Batch, Table
from engram.engine.losses import by_target, per_row
from engram.engine.persample import RowLoss, power_sums
from engram.engine.run import Run
from engram.errors import EngramError, unknown
from engram.models.heads import LinearHead

Importance = dict[str, Tensor]
LABELS = ("true", "model", "sampled", "all")
LOSSES = ("ce", "norm")
VECTORS = 512  # rows per pass at least, where all layers are linear: their rows are small, and calls cost more


def importance(
    model: nn.Module,
    table: Table,
    *,
    loss: str = "ce",
    labels: str = "true",
    per_sample: bool = True,
    power: int = 2,
    batch_size: int = 64,
    run: Run | None = None,
) -> Importance:
    """The mean over rows of |d loss / d parameter| ** power, float64, shaped like the trainable parameters.

    `loss`: "ce", the usual loss by the kind of labels, or "norm", the squared norm of the logits, which needs no
    labels. `labels`: "true" (empirical Fisher), "model" (its own prediction), "sampled" (drawn from its prediction),
    or "all" (the exact Fisher: every class, weighted by its probability; C backward passes). `per_sample=False` is
    the form of published code: the gradient of every batch's mean loss, raised to the power, averaged over batches;
    it depends on `batch_size` and on the order of the rows; per row, networks of linear layers take at least 512 rows
    at a time. The model is in eval mode and is not changed.
    Cost: one forward and backward pass over the rows, per class for "all".
    """
    if loss not in LOSSES:
        raise unknown("loss", loss, LOSSES)
    if labels not in LABELS:
        raise unknown("choice of labels", labels, LABELS)
    if loss == "ce" and labels == "true" and table.labels is None:
        raise EngramError("importances by the true labels need labelled rows; labels='model' does without")
    run = run or Run()
    if per_sample and _linear(model):
        batch_size = max(batch_size, VECTORS)
    modes = {module: module.training for module in model.modules()}
    model.to(run.device).eval()
    try:
        sums = _per_sample if per_sample else _per_batch
        total, count = sums(model, _batches(table, batch_size, run), loss, labels, power, run)
    finally:
        for module, mode in modes.items():
            module.training = mode
    run.cost.rows += len(table)
    return {name: value / max(count, 1) for name, value in total.items()}


def _linear(model: nn.Module) -> bool:
    owners = (m for m in model.modules() if next(m.parameters(recurse=False), None) is not None)
    return all(isinstance(module, nn.Linear | LinearHead) for module in owners)


def _batches(table: Table, size: int, run: Run) -> Iterator[Batch]:
    return (batch.to(run.device) for batch in table.batches(size, shuffle=False))


def _per_sample(
    model: nn.Module, batches: Iterator[Batch], loss: str, labels: str, power: int, run: Run
) -> tuple[Importance, int]:
    total: Importance = {}
    count = 0
    draws = run.generator("sampled labels")
    for batch in batches:
        for labelled, row_loss in _labelled(model, batch, loss, labels, draws, power):
            _add(total, power_sums(model, labelled, row_loss, power))
        count += len(batch)
    return total, count


def _per_batch(
    model: nn.Module, batches: Iterator[Batch], loss: str, labels: str, power: int, run: Run
) -> tuple[Importance, int]:
    if labels == "all":
        raise EngramError("labels='all' is defined per row; it does not go with per_sample=False")
    total: Importance = {}
    count = 0
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    draws = run.generator("sampled labels")
    for batch in batches:
        [(labelled, _)] = _labelled(model, batch, loss, labels, draws, power)
        logits = model(**labelled.inputs).logits
        mean = _square_norm(logits, None).mean() if loss == "norm" else _batch_loss(logits, labelled)
        grads = torch.autograd.grad(mean, list(params.values()), allow_unused=True)
        squares = (torch.zeros_like(p) if g is None else g for g, p in zip(grads, params.values(), strict=True))
        _add(total, {name: g.abs().double().pow(power) for name, g in zip(params, squares, strict=True)})
        count += 1
    return total, count


def _labelled(
    model: nn.Module, batch: Batch, loss: str, labels: str, draws: torch.Generator, power: int
) -> Iterator[tuple[Batch, RowLoss]]:
    """The batch with the labels that the choice asks for, and the loss of a row."""
    if loss == "norm":
        yield Batch(batch.inputs, None, batch.rows), _square_norm
        return
    if labels == "true":
        yield batch, per_row  # type: ignore[misc]
        return
    with torch.no_grad():
        chances = torch.softmax(model(**batch.inputs).logits.float(), 1)
    if labels == "model":
        yield Batch(batch.inputs, chances.argmax(1), batch.rows), per_row  # type: ignore[misc]
    elif labels == "sampled":
        drawn = torch.multinomial(chances.cpu(), 1, generator=draws)[:, 0].to(chances.device)
        yield Batch(batch.inputs, drawn, batch.rows), per_row  # type: ignore[misc]
    else:
        yield from _every_class(batch, chances, power)


def _every_class(batch: Batch, chances: Tensor, power: int) -> Iterator[tuple[Batch, RowLoss]]:
    """Each class in turn; a row's gradient is scaled so that its power is weighted by the class's probability."""
    weights = chances.pow(1 / power)
    for c in (chances.sum(0) > 0).nonzero()[:, 0].tolist():
        labels = torch.stack([torch.full((len(batch),), float(c), device=chances.device), weights[:, c]], 1)
        yield Batch(batch.inputs, labels, batch.rows), _weighted


def _weighted(logits: Tensor, labels: Tensor | None) -> Tensor:
    assert labels is not None
    return labels[:, 1] * per_row(logits, labels[:, 0].long())


def _square_norm(logits: Tensor, labels: Tensor | None) -> Tensor:
    return torch.where(torch.isfinite(logits), logits, 0.0).float().square().sum(1)


def _batch_loss(logits: Tensor, batch: Batch) -> Tensor:
    assert batch.labels is not None
    return by_target(logits, batch.labels).value


def _add(total: Importance, update: Importance) -> None:
    for name, value in update.items():
        total[name] = total[name] + value if name in total else value
