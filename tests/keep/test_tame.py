from __future__ import annotations

import heapq
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.nn.utils import prune as torch_prune

from engram.core.learner import fork
from engram.core.request import Request
from engram.data.streams import class_stream
from engram.data.table import MISSING, Table
from engram.data.task import Task
from engram.engine.optimizer import Optimizer
from engram.engine.predict import accuracy, evaluating, predict
from engram.engine.run import Run
from engram.engine.select import prune
from engram.errors import EngramError
from engram.forget.finetune import Finetune
from engram.keep.tame import EXPERT, TAME, Monitor, classifier, row_losses, smooth, threshold
from engram.models import load, save
from engram.models.routed import Routed
from engram.models.seeding import seeded
from engram.stats.seeds import derive
from engram.testing import fingerprint, holds

FITTING: dict[str, Any] = {
    "network": {"name": "MLP", "hidden": [64]},
    "epochs": 10,
    "batch_size": 32,
    "window": 35,
    "selector_epochs": 25,
    "retrain_epochs": 15,
}
BRIEF: dict[str, Any] = {**FITTING, "epochs": 1, "selector_epochs": 2, "retrain_epochs": 1, "pruning_buffer": 200}


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
        monitor.accept(loss, window, 0.2)
    assert len(monitor.losses) == window
    monitor.watch(0.9, 0.2)
    monitor.threshold = threshold(monitor.losses)
    assert monitor.alarmed and not monitor.fits(0.9, 0.2)


@holds("tame", 3)
@pytest.mark.parametrize("outputs", [None, 2])
@pytest.mark.parametrize("seed", range(5))
def test_a_stream_without_changes_needs_one_expert(digits: Any, seed: int, outputs: int | None) -> None:
    learner = TAME(**FITTING, outputs=outputs)
    learner.learn(Task(digits.train.of_classes([0, 1])), Run(seed=seed))
    assert len(learner.routed.experts) == 1


@holds("tame", 4)
@pytest.mark.parametrize("outputs", [None, 2])
def test_what_comes_back_goes_to_the_expert_that_had_it(digits: Any, outputs: int | None) -> None:
    learner, run = TAME(**{**FITTING, "epochs": 20}, outputs=outputs), Run()
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
    """Two pairs of classes, the second of which is noticed within a piece or at the start of one."""
    stages = class_stream(digits.train, digits.test, base=2, increment=2)
    first, second = (stage.task.train.take(range(192)) for stage in stages[:2])
    stream = first.concat(second)
    whole, cut = (TAME(**BRIEF) for _ in range(2))
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
    assert len(whole.routed.experts) == 2
    assert whole.bank.state_dict()["monitors"] == cut.bank.state_dict()["monitors"]
    assert torch.equal(predict(whole.model, digits.test), predict(cut.model, digits.test))


def test_rows_leave_the_buffers_and_the_moments(tiny: Table) -> None:
    learner = TAME.tiny()
    learner.learn(Task(tiny))
    held = learner.kept.holds(tiny.ids)
    assert held and learner.spare.holds(tiny.ids) and any(state["state"] for state in learner.bank.moments())
    assert set(learner.drop(tiny)) == set(tiny.ids)
    assert learner.kept.holds(tiny.ids) == learner.spare.holds(tiny.ids) == () and learner.bank.moments() == []


def test_an_interrupted_training_goes_on_where_it_was(digits: Any, tmp_path: Any, monkeypatch: Any) -> None:
    """A second pair comes within a piece, an expert is made for it, the process dies in a later epoch; a new one ends
    with equal bits."""
    monkeypatch.setattr("engram.engine.fit.CHECKPOINT_EVERY", 0.0)

    def through(run: Run, dies: bool = False) -> TAME:
        learner = TAME(**{**BRIEF, "epochs": 4, "batch_size": 4, "window": 20})
        if dies:
            whole = learner.batches
            monkeypatch.setattr(learner, "batches", lambda t, e, r: whole(t, e, r) if e < 2 else 1 / 0)
        learner.learn(Task(two_pairs(digits)), run)
        learner.refresh(run)
        return learner

    calm = through(Run())
    with pytest.raises(ZeroDivisionError):
        through(Run(tmp_path / "run"), dies=True)
    resumed = through(Run(tmp_path / "run"))
    assert len(calm.routed.experts) > 1
    assert fingerprint(calm.state_dict()) == fingerprint(resumed.state_dict())


def two_pairs(digits: Any) -> Table:
    """Rows of two classes, then of two others."""
    return digits.train.of_classes([0, 1]).concat(digits.train.of_classes([6, 7]))


