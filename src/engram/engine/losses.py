"""Losses that know what they average over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engram.data.table import IGNORED, MISSING

Count = Tensor | float


@dataclass(frozen=True)
class Mean:
    """A loss as (sum, count) pairs; its value is the total of sum / count over the pairs.

    The engine divides by the count over all processes and micro-batches, once, so that a loss is that of the rows it
    was computed from, however these were cut. `a + b` keeps both counts; `w * a` scales.
    """

    terms: tuple[tuple[Tensor, Count], ...]

    @classmethod
    def of(cls, values: Tensor) -> Mean:
        """The mean over the entries of a tensor; a scalar stands for itself."""
        return cls(((values.sum(), float(values.numel())),))

    @classmethod
    def over(cls, total: Tensor, count: Count) -> Mean:
        """A sum [] and what it is to be divided by."""
        return cls(((total, count),))

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.terms + other.terms)

    def __mul__(self, weight: float) -> Mean:
        return Mean(tuple((weight * total, count) for total, count in self.terms))

    __rmul__ = __mul__

    def __neg__(self) -> Mean:
        return -1.0 * self

    def __sub__(self, other: Mean) -> Mean:
        return self + (-other)

    @property
    def value(self) -> Tensor:
        """The loss of these rows alone, []; a term over nothing counts 0."""
        parts = [total / _positive(count) for total, count in self.terms]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def _positive(count: Count) -> Count:
    return count.clamp(min=1e-12) if isinstance(count, Tensor) else max(count, 1e-12)


def per_row(logits: Tensor, labels: Tensor, reduce: str = "mean") -> Tensor:
    """The loss of every row [B] by the kind of labels; rows without a label have 0.

    Classes: cross-entropy. Numbers: squared error, mean over the k values. Tokens: next-token cross-entropy, the
    `mean` over a row's answer tokens, or their `sum`.
    """
    if labels.is_floating_point():
        known = ~torch.isnan(labels)
        error = torch.where(known, logits.float() - labels.nan_to_num(), 0.0).square()
        return error.sum(1) / known.sum(1).clamp(min=1)
    if labels.ndim == 1:
        return F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=MISSING)
    losses, counts = token_losses(logits, labels)
    return losses.sum(1) / (counts.clamp(min=1) if reduce == "mean" else 1)


def by_target(logits: Tensor, labels: Tensor) -> Mean:
    """The usual loss by the kind of labels: the mean over labelled rows, values, or answer tokens."""
    if labels.ndim == 2 and not labels.is_floating_point():
        losses, counts = token_losses(logits, labels)
        return Mean.over(losses.sum(), counts.sum())
    losses = per_row(logits, labels)
    known = ~torch.isnan(labels).all(1) if labels.is_floating_point() else labels != MISSING
    return Mean.over(losses.sum(), known.sum())


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy [B, T-1] (0 where nothing is asked) and the number of answer tokens [B]."""
    targets = labels[:, 1:]
    flat = logits[:, :-1].flatten(0, 1).float(), targets.flatten()  # a softmax along the last axis is twice as fast
    losses = F.cross_entropy(*flat, reduction="none", ignore_index=IGNORED).view(targets.shape)
    return losses, (targets != IGNORED).sum(1)


def binary_by_class(scores: Tensor, targets: Tensor) -> Mean:
    """Sigmoid cross-entropy, summed over classes, mean over rows: scores and targets [B, C]."""
    losses = F.binary_cross_entropy_with_logits(scores, targets, reduction="none").sum(1)
    return Mean.of(losses)


def distil(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Mean:
    """Cross-entropy of the student's softmax against the teacher's, both [B, C] at a temperature; mean over rows."""
    target = torch.softmax(teacher / temperature, 1)
    return Mean.of(-(target * torch.log_softmax(student / temperature, 1)).sum(1))


def supcon(z: Tensor, y: Tensor, temperature: float = 0.1) -> Mean:
    """Supervised contrastive loss of representations [B, d], of any length, with class labels [B]; mean over anchors.

    Each row is an anchor: with s its cosines over the temperature to all other rows, its loss is the mean of
    logsumexp(s) - s_p over the other rows p of its class. An anchor without such a row counts nothing, and rows without
    a label are left out. The rows of a batch depend on one another, so it has to come whole: neither micro-batches nor
    the shares of several processes give the same loss. Cost O(B² d), memory O(B²).

    Khosla et al.: Supervised Contrastive Learning. NeurIPS 2020, arXiv 2004.11362, eq. 2, without the factor
    temperature / base temperature of published code.
    """
    z, y = z[y != MISSING], y[y != MISSING]
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    with torch.autocast(z.device.type, enabled=False):
        u = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)
        scores = (u @ u.T / temperature).masked_fill(itself, torch.finfo(u.dtype).min)
    alike = (y[:, None] == y) & ~itself
    partners = alike.sum(1)
    each = -torch.where(alike, torch.log_softmax(scores, 1), 0.0).sum(1) / partners.clamp(min=1)
    return Mean.over(each.sum(), (partners > 0).sum())
