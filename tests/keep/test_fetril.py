from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.nn import functional as F

from engram.core.erasure import forget
from engram.core.learner import fork
from engram.core.request import Request
from engram.data.streams import class_stream
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.optimizer import Optimizer
from engram.engine.predict import accuracy, predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.fetril import FeTrIL
from engram.keep.nmc import NMC
from engram.models import digest
from engram.stats.linear import svc_of_blocks
from engram.testing import holds

Take = Callable[..., Any]


def learnt(*tables: Table, run: Run | None = None, **settings: Any) -> FeTrIL:
    learner, run = FeTrIL(**settings), run or Run()
    for index, table in enumerate(tables):
        learner.learn(Task(table, index=index), run)
    return learner


def raw(table: Table) -> Tensor:
    return table.inputs["pixel_values"].flatten(1).double()


def translated(old: Table, new: Table, **settings: Any) -> tuple[FeTrIL, Tensor, Tensor]:
    """A learner of both tables, and the pseudo-features of the second task."""
    learner = learnt(old, **settings)
    learner.means.add(new)
    return learner, *learner.pseudo_features(Task(new, index=1), Run())


@holds("fetril", 1)
@pytest.mark.parametrize("selection", ["euclidean", "cosine", "random", 1, 2, 3])
def test_pseudo_features_have_the_old_mean_and_the_covariance_of_their_source(digits: Any, selection: Any) -> None:
    old, new = digits.train.of_classes(range(6)), digits.train.of_classes(range(6, 10))
    _, x, y = translated(old, new, selection=selection)
    for p in range(6):
        assert torch.allclose(x[y == p].mean(0), raw(old.of_classes([p])).mean(0), atol=1e-5)
        covariances = torch.stack([raw(new.of_classes([n])).T.cov(correction=0) for n in range(6, 10)])
        of_p = x[y == p].T.cov(correction=0)
        assert (covariances - of_p).abs().amax((1, 2)).min() < 1e-5
    for n in range(6, 10):
        assert torch.equal(x[y == n], raw(new.of_classes([n])))


@holds("fetril", 2)
def test_a_class_that_is_its_own_source_keeps_its_features(digits: Any) -> None:
    rows = digits.train.of_classes([0, 1])
    learner = learnt(rows)
    x, y = learner.pseudo_features(Task(rows), Run())
    for c in (0, 1):
        assert torch.equal(x[y == c], raw(rows.of_classes([c])))


def test_a_class_that_comes_again_is_moved_to_the_mean_of_all_its_rows(digits: Any) -> None:
    rows = digits.train.of_classes([0])
    _, x, _ = translated(rows.take(range(50)), rows.take(range(50, 80)))
    assert torch.allclose(x.mean(0), raw(rows.take(range(80))).mean(0), atol=1e-12)
    assert torch.allclose(x - x[0], raw(rows.take(range(50, 80))) - raw(rows.take([50])), atol=1e-12)


@holds("fetril", 3)
def test_a_shift_of_all_features_changes_no_source_and_no_translation(digits: Any) -> None:
    draws = torch.Generator().manual_seed(0)
    shift = torch.randn(64, generator=draws, dtype=torch.float64)

    def table(classes: range, by: Tensor) -> Table:
        rows = digits.train.of_classes(classes)
        return Table({"values": raw(rows) + by}, rows.labels, rows.ids)

    _, x, y = translated(table(range(6), 0 * shift), table(range(6, 10), 0 * shift))
    _, moved, same = translated(table(range(6), shift), table(range(6, 10), shift))
    assert torch.equal(y, same)
    assert torch.allclose(moved - shift, x, atol=1e-5)


def test_sources_by_hand() -> None:
    means = torch.tensor([[1.0, 0.1], [0.0, 5.0], [3.0, 3.0]], dtype=torch.float64)
    own = torch.tensor([[1.2, 2.0], [9.0, 0.9], [3.0, 3.0]], dtype=torch.float64)
    classes, here = torch.tensor([0, 1, 7]), torch.tensor([4, 5, 7])

    def sources(selection: Any) -> list[int]:
        return FeTrIL(selection=selection).sources(classes, means, here, own, Run()).tolist()

    assert sources("euclidean") == sources(1) == [0, 0, 2]
    assert sources("cosine") == [1, 0, 2]
    assert sources(2) == [2, 2, 2]
    assert sources(3) == sources(9) == [1, 1, 2]


