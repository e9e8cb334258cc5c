"""Independent, Previous, Dynamic: a network for each task, what it starts from, and what all of it costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from engram.core.chronicle import curve, follow, mean_error
from engram.core.learner import fork
from engram.data.chronological import Dated
from engram.data.streams import chronological
from engram.data.table import MISSING, Table
from engram.data.task import Task
from engram.engine.cost import flops_of
from engram.engine.predict import accuracy, error_of, predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep import per_task
from engram.keep.dynamic import Dynamic, embedded
from engram.keep.independent import Independent
from engram.keep.per_task import PerTask
from engram.keep.previous import Previous
from engram.models.experts import Experts
from engram.models.heads import LinearHead
from engram.models.io import load, save
from engram.models.predictor import Predictor
from engram.reproduce.nevis22 import OWN, recurrence
from engram.testing import fingerprint, holds

NETWORK = {"name": "MLP", "hidden": [12]}
QUICK: dict[str, Any] = {
    "network": NETWORK, "epochs": 2, "trials": 2, "batch_size": 32, "lr": (1e-2, 1e-1), "validate_every": 5,
}  # fmt: skip
LEARNERS = [Independent, Previous, Dynamic]


@pytest.fixture(scope="module")
def events() -> list[Dated]:
    """Two tables, and digits as they are, turned, in pairs, and again; a quarter of the training rows."""
    wanted = {"iris", "wine", "digits", "turned digits", "pairs of digits", "digits again"}
    return [fewer(event) for event in chronological("sklearn") if event.name in wanted]


def fewer(event: Dated) -> Dated:
    task = event.task
    if len(task.train) < 500:
        return event
    few = Task(task.train.take(range(0, len(task.train), 4)), task.valid, task.index, task.classes, task.names)
    return Dated(few, event.test, event.name, event.year, event.kind, event.dev_test)


def weights(learner: PerTask, k: int) -> dict[str, Tensor]:
    return learner.experts.experts[k].state_dict()


# --- cost


@holds("nevis22", 1)
@pytest.mark.parametrize("cls", LEARNERS)
def test_cumulative_cost_never_falls(cls: type[PerTask], events: list[Dated]) -> None:
    run = Run()
    learner = cls(**QUICK)
    records = follow(learner, events, run)
    costs = [record.flops for record in records]
    assert costs[0] > 0 and costs == sorted(costs)
    assert costs[-1] == run.cost.flops == sum(c.searching + c.choosing for c in learner.choices)
    assert [cost for cost, _ in curve(records)] == costs and curve(records)[-1][1] == mean_error(records)


@holds("nevis22", 1)
def test_twice_as_many_trials_cost_twice_as_much(events: list[Dated]) -> None:
    one, two = (follow(Independent(**{**QUICK, "trials": n}), events)[-1].flops for n in (2, 4))
    assert two / one == pytest.approx(2, rel=0.01)


@holds("nevis22", 1)
def test_the_total_of_independent_knows_no_order(events: list[Dated]) -> None:
    """Nor does any of its networks, to the bit, or any error; those of Previous do."""
    forth, back = Independent(**QUICK), Independent(**QUICK)
    there, here = follow(forth, events), follow(back, events[::-1])
    assert there[-1].flops == here[-1].flops
    assert {r.name: r.error for r in there} == {r.name: r.error for r in here}
    last = len(events) - 1
    for k in range(len(events)):
        assert fingerprint(weights(forth, k)) == fingerprint(weights(back, last - k))
    other, opposite = (follow(Previous(**QUICK), order) for order in (events, events[::-1]))
    assert {r.name: r.error for r in other} != {r.name: r.error for r in opposite}


@pytest.mark.parametrize("cls", LEARNERS)
@pytest.mark.parametrize("network", [NETWORK, {"name": "ConvNet", "widths": [4, 8]}])
def test_what_is_counted_is_what_a_counter_over_everything_sees(
    cls: type[PerTask], network: dict[str, Any], events: list[Dated], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, validation and choice; but for what the count itself takes, of two rows."""
    tasks = [event.task for event in events if event.name in ("digits", "turned digits")]
    learner, run, probing = cls(**{**QUICK, "network": network}), Run(), []
    original = per_task._costs

    def probe(*given: Any) -> tuple[float, float]:
        found = original(*given)
        probing.append(2 * sum(found))
        return found

    monkeypatch.setattr(per_task, "_costs", probe)
    total = flops_of(lambda: [learner.learn(task, run) for task in tasks])
    assert run.cost.flops == total - sum(probing)