def test_further_epochs_shuffle_within_what_one_expert_took(digits: Any) -> None:
    learner, task, run = TAME(**{**BRIEF, "batch_size": 16}), Task(digits.train.take(range(150))), Run()
    learner.learn(task, run)
    assert learner.bank.taken == []  # of a finished piece
    learner.bank.taken = [0, 0, 0, 1, 1, 0, 2, 2, 2, 2]
    rows = torch.arange(150)
    marked = Task(task.train.with_column("row", rows))
    passes = [[batch.extra["row"] for batch in learner.batches(marked, epoch, run)] for epoch in range(3)]
    assert torch.equal(torch.cat(passes[0]), rows)
    for found in passes[1:]:
        pieces = [range(0, 48), range(48, 80), range(80, 96), range(96, 150)]
        assert all(any(set(batch.tolist()) <= set(piece) for piece in pieces) for batch in found)
        assert torch.equal(torch.cat(found).sort().values, rows) and not torch.equal(torch.cat(found), rows)
    assert not torch.equal(torch.cat(passes[1]), torch.cat(passes[2]))


# --- experts' outputs


def test_outputs_follow_the_classes_that_an_expert_met(digits: Any) -> None:
    learner = TAME(**FITTING)
    learner.learn(Task(digits.train.of_classes([2, 5, 7])))
    learner.learn(Task(digits.train.of_classes([0, 9])))
    assert [sorted(c for c in row if c >= 0) for row in learner.routed.names.tolist()] == [[2, 5, 7], [0, 9]]
    assert [expert.head.live.shape[0] for expert in learner.routed.experts] == [3, 2]  # type: ignore[union-attr,index]
    learner.refresh()
    assert predict(learner.model, digits.test).shape == (len(digits.test), 10)
    assert torch.equal(predict(fork(learner).model, digits.test), predict(learner.model, digits.test))


def test_of_a_change_that_is_not_noticed_something_is_learnt(digits: Any) -> None:
    """The expert gets outputs for new classes, of which the sigmoid lets it tell some; with a fixed number of outputs
    they are never predicted."""
    found = []
    for outputs in (None, 2):
        learner = TAME(**{**FITTING, "floor": 100.0, "pruned": 0.0}, outputs=outputs)
        for pair in ([0, 1], [2, 3]):
            learner.learn(Task(digits.train.of_classes(pair)))
        learner.refresh()
        assert len(learner.routed.experts) == 1
        found.append(accuracy(learner.model, digits.test.of_classes([2, 3])))
    assert found[0] > 0.4 and found[1] == 0


def test_the_loss_of_an_output_that_is_lacking(digits: Any) -> None:
    scores = torch.tensor([[0.9, 0.2]])
    assert row_losses(scores, torch.tensor([2]), 3).item() == pytest.approx(math.log(math.exp(0.9) + math.exp(0.2) + 1))
    learner = TAME(**BRIEF)
    learner.learn(Task(digits.train.of_classes([0, 1])))
    batch = digits.train.of_classes([6]).take(range(8)).batch(torch.arange(8))
    own = torch.sigmoid(learner.routed.experts[0](**batch.inputs).logits).detach()
    by_hand = torch.log(own.exp().sum(1) + 1).mean() - math.log(3)
    assert learner.losses(batch)[0] == pytest.approx(float(by_hand), abs=1e-6)


def test_moments_grow_with_the_outputs(digits: Any) -> None:
    """An expert that meets a class later has moments of zero for its row, and the others keep theirs."""
    learner = TAME(**{**BRIEF, "floor": 100.0})
    learner.learn(Task(digits.train.of_classes([0, 1])))
    before = [state["momentum_buffer"] for state in learner.bank.moments()[0]["state"].values()]
    learner.run = Run()
    learner.bank.attach(learner.routed)
    learner._take(0, [0, 1, 4])
    after = [state["momentum_buffer"] for state in learner.bank.moments()[0]["state"].values()]
    params = list(learner.routed.experts[0].parameters())
    assert [m.shape for m in after] == [p.shape for p in params] and params[-2].shape[0] == 3
    assert all(torch.equal(new[: len(old)], old) for old, new in zip(before, after, strict=True))
    assert not after[-2][2].any() and not after[-1][2].any()


# --- buffers


def test_the_buffer_is_a_uniform_sample_of_every_class(digits: Any) -> None:
    """As heaps of random priorities, one a class, whose capacities are known from the start, would hold."""
    rows = digits.train.take(range(600))
    learner = TAME(**{**BRIEF, "buffer": 63})
    for start in (0, 64, 320):
        learner.learn(Task(rows.take(range(start, {0: 64, 64: 320, 320: 600}[start]))))
    heaps: dict[int, list[tuple[int, str]]] = {}
    assert rows.labels is not None
    for id, label in zip(rows.ids, rows.labels.tolist(), strict=True):
        heap = heaps.setdefault(label, [])
        heapq.heappush(heap, (-derive("buffer", 0, id), id))
        if len(heap) > 63 // 10:
            heapq.heappop(heap)
    assert set(learner.kept.table.ids) == {id for heap in heaps.values() for _, id in heap}
    assert set(Counter(learner.kept.table.labels.tolist()).values()) == {6}  # type: ignore[union-attr]