@holds("fetril", 4)
def test_one_task_is_the_plain_classifier(digits: Any) -> None:
    """Exactly that of the same solver on real features; and that of LIBLINEAR, run to its end, within the tolerance at
    which the solver stops: 0.1 % of the largest score."""
    found = predict(learnt(digits.train).model, digits.test)
    u, y, test = (F.normalize(raw(digits.train), dim=1), digits.train.labels, F.normalize(raw(digits.test), dim=1))
    rows = [(c, u[y == c]) for c in range(10)]
    _, w, b = svc_of_blocks(torch.arange(10), lambda: rows)
    assert torch.allclose(found, test @ w + b, rtol=0, atol=1e-9)
    plain = LinearSVC(C=1.0, tol=1e-8, dual=False, random_state=0).fit(u.numpy(), y.numpy())
    scores = torch.from_numpy(plain.decision_function(test.numpy()))
    assert torch.allclose(found, scores, rtol=0, atol=1e-3 * float(scores.abs().max()))
    assert torch.equal(found.argmax(1), scores.argmax(1))
    _, w, b = svc_of_blocks(torch.arange(10), lambda: rows, tol=1e-10)
    assert torch.allclose(test @ w + b, scores, rtol=0, atol=1e-6)


def test_two_classes_and_one() -> None:
    x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    table = Table({"values": x}, torch.tensor([3, 3, 5, 5]))
    assert predict(learnt(table).model, table).argmax(1).tolist() == [3, 3, 5, 5]
    assert predict(learnt(table.take([0, 1])).model, table).argmax(1).tolist() == [3, 3, 3, 3]


@holds("fetril", 5)
def test_published_protocol_on_digits(digits: Any, take: Take) -> None:
    order = {"order": "pycil", "seed": 1993}
    halves = class_stream(digits.train, digits.test, base=5, increment=1, **order)  # type: ignore[arg-type]
    assert np.round(take(FeTrIL(), halves).curve, 3).tolist() == [0.993, 0.978, 0.947, 0.954, 0.932, 0.896]
    pairs = class_stream(digits.train, digits.test, base=2, increment=2, **order)  # type: ignore[arg-type]
    final = take(FeTrIL(), pairs).curve[-1]
    assert final == pytest.approx(0.931, abs=1e-3)
    copies, joint = _copies(pairs), accuracy(learnt(digits.train).model, digits.test)
    assert copies == pytest.approx(0.891, abs=2e-3)
    assert joint == pytest.approx(0.963, abs=1e-3)
    assert final > joint - 0.04
    assert final > copies + 0.03
    assert final > take(NMC(), pairs).curve[-1]


@holds("fetril", 5)
def test_nearest_beats_random_beats_copies_where_there_is_a_choice(digits: Any, take: Take) -> None:
    """Over ten orders of five classes, then five; with two classes a task, random sources were no worse than
    nearest."""
    nearest, random, copies = [], [], []
    for seed in range(10):
        stages = class_stream(digits.train, digits.test, base=5, increment=5, order="pycil", seed=seed)
        nearest.append(take(FeTrIL(), stages).curve[-1])
        random += [take(FeTrIL(selection="random"), stages, Run(seed=draw)).curve[-1] for draw in range(2)]
        copies.append(_copies(stages))
    assert np.mean(nearest) > np.mean(random) + 0.002
    assert np.mean(random) > np.mean(copies) + 0.01


def _copies(stages: Any) -> float:
    """The final accuracy when the mean of a past class, repeated, stands in for its rows."""
    last = stages[-1].task.train
    x, y = [raw(last)], [last.labels]
    for stage in stages[:-1]:
        for c in stage.task.classes:
            mean = raw(stage.task.train.of_classes([c])).mean(0)
            n = len(last) // len(last.classes)
            x.append(mean.expand(n, -1))
            y.append(torch.full((n,), c))
    fitted = LinearSVC(dual=False, random_state=0).fit(F.normalize(torch.cat(x), dim=1).numpy(), torch.cat(y).numpy())
    tests = [stage.test for stage in stages]
    test = tests[0].concat(*tests[1:])
    return float(fitted.score(F.normalize(raw(test), dim=1).numpy(), test.labels.numpy()))


