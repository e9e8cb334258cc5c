"""The few-shot benchmark as a probe: what it draws, what it says of learners, and that it leaves them as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import pytest
import torch

from engram.audit.few_shot import CONFIGURATIONS, Configuration, FewShotProtocol
from engram.core.finding import Finding
from engram.core.learner import Learner
from engram.core.probe import Subject
from engram.data.episodes import Episode, episodes
from engram.data.noise import occlude
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.nmc import NMC
from engram.reproduce.cfsl_instances import World, by_pixels, pretrain_tune, proto_net, world
from engram.stats.intervals import mean
from engram.testing import condition, fingerprint, holds

MADE: dict[str, Callable[[], Learner]] = {
    "ProtoNet": lambda: proto_net(epochs=20),
    "PretrainTune": pretrain_tune,
    "replay": lambda: pretrain_tune(steps=12, sets=5, replayed=8),
}


@pytest.fixture(scope="module")
def numbers() -> World:
    return world(100)


@pytest.fixture(scope="module")
def learners(numbers: World) -> dict[str, Learner]:
    """All of them, when they know the base."""
    found = {name: make() for name, make in MADE.items()}
    for learner in found.values():
        learner.learn(Task(numbers.base), Run(seed=100))
    return found


def examined(learner: Learner, novel: Table, *names: Any, **settings: Any) -> list[Finding]:
    probe = FewShotProtocol(configurations=names, **{"episodes": 3, **settings})
    return probe.examine(Subject(learner.model, rows={"test": novel}, learner=learner), Run(seed=3))


@holds("cfsl-instances", 4)
@pytest.mark.parametrize("name", MADE)
def test_accuracy_falls_from_10_to_20_to_200_classes(name: str, learners: dict[str, Learner], numbers: World) -> None:
    few, more, most = examined(learners[name], numbers.novel, "base", "wide A", "wide B")
    assert few.value > more.value > most.value > 1 / 200
    assert [f.protocol["labels"] for f in (few, more, most)] == [10, 20, 200]


@holds("cfsl-instances", 5)
@pytest.mark.parametrize("name", ["ProtoNet", "replay"])
def test_accuracy_on_instances_falls_with_occlusion(name: str, learners: dict[str, Learner], numbers: World) -> None:
    found = [f.value for f in examined(learners[name], numbers.novel, "instances 4x5", episodes=6)]
    assert len(found) == 4 and all(b <= a + 0.03 for a, b in pairwise(found))
    assert found[0] > found[-1] + 0.3


@holds("cfsl-instances", 6)
@pytest.mark.parametrize("name", MADE)
def test_the_learner_stays_as_it_is_bit_by_bit(name: str, learners: dict[str, Learner], numbers: World) -> None:
    learner = learners[name]
    before = fingerprint(learner.state_dict()), condition(learner.model)
    examined(learner, numbers.novel, "base", "instances 2x10", episodes=2)
    assert (fingerprint(learner.state_dict()), condition(learner.model)) == before


def test_the_figures_are_those_of_the_same_episodes_told_by_hand(numbers: World) -> None:
    """NMC on pixels: the nearest mean of the images of a class; for instances the nearest image, by the cosine."""
    learner = NMC()
    learner.learn(Task(numbers.base), Run())
    classes, plain, hidden = examined(learner, numbers.novel, "long A", "instances 4x5", levels=(0.0, 0.5))
    values = [float(_means(one.supports, one.queries)) for one in drawn(numbers.novel, "long A")]
    assert classes.value == pytest.approx(mean(values).value)
    assert classes.interval == pytest.approx((max(0.0, mean(values).low), min(1.0, mean(values).high)))
    shown = drawn(numbers.novel, "instances 4x5")
    assert plain.value == 1 == mean([_nearest(one, one.queries) for one in shown]).value
    values = [_nearest(one, occluded(one.queries, k)) for k, one in enumerate(shown)]
    assert hidden.value == pytest.approx(mean(values).value)


def test_baselines_that_are_no_learners_see_the_same_episodes(numbers: World) -> None:
    probe = FewShotProtocol(configurations=("instances 4x5",), episodes=3, levels=(0.0, 0.5))
    learner = NMC()
    learner.learn(Task(numbers.base), Run())
    subject = Subject(learner.model, rows={"test": numbers.novel}, learner=learner)
    assert probe.findings(by_pixels, numbers.novel, Run(seed=3)) == probe.examine(subject, Run(seed=3))


def _nearest(one: Episode, queries: Table) -> float:
    """Accuracy of the nearest support image by the cosine of pixels."""
    shown = one.supports[0].concat(*one.supports[1:])
    q, bank = (rows.inputs["pixel_values"].flatten(1)[:, None] for rows in (queries, shown))
    place = torch.cosine_similarity(q, bank.transpose(0, 1), dim=2).argmax(1)
    return float((torch.as_tensor(shown.labels)[place] == queries.labels).double().mean())


@contextmanager
def inside(name: str) -> Iterator[Run]:
    """A run where the probe draws the episodes of a configuration."""
    run = Run(seed=3)
    with run.scope("few-shot", name), run.scope("episodes"):
        yield run


def drawn(novel: Table, name: str) -> list[Episode]:
    given: dict[str, Any] = {**asdict(CONFIGURATIONS[name]), "queries": 5, "count": 3}
    with inside(name) as run:
        return list(episodes(novel, seed=run.number("episodes"), **given))


def occluded(queries: Table, number: int) -> Table:
    with inside("instances 4x5") as run:
        draws = run.generator("damage", number)
    return Table({"pixel_values": occlude(queries.inputs["pixel_values"], 0.5, draws)}, queries.labels, queries.ids)


def _means(supports: tuple[Table, ...], queries: Table) -> torch.Tensor:
    """Accuracy of the nearest mean of pixels of unit length."""
    rows = supports[0].concat(*supports[1:])
    unit = [torch.nn.functional.normalize(t.inputs["pixel_values"].flatten(1).double(), dim=1) for t in (rows, queries)]
    labels = torch.as_tensor(rows.labels)
    means = torch.stack([unit[0][labels == c].mean(0) for c in range(20)])
    return (torch.cdist(unit[1], means).argmin(1) == queries.labels).double().mean()


def test_episodes_train_an_encoder_for_classes_that_come_later(learners: dict[str, Learner], numbers: World) -> None:
    untrained = proto_net(epochs=0)
    untrained.learn(Task(numbers.base), Run(seed=100))
    found = [examined(one, numbers.novel, "base", episodes=8)[0] for one in (learners["ProtoNet"], untrained)]
    assert found[0].value > found[1].value + 0.05


def test_the_curve_is_the_accuracy_by_order_of_arrival(learners: dict[str, Learner], numbers: World) -> None:
    tuned = examined(learners["PretrainTune"], numbers.novel, "long A", {"ways": 1, "shots": 2, "sets": 5})
    for finding, groups in zip(tuned, (4, 5), strict=True):
        curve = finding.curve["accuracy by arrival"]
        assert len(curve) == groups and sum(curve) / groups == pytest.approx(finding.value)
        assert curve[-1] > curve[0] + 0.2  # what came last is known best
    assert tuned[1].name == "accuracy, 1-way 2-shot x 5, change 1"


def test_all_sets_at_once_are_the_same_to_prototypes(learners: dict[str, Learner], numbers: World) -> None:
    apart, together = _apart_and_together(learners["ProtoNet"], numbers)
    assert together == pytest.approx(apart)


def test_all_sets_at_once_are_better_for_tuning(numbers: World) -> None:
    learner = pretrain_tune(steps=40)
    learner.learn(Task(numbers.base), Run(seed=100))
    apart, together = _apart_and_together(learner, numbers)
    assert together > apart + 0.1


def _apart_and_together(learner: Learner, numbers: World) -> tuple[float, float]:
    apart, together = (examined(learner, numbers.novel, "long A", together=how)[0].value for how in (False, True))
    return apart, together


def test_the_published_configurations() -> None:
    labels = {name: shape.labels for name, shape in CONFIGURATIONS.items()}
    assert [labels[name] for name in ("base", "long A", "new long A", "wide A", "wide B")] == [10, 20, 20, 20, 200]
    assert {labels[name] for name in labels if name.startswith("instances")} == {20}
    assert Configuration(1, 5, 4, instances=True).title == "1-way 5-shot x 4, instances"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"configurations": ("bose",)}, "unknown few-shot configuration 'bose'; did you mean 'base'"),
        ({"episodes": 1}, "an interval needs 2 episodes or more, not 1"),
        ({"damage": "blur", "configurations": ("instances 1x20",)}, "unknown kind of damage 'blur'"),
    ],
)
def test_what_cannot_be_examined_is_refused(settings: dict[str, Any], message: str, numbers: World) -> None:
    learner = NMC()
    learner.learn(Task(numbers.base), Run())
    subject = Subject(learner.model, rows={"test": numbers.novel}, learner=learner)
    with pytest.raises(EngramError, match=message):
        FewShotProtocol(**{"configurations": ("base",), "episodes": 2, **settings}).examine(subject)
    with pytest.raises(EngramError, match="asks for learner, test, which is not at hand"):
        FewShotProtocol().examine(Subject(learner.model))


def test_too_few_rows_are_said(numbers: World) -> None:
    learner = NMC()
    learner.learn(Task(numbers.base), Run())
    few = numbers.novel.of_classes(range(9))
    with pytest.raises(EngramError, match="an episode needs 10 classes with 12 rows each, and 9 of 9 have so many"):
        examined(learner, few, "base")
