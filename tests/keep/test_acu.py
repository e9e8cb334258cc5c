from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engram.core.erasure import forget
from engram.core.learner import fork
from engram.core.request import Request
from engram.data.streams import class_stream
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.optimizer import Optimizer
from engram.engine.predict import accuracy, predict
from engram.errors import EngramError
from engram.keep.acu import ACU
from engram.keep.finetune import Finetune
from engram.models import LinearHead, Predictor
from engram.models.frozen import RandomFeatures
from engram.testing import holds

GAMMA, SIZE = 0.1, 200


@pytest.fixture(scope="module")
def table() -> Table:
    """1000 rows of 50 numbers, in 10 classes that have something to do with them."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 50, generator=draws)
    y = (x[:, :10] + 0.5 * torch.randn(1000, 10, generator=draws)).argmax(1)
    return Table({"values": x}, y)


def learnt(*blocks: Table, size: int = SIZE, **settings: Any) -> ACU:
    learner = ACU(size=size, gamma=GAMMA, **settings)
    for block in blocks:
        learner.learn(Task(block))
    return learner


def cut(table: Table, size: int) -> list[Table]:
    return [table.take(rows) for rows in torch.arange(len(table)).split(size)]


def weights(learner: ACU) -> Tensor:
    return learner.ridge.weights


def inverse(learner: ACU) -> Tensor:
    return torch.linalg.inv(learner.ridge.A)


def parts(learner: ACU, table: Table) -> tuple[Tensor, Tensor]:
    """Random features [n, m] and one-hot labels [n, 10] in float64, from B and the rows alone."""
    B = learner.model.encoder.weight.double()  # type: ignore[union-attr, operator]
    assert table.labels is not None
    return torch.relu(table.inputs["values"].double() @ B.T), torch.eye(10, dtype=torch.float64)[table.labels]


def solved(phi: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression written down: its weights, and (PhiᵀPhi + gamma I)⁻¹."""
    R = torch.linalg.inv(phi.T @ phi + GAMMA * torch.eye(phi.shape[1], dtype=phi.dtype))
    return R @ phi.T @ y, R


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@holds("acu", 1)
@pytest.mark.parametrize("size", [1, 100, 333, 1000])
def test_learning_in_any_blocks_and_order_is_the_joint_solution(table: Table, size: int) -> None:
    blocks = cut(table.take(range(200 if size == 1 else 1000)), size)
    order = np.random.default_rng(size).permutation(len(blocks))
    learner = learnt(*(blocks[i] for i in order))
    W, _ = solved(*parts(learner, table.select(learner.holds(table.ids))))
    assert gap(weights(learner), W) < 1e-9
    assert gap(predict(learner.model, table), parts(learner, table)[0] @ W) < 1e-9


@holds("acu", 2)
def test_forgetting_half_is_the_solution_on_the_other_half(table: Table) -> None:
    learner = learnt(*cut(table, 100))
    for block in cut(table.take(range(500)), 50):
        assert forget(learner, Request.of_records(table, block.ids)).residue == ()
    W, R = solved(*parts(learner, table.take(range(500, 1000))))
    assert gap(weights(learner), W) < 1e-8
    assert gap(inverse(learner), R) < 1e-8
    assert learner.holds(table.ids) == table.ids[500:]


@holds("acu", 3)
def test_forgetting_everything_leaves_nothing(table: Table) -> None:
    learner = learnt(*cut(table, 100))
    for block in cut(table, 50):
        learner.forget(Request.of_records(table, block.ids))
    assert gap(weights(learner), torch.zeros(SIZE, 10)) < 1e-6
    assert gap(inverse(learner), torch.eye(SIZE) / GAMMA) < 1e-6
    assert torch.isneginf(predict(learner.model, table)).all()
    assert accuracy(learner.model, table) == 0