@holds("fetril", 6)
def test_keeps_means_and_ids_only_and_never_touches_the_encoder(tiny: Table) -> None:
    learner = FeTrIL.tiny()
    learner.learn(Task(tiny.of_classes(range(4)), classes=(0, 1, 2, 3)))
    encoder = digest(learner.model.encoder)  # type: ignore[arg-type]
    for index, new in enumerate([(4, 5), (6, 7), (8, 9)]):
        learner.learn(Task(tiny.of_classes(new), index=index + 1, classes=new))
        assert digest(learner.model.encoder) == encoder  # type: ignore[arg-type]
    sums = learner.means.state_dict()["sums"]
    assert {name: tuple(value.shape) for name, value in sums.items()} == {
        "sums": (10, 32), "counts": (10,), "second": (0, 32, 32),
    }  # fmt: skip
    floats = [part for part in _leaves(learner.state_dict()["traces"]) if isinstance(part, Tensor)]
    assert sum(part.numel() for part in floats) == 10 * 32 + 10


def _leaves(state: Any) -> list[Any]:
    if isinstance(state, dict | list):
        return [leaf for part in (state.values() if isinstance(state, dict) else state) for leaf in _leaves(part)]
    return [state]


@pytest.mark.parametrize("classifier", ["fc", "ridge", "logistic"])
def test_other_classifiers_beat_the_nearest_mean(digits: Any, take: Take, classifier: str) -> None:
    stages = class_stream(digits.train, digits.test, base=4, increment=3)
    learner = FeTrIL(classifier=classifier, fc_epochs=20)
    assert take(learner, stages).curve[-1] > take(NMC(), stages).curve[-1]


def test_the_trained_encoder_beats_a_random_one(digits: Any, take: Take) -> None:
    stages = class_stream(digits.train, digits.test, base=5, increment=5)
    network = {"name": "MLP", "hidden": [32]}
    quick = Optimizer("adam", lr=1e-2)
    trained = take(FeTrIL(network=network, optimizer=quick, epochs=10), stages).curve
    assert trained[0] > 0.95
    assert trained[-1] > take(FeTrIL(network=network, epochs=0), stages).curve[-1] + 0.02


def test_forgetting_leaves_means_exact_and_a_classifier_that_the_next_task_renews(tiny: Table) -> None:
    first, second, third = (tiny.of_classes(part) for part in [(0, 1, 2, 3), (4, 5, 6), (7, 8, 9)])
    gone = (*first.of_classes([2]).ids, *second.ids[:2])
    learner = learnt(first, second)
    done = forget(learner, Request.of_records(first.concat(second), gone))
    assert not done.exact and set(done.residue) == set(gone)
    assert torch.isneginf(predict(learner.model, tiny)[:, 2]).all()
    assert learner.holds(gone) == ()
    learner.learn(Task(third, index=2))
    oracle = learnt(first.without(gone), second.without(gone), third)
    assert torch.allclose(learner.means.sums.sums, oracle.means.sums.sums, atol=1e-12)
    assert torch.allclose(predict(learner.model, tiny), predict(oracle.model, tiny), atol=1e-6)


def test_rows_of_a_trained_encoder_stay_in_it(tiny: Table) -> None:
    learner = FeTrIL.tiny()
    learner.learn(Task(tiny.take(range(30))))
    learner.learn(Task(tiny.take(range(30, 60)), index=1))
    assert learner.base.holds(tiny.ids) == tiny.ids[:30]
    assert learner.drop(tiny.take([0, 40])) == (tiny.ids[0], tiny.ids[40])


def test_a_copy_goes_on_learning_the_same(tiny: Table) -> None:
    learner = learnt(tiny.take(range(30)), classifier="fc", fc_epochs=2)
    twin = fork(learner)
    for each in (learner, twin):
        each.learn(Task(tiny.take(range(30, 60)), index=1), Run(seed=3))
    assert torch.equal(predict(learner.model, tiny), predict(twin.model, tiny))


def test_wrong_settings_are_named() -> None:
    for wrong in ({"selection": "nearest"}, {"selection": 0}, {"classifier": "tree"}):
        with pytest.raises(EngramError, match=str(next(iter(wrong.values())))):
            FeTrIL(**wrong)  # type: ignore[arg-type]
