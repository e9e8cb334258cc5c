"""Class means and covariances as sums, so that rows can come in any order and go again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from engram.errors import EngramError


class ClassMeans:
    """Sums of rows [n, d] by class, in float64. A class without rows is absent, not zero.

    `scatter` keeps second moments for `covariance`: "shared" one [d, d] for all classes, True one for each
    class ([C, d, d]). Second moments are taken about the origin: features far from it lose digits.
    """

    def __init__(
        self,
        features: int,
        *,
        scatter: bool | Literal["shared"] = False,
        device: torch.device | str | None = None,
    ) -> None:
        self.scatter = scatter
        self.sums = torch.zeros(0, features, dtype=torch.float64, device=device)
        self.counts = torch.zeros(0, dtype=torch.long, device=device)
        self.second = self.sums.new_zeros(int(scatter == "shared"), features, features)

    @property
    def classes(self) -> Tensor:
        """Ids of the classes that hold rows, ascending: [K], int64."""
        return self.counts.nonzero().flatten()

    @property
    def mean(self) -> Tensor:
        """Class means, [K, d]; row k belongs to `classes[k]`."""
        return self.sums[self.classes] / self.counts[self.classes].unsqueeze(1)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in rows x [n, d] of classes y [n]. O(n d), with scatter O(n d²)."""
        x, y = self._rows(x, y)
        self._grow(int(y.max()) + 1 if len(y) else 0)
        self._move(x, y, 1)

    def remove(self, x: Tensor, y: Tensor) -> None:
        """Take rows out again; raises EngramError, state untouched, if a class holds fewer rows than that."""
        x, y = self._rows(x, y)
        asked = torch.bincount(y, minlength=len(self.counts))
        if len(asked) > len(self.counts) or (asked > self.counts).any():
            raise EngramError("cannot remove more rows of a class than it holds: give only rows that were added")
        self._move(x, y, -1)
        self._clear()

    def covariance(self, shared: bool = True) -> Tensor:
        """Within-class covariance, divided by the number of rows: [d, d], or [K, d, d] when not shared.

        Raises EngramError when the second moments it needs were not kept.
        """
        if not self.scatter or (self.scatter == "shared" and not shared):
            raise EngramError('no such covariance was kept: set scatter=True (by class) or "shared"')
        counts, mean = self.counts[self.classes].double(), self.mean
        if shared:
            return (self.second.sum(0) - (mean.T * counts) @ mean) / counts.sum()
        return self.second[self.classes] / counts.view(-1, 1, 1) - mean.unsqueeze(2) * mean.unsqueeze(1)

    def state_dict(self) -> dict[str, Tensor]:
        """All state, flat."""
        return {key: getattr(self, key).clone() for key in ("sums", "counts", "second")}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` of an object with the same `scatter` gave."""
        self.sums, self.counts, self.second = (state[key].clone() for key in ("sums", "counts", "second"))

    def _rows(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        d = self.sums.shape[1]
        if x.ndim != 2 or x.shape[1] != d or y.shape != x.shape[:1]:
            raise EngramError(f"rows and classes are {tuple(x.shape)} and {tuple(y.shape)}, not [n, {d}] and [n]")
        if len(y) and int(y.min()) < 0:
            raise EngramError("a class id is negative; class ids count from 0")
        if not bool(torch.isfinite(x).all()):
            raise EngramError("rows hold NaN or infinite values, of which there is no mean")
        return x.detach().to(self.sums), y.to(self.counts)

    def _grow(self, classes: int) -> None:
        more = max(0, classes - len(self.counts))
        self.sums = torch.cat([self.sums, self.sums.new_zeros(more, self.sums.shape[1])])
        self.counts = torch.cat([self.counts, self.counts.new_zeros(more)])
        if self.scatter is True:
            self.second = torch.cat([self.second, self.second.new_zeros(more, *self.second.shape[1:])])

    def _move(self, x: Tensor, y: Tensor, sign: int) -> None:
        self.sums.index_add_(0, y, x, alpha=sign)
        self.counts.index_add_(0, y, torch.ones_like(y), alpha=sign)
        if self.scatter == "shared":
            self.second += sign * (x.T @ x)
        elif self.scatter:
            for c in y.unique():
                self.second[c] += sign * (x[y == c].T @ x[y == c])

    def _clear(self) -> None:
        empty = self.counts == 0
        self.sums[empty] = 0
        if self.scatter is True:
            self.second[empty] = 0
        elif bool(empty.all()):
            self.second.zero_()


def ema(state: Tensor | None, value: Tensor, keep: float) -> Tensor:
    """Exponential moving average keep·state + (1 - keep)·value; the first value is taken whole."""
    return value.clone() if state is None else keep * state + (1 - keep) * value
