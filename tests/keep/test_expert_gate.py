from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.keep.halves import NEW, OLD, SMALL, halves, same
from torch import Tensor

from engram.core.learner import fork
from engram.data.table import MISSING, Table, Target
from engram.data.task import Task
from engram.engine.predict import accuracy, predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.expert_gate import Choice, ExpertGate
from engram.models import load, save
from engram.models.build import build
from engram.models.routed import Routed
from engram.testing import holds

GATE: dict[str, Any] = {**SMALL, "code": 12, "gate_epochs": 15}


def inverted(table: Table) -> Table:
    return replace(table, inputs={"pixel_values": 1 - table.inputs["pixel_values"]})


def renamed(table: Table, prefix: str) -> Table:
    return replace(table, ids=tuple(f"{prefix} {id}" for id in table.ids))


def learnt(*tables: Table, run: Run | None = None, **settings: Any) -> ExpertGate:
    learner, run = ExpertGate(**{**GATE, **settings}), run or Run()
    for index, table in enumerate(tables):
        learner.learn(Task(table, index=index, classes=table.classes), run)
    return learner


def begun(learner: ExpertGate, task: Task) -> ExpertGate:
    """About to train on a further task."""
    run = Run(seed=1)
    learner._prepare(task, run)
    learner.start(task, run)
    return learner


def nudged(learner: ExpertGate) -> ExpertGate:
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in learner.expert.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draws))
    return learner


@holds("cl-in-neural-networks", 3)
def test_equal_tasks_are_wholly_related(tiny: Table) -> None:
    first = tiny.of_classes(OLD)
    learner = learnt(first, tiny.of_classes(NEW), renamed(first, "again"), epochs=1)
    last = learner.choices[2]
    assert last.relatedness[0] == pytest.approx(1.0, abs=1e-6)
    assert last.parent == 0 and last.relatedness[1] < 0.99


@holds("cl-in-neural-networks", 3)
def test_the_gate_tells_digits_from_inverted_other_ones(digits: Any) -> None:
    learner = learnt(digits.train.of_classes(OLD), inverted(digits.train.of_classes(NEW)), epochs=1)
    tests = [digits.test.of_classes(OLD), inverted(digits.test.of_classes(NEW))]
    right = [(predict(learner.gate, test).argmax(1) == k).double().mean() for k, test in enumerate(tests)]
    assert min(right) > 0.95


@holds("cl-in-neural-networks", 3)
def test_similar_tasks_are_more_related_than_dissimilar_ones(digits: Any) -> None:
    """Other rows of the same digits, against inverted ones, and against other digits."""
    half = digits.train.of_classes(OLD)
    one, other = half.take(range(0, len(half), 2)), half.take(range(1, len(half), 2))
    learner = learnt(one, inverted(digits.train.of_classes(NEW)), digits.train.of_classes(NEW), other, epochs=1)
    alike, inverse, others = learner.choices[3].relatedness
    assert alike > others + 0.05 and others > inverse + 0.05
    assert learner.choices[3].parent == 0


def test_relatedness_written_down(tiny: Table) -> None:
    learner = learnt(tiny.of_classes(OLD), tiny.of_classes(NEW), epochs=1)
    pixels = tiny.of_classes(NEW).inputs["pixel_values"].flatten(1)
    gate = learner.gate
    u = 1 / (1 + torch.exp(-(pixels - gate.mean) / gate.deviation))
    errors = []
    for part in gate.autoencoders:
        errors.append(sum(float((part(row[None])[1].detach() - row).square().sum()) for row in u) / len(u))
    wanted = 1 - (errors[0] - errors[1]) / errors[1]
    assert learner.relatedness(u, 1).tolist() == [pytest.approx(wanted, rel=1e-5)]


def test_a_tasks_own_autoencoder_rebuilds_unseen_rows_best(digits: Any) -> None:
    learner = learnt(digits.train.of_classes(OLD), digits.train.of_classes(NEW), epochs=1)
    test = [digits.test.of_classes(half) for half in (OLD, NEW)]
    errors = torch.stack([-predict(learner.gate, table).mean(0) for table in test])
    assert errors[0, 0] < errors[0, 1] and errors[1, 1] < errors[1, 0]


def test_the_encoder_under_the_gate_never_changes_nor_does_the_standardisation(tiny: Table) -> None:
    draws = torch.Generator().manual_seed(0)
    model = build({"name": "ConvNet", "widths": [4, 8]}, inputs=tiny.shapes, classes=range(2), generator=draws)
    learner = learnt(tiny.of_classes(OLD), backbone=model)
    before = {name: value.clone() for name, value in learner.gate.state_dict().items() if "autoencoders" not in name}
    learner.learn(Task(tiny.of_classes(NEW), index=1, classes=NEW))
    after = learner.gate.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    given = {name: value for name, value in model.state_dict().items() if name.startswith("encoder")}
    assert given and all(torch.equal(value, after[name]) for name, value in given.items())
    u = learner.gate.squashed(predict(learner.gate.encoder, tiny.of_classes(OLD), "pooler_output"))
    assert torch.allclose(torch.logit(u.double()).mean(0), torch.zeros(8, dtype=torch.float64), atol=1e-4)


