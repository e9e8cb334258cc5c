from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engram.core.erasure import forget
from engram.core.learner import Learner, fork
from engram.core.request import Request
from engram.core.unlearning import GradientForgetter
from engram.data.streams import class_stream
from engram.data.table import Batch, Table
from engram.data.task import Task
from engram.engine.fit import fit
from engram.engine.importance import importance
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.finetune import Finetune
from engram.keep.rehearsal_free import ATTENTION, RehearsalFree
from engram.models import Identity, LinearHead, Predictor, seeded
from engram.models.build import build
from engram.stats.continual import forgetting
from engram.testing import holds

SMALL: dict[str, Any] = {"network": {"name": "MLP", "hidden": [32]}, "epochs": 3, "batch_size": 32}
OLD, NEW = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)


def two_tasks(table: Table) -> tuple[Task, Task]:
    return tuple(Task(table.of_classes(c), index=i, classes=c) for i, c in enumerate((OLD, NEW)))  # type: ignore[return-value]


def learnt(table: Table, kind: type[Learner] = RehearsalFree, **settings: Any) -> Any:
    learner, run = kind(**{**SMALL, **settings}), Run()
    for task in two_tasks(table):
        learner.learn(task, run)
    return learner


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in learner.model.named_parameters()}


def same(a: Learner, b: Learner) -> bool:
    return all(torch.equal(p, weights(b)[name]) for name, p in weights(a).items())


def at_the_second_task(table: Table, **settings: Any) -> tuple[RehearsalFree, Batch]:
    """A learner that has just begun its second task, and all rows of it as a batch."""
    learner, run = RehearsalFree(**{**SMALL, **settings}), Run()
    first, second = two_tasks(table)
    learner.learn(first, run)
    learner._prepare(second, run)
    learner.start(second, run)
    return learner, second.train.batch(torch.arange(len(second.train)))


@holds("rehearsal-free", 1)
def test_a_student_that_is_its_teacher_costs_nothing(tiny: Table) -> None:
    learner, batch = at_the_second_task(tiny, feature=1.0, l2=1.0, ewc=1.0)
    output = learner.model.eval()(**batch.inputs)
    assert learner.logits is not None and learner.features is not None
    scores = output.logits[:, list(OLD)].detach().requires_grad_()
    learner.distil(scores, learner.logits(batch)[:, list(OLD)]).value.backward()
    assert scores.grad is not None and scores.grad.abs().max() < 1e-6
    assert learner.distance(output.pooler_output, learner.features(batch)).value == 0
    assert learner.penalty() == 0


@holds("rehearsal-free", 1)
def test_the_gradient_of_all_terms_on_old_columns_vanishes_at_the_teacher(tiny: Table) -> None:
    learner, batch = at_the_second_task(tiny, feature=1.0, l2=1.0, ewc=1.0)
    learner.terms(batch, learner.model.eval()(**batch.inputs)).value.backward()
    bias = learner.model.head.bias.grad  # type: ignore[union-attr]
    assert bias[:5].abs().max() < 1e-6 < 0.1 < bias[5:].abs().max()  # type: ignore[index, union-attr, operator]


def test_the_loss_written_down(tiny: Table) -> None:
    learner, batch = at_the_second_task(tiny, prediction=0.7, feature=0.3, l2=0.5)
    with seeded(torch.Generator().manual_seed(0)), torch.no_grad():
        teacher = learner.model(**batch.inputs)
        for p in learner.model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    output = learner.model(**batch.inputs)
    z, zt = output.logits.double(), teacher.logits.double()
    total = torch.tensor(0.0, dtype=torch.float64)
    for row, label in enumerate(batch.labels.tolist()):  # type: ignore[union-attr]
        for c in range(10):
            q = torch.sigmoid(zt[row, c]) if c < 5 else torch.tensor(float(c == label), dtype=torch.float64)
            p = torch.sigmoid(z[row, c])
            total += (0.7 if c < 5 else 1.0) * -(q * p.log() + (1 - q) * (1 - p).log()) / len(batch)
        total += 0.3 * (output.pooler_output[row] - teacher.pooler_output[row]).double().square().sum() / len(batch)
    for name, p in learner.model.named_parameters():
        moved = (p - learner.anchor[name]).double().square()
        total += 0.5 * (moved[:5] if name.startswith("head.") else moved).sum()
    assert learner.terms(batch, output).value.item() == pytest.approx(total.item(), rel=1e-5)


