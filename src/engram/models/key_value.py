"""A head that reads values through discrete keys: a row touches one cell of each codebook, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engram.errors import EngramError, unknown
from engram.models.head import Head, class_ids
from engram.stats.kmeans import assign

PROJECTIONS = ("random", "chunks")


class KeyValueHead(Head):
    """C codebooks of M cells; a cell is a key [d_k] and a value for each class. No gradient reaches the features.

    A row's features f [d] become C heads f P_c; each reads the value at its nearest key; the logits are their mean
    (Träuble et al. 2023, arXiv:2207.11240). Keys that are masked, or that no record stands behind (`count` 0), do
    not answer; a codebook without any other key says 0.

    `codebooks`: C, `keys`: M, `dim`: d_k. `projection`: "random", Gaussian with columns of length 1, drawn from
    torch's global generator, for use under `seeded`; or "chunks", the features cut into C pieces, for which `dim` is
    d / C.

    projection  [C, d, d_k] float64; codebook [C, M, d_k] float64, zero until set
    count, masked  [C, M]; values [born, C * M], what is trained, zero for a newborn class

    Cost of a row: O(C M d_k); memory C M (d_k + classes).
    """

    rows: ClassVar[tuple[str, ...]] = ("values",)
    projection: Tensor
    codebook: Tensor
    count: Tensor
    masked: Tensor

    def __init__(
        self,
        width: int,
        codebooks: int = 32,
        keys: int = 256,
        dim: int = 8,
        projection: str = "random",
        classes_total: int = 0,
    ) -> None:
        super().__init__(width, classes_total)
        self.codebooks, self.keys = codebooks, keys
        self.register_buffer("projection", _projection(projection, width, codebooks, dim))
        self.register_buffer("codebook", torch.zeros(codebooks, keys, dim, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(codebooks, keys, dtype=torch.int64))
        self.register_buffer("masked", torch.zeros(codebooks, keys, dtype=torch.bool))
        self.values = nn.Parameter(torch.empty(0, codebooks * keys))

    @property
    def usable(self) -> Tensor:
        """Keys that answer in prediction: [C, M]."""
        return ~self.masked & (self.count > 0)

    def project(self, features: Tensor) -> Tensor:
        """[B, d] -> [C, B, d_k]."""
        return features.to(self.projection) @ self.projection

    def nearest(self, features: Tensor, live: Tensor) -> Tensor:
        """The nearest key of each codebook among the `live` [C, M]: [B, d] -> [B, C]."""
        return assign(self.project(features), self.codebook, live).T

    def flat(self, cells: Tensor) -> Tensor:
        """Places of cells [..., C] among the C * M columns of the values."""
        return cells + torch.arange(self.codebooks, device=cells.device) * self.keys

    def read(self, cells: Tensor, heard: Tensor | None = None) -> Tensor:
        """Compact logits [B, born]: the mean of the values at cells [B, C]; those not `heard` [B, C] count as 0."""
        found = self.values[:, self.flat(cells)]
        return (found if heard is None else found * heard).mean(-1).T

    def places(self, labels: Tensor) -> Tensor:
        """Compact columns of labels [n]: [n]."""
        place = torch.full((len(self.live),), -1, device=self.classes.device)
        place[self.classes] = torch.arange(len(self.classes), device=place.device)
        return place.to(labels.device)[labels]

    def scores(self, features: Tensor) -> Tensor:
        usable = self.usable
        cells = self.nearest(features, usable)
        return self.read(cells, usable.flatten()[self.flat(cells)])

    def fresh(self, name: str, count: int, generator: torch.Generator | None) -> Tensor:
        return self.values.new_zeros(count, self.codebooks * self.keys)

    @torch.no_grad()
    def grow(self, classes: Iterable[int] | Tensor, generator: torch.Generator | None) -> None:
        """Make classes live. One that was born before keeps what training has put into its column."""
        wanted = class_ids(classes)
        self._give_birth(wanted)
        self.live[wanted] = True

    @torch.no_grad()
    def reserve(self, classes: Iterable[int] | Tensor) -> None:
        """Give classes a column that takes part in training, and is not predicted before it is made live."""
        self._give_birth(class_ids(classes))

    @torch.no_grad()
    def settle(self, count: Tensor) -> None:
        """Set how many records stand behind each cell [C, M]. One with none loses value and mask, and is free."""
        self.count.copy_(count)
        empty = self.count == 0
        self.values[:, empty.flatten()] = 0
        self.masked &= ~empty


def _projection(kind: str, width: int, codebooks: int, dim: int) -> Tensor:
    """[C, d, d_k]."""
    if kind not in PROJECTIONS:
        raise unknown("projection", kind, PROJECTIONS)
    if kind == "random":
        return F.normalize(torch.randn(codebooks, width, dim, dtype=torch.float64), dim=1)
    if codebooks * dim != width:
        raise EngramError(f"{codebooks} chunks of {dim} are not the {width} features; codebooks * dim has to be these")
    return torch.eye(width, dtype=torch.float64).reshape(width, codebooks, dim).transpose(0, 1).contiguous()
