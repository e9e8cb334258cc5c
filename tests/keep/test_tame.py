from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engram.core.learner import fork
from engram.data.streams import class_stream
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.predict import accuracy, predict
from engram.engine.run import Run
from engram.keep.tame import TAME, Monitor, smooth, threshold
from engram.models import load, save
from engram.testing import holds

FITTING: dict[str, Any] = {
    "network": {"name": "MLP", "hidden": [64]},
    "epochs": 10,
    "batch_size": 32,
    "window": 35,
    "selector_epochs": 60,
}


@pytest.fixture(scope="module")
def trained(digits: Any) -> TAME:
    """A learner of five pairs of classes, of which nobody told it where one ends."""
    learner, run = TAME(**FITTING), Run()
    for stage in class_stream(digits.train, digits.test, base=2, increment=2):
        learner.learn(stage.task, run)
    learner.refresh(run)
    return learner


def weights(learner: TAME, expert: int) -> list[Tensor]:
    return [p.detach().clone() for p in learner.routed.experts[expert].parameters()]


def unchanged(learner: TAME, expert: int, before: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(weights(learner, expert), before, strict=True))


def owners(learner: TAME, table: Table) -> Tensor:
    """The expert that has each row's class, [n]."""
    own = {name: k for k, row in enumerate(learner.routed.names.tolist()) for name in row}
    assert table.labels is not None
    return torch.tensor([own[label] for label in table.labels.tolist()])


def told(learner: TAME, table: Table, experts: Tensor) -> float:
    """Accuracy when the expert of each row is given."""
    with torch.no_grad():
        found = learner.model(**table.inputs, task=experts).logits.argmax(1)
    return float((found == table.labels).float().mean())


@holds("tame", 1)
def test_thresholds_and_smoothed_losses_by_hand() -> None:
    losses = [math.log(2), 0.5, 0.4, 0.4]
    assert np.mean(losses) == pytest.approx(0.49829, abs=1e-5)
    assert threshold(losses) == pytest.approx(0.85733, abs=1e-5)
    assert threshold([0.4, 0.4]) == pytest.approx(0.4 + 3 * 0.005)
    monitor = Monitor([], smoothed=0.5)
    found = []
    for loss in (0.4, 0.4, 1.2):
        monitor.watch(loss, 0.2)
        found.append(monitor.smoothed)
    assert found == pytest.approx([0.48, 0.464, 0.6112])
    assert smooth(None, 0.7, 0.2) == 0.7


@holds("tame", 2)
@pytest.mark.parametrize("window", [35, 100])
@pytest.mark.parametrize("seed", range(5))
def test_a_jump_is_noticed_at_once_and_a_falling_loss_is_not(window: int, seed: int) -> None:
    noise = np.random.default_rng(seed)
    falling = [0.313 + 0.38 * math.exp(-i / 20) + 0.01 * noise.standard_normal() for i in range(200)]
    monitor = Monitor([math.log(2)])
    for loss in falling:
        monitor.watch(loss, 0.2)
        monitor.threshold = threshold(monitor.losses)
        assert not monitor.alarmed
        monitor.accept(loss, window)
    assert len(monitor.losses) == window
    monitor.watch(0.9, 0.2)
    monitor.threshold = threshold(monitor.losses)
    assert monitor.alarmed and not monitor.fits(0.9, 0.2)


@holds("tame", 3)
@pytest.mark.parametrize("seed", range(5))
def test_a_stream_without_changes_needs_one_expert(digits: Any, seed: int) -> None:
    learner = TAME(**FITTING)
    learner.learn(Task(digits.train.of_classes([0, 1])), Run(seed=seed))
    assert len(learner.routed.experts) == 1


