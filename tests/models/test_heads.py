"""Dense columns, growth, retirement, and the formulas of the heads."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from engram.errors import EngramError
from engram.models import (
    CosineHead,
    Head,
    LinearHead,
    MatrixHead,
    NearestMeanHead,
    ValueHead,
    predict_classes,
    seeded,
)
from engram.testing import holds

INF = float("inf")


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64).float()


def linear(*classes: int, seed: int = 0, **options: Any) -> LinearHead:
    with seeded(gen(seed)):
        return LinearHead(3, classes, **options)


def test_columns_are_class_ids_and_the_others_minus_infinity() -> None:
    head = linear(4, 1)
    x = normal(2, 3)
    logits = head(x)
    assert logits.shape == (2, 5)
    assert torch.equal(logits[:, [4, 1]], F.linear(x, head.weight, head.bias))
    assert (logits[:, [0, 2, 3]] == -INF).all()
    assert torch.equal(head.scores(x), logits[:, [4, 1]])
    assert linear(4, 1, classes_total=9)(x).shape == (2, 9)
    assert linear(4, 1, bias=False).bias is None


def test_new_rows_are_drawn_as_those_of_a_linear_layer() -> None:
    with seeded(gen()):
        head = LinearHead(4, range(5000))
    rows = torch.cat([head.weight, head.bias[:, None]], 1).detach()
    bound = 0.5  # 1 / sqrt(4)
    assert rows.abs().max() < bound
    assert rows.abs().max() > 0.99 * bound
    torch.testing.assert_close(rows.std(), torch.tensor(bound / 3**0.5), rtol=0.02, atol=0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 12), max_size=4), max_size=4), st.integers(0, 99))
def test_growing_moves_no_old_row(steps: list[list[int]], seed: int) -> None:
    head, generator = linear(2, 7), gen(seed)
    x = normal(2, 3)
    for classes in steps:
        before, born = head(x).detach(), head.classes.tolist()
        weight = head.weight.detach().clone()
        head.grow(classes, generator)
        assert torch.equal(head.weight[: len(born)], weight)
        assert head.classes.tolist()[: len(born)] == born
        assert torch.equal(head(x)[:, born], before[:, born])
        assert torch.isfinite(head(x)).sum(1).tolist() == [len(head.classes)] * 2
    assert sorted(head.classes.tolist()) == sorted({2, 7, *itertools.chain(*steps)})


def test_growth_follows_the_generator_alone(moved_by: Callable[[Callable[[], object]], list[str]]) -> None:
    heads = [linear(0) for _ in range(3)]
    for head, seed in zip(heads, (5, 5, 6), strict=True):
        head.grow([3, 1], gen(seed))
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[0].weight[1:], heads[2].weight[1:])
    assert moved_by(lambda: heads[0].grow([9], gen())) == []
    weight = heads[0].weight
    heads[0].grow([3, 1], gen(7))
    assert heads[0].weight is weight


def test_a_retired_class_never_wins_and_leaves_nothing() -> None:
    head = linear(0, 1, 2)
    x = normal(50, 3)
    before = head(x).detach()
    head.retire(torch.tensor([1]))
    after = head(x)
    assert (after[:, 1] == -INF).all()
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert head.weight[1].tolist() == [0, 0, 0]
    assert head.bias[1] == 0
    assert 1 not in predict_classes(after).tolist()
    head.grow([1], gen(3))
    assert head.classes.tolist() == [0, 1, 2]
    assert torch.isfinite(head(x)).all()
    assert not torch.equal(head(x)[:, 1], before[:, 1])
    with pytest.raises(EngramError, match=r"no class 8; it has \[0, 1, 2\]"):
        head.retire([8])
    with pytest.raises(EngramError, match="0 or larger; got -1"):
        head.grow([-1], gen())


def test_dead_columns_do_not_touch_the_gradient() -> None:
    head = linear(0, 1, 2, 5)
    head.retire([1])
    x, labels = normal(6, 3), torch.tensor([0, 2, 5, 5, 0, 2])
    F.cross_entropy(head(x), labels).backward()
    live = [0, 2, 3]
    weight = head.weight.detach()[live].requires_grad_()
    bias = head.bias.detach()[live].requires_grad_()
    compact = torch.tensor([0, 1, 2, 2, 0, 1])
    F.cross_entropy(F.linear(x, weight, bias), compact).backward()
    torch.testing.assert_close(head.weight.grad[live], weight.grad)
    torch.testing.assert_close(head.bias.grad[live], bias.grad)
    assert (head.weight.grad[1] == 0).all()


def test_predicting_without_a_live_class() -> None:
    head = linear()
    with pytest.raises(EngramError, match="no class is live"):
        predict_classes(head(normal(2, 3)))
    head.grow([1], gen())
    assert predict_classes(head(normal(2, 3))).tolist() == [1, 1]
    head.retire([1])
    with pytest.raises(EngramError, match="no class is live"):
        predict_classes(head(normal(2, 3)))


def test_stacked_heads_agree_with_each_alone() -> None:
    heads = [linear(3, 0, seed=1), linear(1, 2, seed=2, classes_total=4)]
    heads[0].retire([3])
    heads[0].grow([3, 1], gen())
    heads[1].grow([0], gen())
    x = normal(5, 3)
    weights, buffers = stack_module_state(heads)
    together = vmap(lambda w, b: functional_call(heads[0], (w, b), (x,)))(weights, buffers)
    torch.testing.assert_close(together, torch.stack([head(x) for head in heads]))


@pytest.mark.parametrize("kind", ["linear", "cosine", "means", "matrix"])
def test_a_state_brings_its_own_classes(kind: str) -> None:
    full, empty = filled(kind), fresh(kind)
    full.retire([2])
    empty.load_state_dict(full.state_dict())
    x = normal(4, 3)
    assert torch.equal(full(x), empty(x))
    full.load_state_dict(fresh(kind).state_dict())  # and back to none
    assert full(x).shape[1] == 0
    state = filled(kind).state_dict()
    name = "means" if kind == "means" else "weight"
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh(kind).load_state_dict({**state, name: state[name][:, :2]})


def fresh(kind: str) -> Head:
    classes = {"linear": LinearHead, "cosine": CosineHead, "means": NearestMeanHead, "matrix": MatrixHead}
    return classes[kind](3)


def filled(kind: str) -> Any:
    head: Any = fresh(kind)
    head.grow([6, 2], gen())
    if kind in ("means", "matrix"):
        head.set([6, 2], normal(2, 3) if kind == "means" else normal(3, 2))
    return head


def test_cosine_does_not_feel_lengths() -> None:
    with seeded(gen()):
        head = CosineHead(3, (0, 1), scale=20.0)
        frozen = CosineHead(3, (0,), frozen=True)
    x = normal(4, 3)
    expected = 20 * torch.stack([F.cosine_similarity(x, row[None]) for row in head.weight], 1)
    torch.testing.assert_close(head(x), expected)
    torch.testing.assert_close(head(10 * x), head(x))
    names = normal(2, 3, seed=4)
    head.set([1, 3], names)
    torch.testing.assert_close(head(names)[[0, 1], [1, 3]], torch.full((2,), 20.0))
    frozen.grow([2], gen())
    assert not frozen.weight.requires_grad
    assert head.weight.requires_grad


@holds("nmc-baseline", 2)
def test_the_largest_logit_is_the_nearest_mean() -> None:
    head = NearestMeanHead(5)
    classes = torch.tensor([7, 3, 4])
    means = F.normalize(normal(3, 5), dim=1).double() * 0.8
    head.set(classes, means)
    x = normal(500, 5, seed=2)
    u = x.double() / x.double().norm(dim=1, keepdim=True)
    distances = torch.stack([(u - mean).square().sum(1) for mean in means], 1)
    assert torch.equal(predict_classes(head(x)), classes[distances.argmin(1)])
    raw = NearestMeanHead(5, normalise=False)
    raw.set(classes, means)
    logits = raw(x)[:, classes]
    torch.testing.assert_close(logits, x.double() @ means.T - means.square().sum(1) / 2)
    assert not list(head.parameters())


def test_a_class_without_a_mean_stays_out() -> None:
    head = NearestMeanHead(2)
    head.grow([0, 1, 2], gen())
    head.set([1], torch.tensor([[0.0, -1.0]]))
    assert predict_classes(head(torch.tensor([[0.0, 1.0]]))).tolist() == [1]  # far, but the only one
    kept = head.means.clone()
    head.set([2], torch.tensor([[1.0, 0.0]]))
    assert torch.equal(head.means[:1], kept)
    head.set([1], torch.tensor([[0.0, 0.5]]))
    assert head.means.tolist() == [[0.0, 0.5], [1.0, 0.0]]
    assert head.classes.tolist() == [1, 2]
    with pytest.raises(EngramError, match="not finite"):
        head.set([3], torch.full((1, 2), torch.nan))
    with pytest.raises(EngramError, match=r"shape \[1, 2\]; so many distinct classes need \[2, 2\]"):
        head.set([3, 4], torch.zeros(1, 2))
    assert head.classes.tolist() == [1, 2]


def test_a_solved_matrix() -> None:
    head = MatrixHead(3, bias=True)
    weight, bias = normal(3, 2).double(), torch.tensor([1.0, -1.0])
    head.set([2, 0], weight, bias)
    x = normal(4, 3, seed=3)
    logits = head(x)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits[:, [2, 0]], x.double() @ weight + bias)
    assert (logits[:, 1] == -INF).all()
    with pytest.raises(EngramError, match="bias=True"):
        head.set([2, 0], weight)


def test_the_value_head_is_linear() -> None:
    with seeded(gen()):
        head = ValueHead(3, outputs=2)
    x = normal(4, 3)
    assert torch.equal(head(x), F.linear(x, head.weight, head.bias))
    assert head.config == {"width": 3, "outputs": 2}
