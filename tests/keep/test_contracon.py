"""ConTraCon: what moves and what does not, the choice of parents and copies, and the task found by entropy."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.keep.halves import NEW, OLD, halves, learnt, same
from torch import Tensor, nn

from engram.data.table import MISSING, Table, Target
from engram.data.task import Task
from engram.engine.optimizer import Optimizer
from engram.engine.predict import accuracy, predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.contracon import Best, ConTraCon, Together, restarted
from engram.models import load, save
from engram.models.convolved_attention import PARENTLESS
from engram.models.heads import LinearHead
from engram.reproduce import contracon as claims
from engram.testing import holds

SMALL: dict[str, Any] = {
    "network": {"name": "CompactTransformer", "width": 16, "depth": 2, "heads": 2},
    "epochs": 3,
    "batch_size": 32,
    "kernel": 3,
    "optimizer": Optimizer("adamw", lr=1e-2, weight_decay=6e-7),
    "head_lr": 0.1,
    "augmented": 3,
}


def told(learner: ConTraCon, table: Table, task: int) -> Tensor:
    with torch.no_grad():
        found: Tensor = learner.model(**table.inputs, task=torch.full((len(table),), task)).logits
    return found


def state(learner: ConTraCon) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in learner.model.state_dict().items()}


def thirds(table: Table) -> list[Table]:
    return [table.of_classes(classes) for classes in ((0, 1, 2), (3, 4, 5), (6, 7, 8))]


@pytest.fixture(scope="module")
def trained(tiny: Table) -> ConTraCon:
    return learnt(ConTraCon(**SMALL), tiny)


@holds("contracon", 1)
def test_no_earlier_task_moves_by_a_bit(tiny: Table) -> None:
    learner, run, before = ConTraCon(**SMALL), Run(), []
    for k, table in enumerate(thirds(tiny)):
        learner.learn(Task(table, index=k, classes=table.classes), run)
        for t, wanted in enumerate(before):
            found = told(learner, tiny, t)
            assert torch.equal(found[:, : wanted.shape[1]], wanted)
            assert bool(found[:, wanted.shape[1] :].isneginf().all())
        before = [told(learner, tiny, t) for t in range(k + 1)]


def test_a_further_task_trains_its_part_alone(tiny: Table) -> None:
    learner, run = ConTraCon(**SMALL), Run()
    first, second = halves(tiny)
    learner.learn(first, run)
    before = state(learner)
    learner.learn(second, run)
    after = state(learner)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    new = {name for name in after if name not in before}
    assert new and all(name.startswith("parts.1.") for name in new)
    assert all(p.requires_grad for p in learner.model.parameters())  # whatever comes next may train it


def test_the_first_task_trains_all_and_the_second_every_part_of_its_own(tiny: Table) -> None:
    learner, run = ConTraCon(**SMALL), Run()
    first, second = halves(tiny)
    for task in (first, second):
        learner._prepare(task, run)
        learner.start(task, run)
        learner.model.eval()
        moving = {name for name, p in learner.model.named_parameters() if p.requires_grad}
        loss = learner.step(task.train.batch(torch.arange(20)), task).value
        loss.backward()
        reached = {name for name, p in learner.model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        assert reached <= moving
        part = f"parts.{learner.newest}."
        assert {name for name in moving if name.startswith(part)} <= reached | {f"{part}own.9"}
        assert ("encoder.tokenizer.0.0.weight" in reached) == (task is first)
        learner.model.zero_grad(set_to_none=True)


def test_the_loss_is_smoothed_among_the_tasks_own_classes(tiny: Table) -> None:
    learner = learnt(ConTraCon(**SMALL), tiny)
    learner.rows = tiny
    batch = tiny.of_classes(NEW).batch(torch.arange(6))
    logits = told(learner, Table(batch.inputs), 1)[:, list(NEW)].log_softmax(1)
    targets = torch.nn.functional.one_hot(batch.labels - 5, 5) * 0.9 + 0.1 / 5
    wanted = -(targets * logits).sum(1)
    found = learner.step(batch, halves(tiny)[1])
    assert float(found.value.detach()) == pytest.approx(float(wanted.mean()), rel=1e-5)
    gap = replace(batch, labels=torch.where(torch.arange(6) < 2, MISSING, batch.labels))
    found = learner.step(gap, halves(tiny)[1])
    assert float(found.value.detach()) == pytest.approx(float(wanted[2:].mean()), rel=1e-5)


def test_the_rate_falls_along_a_cosine_and_starts_again_half_way() -> None:
    rates = [restarted(1e-3, epoch, 20) for epoch in range(20)]
    assert rates[:10] == rates[10:] and rates[0] == 1e-3
    assert rates[5] == pytest.approx((1e-3 + 1e-5) / 2)
    assert sorted(rates[:10], reverse=True) == rates[:10] and rates[9] > 1e-5
    assert restarted(1e-6, 3, 8) == pytest.approx(1e-6) and restarted(1e-3, 0, 1) == 1e-3


def test_head_and_rest_have_optimisers_of_their_own(tiny: Table) -> None:
    learner, run = ConTraCon(**SMALL), Run()
    task = halves(tiny)[0]
    learner._prepare(task, run)
    learner.start(task, run)
    both: Any = learner.optimizers()[""]
    assert [type(part).__name__ for part in both.parts] == ["AdamW", "SGD"]
    held = [{id(p) for group in part.param_groups for p in group["params"]} for part in both.parts]
    assert held[1] == {id(p) for p in learner.part.head.parameters()}
    assert held[0] | held[1] == {id(p) for p in learner.model.parameters()} and not held[0] & held[1]
    assert both.parts[1].param_groups[0]["lr"] == 0.1 and both.parts[1].param_groups[0]["momentum"] == 0


def test_two_optimisers_step_as_one_and_are_resumed_as_one() -> None:
    def made() -> tuple[list[torch.nn.Parameter], Together]:
        ps = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        return ps, Together(torch.optim.AdamW(ps[:1], lr=0.1), torch.optim.SGD(ps[1:], lr=0.5))

    def step(ps: list[torch.nn.Parameter], both: Together, scale: float) -> None:
        both.zero_grad()
        (scale * sum(p.square().sum() for p in ps)).backward()
        both.step()

    ps, both = made()
    step(ps, both, 1.0)
    assert ps[1].tolist() == [0.0, 0.0] and ps[0].tolist() != [1.0, 1.0]
    qs, twin = made()
    twin.load_state_dict(copy.deepcopy(both.state_dict()))
    with torch.no_grad():
        for p, q in zip(ps, qs, strict=True):
            q.copy_(p)
    step(ps, both, 3.0)
    step(qs, twin, 3.0)
    assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))


def test_the_parent_is_the_first_task_or_the_one_that_is_surest(tiny: Table) -> None:
    one, two, _ = thirds(tiny)
    inverse = replace(two, inputs={"pixel_values": 1 - two.inputs["pixel_values"]})
    again = replace(two, ids=tuple(f"again {id}" for id in two.ids))
    tables = (one, inverse, again)
    parents = {}
    for parent in ("first", "similar"):
        learner, run = ConTraCon(**{**SMALL, "parent": parent}), Run()
        for k, table in enumerate(tables[:2]):
            learner.learn(Task(table, index=k, classes=table.classes), run)
        mean = predict(learner.model, again, lambda output, _: output.extra["entropies"]).mean(0)
        assert learner.nearest(again, run) == int(mean.argmin())
        learner.learn(Task(again, index=2, classes=again.classes), run)
        parents[parent] = [part.parent for part in learner.whole.parts], int(mean.argmin())
    assert parents["first"][0] == [PARENTLESS, 0, 0]
    assert parents["similar"][0] == [PARENTLESS, 0, parents["similar"][1]]


def test_the_best_copy_on_held_out_rows_is_kept(tiny: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    task, hits, seen = halves(tiny)[0], iter([3, 9, 4]), []
    original = Best.offer

    def offer(self: Best, right: int, *modules: Any) -> None:
        seen.append([p.detach().clone() for module in modules for p in module.parameters()])
        original(self, next(hits), *modules)

    monkeypatch.setattr(Best, "offer", offer)
    learner = ConTraCon(**{**SMALL, "held_out": 0.2})
    learner.learn(task)
    kept = [*learner.part.parameters(), *learner.whole.encoder.parameters()]
    assert len(seen) == 3 and all(torch.equal(p, value) for p, value in zip(kept, seen[1], strict=True))
    assert len(learner.validation) == int(0.2 * len(task.train))
    assert {*learner.validation.ids, *learner.rows.ids} == set(task.train.ids)
    assert learner.holds(task.train.ids) == task.train.ids


def test_hits_are_counted_on_validation_rows_that_a_task_brings(tiny: Table) -> None:
    first, second = halves(tiny)
    valid = replace(second.train, ids=tuple(f"valid {id}" for id in second.train.ids))
    learner = ConTraCon(**{**SMALL, "held_out": 0.2, "epochs": 1})
    learner.learn(first)
    learner.learn(Task(second.train, valid, 1, NEW))
    assert learner.validation is valid and learner.rows is second.train
    right = told(learner, valid, 1).argmax(1) == valid.labels
    assert learner.best.hits == int(right.sum())
    assert learner.holds(valid.ids) == valid.ids
    plain = ConTraCon(**{**SMALL, "epochs": 1})
    plain.learn(Task(first.train, valid, 0, OLD))
    assert plain.holds(valid.ids) == () and plain.best.hits == -1


def test_the_first_of_equal_copies_stays() -> None:
    part, best = LinearHead(1), Best()
    part.grow([0], torch.Generator())
    for hits, value in ((2, 1.0), (2, 5.0), (1, 7.0)):
        with torch.no_grad():
            part.weight.fill_(value)
        best.offer(hits, part)
    other = Best()
    other.load_state_dict(best.state_dict())
    other.restore(part)
    assert part.weight.item() == 1.0 and other.hits == 2


def test_saves_and_loads(trained: ConTraCon, tiny: Table, tmp_path: Any) -> None:
    save(trained.model, tmp_path / "model")
    assert torch.equal(predict(load(tmp_path / "model"), tiny), predict(trained.model, tiny))


def test_told_its_task_a_row_is_at_least_as_well_told(trained: ConTraCon, tiny: Table) -> None:
    for classes in (OLD, NEW):
        rows = tiny.of_classes(classes)
        assert accuracy(trained.model, rows) <= accuracy(trained.model, rows, classes=classes)


def test_an_interrupted_training_goes_on_where_it_was(tiny: Table, tmp_path: Any, monkeypatch: Any) -> None:
    """The second task comes, and the process dies in its last epoch; a new one ends with equal bits."""
    monkeypatch.setattr("engram.engine.fit.CHECKPOINT_EVERY", 0.0)

    def through(run: Run, dies: bool = False) -> ConTraCon:
        learner = ConTraCon(**{**SMALL, "held_out": 0.2, "parent": "similar"})
        first, second = halves(tiny)
        learner.learn(first, run)
        if dies:
            whole = learner.batches
            monkeypatch.setattr(learner, "batches", lambda t, e, r: whole(t, e, r) if e < 2 else 1 / 0)
        learner.learn(second, run)
        return learner

    calm = through(Run())
    with pytest.raises(ZeroDivisionError):
        through(Run(tmp_path / "run"), dies=True)
    resumed = through(Run(tmp_path / "run"))
    assert same(calm, resumed) and calm.best.hits == resumed.best.hits >= 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"network": "MLP"}, "CompactTransformer"),
        ({"parent": "frist"}, "first"),
        ({"held_out": 1.0}, "share"),
        ({"kernel": 4}, "odd"),
        ({"plain": 0}, "views"),
    ],
)
def test_settings_that_cannot_be_are_refused(tiny: Table, settings: dict[str, Any], words: str) -> None:
    learner = ConTraCon(**{**SMALL, **settings})
    with pytest.raises(EngramError, match=words):
        learner.learn(halves(tiny)[0])
    assert not learner.started


def test_rows_that_are_no_images_or_have_no_classes_are_refused(tiny: Table) -> None:
    values = tiny.inputs["pixel_values"].flatten(1)
    with pytest.raises(EngramError, match="pixel_values"):
        ConTraCon(**SMALL).learn(Task(Table({"values": values}, tiny.labels, tiny.ids)))
    numbers = Table(tiny.inputs, values[:, :2], tiny.ids)
    assert numbers.target == Target.NUMBERS
    with pytest.raises(EngramError, match="classes"):
        ConTraCon(**SMALL).learn(Task(numbers))


@holds("contracon", 5)
def test_five_pairs_are_kept_better_than_by_fine_tuning_and_by_heads_alone() -> None:
    found, alone = claims.course(ConTraCon, 0)[1], claims.course(claims.HeadAlone, 0)[1]
    assert found.aware > claims.finetuned(0) + 0.2
    assert found.aware > alone.aware
    assert found.moved == alone.moved == 0


def shares(model: nn.Module, seed: int) -> tuple[float, float]:
    """Of every third test row: right among all classes, less what a task at random would give, and its task found. Row
    by row, what is right among all is right among its task's."""
    found = []
    for stage in claims.five_pairs("pycil", seed):
        rows, own = stage.test.take(range(0, len(stage.test), 3)), torch.tensor(stage.task.classes)
        logits, labels = predict(model, rows), torch.as_tensor(rows.labels)
        said, told = logits.argmax(1), own[logits[:, own].argmax(1)] == labels
        assert bool((told | (said != labels)).all())
        found.append(torch.stack([(said == labels).double() - told.double() / 5, torch.isin(said, own)]).mean(1))
    gain, right_task = torch.stack(found).mean(0).tolist()
    return gain, right_task


@holds("contracon", 6)
def test_entropy_finds_the_task_better_than_chance_and_told_is_never_worse() -> None:
    """Chance is a fifth. With noise that suits images of 64 pixels at each of three seeds and twice as often on their
    mean; with that of the paper on the mean alone (0.35, 0.42, 0.13)."""
    learners = [claims.taught(ConTraCon, seed)[0] for seed in range(3)]
    soft = [shares(claims.softened(learner), seed) for seed, learner in enumerate(learners)]
    loud = [shares(learner.model, seed) for seed, learner in enumerate(learners)]
    assert all(gain > 0.05 and right_task > 0.25 for gain, right_task in soft)
    assert sum(right_task for _, right_task in soft) / 3 > 0.4
    assert sum(gain for gain, _ in loud) / 3 > 0.08
