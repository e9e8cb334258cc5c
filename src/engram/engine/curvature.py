"""Gradients of the mean loss over many rows, and products with its curvature: no matrix is ever formed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from engram.data.table import Batch, Table
from engram.engine.losses import by_target
from engram.engine.run import Run
from engram.errors import unknown

Weights = dict[str, Tensor]
KINDS = ("hessian", "gauss-newton")


def trainable(model: nn.Module) -> Weights:
    """The parameters that take gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def flat(weights: Mapping[str, Tensor]) -> Tensor:
    """All scalars of the tensors, one after the other: [P], float64."""
    return torch.cat([value.detach().double().flatten() for value in weights.values()])


def shaped(vector: Tensor, like: Mapping[str, Tensor]) -> Weights:
    """`flat` undone: a vector [P] cut into tensors of these names, shapes, types and devices."""
    parts = vector.split([value.numel() for value in like.values()])
    return {name: part.reshape(value.shape).to(value) for part, (name, value) in zip(parts, like.items(), strict=True)}


def mean_gradient(model: nn.Module, table: Table, *, batch_size: int = 256, run: Run | None = None) -> Weights:
    """The gradient of the usual loss, averaged over all labelled rows, by parameter, float64.

    It depends neither on `batch_size` nor on the order of the rows. The model is taken as it stands: call `eval()`
    first, since batch statistics would tie rows together. Cost: one forward and backward pass.
    """
    params = trainable(model)
    total, count = _zeros(params), 0.0
    for batch in _batches(model, table, batch_size, run):
        (loss, rows), *_ = by_target(model(**batch.inputs).logits, _labels(batch)).terms
        _add(total, torch.autograd.grad(loss, list(params.values()), allow_unused=True))
        count += float(rows)
    return {name: value / max(count, 1.0) for name, value in total.items()}


class Curvature:
    """The second derivative of the usual loss, averaged over the labelled rows of a table, as a linear map.

    `kind`: "hessian", which may have negative eigenvalues where the loss is not convex in the parameters, or
    "gauss-newton", JᵀH J with J the derivative of the logits and H that of the loss in the logits: never negative for
    the usual losses, the Fisher matrix of a classifier, and the Hessian itself for a model that is linear in its
    parameters. The model is taken as it stands: call `eval()` first. A product costs two (three) backward passes over
    the rows for a forward one. EngramError for an unknown kind. (Pearlmutter 1994; Schraudolph 2002.)
    """

    def __init__(
        self, model: nn.Module, table: Table, kind: str = "hessian", *, batch_size: int = 256, run: Run | None = None
    ) -> None:
        if kind not in KINDS:
            raise unknown("kind of curvature", kind, KINDS)
        self.model, self.table, self.batch_size, self.run = model, table, batch_size, run
        self.product = _hessian if kind == "hessian" else _gauss_newton

    def __call__(self, vector: Tensor) -> Tensor:
        """The product with a vector [P], ordered as `flat(trainable(model))`: [P], float64."""
        params = trainable(self.model)
        direction = list(shaped(vector, params).values())
        total, count = _zeros(params), 0.0
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            for batch in _batches(self.model, self.table, self.batch_size, self.run):
                found, rows = self.product(self.model(**batch.inputs).logits, batch, list(params.values()), direction)
                _add(total, found)
                count += rows
        return flat(total) / max(count, 1.0)


Found = tuple[Iterable[Tensor | None], float]


def _hessian(logits: Tensor, batch: Batch, params: list[Tensor], direction: list[Tensor]) -> Found:
    (loss, rows), *_ = by_target(logits, _labels(batch)).terms
    slopes = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    return _derivative(_along(slopes, direction), params), float(rows)


def _gauss_newton(logits: Tensor, batch: Batch, params: list[Tensor], direction: list[Tensor]) -> Found:
    probe = torch.zeros_like(logits, requires_grad=True)
    back = torch.autograd.grad(logits, params, probe, create_graph=True, allow_unused=True)  # Jᵀ probe
    (moved,) = _derivative(_along(back, direction), [probe])  # J direction
    point = logits.detach().requires_grad_()
    (loss, rows), *_ = by_target(point, _labels(batch)).terms
    (slope,) = torch.autograd.grad(loss, [point], create_graph=True)
    (bend,) = torch.autograd.grad(slope, [point], moved)
    return torch.autograd.grad(logits, params, bend, allow_unused=True), float(rows)


def _along(slopes: Iterable[Tensor | None], direction: list[Tensor]) -> Tensor:
    """The inner product, over those that depend on anything."""
    pairs = zip(slopes, direction, strict=True)
    return torch.stack([(g * d).sum() for g, d in pairs if g is not None and g.requires_grad]).sum()


def _derivative(value: Tensor, of: list[Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(value, of, retain_graph=True, allow_unused=True)


def _batches(model: nn.Module, table: Table, size: int, run: Run | None) -> Iterable[Batch]:
    device = next(model.parameters()).device
    if run is not None:
        run.cost.rows += len(table)
    return (batch.to(device) for batch in table.batches(size, shuffle=False))


def _labels(batch: Batch) -> Tensor:
    assert batch.labels is not None
    return batch.labels


def _zeros(params: Weights) -> Weights:
    return {name: torch.zeros_like(p, dtype=torch.float64) for name, p in params.items()}


def _add(total: Weights, found: Iterable[Tensor | None]) -> None:
    for value, update in zip(total.values(), found, strict=True):
        if update is not None:
            value += update
