"""Which task does a row belong to? Answers of several tasks' networks as one, by the entropy of each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 1e-4  # inside the logarithm of the entropy


def normalised_entropies(logits: Tensor) -> Tensor:
    """Entropy of the softmax over the last dimension of [..., C], as a share of that of C' equal classes, C' being the
    columns that are not -inf: -sum of p log(p + 1e-4), over log C'.

    One class alone says nothing about a row and counts 1, the most; none at all counts infinite.
    """
    count = logits.isfinite().sum(-1)
    p = torch.softmax(logits.float(), -1)
    entropy = -(p * (p + EPS).log()).sum(-1)
    share = torch.where(count > 1, entropy / count.clamp(min=2).log(), 1.0)
    return torch.where(count > 0, share, math.inf)


def joined(every: Tensor, entropies: Tensor) -> Tensor:
    """Logits of tasks [B, T, W], -inf for the classes that a task does not have, as one [B, W]: each task's shifted so
    that its largest is minus its entropy; of a class that several have, the largest."""
    best = every.detach().amax(2, keepdim=True).clamp(min=torch.finfo(every.dtype).min)
    shifted = every - best - entropies.to(every)[:, :, None]
    return torch.where(every.isneginf(), -math.inf, shifted).amax(1)
