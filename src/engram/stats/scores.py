"""Scores of rows from logits [n, C]. Retired columns hold -inf: they count as probability 0, never as NaN."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from engram.errors import EngramError
from engram.stats.intervals import Values, array

GRID = 99  # thresholds 0.01, 0.02 … of the largest possible score


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """z_y - logsumexp of the other logits, [n]: ln p_y - ln(1 - p_y), the logit of the confidence."""
    own = y.unsqueeze(1)
    others = logits.scatter(1, own, -torch.inf)
    return logits.gather(1, own).squeeze(1) - others.logsumexp(1)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-ln p_y by row, [n], in nats; +inf where the column of y is retired."""
    return functional.cross_entropy(logits, y, reduction="none")


def energy(logits: Tensor, columns: Sequence[int] | Tensor | slice | None = None) -> Tensor:
    """-logsumexp of the logits, or of some columns, [n]; low for rows the model knows (Liu et al. 2020)."""
    return -(logits if columns is None else logits[:, columns]).logsumexp(1)


def restricted(logits: Tensor, columns: Sequence[int] | Tensor) -> Tensor:
    """The logits with -inf in all but some columns, [n, C]; the gradient of the other columns is zero."""
    out = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    out[torch.as_tensor(columns, device=logits.device)] = False
    return logits.masked_fill(out, -torch.inf)


def entropy(logits: Tensor, normalise: bool = False) -> Tensor:
    """Entropy of the softmax, [n], in nats; normalised by ln(number of live columns) it lies in [0, 1]."""
    log_p = logits.log_softmax(1)
    value = -(log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0)).sum(1)
    if not normalise:
        return value
    live = (~logits.isneginf()).sum(1)
    return value / live.clamp(min=2).to(value).log()


def modified_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-(1 - p_y) ln p_y - sum over j != y of p_j ln(1 - p_j), [n], in nats.

    Low for a sure and right prediction. (Song & Mittal 2021.) Exact where a probability rounds to 1.
    """
    own = y.unsqueeze(1)
    log_p = logits.log_softmax(1)
    log_rest = _log_complement(log_p)
    others = (log_p.exp() * log_rest).scatter(1, own, 0).sum(1)
    rest, log_own = log_rest.exp().gather(1, own), log_p.gather(1, own)
    log_own = torch.where(log_own > -0.5, torch.log1p(-rest), log_own)  # ln p loses its digits near p = 1
    return (-rest * log_own).squeeze(1) - others


def conformal_threshold(scores: Tensor, labels: Tensor, alpha: float) -> float:
    """Split-conformal threshold: class c is in the prediction set of a new row when 1 - scores[c] <= it.

    scores [n, C]: probabilities of calibration rows; labels [n]. Such sets hold the true class with
    probability of at least 1 - alpha. +inf (every class) when n is too small for alpha. (Vovk et al. 2005.)
    """
    if not 0 < alpha < 1:
        raise EngramError(f"alpha is {alpha}; it is the allowed error rate, between 0 and 1")
    misfit = 1 - scores.double().gather(1, labels.unsqueeze(1)).squeeze(1)
    rank = ceil((len(misfit) + 1) * (1 - alpha) - 1e-9)
    return misfit.sort().values[rank - 1].item() if rank <= len(misfit) else float("inf")


def rejection_threshold(known: Values, share: float = 0.05, largest: float = 1.0) -> float:
    """The smallest of largest · {0.01 … 0.99} above which at most this share of known scores [n] lies.

    For omega, `largest` is 1; for another score, the largest that was seen. Where more of them lie even above the last
    of these, as omega's do that is near 1 for many rows, it is the smallest of the scores themselves that does.
    """
    scores = array(known).ravel()
    if not len(scores):
        raise EngramError("a threshold is found on scores of known rows, and there are none")
    grid = largest * np.arange(1, GRID + 1) / (GRID + 1)
    candidates = np.concatenate([grid, np.sort(scores[scores > grid[-1]])])
    rejected = (scores[:, None] > candidates).mean(0)
    return float(candidates[np.argmax(rejected <= share)])


def _log_complement(log_p: Tensor) -> Tensor:
    """ln(1 - p), [n, C]; that of the largest p from the other columns, so that no digits are lost."""
    top = log_p.argmax(1, keepdim=True)
    rest = log_p.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True)
    return torch.log1p(-log_p.exp()).scatter(1, top, rest)
