"""Support vector machines on blocks against scikit-learn on the whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.svm import LinearSVC
from torch import Tensor

from engram.errors import EngramError
from engram.stats.linear import BLOCKWISE, CLASSIFIERS
from engram.stats.seeds import generator
from engram.stats.svm import squared_hinge


def blobs(classes: int, rows: int, width: int, seed: int = 0) -> list[Tensor]:
    draws = generator("svm blobs", seed)
    means = 1.5 * torch.randn(classes, width, generator=draws)
    return [mean + torch.randn(rows, width, generator=draws) for mean in means]


def whole(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat(parts).double(), torch.arange(len(parts)).repeat_interleave(len(parts[0]))


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 6), st.integers(5, 30), st.integers(1, 8), st.sampled_from([0.1, 1.0, 10.0]))
def test_it_is_what_scikit_learn_finds(classes: int, rows: int, width: int, C: float) -> None:
    parts = blobs(classes, rows, width)
    x, y = whole(parts)
    known = LinearSVC(C=C, tol=1e-10, dual=False, max_iter=10_000, random_state=0).fit(x.numpy(), y.numpy())
    w, b = squared_hinge(lambda: enumerate(parts), classes, C=C, tol=1e-10)
    assert torch.allclose(w, torch.from_numpy(known.coef_.T), atol=1e-5)
    assert torch.allclose(b, torch.from_numpy(known.intercept_), atol=1e-5)


def test_the_gradient_is_nought_and_the_order_of_blocks_does_not_matter() -> None:
    parts = blobs(5, 40, 10)
    x, y = whole(parts)
    w, b = squared_hinge(lambda: enumerate(parts), 5, tol=1e-9)
    again = squared_hinge(lambda: reversed(list(enumerate(parts))), 5, tol=1e-9)
    assert torch.allclose(w, again[0], atol=1e-7) and torch.allclose(b, again[1], atol=1e-7)
    w, b = w.requires_grad_(), b.requires_grad_()
    sign = torch.where(torch.nn.functional.one_hot(y).bool(), 1.0, -1.0)
    loss = (w.square().sum() + b.square().sum()) / 2 + (1 - sign * (x @ w + b)).clamp(min=0).square().sum()
    loss.backward()
    assert w.grad is not None and b.grad is not None
    assert max(w.grad.abs().max(), b.grad.abs().max()) < 1e-5


@pytest.mark.parametrize("name", BLOCKWISE)
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_blocks_and_the_whole_give_the_same(name: str, classes: int) -> None:
    parts = blobs(classes, 25, 6)
    ids = torch.tensor([3, 5, 8, 13])[:classes]
    found = BLOCKWISE[name](ids, lambda: enumerate(parts))
    x, y = whole(parts)
    known = CLASSIFIERS[name](x, ids[y], C=1.0)
    assert torch.equal(found.classes, known.classes)
    assert torch.allclose(found.weight, known.weight, atol=2e-3) and torch.allclose(found.bias, known.bias, atol=2e-3)


def test_rows_are_asked_for_block_by_block() -> None:
    alive: list[int] = []

    def blocks() -> Iterator[tuple[int, Tensor]]:
        for column, rows in enumerate(blobs(4, 10, 3)):
            alive.append(column)
            yield column, rows.clone()

    squared_hinge(blocks, 4)
    assert len(alive) % 4 in (0, 1)  # every pass to its end, and one look at the width


def test_no_rows_are_refused() -> None:
    with pytest.raises(EngramError, match="no rows"):
        squared_hinge(lambda: iter(()), 3)
