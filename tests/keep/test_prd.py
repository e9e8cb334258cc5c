from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests.keep.halves import NEW, OLD, begun, halves, learnt, same
from torch import Tensor, nn

from engram.core.erasure import forget
from engram.core.learner import fork
from engram.core.request import Request
from engram.core.settings import describe, make
from engram.core.unlearning import GradientForgetter
from engram.data.augment import Augment
from engram.data.streams import class_stream
from engram.data.table import MISSING, Batch, Table
from engram.data.task import Task
from engram.engine.losses import Mean, supcon
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep import prd
from engram.keep.prd import PRD, attraction, cosines, prototypes, relation_over_classes, relation_over_samples
from engram.models import CosineHead, Identity, LinearHead, Predictor, ValueHead, seeded
from engram.reproduce.prd import learner as as_measured
from engram.reproduce.prd import learnt as along
from engram.reproduce.prd import nearness
from engram.testing import holds

SMALL: dict[str, Any] = {
    "network": {"name": "MLP", "hidden": [32]}, "epochs": 3, "batch_size": 32,
    "optimizer": Optimizer("sgd", lr=0.05, weight_decay=0.01), "projector": (24, 16),
}  # fmt: skip
SQUARE = torch.eye(2, dtype=torch.float64)
ROWS = torch.tensor([[1, 0], [0, 1], [math.sqrt(0.5), math.sqrt(0.5)]], dtype=torch.float64)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(seed: int, size: int) -> Tensor:
    return torch.linalg.qr(normal(seed, size, size)).Q


