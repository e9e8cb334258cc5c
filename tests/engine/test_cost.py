"""Accounts of work: operations counted twice per multiply-add."""

from __future__ import annotations

import torch

from engram.engine.cost import Cost, flops_of


def test_a_multiply_add_counts_two() -> None:
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert flops_of(lambda: a @ b) == 2 * 3 * 5 * 7
    assert flops_of(lambda: a + 1) == 0


def test_forward_and_backward_count() -> None:
    x, w = torch.ones(4, 6), torch.ones(6, 2, requires_grad=True)
    assert flops_of(lambda: (x @ w).sum().backward()) == 2 * (2 * 4 * 6 * 2)
    kernel = torch.ones(5, 3, 3, 3)
    assert flops_of(lambda: torch.conv2d(torch.ones(2, 3, 8, 8), kernel, padding=1)) == 2 * 2 * 5 * 8 * 8 * 3 * 9


def test_an_account_takes_them_in_and_can_be_told_apart() -> None:
    cost = Cost(flops=7.0)
    before = cost.copy()
    with cost.counting():
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert cost.since(before).flops == 16 and cost.flops == 23
    other = Cost()
    other.add(cost)
    assert other == cost
