"""How far apart distributions are: by histogram over models, of samples, or by class probabilities row by row."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from engram.errors import EngramError


def histogram_kl(
    a: Tensor,
    b: Tensor,
    *,
    bins: int = 20,
    clip: float = 100,
    floor: float = 1e-5,
    right_edge: Literal["closed", "open"] = "closed",
) -> Tensor:
    """KL(a || b) of values over models, for each row by itself: [n] from a [N, n] and b [M, n], in nats.

    With margins as values and the models of an unlearned and of a retrained population this is KLoM (Georgiev
    et al., ICLR 2025). Values are clipped to ±clip, binned in equal bins over the range of both, and b's
    share is raised to at least `floor` where a has any: from 0 (equal) to ln(1/floor). Two samples of one law
    do not give 0: compare at equal N and M, with a reference of oracles against oracles. `right_edge="open"`
    drops the largest value, as published; NaN where a is left with none. Not symmetric: the order of a and b
    matters.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not (len(a) and len(b)):
        raise EngramError(f"histograms want [N, n] and [M, n], not {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = (x.double().clamp(-clip, clip).T.contiguous() for x in (a, b))  # [n, N], [n, M]
    both = torch.cat([a, b], 1)
    low, high = both.min(1, keepdim=True).values, both.max(1, keepdim=True).values
    edges = low + (high - low) * torch.linspace(0, 1, bins + 1, dtype=a.dtype, device=a.device)
    edges[:, -1:] = high
    p, q = (_shares(x, edges, right_edge == "closed") for x in (a, b))
    value = (torch.xlogy(p, p) - torch.xlogy(p, q.clamp(min=floor))).sum(1)
    return value.masked_fill((low == high).squeeze(1), 0.0)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of probabilities [..., C], by row [...], in nats; +inf where q is 0 and p is not."""
    p, q = p.double(), q.double()
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def js(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of probabilities [..., C], by row [...]: 0 (equal) to ln 2 (disjoint)."""
    middle = (p.double() + q.double()) / 2
    return (kl(p, middle) + kl(q, middle)) / 2


def activation_distance(p: Tensor, q: Tensor, norm: float = 2) -> float:
    """Mean over rows of the distance between softmax outputs [n, C], 0 when equal.

    At most √2 (norm 2) or 2 (norm 1). (Chundawat et al. 2023 with norm 2 on forget rows against a retrained
    model; SCRUB with norm 1.)
    """
    return torch.linalg.vector_norm(p.double() - q.double(), norm, dim=-1).mean().item()


def wasserstein(a: Tensor, b: Tensor) -> float:
    """Wasserstein-1 distance of two samples of one number each, [n] or [n, 1] and [m] or [m, 1], in their unit.

    The area between the two distribution functions: 0 for equal samples, |t| for a shift by t. Between a model's
    predictions on the forget rows and a retrained model's it is W1 of Tarun et al. 2023. EngramError for an empty
    sample and for several columns. O((n + m) log (n + m)).
    """
    one, other = (x.squeeze(-1) if x.ndim == 2 else x for x in (a, b))
    if one.ndim != 1 or other.ndim != 1 or not (len(one) and len(other)):
        raise EngramError(f"W1 wants two samples of one number each, not {list(a.shape)} and {list(b.shape)}")
    p, q = (x.double().sort().values for x in (one, other))
    values = torch.cat([p, q]).sort().values
    below = [torch.searchsorted(x, values[:-1], right=True).double() / len(x) for x in (p, q)]
    return ((below[0] - below[1]).abs() * values.diff()).sum().item()


def zrf(p: Tensor, random: Tensor, *, as_published: bool = False) -> float:
    """Zero-retrain forgetting: 1 - mean JS between softmax outputs [n, C] of a model and of a random network.

    1 when the model knows no more than the random one; what a retrained model scores is the aim, not 1
    (Chundawat et al. 2023). `as_published` follows the released code, which swaps the arguments of both KLs
    and averages over the classes too: numbers from the literature compare with that one only.
    """
    if not as_published:
        return 1 - js(p, random).mean().item()
    middle = (p.double() + random.double()) / 2
    return 1 - ((kl(middle, p) + kl(middle, random)) / 2).mean().item() / p.shape[-1]


def _shares(x: Tensor, edges: Tensor, closed: bool) -> Tensor:
    """Shares [n, bins] of values [n, N] between edges [n, bins + 1]."""
    bins = edges.shape[1] - 1
    where = torch.searchsorted(edges, x, right=True) - 1
    inside = torch.ones_like(x) if closed else (where < bins).to(x)
    counts = x.new_zeros(len(x), bins).scatter_add_(1, where.clamp(max=bins - 1), inside)
    return counts / counts.sum(1, keepdim=True)
