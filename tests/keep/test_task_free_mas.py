from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from tests.keep.halves import halves, same, weights

from engram.core.learner import fork
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.importance import importance
from engram.engine.predict import accuracy, predict
from engram.engine.run import Run
from engram.keep.replay import share
from engram.keep.task_free_mas import Plateaus, TaskFreeMAS

NETWORK: dict[str, Any] = {"name": "MLP", "hidden": [32]}
EAGER: dict[str, Any] = {"network": NETWORK, "batch_size": 10, "buffer": 12, "window": 2, "plateau_mean": 100.0}
ALWAYS: dict[str, Any] = {**EAGER, "plateau_variance": 100.0}


def whole(table: Table) -> Task:
    return Task(table, classes=tuple(range(10)))


def plateaus_of(losses: list[float], length: int, mean: float, variance: float) -> list[int]:
    """Where a plateau is used, decided anew at each loss from all before it."""
    found: list[int] = []
    for now in range(length - 1, len(losses)):
        window = losses[now - length + 1 : now + 1]
        settled = np.mean(window) < mean and np.var(window) < variance
        if not found:
            risen = True
        else:
            base = losses[found[-1] - length + 1 : found[-1] + 1]
            later = range(found[-1] + 1, now + 1)
            limit = np.mean(base) + np.std(base)
            risen = any(np.mean(losses[max(0, k - length + 1) : k + 1]) > limit for k in later)
        if settled and risen:
            found.append(now)
    return found


def test_plateaus_and_peaks_on_a_worked_course() -> None:
    """It falls and settles (the window of losses 2 to 4), stays, rises at a change, and settles again (8 to 10)."""
    course = [2.0, 1.0, 0.3, 0.2, 0.1, 0.1, 0.1, 3.0, 0.4, 0.2, 0.1, 0.1]
    watched = Plateaus(3, mean=0.5, variance=0.1)
    assert [k for k, loss in enumerate(course) if watched.watch(loss)] == [4, 10]
    assert watched.count == 2 and watched.last == [pytest.approx(0.7 / 3), pytest.approx(np.std([0.4, 0.2, 0.1]))]


@pytest.mark.parametrize(("mean", "variance"), [(0.19, 1.0), (1.0, 0.006)])
def test_both_mean_and_variance_have_to_be_low(mean: float, variance: float) -> None:
    losses = [0.3, 0.2, 0.1]  # mean 0.2, variance 0.00667
    assert not any(map(Plateaus(3, mean, variance).watch, losses))
    assert [Plateaus(3, 0.21, 0.007).watch(loss) for loss in losses[:2]] == [False, False]
    watched = Plateaus(3, 0.21, 0.007)
    assert [watched.watch(loss) for loss in losses] == [False, False, True]


@given(some.lists(some.floats(0, 2), min_size=1, max_size=40), some.integers(1, 5))
def test_plateaus_by_looking_back(losses: list[float], length: int) -> None:
    watched = Plateaus(length, 0.9, 0.3)
    assert [k for k, loss in enumerate(losses) if watched.watch(loss)] == plateaus_of(losses, length, 0.9, 0.3)


def test_the_buffer_holds_the_hardest_rows(tiny: Table) -> None:
    learner = TaskFreeMAS(network=NETWORK, buffer=12)
    learner.learn(whole(tiny.take(range(0, 60, 3))))
    before = set(learner.kept.table.ids)
    rows = tiny.take(range(1, 60, 4)).without(before)
    candidates = learner.kept.table.concat(rows)
    losses = dict(zip(candidates.ids, predict(learner.model, candidates, "loss").tolist(), strict=True))
    learner.keep_hardest(rows)
    assert len(learner.kept) == 12
    left = [losses[id] for id in candidates.ids if id not in learner.kept.table.ids]
    assert min(losses[id] for id in learner.kept.table.ids) >= max(left)
    learner.keep_hardest(learner.kept.table.take(range(5)))
    assert len(set(learner.kept.table.ids)) == 12


def test_importances_are_the_running_mean_over_updates(tiny: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = TaskFreeMAS(**EAGER, plateau_variance=0.0)  # no plateau of its own
    learner.learn(whole(tiny))
    assert not any(omega.any() for omega in learner.importances.values.values()) and not learner.pull
    assert {name: omega.shape for name, omega in learner.importances.values.items()} == shapes(learner)
    found = []
    for count in (1, 2, 3):
        learner.plateaus.count = count
        with torch.no_grad():
            learner.model.encoder.layers[0][0].weight.mul_(1.1)  # type: ignore[union-attr,index]
        found.append(importance(learner.model, learner.kept.table, loss="norm", power=1))
        learner.consolidate()
    for name, omega in learner.importances.values.items():
        torch.testing.assert_close(omega, torch.stack([each[name] for each in found]).mean(0))
    assert all(torch.equal(value, learner.anchor.values[name]) for name, value in weights(learner).items())
    assert learner.importances.holds(tiny.ids) == learner.kept.holds(tiny.ids)


def shapes(learner: TaskFreeMAS) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in learner.model.named_parameters()}


