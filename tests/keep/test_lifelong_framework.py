from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.keep.halves import NEW, OLD, halves, weights
from torch import Tensor

from engram.core.learner import Forgetful, fork
from engram.core.request import Request
from engram.core.settings import describe, make
from engram.data.table import MISSING, Table
from engram.data.task import Task
from engram.engine.optimizer import Optimizer
from engram.engine.predict import accuracy, predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep import lifelong_framework
from engram.keep.finetune import Finetune
from engram.keep.lifelong_framework import LifelongFramework
from engram.keep.policies import FREE, FROZEN, HELD, KEEP, POLICIES, Policy, Step, policy_of
from engram.reproduce import lifelong_framework as claims
from engram.testing import holds

SMALL: dict[str, Any] = {"network": {"name": "MLP", "hidden": [12, 8]}, "epochs": 3, "batch_size": 16}
RESTLESS = Optimizer("sgd", lr=0.05, weight_decay=0.1)  # momentum and decay would move what is only given no gradient
ALL_FREE, ALL_FROZEN = Policy((Step({"all": FREE}),), columns=1), Policy((Step({"all": FROZEN}),))


def learnt(policy: Any, *tables: Table, run: Run | None = None, **settings: Any) -> LifelongFramework:
    """A learner that has taken in these tables as tasks."""
    learner, run = LifelongFramework(policy=policy, **{**SMALL, **settings}), run or Run()
    for index, table in enumerate(tables):
        learner.learn(Task(table, index=index, classes=table.classes), run)
    return learner


def further(learner: LifelongFramework, table: Table) -> LifelongFramework:
    """A copy of the learner that has taken in one more task."""
    twin = fork(learner)
    assert isinstance(twin, LifelongFramework)
    twin.learn(Task(table, index=len(learner.births), classes=table.classes), Run(seed=1))
    return twin


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The names of weights that are not what they were."""
    return {name for name, p in before.items() if not torch.equal(p, after[name])}


# --- what b does


@holds("lifelong-framework", 1)
@pytest.mark.parametrize("policy", ["no forgetting", "forward transfer", "few-shot"])
def test_what_is_frozen_keeps_its_bits(tiny: Table, policy: str) -> None:
    first, second = (task.train for task in halves(tiny))
    learner = learnt(policy, first, optimizer=RESTLESS)
    twin = further(learner, second)
    assert changed(weights(learner), weights(twin)) == set()
    assert torch.equal(predict(learner.model, tiny)[:, OLD], predict(twin.model, tiny)[:, OLD])
    assert twin.columns.classes == [*OLD, *NEW]


@holds("lifelong-framework", 2)
def test_all_free_is_fine_tuning_step_for_step(tiny: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a loop of its own over a network of its own, after every update of the second task."""
    first, second = (task.train for task in halves(tiny))
    learner, seen = learnt(ALL_FREE, first), []

    class Spy(lifelong_framework.Pull):
        def __call__(self, update: int) -> None:
            super().__call__(update)
            seen.append(weights(learner))

    plan = Optimizer("sgd", lr=0.05, momentum=0.9, weight_decay=0.01)
    learner.optimizer = plan
    monkeypatch.setattr(lifelong_framework, "Pull", Spy)
    start = further_begun(learner, second)
    own = {name: p.clone().requires_grad_(True) for name, p in start.items()}
    optimizer = torch.optim.SGD(own.values(), 0.05, 0.9, weight_decay=0.01)
    learner.learn(Task(second, index=1, classes=NEW), Run(seed=1))
    order = Order(Run(seed=1))
    for k, wanted in enumerate(seen):
        batch = order.batch(second, k)
        h = batch.inputs["pixel_values"].flatten(1)
        for layer in (0, 1):
            h = F.relu(F.linear(h, own[f"blocks.0.layers.{layer}.weight"], own[f"blocks.0.layers.{layer}.bias"]))
        said = [F.linear(h, own[f"blocks.0.heads.{c}.weight"], own[f"blocks.0.heads.{c}.bias"]) for c in NEW]
        optimizer.zero_grad()
        F.cross_entropy(torch.cat(said, 1), batch.labels - 5).backward()
        optimizer.step()
        assert all(torch.allclose(own[name], p, atol=1e-6) for name, p in wanted.items())
    assert len(seen) == 6 and changed(start, seen[-1])