def test_buffers_say_which_expert_took_a_row(digits: Any) -> None:
    learner = TAME(**{**FITTING, "pruning_buffer": 150})
    for pair in ([0, 1], [2, 3]):
        learner.learn(Task(digits.train.of_classes(pair)))
    assert len(learner.spare) == 150
    for kept in (learner.kept.table, learner.spare.table):
        wanted = torch.as_tensor(kept.labels) >= 2
        assert (torch.as_tensor(kept.extra[EXPERT]) == wanted).double().mean() > 0.97  # but for a delay
    some = learner._rows_of(1, learner.routed)
    assert set(some.ids) <= set(learner.spare.table.ids) and set(some.classes) == {0, 1}
    truth = learner.spare.table.select(some.ids)
    assert learner.routed.names[1][some.labels].tolist() == truth.labels.tolist()


# --- pruning


def network(seed: int = 0) -> nn.Module:
    spec = {"name": "MLP", "hidden": [20, 10]}
    return classifier(spec, {"values": (12,)}, range(3), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [0.5, 0.98])
def test_pruning_is_by_size_over_all_layers_together(share: float) -> None:
    """As torch's own global pruning by L1."""
    ours = network()
    layers: Any = ours.get_submodule("encoder.layers")
    with seeded(torch.Generator().manual_seed(0)):
        plain = nn.ModuleList([nn.Linear(12, 20), nn.Linear(20, 10), nn.Linear(10, 3)])
    for theirs, weight in zip(plain, [layers[0][0].weight, layers[1][0].weight, ours.head.weight], strict=True):  # type: ignore[union-attr]
        theirs.weight.data = weight.detach().clone()
    torch_prune.global_unstructured(
        [(layer, "weight") for layer in plain], pruning_method=torch_prune.L1Unstructured, amount=share
    )
    masks = prune(ours, share)
    assert [m.bool().tolist() for m in masks.values()] == [layer.weight_mask.bool().tolist() for layer in plain]
    assert all(bool((ours.get_parameter(name)[~mask] == 0).all()) for name, mask in masks.items())


def test_pruned_experts_are_made_anew_and_the_others_go_on(digits: Any) -> None:
    learner, twin = TAME(**FITTING), TAME(**FITTING)
    run, other = Run(), Run()
    for k, pair in enumerate(([0, 1], [2, 3], [0, 1])):
        task = Task(digits.train.of_classes(pair).take(range(k, 250)))
        learner.learn(task, run)
        twin.learn(task, other)
        learner.refresh(run)  # after every piece; the twin only at the end
        for expert in learner.routed.experts:
            left, all_of_them = weights_left(expert)
            assert left == round(0.02 * all_of_them)
    twin.refresh(other)
    assert fingerprint(learner.state_dict()) == fingerprint(twin.state_dict())
    assert learner.unpruned is not None and learner.unpruned is not learner.model
    left, all_of_them = weights_left(learner.unpruned.experts[0])
    assert left == all_of_them
    left, all_of_them = weights_left(learner.routed.router)
    assert left == round(0.5 * all_of_them)
    assert len(learner.routed.experts) == 2