# --- resuming


class StoppedError(Exception):
    pass


@holds("nevis22", 2)
@pytest.mark.parametrize(("cls", "j"), [(Independent, 4), (Previous, 1), (Dynamic, 3)])
def test_a_course_that_is_interrupted_gives_the_same_records(
    cls: type[PerTask], j: int, events: list[Dated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm_learner = cls(**QUICK)
    calm = follow(calm_learner, events, Run(seed=4))
    learn = cls.learn

    def dies(self: PerTask, task: Task, run: Run | None = None) -> None:
        if len(self.choices) == j:
            raise StoppedError
        learn(self, task, run)

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(cls, "learn", dies)
        follow(cls(**QUICK), events, Run(tmp_path / "run", seed=4))
    learnt: list[int] = []
    monkeypatch.setattr(cls, "learn", lambda self, task, run: (learnt.append(task.index), learn(self, task, run))[1])
    resumed, again = cls(**QUICK), Run(tmp_path / "run", seed=4)
    assert follow(resumed, events, again) == calm
    assert learnt == [event.task.index for event in events[j:]]  # finished events are not learnt again
    assert fingerprint(resumed.state_dict()) == fingerprint(calm_learner.state_dict())
    assert again.cost.flops == calm[-1].flops


@holds("nevis22", 2)
def test_a_training_that_is_interrupted_goes_on_where_it_was(
    events: list[Dated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies in the second epoch of the second trial; what the first epochs cost is not forgotten."""
    monkeypatch.setattr("engram.engine.fit.CHECKPOINT_EVERY", 0.0)
    task = next(event.task for event in events if event.name == "digits")
    calm, run = Dynamic(**QUICK), Run(seed=1)
    calm.learn(task, run)
    original, calls = per_task.loss, []

    def dies(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 27:  # eight steps an epoch, and one row of the count
            raise StoppedError
        return original(*given)

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(per_task, "loss", dies)
        Dynamic(**QUICK).learn(task, Run(tmp_path / "run", seed=1))
    resumed, again = Dynamic(**QUICK), Run(tmp_path / "run", seed=1)
    resumed.learn(task, again)
    assert fingerprint(resumed.state_dict()) == fingerprint(calm.state_dict())
    assert again.cost.flops == run.cost.flops


# --- what a network starts from


@holds("nevis22", 4)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_task_that_comes_back_is_recognised_and_soon_learnt(seed: int) -> None:
    """B, A, B, A: after twenty updates Dynamic, from A's own state, is far ahead of a fresh start at equal cost."""
    choice, error = recurrence(Dynamic, seed)
    fresh, behind = recurrence(Independent, seed)
    assert choice.parent == OWN and fresh.parent is None
    assert choice.searching == fresh.searching  # the choice comes on top, and is told
    assert error < 0.15 and behind > error + 0.2


def test_previous_starts_from_the_last_network_that_reads_such_rows(events: list[Dated]) -> None:
    learner = Previous(**QUICK)
    follow(learner, events)
    assert [c.parent for c in learner.choices] == [None, 0, None, 2, 3, 4]
    # without any training, the backbone is the parent's to the bit, and the head is new
    still = Previous(**{**QUICK, "lr": (1e-30, 1e-30), "trials": 1})
    still.load_state_dict(learner.state_dict())
    still.learn(events[3].task)
    assert fingerprint(still.experts.experts[6].encoder.state_dict()) == fingerprint(  # type: ignore[union-attr]
        learner.experts.experts[5].encoder.state_dict()  # type: ignore[union-attr]
    )
    assert weights(still, 6)["head.weight"].shape == (10, 12)


def test_the_score_is_that_of_scikit_learns_neighbours(events: list[Dated]) -> None:
    learner = Dynamic(**QUICK)
    digits, turned = (next(e.task for e in events if e.name == name) for name in ("digits", "turned digits"))
    learner.learn(digits)
    job, run = learner._job(turned), Run()
    encoder = learner.experts.experts[0].encoder
    assert isinstance(encoder, nn.Module) and job.train.labels is not None
    bank, asked = embedded(encoder, job.train, run), embedded(encoder, job.dev, run)
    reference = KNeighborsClassifier().fit(bank.numpy(), job.train.labels.numpy())
    wanted = reference.score(asked.numpy(), np.asarray(job.dev.labels))
    assert learner.score(encoder, job.train, job.dev, job, run) == pytest.approx(wanted, abs=1e-12)
    assert torch.allclose(asked, predict(encoder, job.dev, "pooler_output"), atol=1e-6)


@pytest.mark.parametrize(
    ("scratch", "scores", "wanted"),
    [
        (True, [0.5, 0.7, 0.6], 9),
        (True, [0.5, 0.6, 0.7], None),
        (False, [0.5, 0.6, 0.7], 9),  # as published code has it
        (True, [0.6, 0.6, 0.6], 4),
    ],
)
def test_the_fresh_state_is_a_candidate(scratch: bool, scores: list[float], wanted: int | None) -> None:
    assert Dynamic(scratch=scratch).best([4, 9], scores) == wanted


def test_dynamic_starts_afresh_where_earlier_features_are_worse(events: list[Dated]) -> None:
    digits, turned = (next(e.task for e in events if e.name == name) for name in ("digits", "turned digits"))
    learner = Dynamic(**QUICK)
    learner.learn(digits)
    with torch.no_grad():
        for p in learner.experts.experts[0].encoder.parameters():  # type: ignore[union-attr]
            p.zero_()  # a ruined state
    learner.learn(turned)
    assert learner.choices[1].parent is None and len(learner.choices[1].scores) == 2
    own = Independent(**QUICK)
    own.learn(turned)
    assert fingerprint(weights(learner, 1)) == fingerprint(weights(own, 0))  # and is then an independent one


def test_batch_norms_take_the_statistics_of_the_batch_and_stay_as_they_are(events: list[Dated]) -> None:
    task = events[2].task
    learner = Dynamic(**{**QUICK, "network": {"name": "ConvNet", "widths": [4, 8]}})
    learner.learn(task)
    encoder = learner.experts.experts[0].encoder
    assert isinstance(encoder, nn.Module)
    before = fingerprint(encoder.state_dict())
    found = embedded(encoder, task.train.take(range(100)), Run())
    assert fingerprint(encoder.state_dict()) == before and not encoder.training
    twin = torch.nn.Module.train(fork(learner).model.experts[0].encoder)  # type: ignore[union-attr, index, arg-type]
    with torch.no_grad():
        wanted = twin(**task.train.batch(torch.arange(100)).inputs).pooler_output
    assert torch.allclose(found, wanted, atol=1e-6)
    assert bool(embedded(encoder, task.train.take([0]), Run()).isfinite().all())


# --- the search


def test_the_trial_whose_best_is_best_wins(events: list[Dated]) -> None:
    digits = events[2].task
    few, more = (Independent(**{**QUICK, "trials": n}) for n in (1, 4))
    for learner in (few, more):
        learner.learn(digits, Run(seed=2))
    assert more.choices[0].error <= few.choices[0].error
    assert digits.valid is not None
    assert error_of(more.model, digits.valid, digits.classes) == pytest.approx(more.choices[0].error)


def test_a_trial_that_diverges_is_paid_for_and_loses(events: list[Dated]) -> None:
    digits = events[2].task
    wild = {**QUICK, "epochs": 20, "trials": 1, "lr": (1e30, 1e30)}
    run = Run()
    with pytest.raises(EngramError, match="diverged"):
        Independent(**wild).learn(digits, run)
    assert run.cost.flops > 0


def test_no_more_updates_than_allowed(events: list[Dated]) -> None:
    for most, wanted in ((3, 3), (11, 11), (10_000, 2 * 8)):
        run = Run()
        Independent(**{**QUICK, "trials": 1, "max_steps": most}).learn(events[2].task, run)
        assert run.cost.steps == wanted


# --- who answers


def rows(scores: Sequence[Sequence[float]], classes: Sequence[int], several: bool = False) -> Predictor:
    """A predictor that says these logits of rows that are one-hot."""
    encoder = _identity(len(scores))
    head = LinearHead(len(scores))
    head.set(list(classes), torch.tensor(scores).T, torch.zeros(len(classes)))
    return Predictor(encoder, head)


def _identity(width: int) -> nn.Module:
    from engram.models.encoders import Identity

    return Identity(width)


def test_the_most_confident_network_answers_with_confidence_normalised() -> None:
    """p = 0.6 of two classes is less (0.2) than 0.5 of ten (0.44)."""
    two = rows([[float(np.log(0.6)), float(np.log(0.4))]], (0, 1))
    ten = rows([[float(np.log(0.5)), *[float(np.log(0.5 / 9))] * 9]], range(2, 12))
    model = Experts([two, ten], [{"values": (1,)}] * 2, [False, False])
    logits = model(values=torch.ones(1, 1)).logits[0].tolist()
    assert max(range(12), key=lambda c: logits[c]) == 2
    assert logits[0] == pytest.approx(float(np.log(0.2)), abs=1e-6)
    assert logits[2] == pytest.approx(float(np.log((0.5 - 0.1) / 0.9)), abs=1e-6)
    assert logits[0] - logits[1] == pytest.approx(float(np.log(0.6 / 0.4)), abs=1e-5)
    told = model(values=torch.ones(1, 1), task=torch.tensor([0])).logits[0].tolist()
    assert set(told[2:]) == {-np.inf} and told[0] == pytest.approx(float(np.log(0.6)))


def test_certain_networks_are_still_told_apart() -> None:
    """Both say 1.0 in float32."""
    sure, surer = rows([[20.0, 0.0]], (0, 1)), rows([[24.0, 0.0]], (2, 3))
    model = Experts([sure, surer], [{"values": (1,)}] * 2, [False, False])
    assert int(model(values=torch.ones(1, 1)).logits.argmax()) == 2


def test_several_labels_rank_rows_and_never_win() -> None:
    one = rows([[0.0, 0.0], [0.0, 0.0]], (0, 1))
    many = rows([[50.0, -3.0], [-3.0, 50.0]], (2, 3), several=True)
    model = Experts([one, many], [{"values": (2,)}] * 2, [False, True])
    logits = model(values=torch.eye(2)).logits
    assert bool((logits.argmax(1) < 2).all())
    assert bool((logits[:, 2].argsort() == torch.tensor([1, 0])).all())
    assert error_of(model, Table({"values": torch.eye(2)}, torch.eye(2)), (2, 3)) == 0.0


def test_one_network_alone_is_itself(events: list[Dated]) -> None:
    learner = Independent(**QUICK)
    learner.learn(events[2].task)
    test = events[2].test
    alone, joint = predict(learner.experts.experts[0], test), predict(learner.model, test)
    columns = list(events[2].task.classes)
    assert torch.allclose(alone[:, columns].softmax(1), joint[:, columns].softmax(1), atol=1e-6)


def test_nothing_is_forgotten(events: list[Dated]) -> None:
    """Among its own classes a task is told after the stream as it was after the task itself."""
    learner = Previous(**QUICK)
    records = follow(learner, events[:5])
    later = [error_of(learner.model, event.dev_test, event.task.classes) for event in events[:5]]
    assert later == pytest.approx([record.error for record in records], abs=1e-12)


def test_a_task_that_comes_back_is_answered_by_its_newest_network(events: list[Dated]) -> None:
    learner = Dynamic(**QUICK)
    follow(learner, events)
    shape = {"pixel_values": (1, 8, 8)}
    assert learner.experts.readers(shape) == [2, 3, 4, 5] and learner.experts.answering(shape) == [3, 4, 5]


def test_networks_of_several_kinds_of_rows_are_saved_and_loaded(events: list[Dated], tmp_path: Path) -> None:
    network = {"pixel_values": {"name": "ConvNet", "widths": [4]}, "values": NETWORK}
    learner = Dynamic(**{**QUICK, "network": network})
    follow(learner, events)
    save(learner.model, tmp_path / "model")
    again = load(tmp_path / "model")
    for event in events:
        assert torch.equal(predict(again, event.test), predict(learner.model, event.test))
    with pytest.raises(EngramError, match="no expert reads"):
        learner.model(values=torch.zeros(1, 3))
    with pytest.raises(EngramError, match="networks for pixel_values"):
        Dynamic(**{**QUICK, "network": {"pixel_values": network["pixel_values"]}}).learn(events[0].task)


def test_retired_classes_are_told_no_more(events: list[Dated]) -> None:
    learner = Independent(**QUICK)
    learner.learn(events[2].task)
    gone = events[2].task.classes[3]
    learner.experts.retire([gone])
    assert not bool((predict(learner.model, events[2].test).argmax(1) == gone).any())


def test_a_pretrained_network_is_what_each_task_starts_from(events: list[Dated], tmp_path: Path) -> None:
    first = Independent(**QUICK)
    first.learn(events[2].task)
    save(first.experts.experts[0], tmp_path / "pretrained")
    learner = Independent(**{**QUICK, "network": str(tmp_path / "pretrained"), "lr": (1e-30, 1e-30)})
    learner.learn(events[3].task)
    for name, value in weights(first, 0).items():
        if name.startswith("encoder"):
            assert torch.equal(weights(learner, 0)[name], value)


# --- odd tasks


def test_rows_without_labels_do_not_count(events: list[Dated]) -> None:
    task = events[0].task
    assert task.train.labels is not None
    blank = Table(
        task.train.inputs, torch.full_like(task.train.labels, MISSING), tuple(f"u{k}" for k in task.train.ids)
    )
    more = Task(task.train.concat(blank), task.valid, 0, task.classes)
    one, other = Independent(**QUICK), Independent(**QUICK)
    one.learn(task)
    other.learn(more)
    assert fingerprint(weights(one, 0)) == fingerprint(weights(other, 0))
    assert other.holds(["ua", *blank.ids[:2]]) == blank.ids[:2]


def test_without_dev_rows_some_are_held_out(events: list[Dated]) -> None:
    task = events[2].task
    learner = Independent(**QUICK)
    job = learner._job(Task(task.train, None, 0, task.classes))
    assert len(job.dev) == pytest.approx(0.15 * len(task.train), abs=6)
    assert not set(job.dev.ids) & set(job.train.ids)
    lone = learner._job(Task(task.train.take([0]), None, 0))
    assert lone.train.ids == lone.dev.ids


@pytest.mark.parametrize("cls", LEARNERS)
def test_what_cannot_be_learnt_is_refused(cls: type[PerTask], events: list[Dated]) -> None:
    values = torch.linspace(-1, 1, 16).view(8, 2)
    with pytest.raises(EngramError, match="target"):
        cls(**QUICK).learn(Task(Table({"values": values}, values)))
    with pytest.raises(EngramError, match="2 labels each, and the task names 0 classes"):
        cls(**QUICK).learn(Task(Table({"values": values}, torch.ones(8, 2))))
    with pytest.raises(EngramError, match="trials"):
        cls(**{**QUICK, "trials": 0}).learn(events[0].task)


def test_digits_in_pairs_without_task_labels(digits: Any) -> None:
    """Without task labels it is far above chance, and below what the task makes of it."""
    from engram.data.streams import class_stream

    stages = class_stream(digits.train, digits.test, base=2, increment=2)
    learner = Independent(network={"name": "MLP", "hidden": [32]}, epochs=5, trials=2, batch_size=32, lr=(0.05, 0.1))
    for stage in stages:
        learner.learn(stage.task)
    aware = np.mean([accuracy(learner.model, s.test, classes=s.task.classes) for s in stages])
    free = accuracy(learner.model, digits.test)
    assert aware > 0.95 and 0.3 < free < aware
