"""Ridge regression that can learn and unlearn rows exactly.

The state is A = ΦᵀΦ + γI and Q = ΦᵀY in float64; adding rows adds their products, removing rows subtracts
them, and the weights solve A W = Q by Cholesky when they are asked for. So the result depends on the rows
that remain and not on the path, up to rounding, and the rounding is accounted for: see `Ridge.error_bound`.
(Analytic continual unlearning, Tang et al., arXiv 2505.12239, is the same update written for A⁻¹.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from engram.errors import EngramError

UNIT = 2.0**-53  # unit roundoff of float64
BLOCK = 512  # rows a product: keeps the rounding of one product below BLOCK * UNIT, whatever n


def _gamma(k: int) -> float:
    """k u / (1 - k u): the rounding of a sum of k products in any order (Higham 2002, section 3.1)."""
    return k * UNIT / (1 - k * UNIT)


@dataclass(frozen=True)
class _Sums:
    """A [d, d], Q [d, C], count [C] of rows with a target other than 0, n rows, and the rounding so far."""

    A: Tensor
    Q: Tensor
    count: Tensor
    n: int
    rounding_gram: float  # >= Frobenius norm of (stored A - true A)
    rounding_cross: Tensor  # [C], the same for each column of Q


class Ridge:
    """Ridge regression on rows [n, d] and targets [n, C], one-hot or real. Needs d² + dC doubles.

    `features` is d, `gamma` > 0 the penalty, `outputs` the number of columns to begin with; it grows by itself.
    """

    _sums: _Sums
    _weights: Tensor | None
    _error: float | None

    def __init__(
        self, features: int, gamma: float = 0.1, *, outputs: int = 0, device: torch.device | str | None = None
    ) -> None:
        if not gamma > 0:
            raise EngramError(f"gamma is {gamma}; ridge regression that forgets exactly needs gamma > 0")
        self.gamma = float(gamma)
        self._set(self._empty(features, outputs, device))

    @property
    def A(self) -> Tensor:  # noqa: N802
        """ΦᵀΦ + γI, [d, d], float64."""
        return self._sums.A

    @property
    def Q(self) -> Tensor:  # noqa: N802
        """ΦᵀY, [d, C], float64."""
        return self._sums.Q

    @property
    def count(self) -> Tensor:
        """Rows whose target is not 0, by column: [C], int64."""
        return self._sums.count

    @property
    def n(self) -> int:
        """Number of rows held."""
        return self._sums.n

    @property
    def weights(self) -> Tensor:
        """W = A⁻¹Q, [d, C]; solved once after each change, O(d³ + d²C)."""
        if self._weights is None:
            factor, failed = torch.linalg.cholesky_ex(self.A)
            if failed:
                least = self._sums.rounding_gram
                raise EngramError(f"gamma={self.gamma} is lost in rounding; choose gamma above {least:.1e}")
            self._weights = torch.cholesky_solve(self.Q, factor)
        return self._weights

    def add(self, phi: Tensor, y: Tensor) -> None:
        """Learn rows phi [n, d] with targets y [n, C]; missing columns count as zeros. O(n d (d + C))."""
        self._set(self._moved(phi, y, 1, 0.0))

    def remove(self, phi: Tensor, y: Tensor, *, drift: float = 0.0) -> None:
        """Unlearn rows, given as they were learnt; raises EngramError, state untouched, if they never were.

        Rows that were computed anew (another batch size, another device) differ in their last digits: `drift`
        is the relative difference to allow for (1e-5 suits float32 features); it enters the error bound.
        Refused is what would leave fewer than no rows, or A - γI not positive semidefinite beyond rounding,
        or a sum without rows. O(n d (d + C) + d³).
        """
        sums = self._moved(phi, y, -1, drift)
        if not self._possible(sums):
            raise EngramError("cannot remove rows that were never learnt: give features and targets as learnt")
        self._set(self._cleared(sums))

    def error_bound(self) -> float:
        """Upper bound of the Frobenius norm of W - W*, W* the exact ridge weights of the rows that remain.

        Let E = A - A* and F = Q - Q* be the rounding, bounded as it happened, and R = Q - A W the residual.
        Then A* (W - W*) = F - R - E W, so

            |W - W*| <= (|R| + |E| |W| + |F|) / λmin(A*),    λmin(A*) >= max(γ, λmin(A) - |E|).

        The bound of |E| grows by γ_k |Φ|² for each product of k rows and by u |A| for each sum (Higham 2002,
        chapter 3), and by what `drift` allows; that of |R| includes the rounding of its own evaluation.
        The score of a row x in one column is off by at most |x| times this bound, the difference of two
        columns by √2 times that: a prediction whose lead is larger is certain. O(d³), once after each change.
        """
        if self._error is None:
            W, sums = self.weights, self._sums
            own = _gamma(len(W) + 2) * (sums.Q.abs() + sums.A.abs() @ W.abs())
            moved = sums.rounding_gram * W.norm() + sums.rounding_cross.norm()
            rest = (sums.Q - sums.A @ W).norm() + own.norm() + moved
            self._error = 1.01 * rest.item() / self._least_eigenvalue()  # 1 % for the rounding of the norms
        return self._error

    def residual_bound(self) -> float:
        """Upper bound of |W - W*| / |W*| (Frobenius): what "exact" is worth here; infinite if unknown."""
        error, size = self.error_bound(), self.weights.norm().item()
        if error == 0:
            return 0.0
        return error / (size - error) if size > error else float("inf")

    def state_dict(self) -> dict[str, Any]:
        """All state, flat: tensors and numbers."""
        return {"gamma": self.gamma} | {f.name: getattr(self._sums, f.name) for f in fields(_Sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.gamma = float(state["gamma"])
        self._set(_Sums(**{f.name: state[f.name] for f in fields(_Sums)}))

    def _set(self, sums: _Sums) -> None:
        self._sums = sums
        self._weights = None
        self._error = None

    def _empty(self, d: int, C: int, device: torch.device | str | None) -> _Sums:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        eye = torch.eye(d, dtype=torch.float64, device=device)
        return _Sums(self.gamma * eye, zeros(d, C), zeros(C).long(), 0, 0.0, zeros(C))

    def _rows(self, phi: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The rows in float64, the targets with at least as many columns as Q."""
        d, C = self.Q.shape
        if phi.ndim != 2 or y.ndim != 2 or phi.shape[1] != d or len(phi) != len(y):
            shapes = f"{tuple(phi.shape)} and {tuple(y.shape)}"
            raise EngramError(f"rows and targets have the shapes {shapes}; they want to be [n, {d}] and [n, C]")
        phi, y = phi.detach().to(self.A), y.detach().to(self.A)
        if not (phi.isfinite().all() and y.isfinite().all()):
            raise EngramError("rows or targets hold NaN or infinity; a sum would never lose them again")
        return phi, torch.nn.functional.pad(y, (0, max(0, C - y.shape[1])))

    def _moved(self, phi: Tensor, y: Tensor, sign: int, drift: float) -> _Sums:
        phi, y = self._rows(phi, y)
        old, wider = self._sums, (0, y.shape[1] - self.Q.shape[1])
        A, rounding_gram = old.A.clone(), old.rounding_gram
        Q, count, rounding_cross = (torch.nn.functional.pad(t, wider) for t in (old.Q, old.count, old.rounding_cross))
        for p, t in zip(phi.split(BLOCK), y.split(BLOCK), strict=True):
            A += sign * (p.T @ p)
            Q = Q + sign * (p.T @ t)
            size, own = p.norm().item(), _gamma(len(p))
            rounding_gram += (own + 2 * drift + drift**2) * size**2 + UNIT * A.norm().item()
            rounding_cross = rounding_cross + (own + drift) * size * t.norm(dim=0) + UNIT * Q.norm(dim=0)
        return _Sums(A, Q, count + sign * (y != 0).sum(0), old.n + sign * len(phi), rounding_gram, rounding_cross)

    def _possible(self, sums: _Sums) -> bool:
        """Whether these can be the sums of some rows, given the rounding."""
        if sums.n < 0 or (sums.count < 0).any():
            return False
        empty = sums.count == 0
        if (sums.Q.norm(dim=0) > 1.01 * sums.rounding_cross)[empty].any():
            return False
        gram = sums.A - self.gamma * torch.eye(len(sums.A)).to(sums.A)
        d, top = len(gram), sums.A.diagonal().abs().max().item() if len(sums.A) else 0.0
        # Cholesky itself needs d γ_{d+1} times the largest entry (Higham 2002, theorem 10.7)
        slack = 1.01 * sums.rounding_gram + 2 * d * _gamma(d + 1) * top
        if sums.n == 0:
            return gram.norm().item() <= slack
        gram.diagonal().add_(slack)
        return not torch.linalg.cholesky_ex(gram).info

    def _cleared(self, sums: _Sums) -> _Sums:
        """Sums without rows are zero: exactly, and with no rounding left."""
        if sums.n == 0:
            return self._empty(len(sums.A), len(sums.count), sums.A.device)
        live = sums.count > 0
        Q, rounding_cross = torch.where(live, sums.Q, 0.0), torch.where(live, sums.rounding_cross, 0.0)
        return _Sums(sums.A, Q, sums.count, sums.n, sums.rounding_gram, rounding_cross)

    def _least_eigenvalue(self) -> float:
        A = self.A
        least = torch.linalg.eigvalsh(A)[0].item() - len(A) * UNIT * A.norm().item()
        return max(self.gamma, least - self._sums.rounding_gram)