def weights_left(model: nn.Module) -> tuple[int, int]:
    """How many entries of matrices are not zero, and how many there are."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return int(sum(p.count_nonzero() for p in matrices)), sum(p.numel() for p in matrices)


def test_without_pruning_the_model_is_what_goes_on_learning(digits: Any) -> None:
    learner = TAME(**{**BRIEF, "pruned": 0.0})
    learner.learn(Task(digits.train.of_classes([0, 1])))
    before = weights(learner, 0)
    learner.refresh()
    assert learner.unpruned is None and unchanged(learner, 0, before)
    assert len(learner.spare) == 0


def test_retraining_mends_what_pruning_broke(digits: Any) -> None:
    pairs, found = digits.test.of_classes([0, 1, 2]), []
    for epochs in (0, 40):
        learner = TAME(**{**FITTING, "retrain_epochs": epochs})
        learner.learn(Task(digits.train.of_classes([0, 1, 2])))
        learner.refresh()
        found.append(accuracy(learner.model, pairs))
    assert found[1] > 0.95 > found[0]


def test_forgetting_reaches_what_goes_on_learning(digits: Any) -> None:
    """A model that is set takes the place of the unpruned experts, and the next refresh does not bring them back."""
    from engram.core.erasure import forget

    learner = TAME(**FITTING)
    train = digits.train.of_classes([0, 1])
    learner.learn(Task(train))
    learner.refresh()
    before = parameters_to_vector(learner.unpruned.experts[0].parameters())  # type: ignore[union-attr]
    forget(learner, Request.of_records(train, train.ids[:20]), Finetune(epochs=1))
    assert learner.unpruned is not None
    left, all_of_them = weights_left(learner.unpruned.experts[0])
    assert not torch.equal(parameters_to_vector(learner.unpruned.experts[0].parameters()), before)
    assert learner.kept.holds(train.ids[:20]) == () and left < all_of_them


# --- experts together


@pytest.mark.parametrize(
    ("spec", "shape"),
    [({"name": "MLP", "hidden": [16], "norm": "batch"}, {"values": (6,)}), ("ConvNet", {"pixel_values": (1, 8, 8)})],
)
def test_stacked_experts_say_what_single_ones_do(spec: Any, shape: dict[str, tuple[int, ...]]) -> None:
    draws = torch.Generator().manual_seed(0)
    sizes = (2, 3, 2, 2)
    experts = [classifier(spec, shape, range(size), draws) for size in sizes]
    model = Routed(experts, network(), 3)
    inputs = {name: torch.rand(40, *size, generator=draws) for name, size in shape.items()}
    for k, expert in enumerate(experts):  # statistics that differ
        expert.train()(**{name: value + k for name, value in inputs.items()})
    with evaluating(model):
        one = model.every(inputs, stacked=False)
        together = model.every(inputs, stacked=True)
    assert [tuple(scores.shape) for scores in together] == [(40, size) for size in sizes]
    for a, b in zip(one, together, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(one[0], one[2])


# --- settings


def test_a_schedule_counts_an_experts_own_updates(digits: Any) -> None:
    plan = Optimizer("sgd", lr=0.1, nesterov=True, schedule="steps", milestones=(0.5,), gamma=0.2)
    learner = TAME(**BRIEF, optimizer=plan, schedule_steps=16)
    for pair in ([0, 1], [0, 1], [2, 3]):
        learner.learn(Task(digits.train.of_classes(pair).take(range(192))))  # six batches
        if len(learner.bank.optimizers) == 1:
            rates = [group["lr"] for group in learner.bank.optimizers[0].param_groups]
            assert rates == pytest.approx([0.1 if learner.bank.monitors[0].updates <= 8 else 0.02])
    assert learner.bank.monitors[0].updates >= 12
    with pytest.raises(EngramError, match="give schedule_steps"):
        TAME(optimizer=plan)


def test_another_network_for_the_selector(digits: Any) -> None:
    learner = TAME(**{**BRIEF, "selector": {"name": "ConvNet", "widths": [8]}})
    learner.learn(Task(digits.train.of_classes([0, 1])))
    learner.refresh()
    assert type(learner.routed.router.encoder).__name__ == "ConvNet"
    assert type(learner.routed.experts[0].encoder).__name__ == "MLP"


def test_a_trained_network_for_the_selector_gets_a_head_of_experts(digits: Any) -> None:
    trained = classifier("MLP", digits.train.shapes, range(7), torch.Generator().manual_seed(0))
    learner = TAME(**{**BRIEF, "selector": trained, "selector_epochs": 0, "selector_pruned": 0.0})
    learner.learn(Task(digits.train.of_classes([0, 1])))
    learner.refresh()
    router: Any = learner.routed.router
    assert router.head.live.tolist() == [True]
    assert torch.equal(router.encoder.layers[0][0].weight, trained.encoder.layers[0][0].weight)  # type: ignore[union-attr,index]


def test_rows_without_a_label_are_left_out(digits: Any) -> None:
    rows = digits.train.of_classes([0, 1]).take(range(64))
    labels = torch.as_tensor(rows.labels).clone()
    labels[::2] = MISSING
    some, fewer = TAME(**BRIEF), TAME(**BRIEF)
    some.learn(Task(rows.with_labels(labels)))
    fewer.learn(Task(rows.take(range(1, 64, 2))))
    assert fingerprint(some.state_dict()) == fingerprint(fewer.state_dict())


def test_what_it_cannot_learn_from(tiny: Table) -> None:
    with pytest.raises(EngramError, match="experts tell classes apart"):
        TAME.tiny().learn(Task(tiny.with_labels(torch.ones(len(tiny), 1))))
    with pytest.raises(EngramError, match="encoders with a class head"):
        TAME(network=nn.ReLU()).learn(Task(tiny))
