"""Clusters against classes."""

from __future__ import annotations

import torch
from torch import Tensor

from engram.errors import EngramError


def match(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Assign rows to columns of cost [a, b] one to one at least cost: indices, both [min(a, b)].

    O(K³) (the Hungarian problem, by SciPy); on the CPU.
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cost.detach().double().cpu().numpy())
    return torch.from_numpy(rows).to(cost.device), torch.from_numpy(columns).to(cost.device)


def hungarian_accuracy(y: Tensor, clusters: Tensor) -> tuple[float, dict[int, int]]:
    """Share of rows right under the best one-to-one map of clusters to classes, and that map.

    y and clusters [n], any integers; the map is {cluster: class}. Clusters beyond the number of classes are
    errors. The map is chosen by hindsight, so a random partition scores above 1/K; to report known and novel
    classes apart, fit it on the novel rows alone.
    """
    if y.shape != clusters.shape or y.ndim != 1 or not len(y):
        raise EngramError(f"classes and clusters want to be [n], not {tuple(y.shape)}, {tuple(clusters.shape)}")
    classes, a = y.unique(return_inverse=True)
    groups, b = clusters.unique(return_inverse=True)
    pairs = torch.bincount(a * len(groups) + b, minlength=len(classes) * len(groups))
    counts = pairs.view(len(classes), len(groups))
    rows, columns = match(-counts)
    found = dict(zip(groups[columns].tolist(), classes[rows].tolist(), strict=True))
    return counts[rows, columns].sum().item() / len(y), found