def turned(x: Tensor, angle: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return x @ torch.tensor([[c, s], [-s, c]], dtype=torch.float64)


def moved(learner: PRD) -> PRD:
    """The learner, its model changed by a little since the task came."""
    with torch.no_grad(), seeded(torch.Generator().manual_seed(0)):
        for p in learner.model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return learner


def views(table: Table, learner: PRD) -> Batch:
    return next(iter(learner.batches(Task(table), 0, Run())))


def bare(model: Any, batch: Batch) -> Any:
    return model(**batch.inputs)


# --- what must hold


@holds("prd", 1)
@given(st.integers(0, 1000))
def test_turning_prototypes_and_features_together_keeps_the_relation(seed: int) -> None:
    p, x, turn = normal(seed, 4, 6), normal(seed + 1, 9, 6), rotation(seed, 6)
    before = cosines(p, x)
    together, alone = cosines(p @ turn, x @ turn), cosines(p, x @ turn)
    for loss in (
        lambda now: relation_over_samples(now, before, 0.5),
        lambda now: relation_over_classes(now, before, [[0, 1], [2, 3]], 0.5),
    ):
        assert abs(float(loss(together).value)) < 1e-6
        assert float(loss(alone).value) > 1e-3


@holds("prd", 1)
def test_the_relation_by_hand_is_over_the_rows_of_each_prototype() -> None:
    before = cosines(SQUARE, ROWS)
    over_rows, over_prototypes = before.softmax(1), before.T.softmax(1)
    assert over_rows[0].tolist() == pytest.approx([0.4730, 0.1740, 0.3529], abs=1e-4)
    assert over_rows[1].tolist() == pytest.approx([0.1740, 0.4730, 0.3529], abs=1e-4)
    assert over_prototypes.flatten().tolist() == pytest.approx([0.7311, 0.2689, 0.2689, 0.7311, 0.5, 0.5], abs=1e-4)
    now = cosines(SQUARE, turned(ROWS, 0.7))
    wanted = float((over_rows * (over_rows / now.softmax(1)).log()).sum())
    over_classes = float((over_prototypes * (over_prototypes / now.T.softmax(1)).log()).sum() / 3)
    assert float(relation_over_samples(now, before, 1.0).value) == pytest.approx(wanted, rel=1e-9)
    assert wanted == pytest.approx(0.0791, abs=1e-4)
    assert float(relation_over_classes(now, before, [[0, 1]], 1.0).value) == pytest.approx(over_classes, rel=1e-9)
    assert abs(over_classes - wanted) > 0.01
    assert float(relation_over_samples(before, before, 1.0).value) == 0


@holds("prd", 2)
def test_prototypes_loss_does_not_reach_the_encoder(tiny: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prd, "supcon", lambda z, y, temperature: Mean.of(torch.zeros(())))
    learner = begun(PRD(**SMALL, beta=0.0), tiny)
    batch = views(tiny.of_classes(NEW), learner)
    learner.terms(batch, bare(learner.model, batch)).value.backward()
    assert all(p.grad is None or not p.grad.any() for p in learner.model.encoder.parameters())
    head = learner.model.head.weight
    assert head.grad[5:].norm(dim=1).min() > 1e-3
    assert float((head.grad * head.detach()).sum(1).abs().max()) < 1e-6


@holds("prd", 2)
def test_the_prototypes_loss_by_hand() -> None:
    p, z = torch.tensor([[2.0, 1.0]], requires_grad=True), torch.tensor([[1.0, 0.0]])
    loss = attraction(p, z).value
    loss.backward()
    assert loss.item() == pytest.approx(0.10557, abs=1e-5)
    assert p.grad is not None and p.grad.abs().max() > 0.01
    assert abs(float((p.detach() * p.grad).sum())) < 1e-6


@holds("prd", 3)
def test_prototypes_are_not_pushed_apart(tiny: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prd, "supcon", lambda z, y, temperature: Mean.of(torch.zeros(())))
    learner = begun(PRD(**SMALL, beta=0.0), tiny)
    batch = views(tiny.of_classes((5, 6, 8, 9)), learner)
    learner.terms(batch, bare(learner.model, batch)).value.backward()
    found = learner.model.head.weight.grad.abs().sum(1) > 0
    assert found.nonzero()[:, 0].tolist() == [5, 6, 8, 9]


@holds("prd", 3)
@pytest.mark.parametrize("axis", ["samples", "classes"])
def test_the_distillation_moves_encoder_and_old_prototypes_alone(tiny: Table, axis: str) -> None:
    learner = moved(begun(PRD(**SMALL, relation_axis=axis), tiny))
    batch = views(tiny.of_classes(NEW), learner)
    learner.relation(batch, bare(learner.model, batch).pooler_output).value.backward()
    found = learner.model.head.weight.grad.abs().sum(1) > 0
    assert found.nonzero()[:, 0].tolist() == list(OLD)
    assert all(p.grad is not None and p.grad.any() for p in learner.model.encoder.parameters())
    assert learner.teacher is not None and all(p.grad is None for p in learner.teacher.parameters())


@holds("prd", 4)
def test_contrast_of_two_identical_views_of_two_orthogonal_rows() -> None:
    found = supcon(SQUARE.repeat(2, 1), torch.tensor([0, 1, 0, 1]), 1.0)
    assert float(found.value) == pytest.approx(math.log(math.e + 2) - 1, abs=1e-12)
    assert float(found.value) == pytest.approx(0.55144, abs=1e-5)


@holds("prd", 5)
def test_the_first_task_has_no_teacher(tiny: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[nn.Module] = []
    frozen = prd.frozen
    monkeypatch.setattr(prd, "frozen", lambda model: taken.append(model) or frozen(model))  # type: ignore[func-returns-value]
    first, second = halves(tiny)
    learner, without, run, other = PRD(**SMALL), PRD(**SMALL, beta=0.0), Run(), Run()
    learner.learn(first, run)
    without.learn(first, other)
    assert not taken and same(learner, without)
    learner.learn(second, run)
    without.learn(second, other)
    assert len(taken) == 1 and not same(learner, without)


@holds("prd", 6)
def test_distilled_prototypes_keep_old_tasks_and_stand_at_their_classes(digits: Any) -> None:
    stages = class_stream(digits.train, digits.test, base=2, increment=2)
    for seed in range(2):
        whole, still = as_measured(epochs=10), as_measured(epochs=10, beta=0.0)
        assert along(whole, stages, seed).old > along(still, stages, seed).old + 0.05
        assert nearness(whole, stages) > nearness(still, stages) + 0.05


# --- the loss, the model, and what goes on between tasks


def kl(p: Tensor, q: Tensor) -> float:
    return float((p * (p / q).log()).sum())


def slowly(learner: PRD, batch: Batch, before: Tensor, now: Tensor, old: Tensor) -> float:
    """The loss, term by term and row by row. `before` and `now`: features [n, d]; `old`: prototypes before."""
    labels, p = batch.labels, learner.model.head.weight.detach().double()
    assert labels is not None and learner.projection is not None
    v = F.normalize(learner.projection(values=now.float()).logits.detach().double(), dim=1)
    n, T = len(v), learner.temperature
    contrast = 0.0
    for i in range(n):
        below = sum(math.exp(float(v[i] @ v[a]) / T) for a in range(n) if a != i)
        own = [p for p in range(n) if p != i and labels[p] == labels[i]]
        contrast -= sum(math.log(math.exp(float(v[i] @ v[a]) / T) / below) for a in own) / len(own) / n
    cos = lambda a, b: float(a @ b / (a.norm() * b.norm()))  # noqa: E731
    attracted = sum(1 - cos(p[labels[i]], now[i]) for i in range(n)) / n
    taught = torch.tensor([[cos(old[k], before[i]) for i in range(n)] for k in OLD]).double() / learner.tau
    said = torch.tensor([[cos(p[k], now[i]) for i in range(n)] for k in OLD]).double() / learner.tau
    if learner.relation_axis == "samples":
        kept = sum(kl(taught[k].softmax(0), said[k].softmax(0)) for k in range(5))
    else:
        kept = sum(kl(taught[:, i].softmax(0), said[:, i].softmax(0)) for i in range(n)) / n
    return T / 0.07 * contrast + learner.alpha * attracted + learner.beta * kept


@pytest.mark.parametrize("settings", [{}, {"relation_axis": "classes"}, {"alpha": 0.7, "beta": 30.0, "tau": 0.2}])
def test_the_loss_written_down(tiny: Table, settings: dict[str, Any]) -> None:
    learner = begun(PRD(**SMALL, **settings), tiny)
    batch = views(tiny.of_classes(NEW).take(range(12)), learner)
    before, old = (t.detach().double() for t in (bare(learner.model, batch).pooler_output, learner.model.head.weight))
    output = bare(moved(learner).model, batch)
    found = learner.terms(batch, output).value.item()
    wanted = slowly(learner, batch, before, output.pooler_output.detach().double(), old)
    assert found == pytest.approx(wanted, rel=1e-4)


def test_a_softmax_over_classes_is_within_each_old_task() -> None:
    before, now = normal(0, 4, 5), normal(1, 4, 5)
    parts = [float(relation_over_classes(now[k], before[k], [[0, 1]], 1.0).value) for k in ([0, 2], [1, 3])]
    found = float(relation_over_classes(now, before, [[0, 2], [], [1, 3]], 1.0).value)
    assert found == pytest.approx(sum(parts), rel=1e-9)
    assert found != pytest.approx(float(relation_over_classes(now, before, [[0, 1, 2, 3]], 1.0).value), rel=0.01)


def test_classes_that_came_together_are_remembered(tiny: Table) -> None:
    learner, run = PRD(**SMALL), Run()
    for classes in ((3, 1), (1, 2), (0,)):
        learner.learn(Task(tiny.of_classes(classes), classes=classes), run)
    assert learner.groups == [[3, 1], [2], [0]]
    assert fork(learner).groups == learner.groups


def test_the_model_tells_the_most_similar_prototype(tiny: Table) -> None:
    learner = learnt(PRD(**SMALL), tiny)
    assert isinstance(learner.model.head, CosineHead)
    z, p = predict(learner.model, tiny, "pooler_output").double(), learner.model.head.weight.detach().double()
    angles = torch.stack([torch.stack([row @ k / row.norm() / k.norm() for k in p]) for row in z])
    assert torch.equal(predict(learner.model, tiny).argmax(1), angles.argmax(1))
    assert torch.equal(prototypes(learner.model, torch.tensor([7, 2, 7])), learner.model.head.weight[[7, 2, 7]])


def test_without_distillation_old_prototypes_stand_still(tiny: Table) -> None:
    """Neither the decay nor the momentum of the optimiser reaches them."""
    run, (first, second) = Run(), halves(tiny)
    for beta in (0.0, 4.0):
        learner = PRD(**SMALL, beta=beta)
        learner.learn(first, run)
        before = learner.model.head.weight.detach().clone()
        learner.learn(second, run)
        assert torch.equal(learner.model.head.weight[:5], before) == (beta == 0)


def test_the_plan_of_the_optimiser_holds_for_all_but_the_prototypes_friction(tiny: Table) -> None:
    plan = Optimizer("sgd", lr=0.2, weight_decay=0.01, schedule="linear", clip=1.0)
    learner = begun(PRD(**{**SMALL, "optimizer": plan}), tiny)
    built = learner.optimizers().build(learner.model.parameters())
    most, free = built.param_groups
    assert [id(p) for p in free["params"]] == [id(learner.model.head.weight)]
    trained = [*learner.model.encoder.parameters(), *learner.projection.parameters()]
    assert {id(p) for p in most["params"]} == set(map(id, trained))
    assert (most["momentum"], most["weight_decay"]) == (0.9, 0.01)
    assert (free["momentum"], free["weight_decay"]) == (0.0, 0.0)
    learner.optimizers().set_rate(built, 0.5)
    assert most["lr"] == free["lr"] == 0.1 and learner.optimizers().clip == 1.0
    adam = begun(PRD(**{**SMALL, "optimizer": Optimizer(weight_decay=0.1)}), tiny)
    most, free = adam.optimizers().build(adam.model.parameters()).param_groups
    assert (most["weight_decay"], free["weight_decay"]) == (0.1, 0.0)


def test_the_projector_is_no_part_of_the_model_and_goes_on(tiny: Table) -> None:
    learner = PRD.tiny()
    first, second = halves(tiny)
    learner.learn(first)
    twin, begun_anew = fork(learner), fork(learner)
    begun_anew.projection = None
    before = {name: p.clone() for name, p in learner.projection.state_dict().items()}  # type: ignore[union-attr]
    for each in (learner, twin, begun_anew):
        each.learn(second)
    assert same(learner, twin) and not same(learner, begun_anew)
    after = learner.projection.state_dict()  # type: ignore[union-attr]
    assert not any(torch.equal(after[name], value) for name, value in before.items())
    assert set(learner.model.state_dict()) == {
        "encoder.layers.0.0.weight", "encoder.layers.0.0.bias", "head.weight", "head.classes", "head.live",
    }  # fmt: skip


def test_classes_that_come_again_are_trained_by_their_rows(tiny: Table) -> None:
    learner, run = PRD(**SMALL), Run()
    learner.learn(halves(tiny)[0], run)
    again = Task(tiny.of_classes((3, 4, 5)), index=1, classes=(5,))
    learner._prepare(again, run)
    learner.start(again, run)
    assert learner.known == OLD and learner.old == [0, 1, 2]


def test_what_was_forgotten_is_not_taught_back(tiny: Table) -> None:
    learner, run = PRD(**SMALL), Run()
    first, second = halves(tiny)
    learner.learn(first, run)
    done = forget(learner, Request.of_classes(first.train, (2,)), Wiped())
    assert set(done.residue) == set(first.train.of_classes((2,)).ids)
    learner._prepare(second, run)
    learner.start(second, run)
    assert learner.teacher is not None and torch.equal(learner.teacher.head.weight[2], torch.ones(32))  # type: ignore[union-attr,index]


class Wiped(GradientForgetter):
    """Overwrites the prototype of class 2."""

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        import copy

        new = copy.deepcopy(model)
        new.head.weight.data[2] = 1  # type: ignore[union-attr,index,operator]
        return new


def test_rows_without_a_label_count_nothing(tiny: Table) -> None:
    learner = begun(PRD(**SMALL, beta=0.0), tiny)
    batch = views(tiny.of_classes(NEW), learner)
    assert batch.labels is not None
    some = batch.labels.clone()
    some[batch.rows % 3 == 0] = MISSING
    known = some != MISSING
    kept = Batch({k: v[known] for k, v in batch.inputs.items()}, some[known], batch.rows[known])
    found = learner.terms(Batch(batch.inputs, some, batch.rows), bare(learner.model, batch)).value.item()
    assert found == pytest.approx(learner.terms(kept, bare(learner.model, kept)).value.item(), rel=1e-5)


def test_a_batch_is_two_views_of_each_row_and_every_epoch_has_its_own(tiny: Table) -> None:
    learner, run, task = PRD(**SMALL), Run(), halves(tiny)[0]
    one, again, other = (list(learner.batches(task, epoch, run)) for epoch in (0, 0, 1))
    pixels = [torch.cat([batch.inputs["pixel_values"] for batch in epoch]) for epoch in (one, again, other)]
    assert torch.equal(pixels[0], pixels[1]) and not torch.equal(pixels[0].sort().values, pixels[2].sort().values)
    for batch in one:
        half = len(batch) // 2
        assert torch.equal(batch.rows[:half], batch.rows[half:])
        assert not torch.equal(batch.inputs["pixel_values"][:half], batch.inputs["pixel_values"][half:])


def test_settings_of_the_views_stand_in_the_config() -> None:
    method = PRD(views=Augment(shift=0.25, flip=0.5), projector=(8,))
    again = make(describe(method))
    assert again.views == method.views and again.projector == (8,)
    assert make({"name": "keep.PRD", "views": {"flip": 0.5}}).views == Augment(flip=0.5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"relation_axis": "rows"}, "relation_axis"),
        ({"tau": 0.0}, "tau=0.0"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"projector": ()}, "projector needs the width"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(EngramError, match=words):
        PRD(**settings)


def test_what_it_cannot_learn_from_is_said(tiny: Table) -> None:
    with seeded(torch.Generator().manual_seed(0)):
        numbers = Predictor(Identity(64), ValueHead(64, 2))
    with pytest.raises(EngramError, match="encoder with a class head"):
        PRD(**{**SMALL, "network": numbers}).learn(Task(tiny))
    with pytest.raises(EngramError, match="holds no row with a label"):
        PRD(**SMALL).learn(Task(tiny.unlabelled()))
    with pytest.raises(EngramError, match="the head has no class 2"):
        PRD(**SMALL).learn(Task(tiny, classes=(0, 1)))


def test_another_head_is_replaced_by_prototypes(tiny: Table) -> None:
    with seeded(torch.Generator().manual_seed(0)):
        network = Predictor(Identity(64), LinearHead(64, (0, 1)))
    learner = PRD(**{**SMALL, "network": network, "epochs": 1})
    learner.learn(halves(tiny)[1])
    assert isinstance(learner.model.head, CosineHead) and learner.model.head.classes.tolist() == list(NEW)
    assert isinstance(network.head, LinearHead)