@holds("tame", 4)
def test_what_comes_back_goes_to_the_expert_that_had_it(digits: Any) -> None:
    learner, run = TAME(**{**FITTING, "epochs": 20}), Run()
    pairs = {name: digits.train.of_classes((2 * k, 2 * k + 1)) for k, name in enumerate("ABCD")}
    half = {name: len(table) // 2 for name, table in pairs.items()}
    parts = [
        pairs["A"],
        pairs["B"].take(range(half["B"])),
        pairs["C"],
        pairs["B"].take(range(half["B"], len(pairs["B"]))),
    ]
    active = []
    for table in [*parts, pairs["D"]]:
        learner.learn(Task(table), run)
        active.append(learner.bank.active)
    assert active == [0, 1, 2, 1, 3]
    assert len(learner.routed.experts) == 4


@holds("tame", 5)
def test_inactive_experts_stay_as_they_are(digits: Any) -> None:
    stages = class_stream(digits.train, digits.test, base=2, increment=2)
    learner, run = TAME(**FITTING), Run()
    learner.learn(stages[0].task, run)
    before, losses, tests = weights(learner, 0), list(learner.bank.monitors[0].losses), stages[0].test
    known = told(learner, tests, torch.zeros(len(tests), dtype=torch.long))
    for stage in stages[1:3]:
        learner.learn(stage.task, run)
    assert len(learner.routed.experts) == 3 and learner.bank.active == 2
    assert unchanged(learner, 0, before)
    assert learner.bank.monitors[0].losses == losses
    assert told(learner, tests, torch.zeros(len(tests), dtype=torch.long)) == known > 0.98


@holds("tame", 6)
def test_routing_is_what_is_lost(trained: TAME, digits: Any) -> None:
    oracle = told(trained, digits.test, owners(trained, digits.test))
    assert trained.routed.names.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert oracle >= accuracy(trained.model, digits.test) > 0.9
    draws = torch.Generator().manual_seed(0)
    guessed = np.mean(
        [told(trained, digits.test, torch.randint(5, (len(digits.test),), generator=draws)) for _ in range(20)]
    )
    assert guessed == pytest.approx(oracle / 5, abs=0.02)


def test_the_selector_is_rebuilt_to_the_same_bits(trained: TAME, tiny: Table) -> None:
    before = predict(trained.model, tiny)
    twin = fork(trained)
    for _ in range(2):
        twin.refresh(Run())
        assert torch.equal(predict(twin.model, tiny), before)


def test_saves_and_loads(trained: TAME, tiny: Table, tmp_path: Any) -> None:
    save(trained.model, tmp_path / "model")
    assert torch.equal(predict(load(tmp_path / "model"), tiny), predict(trained.model, tiny))


@pytest.mark.parametrize("sizes", [[32] * 12, [64, 224, 96], [384]])
def test_a_stream_that_is_cut_elsewhere_gives_the_same_bits(digits: Any, sizes: list[int]) -> None:
    stages = class_stream(digits.train, digits.test, base=2, increment=2)
    stream = stages[0].task.train.concat(*(stage.task.train for stage in stages[1:])).take(range(100, 484))
    whole, cut = (TAME(**{**FITTING, "epochs": 1, "selector_epochs": 2}) for _ in range(2))
    whole.learn(Task(stream.take(range(384))))
    run, start = Run(), 0
    for size in sizes:
        cut.learn(Task(stream.take(range(start, start + size))), run)
        start += size
        if size == 64:
            cut = fork(cut)
            cut.refresh(run)
    for learner in (whole, cut):
        learner.refresh()
    assert whole.bank.state_dict()["monitors"] == cut.bank.state_dict()["monitors"]
    assert torch.equal(predict(whole.model, digits.test), predict(cut.model, digits.test))


def test_rows_leave_the_buffer_and_the_moments(tiny: Table) -> None:
    learner = TAME.tiny()
    learner.learn(Task(tiny))
    held = learner.kept.holds(tiny.ids)
    assert held and any(state["state"] for state in learner.bank.moments())
    assert set(learner.drop(tiny.select(held))) == set(held)
    assert learner.kept.holds(tiny.ids) == () and learner.bank.moments() == []


def test_an_interrupted_training_goes_on_where_it_was(digits: Any, tmp_path: Any, monkeypatch: Any) -> None:
    """The third pair comes, an expert is made for it, the process dies in a later epoch; a new one ends with
    equal bits."""
    monkeypatch.setattr("engram.engine.fit.CHECKPOINT_EVERY", 0.0)
    stages = class_stream(digits.train, digits.test, base=2, increment=2)
    rows = stages[0].task.train.concat(*(stage.task.train for stage in stages[1:3]))

    def through(run: Run, dies: bool = False) -> TAME:
        learner = TAME(**{**FITTING, "selector_epochs": 2})
        if dies:
            whole = learner.batches
            monkeypatch.setattr(learner, "batches", lambda t, e, r: whole(t, e, r) if e < 7 else 1 / 0)
        learner.learn(Task(rows), run)
        learner.refresh(run)
        return learner

    calm = through(Run())
    with pytest.raises(ZeroDivisionError):
        through(Run(tmp_path / "run"), dies=True)
    resumed = through(Run(tmp_path / "run"))
    assert len(calm.routed.experts) > 1
    assert torch.equal(predict(calm.model, digits.test), predict(resumed.model, digits.test))