def test_the_softmax_form_written_down(tiny: Table) -> None:
    learner, batch = at_the_second_task(tiny, head="softmax", prediction=0.7, temperature=3.0)
    output = learner.model(**batch.inputs)
    z, zt = output.logits, learner.logits(batch)[:, :5]  # type: ignore[misc]
    rows = torch.arange(len(batch))
    expected = -z.log_softmax(1)[rows, batch.labels].mean()
    expected = expected - 0.7 * ((zt / 3).softmax(1) * (z[:, :5] / 3).log_softmax(1)).sum(1).mean()
    assert torch.allclose(learner.terms(batch, output).value, expected)


@holds("rehearsal-free", 2)
def test_terms_of_weight_zero_are_absent(tiny: Table) -> None:
    assert same(learnt(tiny, head="softmax", prediction=0.0), learnt(tiny, Finetune))
    plain = learnt(tiny)
    assert same(plain, learnt(tiny, feature=0.0, l2=0.0, ewc=0.0, temperature=9.0))
    for term in ({"feature": 1.0}, {"l2": 1.0}, {"ewc": 100.0}, {"prediction": 0.5}):
        assert not same(plain, learnt(tiny, **term))


@holds("rehearsal-free", 2)
def test_ewc_with_importance_one_is_l2(tiny: Table) -> None:
    learner, _ = at_the_second_task(tiny, ewc=0.5)
    other, _ = at_the_second_task(tiny, l2=0.5)
    learner.importances.values = {name: torch.ones_like(p) for name, p in learner.importances.values.items()}
    learner.strength = learner._strength()
    with seeded(torch.Generator().manual_seed(0)), torch.no_grad():
        for p, q in zip(learner.model.parameters(), other.model.parameters(), strict=True):
            p.add_(torch.randn_like(p))
            q.copy_(p)
    assert float(learner.penalty().detach()) == pytest.approx(float(other.penalty().detach()), rel=1e-6)
    assert float(other.penalty().detach()) > 1


@holds("rehearsal-free", 2)
def test_an_infinite_penalty_leaves_everything_at_the_anchor(tiny: Table) -> None:
    """At a rate so small that the penalty's own steps converge, and often enough that fine-tuning goes far beyond."""
    learner, run = RehearsalFree(**SMALL), Run()
    first, second = two_tasks(tiny)
    learner.learn(first, run)
    before, free = weights(learner), fork(learner)
    plan = Optimizer("sgd", lr=4e-7, momentum=0.0)
    for each, l2 in ((learner, 1e6), (free, 0.0)):
        each.l2, each.optimizer, each.epochs = l2, plan, 300  # type: ignore[attr-defined]
        each.learn(second, run)
    for name, p in before.items():
        held, far = (float((weights(each)[name][: len(p)] - p).abs().max()) for each in (learner, free))
        assert held < 1e-7
        assert name.startswith("head.") or far > 100 * held  # gradients of old rows are 0 at the teacher
    assert learner.importances.values == {}


@holds("rehearsal-free", 3)
def test_fisher_of_softmax_regression_by_enumeration() -> None:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=draws)
    labels = torch.tensor([0, 1, 2, 1, 0])
    with seeded(draws):
        model = Predictor(Identity(3), LinearHead(3, range(3)))
    W, b = (p.detach().double() for p in model.head.parameters())
    exact_W, exact_b = torch.zeros_like(W), torch.zeros_like(b)
    for row in x.double():
        p = (W @ row + b).softmax(0)
        for c in range(3):
            delta = torch.eye(3, dtype=torch.float64)[c] - p
            exact_W += p[c] * (delta[:, None] * row).square() / 5
            exact_b += p[c] * delta.square() / 5
    learner = RehearsalFree(network=model, head="softmax", prediction=0.0, ewc=1.0, fisher="all", epochs=0)
    learner.learn(Task(Table({"values": x}, labels)))
    assert torch.allclose(learner.importances.values["head.weight"], exact_W, atol=1e-5)
    assert torch.allclose(learner.importances.values["head.bias"], exact_b, atol=1e-5)
    empirical = importance(model, Table({"values": x}, labels))
    assert (empirical["head.weight"] - exact_W).abs().max() > 0.01


