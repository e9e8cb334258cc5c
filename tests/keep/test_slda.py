from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import shrunk_covariance
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from tests.keep.halves import finals
from torch import Tensor

from engram.core.erasure import forget
from engram.core.learner import fork
from engram.core.request import Request
from engram.data.streams import class_stream
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.predict import predict
from engram.errors import EngramError
from engram.keep.finetune import Finetune
from engram.keep.nmc import NMC
from engram.keep.slda import SLDA
from engram.models import MLP, LinearHead, Predictor, seeded


def learnt(*tables: Table, **options: Any) -> SLDA:
    learner = SLDA(**options)
    for table in tables:
        learner.learn(Task(table))
    return learner


def parts(table: Table) -> tuple[np.ndarray, np.ndarray]:
    assert table.labels is not None
    return table.inputs["pixel_values"].flatten(1).double().numpy(), table.labels.numpy()


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-8) -> bool:
    return bool(((found - wanted).abs().max() / wanted.abs().max()) < tolerance)


@pytest.mark.parametrize("shrinkage", [1e-4, 0.1, 1.0])
def test_it_is_the_closed_form(digits: Any, shrinkage: float) -> None:
    x, y = parts(digits.train)
    means = np.stack([x[y == c].mean(0) for c in range(10)])
    spread = sum((row - means[c])[:, None] * (row - means[c])[None, :] for row, c in zip(x, y, strict=True)) / len(x)
    precision = np.linalg.inv((1 - shrinkage) * spread + shrinkage * np.eye(64))
    z, _ = parts(digits.test)
    wanted = z @ precision @ means.T - 0.5 * np.einsum("cd,de,ce->c", means, precision, means)
    found = predict(learnt(digits.train, shrinkage=shrinkage).model, digits.test)
    assert close(found, torch.tensor(wanted))


def test_scikit_learns_analysis_with_equal_priors_tells_the_same(digits: Any) -> None:
    """Its shrinkage is towards the mean variance of a class, so that of one is turned into that of the other."""
    x, y = parts(digits.train)
    centred = x - np.stack([x[y == c].mean(0) for c in range(10)])[y]
    mean_variance = np.trace(centred.T @ centred / len(x)) / 64
    theirs = 0.3
    ours = theirs * mean_variance / (1 - theirs + theirs * mean_variance)
    shrunk = shrunk_covariance(centred.T @ centred / len(x), theirs)
    assert np.allclose(
        shrunk / (1 - theirs) * (1 - ours), (1 - ours) * centred.T @ centred / len(x) + ours * np.eye(64)
    )

    class Shrunk:
        """The pooled covariance, whichever class's rows are asked for."""

        def fit(self, X: np.ndarray) -> None:
            self.covariance_ = shrunk

    reference = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=Shrunk(), priors=[0.1] * 10).fit(x, y)
    found = predict(learnt(digits.train, shrinkage=ours).model, digits.test).argmax(1)
    assert found.tolist() == reference.predict(parts(digits.test)[0]).tolist()


def test_full_shrinkage_is_the_nearest_mean(digits: Any) -> None:
    nearest = NMC(normalise=False)
    nearest.learn(Task(digits.train))
    found = predict(learnt(digits.train, shrinkage=1.0).model, digits.test)
    assert torch.allclose(found, predict(nearest.model, digits.test), atol=1e-10)


@given(st.permutations(range(60)), st.integers(1, 59))
@settings(max_examples=10)
def test_the_order_of_rows_and_of_tasks_is_of_no_matter(tiny: Table, order: list[int], cut: int) -> None:
    pieces = [tiny.take(order[:cut]), tiny.take(order[cut:])]
    assert close(predict(learnt(*pieces).model, tiny), predict(learnt(tiny).model, tiny))


@given(st.sets(st.integers(0, 59), min_size=1, max_size=58))
@settings(max_examples=15)
def test_forgetting_is_never_having_learnt(tiny: Table, rows: set[int]) -> None:
    gone = tuple(tiny.ids[row] for row in rows)
    learner, oracle = learnt(tiny), learnt(tiny.without(gone))
    done = forget(learner, Request.of_records(tiny, gone))
    assert done.exact and done.residue == () and learner.holds(gone) == ()
    found, wanted = predict(learner.model, tiny), predict(oracle.model, tiny)
    live = torch.isfinite(found).all(0)
    assert torch.isneginf(wanted[:, ~live[: wanted.shape[1]]]).all()
    wanted = wanted[:, live[: wanted.shape[1]]]
    assert close(found[:, live], wanted, 1e-7)


def test_a_class_and_then_everything_can_go_and_be_learnt_again(tiny: Table) -> None:
    learner = learnt(tiny)
    forget(learner, Request.of_classes(tiny, (7,)))
    assert torch.isneginf(predict(learner.model, tiny)[:, 7]).all()
    rest = tiny.of_classes([c for c in range(10) if c != 7])
    forget(learner, Request.of_records(rest, rest.ids))
    assert torch.isneginf(predict(learner.model, tiny)).all()
    learner.learn(Task(tiny))
    assert close(predict(learner.model, tiny), predict(learnt(tiny).model, tiny))


def test_rounding_of_a_float32_backbone_is_enlarged_by_at_most_the_inverse_shrinkage(tiny: Table) -> None:
    with seeded(torch.Generator().manual_seed(0)):
        backbone = Predictor(MLP(64, [32]), LinearHead(32, range(10)))
    gone = tiny.ids[::9]
    for shrinkage in (1e-2, 1.0):
        learner = learnt(tiny, backbone=backbone, shrinkage=shrinkage)
        forget(learner, Request.of_records(tiny, gone))
        oracle = learnt(tiny.without(gone), backbone=backbone, shrinkage=shrinkage)
        assert close(predict(learner.model, tiny), predict(oracle.model, tiny), 1e-6 / shrinkage)


def test_refuses_strangers_and_shrinkages_outside(tiny: Table) -> None:
    learner = learnt(tiny.take(range(50)))
    with pytest.raises(EngramError, match=repr(tiny.ids[59])):
        learner.forget(Request.of_records(tiny, (tiny.ids[0], tiny.ids[59])))
    for shrinkage in (0.0, 1.5):
        with pytest.raises(EngramError, match="shrinkage"):
            SLDA(shrinkage=shrinkage)


def test_wins_over_fine_tuning_and_over_nearest_means(digits: Any, take: Callable[..., Any]) -> None:
    stages = class_stream(digits.train, digits.test, base=2, increment=2)
    found, means, lost = finals(take, stages, SLDA(), NMC(), Finetune())
    assert found > means + 0.03 and found > lost + 0.6


def test_a_copy_goes_on_learning(tiny: Table) -> None:
    twin = fork(learnt(tiny.take(range(30))))
    twin.learn(Task(tiny.take(range(30, 60))))
    assert close(predict(twin.model, tiny), predict(learnt(tiny).model, tiny))