def test_earlier_experts_and_autoencoders_keep_their_bits(tiny: Table) -> None:
    learner = learnt(tiny.of_classes(OLD))
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    learner.learn(Task(tiny.of_classes(NEW), index=1, classes=NEW))
    after = learner.model.state_dict()
    assert all(torch.equal(value, after[name][: len(value)]) for name, value in before.items())


@pytest.mark.parametrize(("related", "distilled"), [(-100.0, True), (100.0, False)])
def test_relatedness_above_the_threshold_distils(tiny: Table, related: float, distilled: bool) -> None:
    learner = begun(learnt(tiny.of_classes(OLD), related=related), halves(tiny)[1])
    assert isinstance(learner.choices[1], Choice) and learner.choices[1].distilled == distilled
    assert (learner.teacher is not None) == (learner.old_head is not None) == distilled


def test_the_losses_written_down(tiny: Table) -> None:
    task = halves(tiny)[1]
    batch = task.train.batch(torch.arange(30))
    plain = nudged(begun(learnt(tiny.of_classes(OLD), related=100.0), task))
    taught = nudged(begun(learnt(tiny.of_classes(OLD), related=-100.0, weight=0.7, temperature=3.0), task))
    parent = taught.routed.experts[0]
    assert batch.labels is not None and taught.old_head is not None
    wanted = {}
    for name, learner in (("plain", plain), ("taught", taught)):
        z: Tensor = learner.expert(**batch.inputs).logits[:, :5].detach().double()
        wanted[name] = F.cross_entropy(z, batch.labels - 5).item()
    recorded = parent(**batch.inputs).logits[:, :5].detach().double() / 3.0
    said = taught.old_head(taught.expert(**batch.inputs).pooler_output)[:, :5].detach().double() / 3.0
    distilled = -(recorded.softmax(1) * said.log_softmax(1)).sum(1).mean().item()
    assert plain.step(batch, task).value.item() == pytest.approx(wanted["plain"], rel=1e-5)
    assert taught.step(batch, task).value.item() == pytest.approx(wanted["taught"] + 0.7 * distilled, rel=1e-5)
    assert plain.places(torch.tensor([5, 9, MISSING, 7])).tolist() == [0, 4, MISSING, 2]


def test_a_related_experts_features_are_where_a_new_one_starts(tiny: Table) -> None:
    learner = learnt(tiny.of_classes(OLD))
    begun(learner, halves(tiny)[1])
    old, new = (dict(expert.named_parameters()) for expert in learner.routed.experts)
    assert all(torch.equal(old[name], p) == name.startswith("encoder") for name, p in new.items())


def test_what_was_learnt_is_kept(digits: Any) -> None:
    """The gate loses some rows, experts nothing."""
    halves_of = [digits.train.of_classes(OLD), inverted(digits.train.of_classes(NEW))]
    learner = learnt(halves_of[0], epochs=10)
    test = digits.test.of_classes(OLD)
    before = accuracy(learner.model, test)
    learner.learn(Task(halves_of[1], index=1, classes=NEW))
    assert accuracy(learner.model, test) > before - 0.03
    assert accuracy(learner.model, inverted(digits.test.of_classes(NEW))) > 0.85


def test_classes_may_come_again_in_another_domain(digits: Any) -> None:
    table = digits.train.of_classes((0, 1, 2))
    learner = learnt(table, renamed(inverted(table), "inverted"), epochs=10)
    test = digits.test.of_classes((0, 1, 2))
    assert min(accuracy(learner.model, test), accuracy(learner.model, inverted(test))) > 0.9


def test_relatedness_is_measured_on_validation_rows_where_there_are_some(tiny: Table) -> None:
    first, second = halves(tiny)
    valid = renamed(inverted(second.train), "valid")
    given = learnt(first.train)
    given.learn(Task(second.train, valid, 1, NEW))
    held = learnt(first.train)
    held.learn(second)
    assert given.choices[1].relatedness != held.choices[1].relatedness
    assert given.holds([valid.ids[0]]) and not held.holds([valid.ids[0]])


def test_the_model_is_saved_with_its_gate(tiny: Table, tmp_path: Path) -> None:
    learner = learnt(tiny.of_classes(OLD), tiny.of_classes((5, 6)))
    save(learner.model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert isinstance(again, Routed)
    assert torch.equal(predict(again, tiny), predict(learner.model, tiny))


def test_a_copy_goes_on_learning_the_same(tiny: Table) -> None:
    learner = learnt(tiny.of_classes(OLD))
    twin = fork(learner)
    for each in (learner, twin):
        each.learn(halves(tiny)[1])
    assert same(learner, twin) and learner.choices == twin.choices  # type: ignore[attr-defined]


def test_what_does_not_suit_it_is_named(tiny: Table) -> None:
    numbers = Table(tiny.inputs, torch.zeros(len(tiny), 1))
    assert numbers.target == Target.NUMBERS
    with pytest.raises(EngramError, match="target of these rows is numbers"):
        ExpertGate(**GATE).learn(Task(numbers))
    with pytest.raises(EngramError, match="a task brings 10 classes, and an expert has 4 outputs; raise outputs"):
        ExpertGate(**GATE, outputs=4).learn(Task(tiny))