FULL: dict[str, Any] = {"network": {"name": "MLP", "hidden": [128, 128]}, "epochs": 15, "covers": "body"}


@pytest.fixture(scope="module")
def course(digits: Any, take: Callable[..., Any]) -> Callable[..., Any]:
    """course(seed, **settings): five tasks of two classes."""
    stages = class_stream(digits.train, digits.test, base=2, increment=2)
    done: dict[str, Any] = {}

    def once(seed: int = 0, **settings: Any) -> Any:
        key = f"{seed} {settings}"
        done[key] = done.get(key) or take(RehearsalFree(**{**FULL, **settings}), stages, Run(seed=seed))
        return done[key]

    return once


@holds("rehearsal-free", 4)
def test_distillation_with_sigmoids_beats_each_term_alone(course: Callable[..., Any]) -> None:
    def final(**settings: Any) -> float:
        return float(np.mean([course(seed, **settings).curve[-1] for seed in range(3)]))

    distilled = final()
    alone = {
        "softmax distillation": final(head="softmax"),
        "ewc": final(prediction=0.0, ewc=100.0),
        "l2": final(prediction=0.0, l2=0.01),
        "features": final(prediction=0.0, feature=0.1),
        "nothing": final(prediction=0.0),
    }
    for name, value in alone.items():
        assert distilled > value + 0.2, name
    assert distilled > final(feature=0.1) + 0.02


@holds("rehearsal-free", 4)
def test_penalties_lower_forgetting(course: Callable[..., Any]) -> None:
    def forgot(**settings: Any) -> float:
        return float(np.mean([forgetting(course(seed, **settings).matrix) for seed in range(3)]))

    plain, light, heavy = forgot(), forgot(l2=0.01), forgot(l2=0.1)
    assert plain > light > heavy and plain > heavy + 0.1
    assert plain > forgot(ewc=100.0) + 0.1


@holds("rehearsal-free", 4)
def test_from_a_pretrained_start_strong_l2_is_best(digits: Any, course: Callable[..., Any]) -> None:
    network = _autoencoder(digits.train)

    def final(**settings: Any) -> float:
        return float(np.mean([course(seed, **settings).curve[-1] for seed in range(3)]))

    anchored = final(network=network, l2=1.0, pretrained=True)
    assert anchored > final(network=network) + 0.02
    assert anchored > final(network=network, l2=1.0) + 0.05
    assert final() > final(l2=1.0) + 0.1


def _autoencoder(table: Table) -> nn.Module:
    """A network whose body has learnt to reconstruct the rows, without labels."""
    run = Run()
    network = build(FULL["network"], inputs=table.shapes, generator=run.generator("body"))
    with run.seeded("decoder"):
        decoder = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))

    def step(batch: Batch) -> Mean:
        found = decoder(network.encoder(**batch.inputs).pooler_output)  # type: ignore[operator]
        return Mean.of((found - batch.inputs["pixel_values"].flatten(1)).square())

    both = nn.ModuleList([network.encoder, decoder])  # type: ignore[list-item]
    batches = lambda epoch: table.batches(64, epoch=epoch)  # noqa: E731
    fit(step, batches, model=both, optimizer=Optimizer(), epochs=50, run=run)
    return network


@holds("rehearsal-free", 5)
def test_the_loss_is_in_the_head_and_not_in_the_features(course: Callable[..., Any]) -> None:
    found = course()
    assert found.task_aware.min() > 0.9
    assert found.curve[-1] < 0.6


