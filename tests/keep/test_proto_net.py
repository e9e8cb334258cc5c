"""ProtoNet: prototypes are means, the order of sets does not matter, and rows leave them exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from engram.core.learner import Learner, fork
from engram.core.request import Request
from engram.data.episodes import episodes
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.predict import accuracy, predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.proto_net import ProtoNet, cosines
from engram.stats.seeds import generator
from engram.testing import condition, fingerprint, holds

BASE, NOVEL = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)


def trained(digits: Any, epochs: int = 4) -> ProtoNet:
    learner = ProtoNet(network={"name": "MLP", "hidden": [48, 32]}, epochs=epochs, batch_size=32)
    learner.learn(Task(digits.train.of_classes(BASE)), Run())
    return learner


@pytest.fixture(scope="module")
def learner(digits: Any) -> ProtoNet:
    return trained(digits)


def taught(learner: ProtoNet, sets: Any) -> ProtoNet:
    twin: Learner = fork(learner)
    assert isinstance(twin, ProtoNet)
    for index, rows in enumerate(sets):
        twin.learn(Task(rows, index=index + 1), Run(seed=index))
    return twin


def novel(digits: Any) -> list[Table]:
    """Eight sets of a row of three or two classes each."""
    rows = digits.test.of_classes(NOVEL)
    return [rows.take(range(k, 40, 8)) for k in range(8)]


@holds("cfsl-instances", 2)
def test_the_order_of_support_sets_does_not_matter(learner: ProtoNet, digits: Any) -> None:
    sets = novel(digits)
    test = digits.test.take(range(60, 300))
    wanted = predict(taught(learner, sets).model, test)
    for order in ([7, 6, 5, 4, 3, 2, 1, 0], [3, 0, 6, 1, 7, 2, 4, 5]):
        found = predict(taught(learner, [sets[k] for k in order]).model, test)
        assert torch.allclose(found, wanted, rtol=0, atol=1e-6) and torch.equal(found.argmax(1), wanted.argmax(1))
    whole = predict(taught(learner, [sets[0].concat(*sets[1:])]).model, test)
    assert torch.allclose(whole, wanted, rtol=0, atol=1e-6)


@holds("cfsl-instances", 2)
@pytest.mark.parametrize(("sets", "shots"), [(1, 20), (4, 5), (20, 1)])
def test_rows_that_were_shown_are_recognised(learner: ProtoNet, digits: Any, sets: int, shots: int) -> None:
    for one in episodes(digits.test, ways=1, shots=shots, queries=1, sets=sets, instances=True, count=3, seed=0):
        shown = [rows.with_labels(rows.labels + 10) for rows in one.supports]  # type: ignore[operator]
        asked = one.queries.with_labels(one.queries.labels + 10)  # type: ignore[operator]
        twin = taught(learner, shown)
        assert accuracy(twin.model, asked, classes=tuple(range(10, 30))) == 1


def test_a_row_goes_to_the_largest_cosine_with_the_mean_of_features(learner: ProtoNet, digits: Any) -> None:
    sets = novel(digits)
    twin = taught(learner, sets)
    rows = digits.train.of_classes(BASE).concat(*sets)
    features = predict(twin.model.encoder, rows, "pooler_output").double()  # type: ignore[arg-type]
    means = torch.stack([features[rows.labels == c].mean(0) for c in range(10)])
    own = predict(twin.model.encoder, digits.test, "pooler_output").double()  # type: ignore[arg-type]
    wanted = torch.stack([torch.cosine_similarity(f[None], means) for f in own])
    assert torch.allclose(predict(twin.model, digits.test), wanted - 0.5, atol=1e-6)


def test_cosines_with_the_prototypes_of_an_episode() -> None:
    draws = generator("episode")
    features = torch.randn(9, 4, generator=draws)
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2, 0, 1])
    support = torch.tensor([True] * 6 + [False] * 3)
    for row, found in zip(range(6, 9), cosines(features, labels, support), strict=True):
        for c in range(3):
            prototype = features[2 * c : 2 * c + 2].mean(0)
            assert found[c] == pytest.approx(float(F.cosine_similarity(features[row], prototype, dim=0)), abs=1e-6)


def test_later_tasks_leave_the_encoder_alone(learner: ProtoNet, digits: Any) -> None:
    before = fingerprint(learner.state_dict()), condition(learner.model)
    twin = taught(learner, novel(digits))
    encoders = [one.model.encoder.state_dict() for one in (twin, learner)]  # type: ignore[union-attr,operator]
    assert fingerprint(encoders[0]) == fingerprint(encoders[1])
    assert (fingerprint(learner.state_dict()), condition(learner.model)) == before
    assert not any(p.requires_grad for p in fork(twin).model.parameters())


def test_rows_of_later_tasks_leave_exactly_and_rows_of_the_first_are_residue(learner: ProtoNet, digits: Any) -> None:
    sets = novel(digits)
    twin, never = taught(learner, sets), taught(learner, sets[2:])
    gone = sets[0].concat(sets[1])
    assert twin.forget(Request.of_records(gone, gone.ids)) == ()
    assert twin.holds(gone.ids) == ()
    assert torch.allclose(predict(twin.model, digits.test), predict(never.model, digits.test), rtol=0, atol=1e-6)
    base = digits.train.of_classes(BASE).take(range(3))
    assert twin.forget(Request.of_records(base, base.ids)) == base.ids
    with pytest.raises(EngramError, match="was never learnt, or is forgotten already"):
        twin.forget(Request.of_records(gone, gone.ids))
    with pytest.raises(EngramError, match="the forget rows are not at hand"):
        twin.forget(Request.of_records(gone, gone.ids).but(forget=None))


def test_a_class_without_rows_is_not_predicted(learner: ProtoNet, digits: Any) -> None:
    twin = taught(learner, novel(digits))
    rows = novel(digits)[0].concat(*novel(digits)[1:]).of_classes([7])
    twin.forget(Request.of_records(rows, rows.ids))
    assert 7 not in predict(twin.model, digits.test).argmax(1).tolist()


def test_a_first_task_of_single_rows_makes_prototypes_without_training(digits: Any) -> None:
    first = digits.train.take([int((digits.train.labels == c).nonzero()[0]) for c in range(10)])
    learner = ProtoNet.tiny()
    learner.learn(Task(first), Run())
    assert accuracy(learner.model, first) == 1


def test_a_network_without_class_head_is_refused(digits: Any) -> None:
    numbers = digits.train.with_labels(torch.rand(len(digits.train), 1, generator=generator("numbers")))
    with pytest.raises(EngramError, match="ProtoNet wants an encoder with a class head"):
        ProtoNet.tiny().learn(Task(numbers), Run())