@holds("acu", 4)
def test_learning_and_forgetting_a_block_restores_the_state(table: Table) -> None:
    first, block = table.take(range(600)), table.take(range(600, 700))
    learner = learnt(first)
    W, R = weights(learner).clone(), inverse(learner)
    learner.learn(Task(block))
    assert gap(weights(learner), W) > 1e-3
    learner.forget(Request.of_records(block, block.ids))
    assert gap(weights(learner), W) < 1e-9
    assert gap(inverse(learner), R) < 1e-9


@holds("acu", 4)
def test_ten_requests_for_one_row_are_one_request_for_ten_in_any_order(table: Table) -> None:
    rows, once = table.take(range(400)), learnt(table.take(range(400)))
    once.forget(Request.of_records(rows, rows.ids[:10]))
    for order in (range(10), range(9, -1, -1)):
        singly = learnt(rows)
        for row in order:
            singly.forget(Request.of_records(rows, (rows.ids[row],)))
        assert gap(weights(singly), weights(once)) < 1e-9
        assert gap(singly.ridge.A, once.ridge.A) < 1e-9


class Recursion:
    """The method as it is published: W and R = A⁻¹ moved by Woodbury's identity, in the precision of the
    rows."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.W, self.R = torch.zeros(SIZE, 10, dtype=dtype), torch.eye(SIZE, dtype=dtype) / GAMMA

    def move(self, phi: Tensor, y: Tensor, sign: int) -> None:
        phi, y = phi.to(self.W), y.to(self.W)
        K = torch.linalg.inv(torch.eye(len(phi), dtype=phi.dtype) + sign * phi @ self.R @ phi.T)
        self.R = self.R - sign * self.R @ phi.T @ K @ phi @ self.R
        self.W = self.W + sign * self.R @ phi.T @ (y - phi @ self.W)


@holds("acu", 5)
def test_the_published_recursion_agrees_in_float64_and_breaks_in_float32(table: Table) -> None:
    learner, double, single = learnt(table), Recursion(torch.float64), Recursion(torch.float32)
    for block in cut(table, 100):
        for recursion in (double, single):
            recursion.move(*parts(learner, block), 1)
    assert gap(double.W, weights(learner)) < 1e-8
    for block in cut(table, 50):
        learner.forget(Request.of_records(table, block.ids))
        for recursion in (double, single):
            recursion.move(*parts(learner, block), -1)
    assert learner.ridge.A.dtype == learner.ridge.Q.dtype == torch.float64
    assert gap(learner.ridge.A, GAMMA * torch.eye(SIZE, dtype=torch.float64)) == 0 == weights(learner).norm()
    assert gap(double.W, torch.zeros(SIZE, 10)) < 1e-6
    assert gap(single.W, torch.zeros(SIZE, 10)) > 0.1 and gap(GAMMA * single.R, torch.eye(SIZE)) > 0.5


@holds("acu", 6)
def test_learning_class_by_class_is_joint_ridge_where_sgd_forgets(digits: Any, take: Callable[..., Any]) -> None:
    stages = class_stream(digits.train, digits.test, base=2, increment=2)
    learner = ACU(size=300)
    course = take(learner, stages)
    joint = ACU(size=300)
    joint.learn(Task(digits.train))
    assert torch.equal(predict(learner.model, digits.test).argmax(1), predict(joint.model, digits.test).argmax(1))
    assert course.curve[-1] == accuracy(joint.model, digits.test) > 0.95
    encoder = joint.model.encoder
    assert isinstance(encoder, RandomFeatures)
    same = Predictor(encoder, LinearHead(300)).float()
    tuned = take(Finetune(network=same, optimizer=Optimizer("sgd", lr=0.1), epochs=20), stages)
    assert tuned.curve[-1] < 0.3


@holds("acu", 7)
def test_a_forgotten_class_is_gone_and_the_others_are_as_retrained(digits: Any) -> None:
    learner = learnt(digits.train, size=300)
    assert forget(learner, Request.of_classes(digits.train, (4,))).exact
    oracle = learnt(digits.train.of_classes([0, 1, 2, 3, 5, 6, 7, 8, 9]), size=300)
    assert accuracy(learner.model, digits.test.of_classes([4])) == 0
    assert torch.equal(predict(learner.model, digits.test).argmax(1), predict(oracle.model, digits.test).argmax(1))


@given(st.data())
@settings(max_examples=10)
def test_a_hundred_requests_are_retraining_within_the_bound(table: Table, data: st.DataObject) -> None:
    """Relative error 1e-8 while more rows remain than features; else within the bound, and with the same
    answers."""
    rows = table.take(range(400))
    left = data.draw(st.integers(20, 390), label="rows that remain")
    order = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(400)[left:]
    learner = learnt(*cut(rows, 150), size=100)
    for request in np.array_split(order, 100):
        if len(request):
            learner.forget(Request.of_records(rows, tuple(rows.ids[i] for i in request)))
    oracle = learnt(rows.without(rows.ids[i] for i in order), size=100)
    live = oracle.ridge.count.nonzero()[:, 0]
    error = (weights(learner)[:, live] - weights(oracle)[:, live]).norm()
    assert error <= learner.error_bound() + oracle.error_bound()
    if left > 100:
        assert error <= 1e-8 * weights(oracle).norm()
    _same_where_certain(learner, oracle, table)


def _same_where_certain(learner: ACU, oracle: ACU, table: Table) -> None:
    scores, reference = predict(learner.model, table), predict(oracle.model, table)
    best = scores.topk(2, dim=1).values
    bound = 2**0.5 * parts(learner, table)[0].norm(dim=1) * (learner.error_bound() + oracle.error_bound())
    certain = best[:, 0] - best[:, 1] > bound
    assert certain.float().mean() > 0.99
    assert torch.equal(scores.argmax(1)[certain], reference.argmax(1)[certain])


def test_refuses_rows_that_were_never_learnt_and_contents_that_were_others(table: Table) -> None:
    learner = learnt(table.take(range(150)))
    A = learner.ridge.A.clone()
    with pytest.raises(EngramError, match="'150'"):
        learner.forget(Request.of_records(table, ("0", "150")))
    assert learner.drop(table.take([150])) == ()
    other = Table({"values": 3 * table.inputs["values"][:1]}, ids=("0",))
    with pytest.raises(EngramError, match="never learnt"):
        learner.forget(Request.of_records(other, ("0",)))
    assert torch.equal(learner.ridge.A, A) and learner.holds(("0",)) == ("0",)


def test_float32_features_need_drift_and_pay_for_it_in_the_bound(tiny: Table) -> None:
    backbone = {"name": "MLP", "hidden": [64]}
    bounds = []
    for drift in (1e-14, 1e-5):
        learner = learnt(tiny, size=0, backbone=backbone, drift=drift)
        learner.forget(Request.of_records(tiny, tiny.ids[:1]))
        oracle = learnt(tiny.take(range(1, 60)), size=0, backbone=backbone)
        bounds.append(learner.error_bound())
        assert gap(weights(learner), weights(oracle)) < 1e-3
    assert bounds[1] > 1e3 * bounds[0]
    assert gap(weights(learner), weights(oracle)) <= bounds[1]
    assert learner.residual_bound() > bounds[1] / float(weights(learner).norm())


def test_learns_on_after_forgetting_and_as_a_copy(table: Table) -> None:
    first, second = table.take(range(300)), table.take(range(300, 600))
    learner = learnt(first)
    learner.forget(Request.of_records(first, first.ids[:100]))
    twin = fork(learner)
    for each in (learner, twin):
        each.learn(Task(second))
    assert torch.equal(predict(learner.model, table), predict(twin.model, table))
    assert gap(weights(learner), weights(learnt(table.take(range(100, 600))))) < 1e-9
    assert fork(learner).error_bound() == learner.error_bound()