def test_the_loss_written_down(tiny: Table) -> None:
    learner = TaskFreeMAS(**ALWAYS, strength=0.7)
    learner.learn(whole(tiny))
    learner._aim()
    with torch.no_grad():
        for p in learner.model.parameters():
            p.add_(0.05)
    new, old = (share(tiny.take(rows), Run()) for rows in (range(8), range(20, 30)))
    found = learner.step((new, old), whole(tiny)).value
    wanted = 0.0
    for batch in (new, old):
        logits = learner.model(**batch.inputs).logits.detach()
        assert batch.labels is not None
        wanted -= logits.log_softmax(1)[torch.arange(len(batch)), batch.labels].mean().item()
    for name, p in learner.model.named_parameters():
        omega, goal = learner.importances.values[name], learner.anchor.values[name]
        wanted += 0.35 * (omega * (p - goal).square()).sum().item()
    assert found.item() == pytest.approx(wanted, rel=1e-5)


def test_each_batch_is_trained_on_with_the_buffer_some_times_over(tiny: Table) -> None:
    learner, run = TaskFreeMAS(**ALWAYS, iterations=3), Run()
    learner.learn(whole(tiny), run)
    second = halves(tiny)[1]
    pairs = list(learner.batches(second, 1, run))
    assert [len(new) for new, _ in pairs] == [10] * 9
    for new, old in pairs:
        assert old is not None and not _rows(new) & _rows(old)
    first = list(learner.batches(second, 0, run))
    assert torch.cat([new.rows for new, _ in first[::3]]).tolist() == list(range(10)) * 3  # numbered in their batch
    ordered = torch.cat([new.inputs["pixel_values"] for new, _ in first[::3]])
    assert torch.equal(ordered, second.train.inputs["pixel_values"])


def _rows(batch: Any) -> set[str]:
    return {str(row.tolist()) for row in batch.inputs["pixel_values"]}


def test_where_the_stream_is_cut_does_not_matter(tiny: Table) -> None:
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    table = tiny.take(order)
    one, other = TaskFreeMAS(**ALWAYS), TaskFreeMAS(**ALWAYS)
    one.learn(whole(table), Run())
    run = Run()
    for part in (range(10), range(10, 40), range(40, 60)):
        other.learn(whole(table.take(part)), run)
    assert same(one, other) and one.plateaus.count
    assert one.kept.table.ids == other.kept.table.ids and one.plateaus.state_dict() == other.plateaus.state_dict()


def test_the_head_may_grow_while_it_holds(tiny: Table) -> None:
    learner = TaskFreeMAS(**ALWAYS)
    for task in halves(tiny):
        learner.learn(task)
    learner._aim()
    assert all(learner.pull[name].shape == p.shape for name, p in learner.model.named_parameters())
    assert learner.plateaus.count > 1


def test_rows_that_were_dropped_are_not_taught_back_by_the_anchor(tiny: Table) -> None:
    learner = TaskFreeMAS(**ALWAYS)
    learner.learn(whole(tiny))
    assert learner.anchor.values
    learner.drop(learner.kept.table)
    assert not learner.anchor.values and not len(learner.kept)
    with torch.no_grad():
        for p in learner.model.parameters():
            p.zero_()
    learner.start(whole(tiny), Run())
    assert all(bool((value == 0).all()) for value in learner.anchor.values.values())


def other_pixels(table: Table) -> Table:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    pixels = table.inputs["pixel_values"].flatten(1)[:, order].reshape(-1, 1, 8, 8)
    return replace(table, inputs={"pixel_values": pixels}, ids=tuple(f"other {id}" for id in table.ids))


def test_it_notices_that_the_pixels_changed_and_forgets_less(digits: Any) -> None:
    """Digits, then digits with permuted pixels, in one stream; and the same without the penalty."""
    stream = digits.train.concat(other_pixels(digits.train))
    kept = []
    for strength in (2.0, 0.0):
        learner = TaskFreeMAS(network={"name": "MLP", "hidden": [64]}, strength=strength)
        learner.learn(whole(stream), Run(seed=1))
        kept.append(accuracy(learner.model, digits.test))
    assert kept[0] > kept[1] + 0.1


def test_a_copy_goes_on_learning_the_same(tiny: Table) -> None:
    learner = TaskFreeMAS.tiny()
    first, second = halves(tiny)
    learner.learn(first)
    twin = fork(learner)
    for each in (learner, twin):
        each.learn(second)
    assert same(learner, twin) and learner.kept.table.ids == twin.kept.table.ids  # type: ignore[attr-defined]