class Order:
    """The batches of a task's only training in a run."""

    def __init__(self, run: Run) -> None:
        with run.scope("learn"), run.scope("fit"):
            self.seed = run.number("order")

    def batch(self, rows: Table, update: int) -> Any:
        each = -(-len(rows) // SMALL["batch_size"])
        epoch, k = divmod(update, each)
        return list(rows.batches(SMALL["batch_size"], seed=self.seed, epoch=epoch))[k]


def further_begun(learner: LifelongFramework, rows: Table) -> dict[str, Tensor]:
    """The weights with which a further task begins."""
    twin = fork(learner)
    assert isinstance(twin, LifelongFramework)
    run = Run(seed=1)
    with run.scope("learn"):
        twin.begin(rows, run)
    return weights(twin)


@holds("lifelong-framework", 2)
def test_all_frozen_changes_nothing(tiny: Table) -> None:
    first, second = (task.train for task in halves(tiny))
    learner = learnt(ALL_FROZEN, first, optimizer=RESTLESS)
    begun = further_begun(learner, second)
    assert changed(begun, weights(further(learner, second))) == set()
    free = replace(ALL_FROZEN, steps=(Step({"all": FREE}),))
    learner.plan = free
    twin = LifelongFramework(policy=free, **SMALL)
    twin.load_state_dict(learner.state_dict())
    assert changed(begun, weights(further(twin, second)))


@holds("lifelong-framework", 3)
@pytest.mark.parametrize("b", [1e-6, 0.3, 2.0, 1e9])
def test_a_group_comes_to_rest_between_the_loss_and_its_target(
    tiny: Table, b: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is (theta - a)² over every weight; each rests at (a + b target) / (1 + b)."""
    learner = learnt(Policy((Step({"all": b}),)), tiny.of_classes([0]), epochs=0)
    before, a = weights(learner), 0.7

    def loss(batch: Any, among: Any) -> Any:
        return lifelong_framework.Mean.of(
            torch.stack([(p - a).square().sum() for p in learner.model.parameters()]).sum()
        )

    monkeypatch.setattr(learner, "loss", loss)
    learner.epochs, learner.optimizer = 300, Optimizer("sgd", lr=0.03, momentum=0.5)
    learner.train(learner.plan.steps[0], tiny.of_classes([0]), Run())
    for name, p in weights(learner).items():
        assert torch.allclose(p, (a + b * before[name]) / (1 + b), atol=1e-4)


def test_what_shall_vanish_is_pulled_to_zero(tiny: Table) -> None:
    first = tiny.of_classes(OLD)
    learner = learnt(Policy((Step({"all": 1e9, "head": FROZEN}, to_zero="top"),)), first)
    after, never = weights(learner), weights(learnt(ALL_FROZEN, first))
    assert float(after["blocks.0.layers.1.weight"].abs().max()) < 1e-6
    assert torch.allclose(after["blocks.0.layers.0.weight"], never["blocks.0.layers.0.weight"], atol=1e-6)


# --- the skills


@holds("lifelong-framework", 4)
def test_no_forgetting_forgets_nothing_and_fine_tuning_much() -> None:
    plan = LifelongFramework().optimizer
    kept, tuned = (
        claims.pairs("no forgetting", 0),
        claims.along(Finetune(network=claims.NETWORK, optimizer=plan), 0),
    )
    assert kept.forgotten == 0.0 and kept.learnt > 0.95
    assert tuned.forgotten > 0.15


@holds("lifelong-framework", 4)
def test_blocks_grow_only_where_the_error_is_too_large(tiny: Table) -> None:
    """Labels at random cannot be learnt in an epoch; every error is below 1."""
    nonsense = tiny.with_labels(torch.randint(2, (60,), generator=torch.Generator().manual_seed(0)))
    grown = learnt("no forgetting", nonsense, epochs=1, units=3, expansions=2, tolerated=0.0)
    assert grown.births[0].widened == 6 and grown.columns.columns[0].hidden == [18, 14]
    content = learnt("no forgetting", nonsense, epochs=1, units=3, tolerated=1.0)
    assert content.births[0].widened == 0
    easy = learnt("no forgetting", tiny.of_classes([0, 1]), epochs=20, units=3, tolerated=0.05)
    assert easy.births[0].widened == 0 and accuracy(easy.model, tiny.of_classes([0, 1])) > 0.95
    assert learnt("few-shot", nonsense, epochs=1, tolerated=0.0).births[0].widened == 0


@holds("lifelong-framework", 5)
def test_a_copied_block_learns_from_few_rows() -> None:
    found = [claims.few_shot(seed) for seed in range(5)]
    assert sum(one.similar - one.scratch for one in found) / 5 > 0.05
    assert sum(one.dissimilar - one.scratch for one in found) / 5 >= -0.03


@holds("lifelong-framework", 6)
def test_confusion_is_halved_and_others_stay() -> None:
    found = claims.repair(0)
    assert found.left < 0.5 and found.lost < 0.02


@holds("lifelong-framework", 6)
def test_a_named_task_goes_and_others_stay() -> None:
    found = claims.letting_go(0)
    assert found.left == 0.0 and found.lost < 0.02 and found.freed == 64


def test_the_source_is_the_block_that_tells_the_new_rows_best(digits: Any) -> None:
    """Blocks of other rows of the same digits, and of the digits with pixels in another order."""
    half, other = (digits.train.take(range(k, len(digits.train), 2)) for k in (0, 1))
    for tables, source in (((half, claims.reordered(half)), 0), ((claims.reordered(half), half), 1)):
        learner = learnt("forward transfer", *tables, network=claims.NETWORK, epochs=6)
        learner = further(learner, claims.renamed(other.take(range(100))))
        birth = learner.births[2]
        assert birth.source == source and birth.errors[source] < birth.errors[1 - source]
        link = learner.columns.columns[2].sources
        assert link == [source]


def test_a_copy_begins_where_its_source_is_and_is_held(tiny: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LifelongFramework, "similarity", lambda self, rows, run: (0.1, 0.9))
    learner = learnt("few-shot", tiny.of_classes(OLD))
    begun = further_begun(learner, tiny.of_classes(NEW))
    assert torch.equal(begun["blocks.1.layers.0.weight"], begun["blocks.0.layers.0.weight"])
    moved = []
    for b in (0.0, 0.1, 10.0):
        learner.plan = Policy((Step({"all": FROZEN, "new": FREE, "copied": b}),), start="copy")
        after = weights(_with_plan(learner, tiny.of_classes(NEW)))
        moved.append(float((after["blocks.1.layers.0.weight"] - begun["blocks.1.layers.0.weight"]).norm()))
    assert moved[0] > moved[1] > moved[2] > 0


def _with_plan(learner: LifelongFramework, rows: Table) -> LifelongFramework:
    twin = LifelongFramework(policy=learner.plan, **SMALL)
    twin.load_state_dict(learner.state_dict())
    twin.learn(Task(rows, index=1, classes=rows.classes), Run(seed=1))
    return twin


def test_a_source_has_to_be_clearly_better_than_none(tiny: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two standard deviations of an error of 0.5 among 30 rows are 0.183."""
    for error, source in ((0.6, None), (0.33, None), (0.31, 0)):
        monkeypatch.setattr(LifelongFramework, "similarity", lambda self, rows, run, error=error: (error, 0.5))
        learner = learnt("few-shot", tiny.of_classes(OLD), tiny.of_classes(NEW), epochs=1)
        assert learner.births[1].source == source and learner.births[1].errors == (error, 0.5)


def test_backward_transfer_reaches_the_source_by_links_in_rehearsal(
    tiny: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LifelongFramework, "similarity", lambda self, rows, run: (0.1, 0.9))
    learner = learnt("backward transfer", tiny.of_classes(OLD))
    twin = further(learner, tiny.of_classes(NEW))
    assert twin.columns.columns[0].sources == [1]
    assert bool(twin.model.get_parameter("blocks.0.links.1.0.weight").any())
    moved = changed(weights(learner), weights(twin))
    assert "blocks.0.layers.0.weight" in moved and "blocks.0.heads.3.weight" in moved
    assert set(twin.kept.table.classes) == set(range(10))


def test_only_policies_that_rehearse_keep_rows_and_few(digits: Any) -> None:
    few = digits.train.take(range(0, len(digits.train), 3))
    parts = few.of_classes([0, 1, 2]), few.of_classes([3, 4])
    assert len(learnt("no forgetting", *parts, epochs=1).kept) == 0
    kept = learnt("overall refinement", *parts, epochs=1, rehearsed=4).kept.table
    assert torch.bincount(torch.as_tensor(kept.labels)).tolist() == [4] * 5


def test_confusions_are_pairs_that_are_mistaken_often(tiny: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learnt("confusion reduction", tiny.of_classes(OLD), confused=0.2)
    told = torch.as_tensor(learner.kept.table.labels).clone()
    told[(told == 3).nonzero()[:2, 0]] = 4  # two rows of six
    told[(told == 1).nonzero()[:1, 0]] = 0  # one of six
    monkeypatch.setattr(lifelong_framework, "predict", lambda *_: F.one_hot(told, 5).float())
    assert learner.confusions() == [(3, 4)]


def test_only_confused_heads_and_their_top_layers_are_mended(tiny: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learnt(claims.UNREPAIRED, tiny.of_classes(OLD), tiny.of_classes([5, 6]))
    before = weights(learner)
    monkeypatch.setattr(learner, "confusions", lambda: [(3, 4)])
    learner.follow(POLICIES["confusion reduction"].steps[1], tiny.of_classes([5, 6]), Run())
    parts = ("layers.1", "heads.3", "heads.4")
    assert changed(before, weights(learner)) == {
        f"blocks.0.{part}.{name}" for part in parts for name in ("weight", "bias")
    }


# --- importance, and human oddities


def test_rain_man_recalls_everything_and_makes_no_new_features(tiny: Table) -> None:
    pairs = [tiny.of_classes([c, c + 1]) for c in (0, 2, 4)]
    learner = learnt("rain man", pairs[0])
    twin = further(further(learner, pairs[1]), pairs[2])
    assert len(twin.columns.columns) == 1 and changed(weights(learner), weights(twin)) == set()
    assert torch.equal(predict(learner.model, tiny), predict(twin.model, tiny)[:, :2])
    assert {b for name, b in twin.held.values.items()} == {math.inf}


def test_memory_fades_and_without_sleep_nothing_is_held(tiny: Table) -> None:
    pairs = [tiny.of_classes([c, c + 1]) for c in (0, 2, 4)]
    held = learnt("memory loss", *pairs).held.values
    assert held["blocks.0.layers.0"] == pytest.approx(3.0 * 0.1**2)
    assert held["blocks.0.heads.2"] == pytest.approx(0.3) and held["blocks.0.heads.5"] == pytest.approx(3.0)
    assert set(learnt("sleep deprivation", *pairs).held.values.values()) == {0.0}
    free = learnt("learn", *pairs)
    assert changed(weights(free), weights(learnt("sleep deprivation", *pairs))) == set()


def test_importance_raises_b_by_use(tiny: Table) -> None:
    """By the mean of squared gradients of each row's loss, one row after the other."""
    first = tiny.of_classes([0, 1])
    learner = learnt("retention", first)
    sums = dict.fromkeys(learner.held.values, 0.0)
    for row in range(len(first)):
        learner.model.zero_grad()
        batch = first.batch(torch.tensor([row]))
        assert batch.labels is not None
        F.cross_entropy(learner.model(**batch.inputs).logits, batch.labels).backward()
        for group in learner.columns.groups():
            grads = [p.grad.double().square().mean() for p in learner.columns.weights(group) if p.grad is not None]
            sums[group.name] += float(torch.stack(grads).mean()) / len(first)
    assert {name: 3 * value for name, value in sums.items()} == pytest.approx(learner.held.values, rel=1e-4)
    later = further(learner, tiny.of_classes([2, 3])).held.values
    assert all(later[name] >= b for name, b in learner.held.values.items())
    assert learner.held.holds(first.ids) == first.ids


def test_when_there_is_no_room_the_least_held_block_is_used_anew(tiny: Table) -> None:
    pairs = [tiny.of_classes([c, c + 1]) for c in (0, 2, 4, 6)]
    learner = learnt("graceful forgetting", *pairs[:3])
    least = min(range(3), key=learner.priority)
    twin = further(learner, pairs[3])
    assert twin.births[3].block == least and len(twin.columns.columns) == 3
    moved = changed(weights(learner), weights(twin))
    assert moved == {f"blocks.{least}.layers.{k}.{name}" for k in (0, 1) for name in ("weight", "bias")}


# --- forgetting


def test_a_forgotten_task_leaves_room_that_the_next_one_takes(tiny: Table) -> None:
    pairs = [tiny.of_classes([c, c + 1]) for c in (0, 2, 4, 6)]
    learner = learnt("no forgetting", *pairs[:3], tolerated=1.0)
    assert isinstance(learner, Forgetful)
    before = predict(learner.model, tiny)
    residue = learner.forget(Request.of_classes(tiny, (2, 3)))
    assert set(residue) == set(pairs[1].ids) and learner.holds(pairs[1].ids) == ()
    after = predict(learner.model, tiny)
    assert torch.equal(after[:, [0, 1, 4, 5]], before[:, [0, 1, 4, 5]]) and bool(after[:, [2, 3]].isneginf().all())
    assert learner.columns.free_units == 20
    assert not any(name.startswith("blocks.1.heads") for name in learner.held.values)
    twin = further(learner, pairs[3])
    assert twin.births[-1].block == 1 and twin.columns.free_units == 0 and len(twin.columns.columns) == 3


def test_a_class_may_go_alone_and_its_block_stays(tiny: Table) -> None:
    learner = learnt("overall refinement", tiny.of_classes(OLD), epochs=1)
    learner.forget(Request.of_classes(tiny, (3,)).but(forget=None))
    assert learner.columns.classes == [0, 1, 2, 4] and learner.columns.free_units == 0
    assert 3 not in learner.kept.table.classes


def test_those_who_listened_make_up_for_a_block_that_goes(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LifelongFramework, "similarity", lambda self, rows, run: (0.1, 0.9))
    rows = digits.train.take(range(0, len(digits.train), 2))
    learner = learnt("forward transfer", rows.of_classes(OLD), rows.of_classes(NEW), epochs=10)
    request, test = Request.of_classes(rows, OLD), digits.test.of_classes(NEW)
    with pytest.raises(EngramError, match="block 1 listens"):
        learner.forget(request.but(retain=None))
    assert learner.columns.classes == [*OLD, *NEW]  # nothing changed
    before = accuracy(learner.model, test, classes=NEW)
    learner.forget(request)
    assert learner.columns.free_units == 20 and learner.columns.columns[1].sources == []
    assert accuracy(learner.model, test, classes=NEW) > before - 0.02


def test_what_cannot_be_let_go_is_said(tiny: Table) -> None:
    learner = learnt("no forgetting", tiny.of_classes(OLD), epochs=1)
    with pytest.raises(EngramError, match="whole classes"):
        learner.forget(Request.of_records(tiny, tiny.ids[:1]))
    with pytest.raises(EngramError, match="class 7 was never learnt"):
        learner.forget(Request.of_classes(tiny, (0, 7)))
    assert learner.columns.classes == list(OLD)


# --- policies, and odd tasks


def test_the_last_entry_that_fits_counts() -> None:
    step = Step({"all": FROZEN, "new": FREE, "new head": 0.5, "top": HELD}, to_zero="old link")
    assert step.stiffness({"all", "old", "within"}) == FROZEN and step.stiffness({"all", "new", "within"}) == FREE
    assert step.stiffness({"all", "new", "head"}) == 0.5 and step.stiffness({"all", "new", "within", "top"}) == HELD
    assert step.vanishes({"all", "old", "link"}) and not step.vanishes({"all", "new", "link"})
    assert Step({"new": FREE}).stiffness({"all", "old"}) == FROZEN and not KEEP.vanishes({"all"})


def test_policies_are_data() -> None:
    as_data = {"steps": [{"b": {"all": math.inf, "new": 0.0}}], "expands": True}
    assert policy_of(as_data) == POLICIES["no forgetting"] == policy_of("no forgetting")
    assert policy_of(POLICIES["few-shot"]) is POLICIES["few-shot"]
    written = json.loads(json.dumps(describe(LifelongFramework(policy=POLICIES["confusion reduction"]))))
    assert make(written).plan == POLICIES["confusion reduction"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("no forgeting", "no forgetting"),
        ({"steps": [{"b": {"older": 1.0}}]}, "older"),
        ({"steps": [{"b": {"all": -1.0}}]}, "from 0 to inf"),
        ({"steps": [{"b": {"all": "soft"}}]}, "from 0 to inf"),
        ({"steps": [{"b": {}, "rows": "old"}]}, "old"),
        ({"steps": [{"c": {}}]}, "setting of a step"),
        ({"stepz": []}, "setting of a policy"),
        ({"steps": [], "start": "warm"}, "warm"),
        ({"steps": [], "columns": 0}, "columns"),
        ({"steps": [], "fade": 0.0}, "above 0"),
    ],
)
def test_a_policy_that_is_none_is_said(given: Any, says: str) -> None:
    with pytest.raises(EngramError, match=says):
        LifelongFramework(policy=given)


def test_other_rows_and_networks_are_refused(tiny: Table) -> None:
    with pytest.raises(EngramError, match="hidden"):
        learnt("learn", tiny, network="ConvNet")
    with pytest.raises(EngramError, match="heads are those of classes"):
        learnt("learn", tiny.with_labels(torch.rand(60, 1, generator=torch.Generator().manual_seed(0))))
    with pytest.raises(EngramError, match="rows of each class"):
        LifelongFramework(rehearsed=0)


def test_rows_without_a_label_do_not_matter(tiny: Table) -> None:
    first = tiny.of_classes([0, 1])
    labels = torch.cat([torch.as_tensor(first.labels), torch.full((48,), MISSING)])
    mixed = first.concat(tiny.without(first.ids)).with_labels(labels)
    one, other = learnt("no forgetting", first), learnt("no forgetting", mixed)
    assert changed(weights(one), weights(other)) == set() and other.columns.classes == [0, 1]


def test_an_interrupted_training_goes_on_where_it_was(
    tiny: Table, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies as all is refined for the second time; a new one ends with equal bits."""
    monkeypatch.setattr("engram.engine.fit.CHECKPOINT_EVERY", -1.0)
    first, second = (task.train for task in halves(tiny))
    calm = learnt("overall refinement", first, second)
    real, calls = LifelongFramework.train, []

    def mortal(self: LifelongFramework, *given: Any) -> None:
        calls.append(given)
        real(self, *given) if len(calls) < 7 else 1 / 0

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(LifelongFramework, "train", mortal)
        learnt("overall refinement", first, second, run=Run(tmp_path / "run"))
    resumed = learnt("overall refinement", first, second, run=Run(tmp_path / "run"))
    assert changed(weights(calm), weights(resumed)) == set()
