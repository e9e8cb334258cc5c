from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.keep.halves import NEW, OLD, SMALL, begun, halves, learnt, same, weights

from engram.core.learner import fork
from engram.data.table import Batch, Table
from engram.data.task import Task
from engram.engine.optimizer import Optimizer
from engram.engine.predict import features as features_of
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.encoder_based_lwf import EncoderBasedLwF
from engram.keep.lwf import LwF
from engram.models import seeded
from engram.testing import holds

CODED: dict[str, Any] = {**SMALL, "code": 8, "code_epochs": 5, "warmup": 0}


def moved(learner: Any, table: Table) -> torch.Tensor:
    """How far the first task's codes of rows are from those of the model before, mean over rows, []."""
    now = features_of(learner.model, table)
    return learner.moved(now, learner.features(table.batch(torch.arange(len(table))))).value


@holds("cl-in-neural-networks", 6)
def test_codes_of_features_that_stay_have_no_loss(tiny: Table) -> None:
    learner = begun(EncoderBasedLwF(**CODED), tiny)
    assert moved(learner, tiny.of_classes(NEW)).item() == 0
    with torch.no_grad():
        learner.model.encoder.layers[0][0].weight.add_(0.1)
    assert moved(learner, tiny.of_classes(NEW)).item() > 1e-3


@holds("cl-in-neural-networks", 6)
def test_with_alpha_zero_it_is_learning_without_forgetting(tiny: Table) -> None:
    plain = learnt(LwF(**SMALL, weight=0.7, temperature=3.0), tiny)
    without = learnt(EncoderBasedLwF(**CODED, weight=0.7, temperature=3.0, alpha=0.0), tiny)
    assert same(without, plain) and not without.encoders.values
    assert not same(learnt(EncoderBasedLwF(**CODED, weight=0.7, temperature=3.0), tiny), plain)


def test_the_loss_written_down(tiny: Table) -> None:
    learner = begun(EncoderBasedLwF(**CODED, alpha=0.4, weight=0.7), tiny)
    batch = tiny.of_classes(NEW).batch(torch.arange(30))
    with torch.no_grad():
        before = learner.model.eval()(**batch.inputs)
        with seeded(torch.Generator().manual_seed(0)):
            for p in learner.model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    output = learner.model(**batch.inputs)
    z, total = output.logits.detach(), 0.0
    weight, bias = (learner.encoders.values[f"0.{name}"] for name in ("weight", "bias"))
    assert batch.labels is not None and weight.shape == (8, 32)
    for row, label in enumerate(batch.labels.tolist()):
        recorded = (before.logits[row, :5] / 2).softmax(0)
        codes = [torch.sigmoid(weight @ f[row] + bias) for f in (output.pooler_output, before.pooler_output)]
        total -= float(z[row].log_softmax(0)[label]) + 0.7 * float((recorded * (z[row, :5] / 2).log_softmax(0)).sum())
        total += 0.4 / 2 * (codes[0] - codes[1]).square().sum().item()
    assert learner.terms(batch, output).value.item() == pytest.approx(total / len(batch), rel=1e-5)


def test_codes_of_all_earlier_tasks_count(tiny: Table) -> None:
    learner, run = EncoderBasedLwF(**CODED), Run()
    tasks = [Task(tiny.of_classes(c), index=k, classes=c) for k, c in enumerate(((0, 1), (2, 3), (4, 5)))]
    for task in tasks[:2]:
        learner.learn(task, run)
    learner._prepare(tasks[2], run)
    learner.start(tasks[2], run)
    one, other = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0)).unbind()
    whole, parts = learner.moved(one, other).value, []
    for pair in list(learner.held):
        learner.held = [pair]
        parts.append(learner.moved(one, other).value)
    assert len(parts) == 2 and torch.allclose(whole, torch.stack(parts).sum(), rtol=1e-6)


def test_an_autoencoders_loss_written_down(tiny: Table) -> None:
    learner = EncoderBasedLwF(**CODED, reconstruction=0.3)
    for task in halves(tiny):
        learner.learn(task)
    features = features_of(learner.model, tiny.of_classes(NEW))
    model = learner.autoencoder(Task(tiny.of_classes(NEW)), Run())
    labels = tiny.of_classes(NEW).labels
    assert labels is not None
    batch = Batch({"values": features}, labels, torch.arange(len(features)))
    rebuilt = model(features)[1]
    logits = learner.model.head(rebuilt)[:, 5:]  # type: ignore[operator]
    wanted = 0.3 * (rebuilt - features).square().sum(1).mean() + F.cross_entropy(logits, labels - 5)
    found = learner.rebuilding(batch, model, learner.model.head, NEW).value  # type: ignore[arg-type]
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_the_code_keeps_what_the_task_needs(digits: Any) -> None:
    """A head that was trained on features tells classes apart from six code units, and autoencoders leave it alone."""
    coded = {**CODED, "code": 6, "code_epochs": 30, "code_optimizer": Optimizer(lr=3e-2)}
    learner = EncoderBasedLwF(**{**coded, "epochs": 8})
    task = Task(digits.train.of_classes(OLD).take(range(0, 600, 2)), classes=OLD)
    learner.learn(task)
    before = weights(learner)
    model, test = learner.autoencoder(task, Run()), digits.test.of_classes(OLD)
    rebuilt = model(features_of(learner.model, test))[1]
    told = learner.model.head(rebuilt).argmax(1)  # type: ignore[operator]
    assert (told == test.labels).double().mean() > 0.9
    assert all(torch.equal(before[name], p) for name, p in weights(learner).items())


def test_the_warm_up_moves_new_rows_of_the_head_alone(tiny: Table) -> None:
    learner, run = EncoderBasedLwF(**{**CODED, "warmup": 3}), Run()
    first, second = halves(tiny)
    learner.learn(first, run)
    learner._prepare(second, run)
    before = weights(learner)
    learner.start(second, run)
    after = weights(learner)
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert moved == {"head.weight", "head.bias"}
    assert torch.equal(after["head.weight"][:5], before["head.weight"][:5])
    assert (after["head.weight"][5:] != before["head.weight"][5:]).any(1).all()


def test_codes_move_less_than_without(digits: Any) -> None:
    """What the held codes do: with the same distillation, the codes of the new task's rows stay nearer to what they
    were."""
    far = []
    for alpha in (20.0, 1e-9):
        learner = EncoderBasedLwF(**{**CODED, "epochs": 5}, alpha=alpha)
        learner.learn(Task(digits.train.of_classes(OLD).take(range(0, 600, 3)), classes=OLD))
        new = digits.train.of_classes(NEW).take(range(0, 600, 3))
        twin, before = fork(learner), features_of(learner.model, new)
        twin.learn(Task(new, index=1, classes=NEW))
        far.append(twin.moved(features_of(twin.model, new), before).value)  # type: ignore[attr-defined]
    assert far[0] < 0.3 * far[1]


def test_a_copy_goes_on_learning_the_same(tiny: Table) -> None:
    learner = EncoderBasedLwF.tiny()
    first, second = halves(tiny)
    learner.learn(first)
    twin = fork(learner)
    for each in (learner, twin):
        each.learn(second)
    assert same(learner, twin)


def test_a_network_without_a_class_head_is_refused(tiny: Table) -> None:
    numbers = Table(tiny.inputs, torch.zeros(len(tiny), 2))
    with pytest.raises(EngramError, match="wants an encoder with a class head"):
        EncoderBasedLwF(**CODED).learn(Task(numbers))
