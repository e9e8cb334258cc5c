"""Conjugate gradients against a direct solver, and where they have to stop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engram.stats.seeds import generator
from engram.stats.solve import cg


def systems(batch: int, n: int, *key: object) -> tuple[Tensor, Tensor]:
    """Symmetric positive definite matrices [B, n, n] and right sides [B, n]."""
    draws = generator("systems", batch, n, *key)
    roots = torch.randn(batch, n, n + 2, generator=draws, dtype=torch.float64)
    A = roots @ roots.mT / n + 0.1 * torch.eye(n, dtype=torch.float64)
    return A, torch.randn(batch, n, generator=draws, dtype=torch.float64)


def product(A: Tensor) -> object:
    return lambda x: (A @ x[..., None])[..., 0]


@given(batch=st.integers(1, 4), n=st.integers(1, 12), key=st.integers(0, 99))
def test_it_solves_what_a_direct_solver_solves(batch: int, n: int, key: int) -> None:
    A, b = systems(batch, n, key)
    found = cg(product(A), b, tol=1e-12, iters=10 * n)  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-9)


@given(n=st.integers(2, 10), key=st.integers(0, 99))
def test_each_row_is_solved_as_if_alone(n: int, key: int) -> None:
    A, b = systems(3, n, key)
    together = cg(product(A), b, tol=1e-3, iters=5)  # type: ignore[arg-type]
    for k in range(3):
        alone = cg(product(A[k : k + 1]), b[k : k + 1], tol=1e-3, iters=5)  # type: ignore[arg-type]
        torch.testing.assert_close(together[k], alone[0], rtol=1e-10, atol=1e-12)


def test_a_worked_example() -> None:
    """Hand-computed: A = [[4, 1], [1, 3]], b = (1, 2), from (2, 1)."""
    A = torch.tensor([[[4.0, 1.0], [1.0, 3.0]]], dtype=torch.float64)
    b, x0 = torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    first = cg(product(A), b, x0, iters=1)  # type: ignore[arg-type]
    torch.testing.assert_close(first[0], torch.tensor([78.0, 112.0], dtype=torch.float64) / 331)
    second = cg(product(A), b, x0, iters=2)  # type: ignore[arg-type]
    torch.testing.assert_close(second[0], torch.tensor([1.0, 7.0], dtype=torch.float64) / 11)


def test_as_many_iterations_as_different_eigenvalues_suffice() -> None:
    A = torch.diag(torch.tensor([1.0, 1.0, 5.0, 5.0, 5.0, 9.0], dtype=torch.float64))[None]
    b = torch.arange(1.0, 7.0, dtype=torch.float64)[None]
    torch.testing.assert_close(cg(product(A), b, tol=0.0, iters=3), b / A[0].diagonal())  # type: ignore[arg-type]
    assert not torch.allclose(cg(product(A), b, tol=0.0, iters=2), b / A[0].diagonal())  # type: ignore[arg-type]


def test_the_residual_is_within_the_tolerance() -> None:
    A, b = systems(4, 30)
    for tol in (1e-2, 1e-5):
        found = cg(product(A), b, tol=tol, iters=1000)  # type: ignore[arg-type]
        residual = b - (A @ found[..., None])[..., 0]
        assert (residual.norm(dim=1) <= 1.01 * tol * b.norm(dim=1)).all()
        assert (residual.norm(dim=1) > 1e-9 * b.norm(dim=1)).all()  # and no more work is done than was asked for


@pytest.mark.parametrize("start", [None, "solution"])
def test_nothing_to_do_costs_no_more_than_looking(start: str | None) -> None:
    A, b = systems(2, 6)
    calls: list[Tensor] = []

    def apply(x: Tensor) -> Tensor:
        calls.append(x)
        return (A @ x[..., None])[..., 0]

    if start is None:
        assert torch.equal(cg(apply, torch.zeros_like(b)), torch.zeros_like(b))
        assert not calls
    else:
        x = torch.linalg.solve(A, b)
        assert torch.equal(cg(apply, b, x), x)
        assert len(calls) == 1


def test_a_row_whose_matrix_is_not_positive_stands_still_and_the_others_go_on() -> None:
    A = torch.stack([torch.eye(3), -torch.eye(3)]).double()
    b = torch.ones(2, 3, dtype=torch.float64)
    found = cg(product(A), b)  # type: ignore[arg-type]
    torch.testing.assert_close(found[0], b[0])
    assert torch.equal(found[1], torch.zeros(3, dtype=torch.float64))