def test_head_rows_of_new_classes_are_free(tiny: Table) -> None:
    learner, _ = at_the_second_task(tiny, l2=1.0)
    for name in ("head.weight", "head.bias"):
        assert (learner.strength[name][:5] == 1).all() and (learner.strength[name][5:] == 0).all()
    body, _ = at_the_second_task(tiny, l2=1.0, covers="body")
    assert not any(name.startswith("head.") for name in body.strength)
    one, _ = at_the_second_task(tiny, l2=1.0, covers=r"layers\.0.*weight")
    assert list(one.strength) == ["encoder.layers.0.0.weight"]


def test_only_the_attention_projections_of_a_transformer_learn(tiny: Table) -> None:
    network = {"name": "ViT", "image_size": 8, "patch_size": 4, "width": 16, "depth": 2, "heads": 2}
    learner = RehearsalFree(network=network, epochs=3, l2=0.1, covers=ATTENTION, trains=ATTENTION, pretrained=True)
    run = Run()
    first, second = two_tasks(tiny)
    learner.learn(first, run)
    before = weights(learner)
    learner.learn(second, run)
    moved = {name for name, p in weights(learner).items() if not torch.equal(p[: len(before[name])], before[name])}
    wanted = {name for name in before if name.startswith("head.") or any(k in name for k in ("query", "key", "value"))}
    assert moved == wanted
    assert set(learner.strength) == {name for name in wanted if not name.startswith("head.")}
    assert all(p.requires_grad for p in learner.model.parameters())


def test_importances_add_up_and_grow_with_the_head(tiny: Table) -> None:
    learner = learnt(tiny, ewc=1.0, fisher="true")
    second = importance(learner.model, tiny.of_classes(NEW))
    last = learnt(tiny, ewc=1.0, fisher="true", online=False)
    assert learner.importances.values["head.weight"].shape == (10, 32)
    assert torch.equal(last.importances.values["head.bias"], importance(last.model, tiny.of_classes(NEW))["head.bias"])
    assert (learner.importances.values["head.bias"] > second["head.bias"])[:5].all()
    assert learner.holds(tiny.ids) == tiny.ids
    assert learner.drop(tiny.take([0, 59])) == (tiny.ids[0], tiny.ids[59])


def test_what_was_forgotten_is_not_taught_back(tiny: Table) -> None:
    """Teacher and anchor are the model when the next task starts, not when the last one ended."""
    learner, run = RehearsalFree(**{**SMALL, "epochs": 20, "l2": 0.01}), Run()
    first, second = two_tasks(tiny)
    learner.learn(first, run)
    forget(learner, Request.of_classes(first.train, (2,)), Wiped())
    learner._prepare(second, run)
    learner.start(second, run)
    assert (learner.anchor["head.weight"][2] == 0).all()
    assert learner.logits is not None
    assert (learner.logits.values[:, 2] == 0).all()


class Wiped(GradientForgetter):
    """Sets what the head knows of class 2 to zero."""

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        import copy

        new = copy.deepcopy(model)
        for p in new.head.parameters():  # type: ignore[union-attr]
            p.data[2] = 0
        return new


def test_classes_that_come_again_are_trained_by_their_labels(tiny: Table) -> None:
    learner, run = RehearsalFree(**SMALL), Run()
    first, _ = two_tasks(tiny)
    learner.learn(first, run)
    again = Task(tiny.of_classes((3, 4, 5)), index=1, classes=(5,))
    learner._prepare(again, run)
    learner.start(again, run)
    assert learner.known == OLD and learner.old == [0, 1, 2]


def test_a_copy_goes_on_learning_the_same(tiny: Table) -> None:
    learner = RehearsalFree.tiny()
    first, second = two_tasks(tiny)
    learner.learn(first)
    twin = fork(learner)
    for each in (learner, twin):
        each.learn(second)
    assert same(learner, twin)


def test_wrong_head_is_named() -> None:
    with pytest.raises(EngramError, match="sigmoid"):
        RehearsalFree(head="sigmoid")
