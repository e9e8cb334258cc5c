from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.keep.halves import SMALL, finals, halves, learnt, same, weights

from engram.core.learner import fork
from engram.data.streams import class_stream
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.curvature import flat, mean_gradient
from engram.engine.losses import per_row
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.keep.finetune import Finetune
from engram.keep.mir import LEAST, MIR
from engram.testing import holds

ONLINE: dict[str, Any] = {"optimizer": Optimizer("sgd", lr=0.1, momentum=0.0), "epochs": 1, "batch_size": 10}


def doubled(table: Table) -> Table:
    return Table({name: value.double() for name, value in table.inputs.items()}, table.labels, table.ids)


def learner_of_all(table: Table, lr: float) -> MIR:
    learner = MIR(network=SMALL["network"])
    learner.learn(Task(table))
    learner.optimizer = Optimizer("sgd", lr=lr, momentum=0.0)
    learner.model.double()
    return learner


@holds("cl-in-neural-networks", 5)
def test_the_score_is_the_step_along_both_gradients_to_first_order(tiny: Table) -> None:
    learner = learner_of_all(tiny, 1e-4)
    rows, held = doubled(tiny.take(range(0, 60, 7))), doubled(tiny.take(range(1, 60, 6)))
    scores = learner.interference(rows, held, Run())
    step = flat(mean_gradient(learner.model, rows))
    alike = [float(step @ flat(mean_gradient(learner.model, held.take([row])))) for row in range(len(held))]
    wanted = -1e-4 * torch.tensor(alike)
    assert (scores - wanted).norm() < 0.01 * wanted.norm()
    assert (scores < 0).any() and (scores > 0).any()


def test_the_score_is_what_a_real_step_does_and_the_model_stays(tiny: Table) -> None:
    learner = learner_of_all(tiny, 0.5)
    rows, held = doubled(tiny.take(range(0, 60, 7))), doubled(tiny.take(range(1, 60, 6)))
    before = weights(learner)
    scores = learner.interference(rows, held, Run())
    assert all(torch.equal(before[name], p) for name, p in weights(learner).items())

    def losses() -> torch.Tensor:
        assert held.labels is not None
        return per_row(predict(learner.model, held).double(), held.labels)

    then, slope = losses(), mean_gradient(learner.model, rows)
    with torch.no_grad():
        for name, p in learner.model.named_parameters():
            p.sub_(0.5 * slope[name])
    assert torch.allclose(scores.double(), (losses() - then).double(), atol=1e-6)
    assert scores.abs().max() > 0.01


def test_the_most_interfered_candidates_are_replayed(tiny: Table) -> None:
    learner, run = MIR(network=SMALL["network"], buffer=25, candidates=25, replayed=6), Run()
    first, second = halves(tiny)
    learner.learn(first, run)
    learner._prepare(second, run)
    learner.start(second, run)
    new, old = next(iter(learner.batches(second, 0, run)))
    held = learner.kept.table
    rows = second.train.take(_places(second.train, new))
    scores = learner.interference(rows, held, run)
    assert old is not None and len(old) == 6 and set(held.ids) <= set(first.train.ids)
    worst = held.take(scores.topk(6).indices).inputs["pixel_values"]
    assert sorted(map(str, worst.tolist())) == sorted(map(str, old.inputs["pixel_values"].tolist()))
    logits = [learner.model(**batch.inputs).logits.detach() for batch in (new, old)]
    wanted = sum(
        -z.log_softmax(1)[torch.arange(len(z)), batch.labels].mean()
        for z, batch in zip(logits, (new, old), strict=True)
    )
    assert learner.step((new, old), second).value.item() == pytest.approx(float(wanted), rel=1e-5)


def _places(table: Table, batch: Any) -> list[int]:
    """Where the rows of a batch stand in a table, by their contents."""
    rows = table.inputs["pixel_values"].flatten(1)
    return [int((rows == row.flatten()).all(1).nonzero()[0]) for row in batch.inputs["pixel_values"]]


def test_scores_may_be_taken_against_the_least_past_loss(tiny: Table) -> None:
    learner, plain = (MIR(network=SMALL["network"], buffer=25, best=best) for best in (True, False))
    first = halves(tiny)[0]
    learner.learn(first)
    plain.model = learner.model
    held, rows = learner.kept.table, first.train.take(range(10))
    now = predict(learner.model, held, "loss")
    assert torch.allclose(torch.as_tensor(held.extra[LEAST]), now, atol=1e-6)
    lowered = held.with_column(LEAST, now - 0.25 * torch.arange(25).remainder(2))
    learner.kept.drop(held)
    learner.kept.offer(lowered)
    found, usual = (each.interference(rows, lowered, Run()) for each in (learner, plain))
    assert torch.allclose(found - usual, 0.25 * torch.arange(25).remainder(2), atol=1e-5)
    with torch.no_grad():
        for p in learner.model.parameters():
            p.mul_(1.2)
    better = predict(learner.model, held, "loss") < torch.as_tensor(lowered.extra[LEAST]) - 1e-4
    learner.interference(rows, learner.kept.table, Run())
    after = learner.kept.table.select(held.ids).extra[LEAST]
    changed = torch.as_tensor(after) < torch.as_tensor(lowered.extra[LEAST]) - 1e-4
    assert torch.equal(changed, better) and better.any()


def test_batch_statistics_are_not_moved_by_scoring(tiny: Table) -> None:
    learner = MIR(network={"name": "MLP", "hidden": [16], "norm": "batch"}, batch_size=15)
    learner.learn(halves(tiny)[0])
    state = {name: value.clone() for name, value in learner.model.train().state_dict().items()}
    learner.interference(tiny.take(range(10)), tiny.take(range(10, 20)), Run())
    assert learner.model.training
    assert all(torch.equal(state[name], value) for name, value in learner.model.state_dict().items())


def test_without_a_buffer_it_is_fine_tuning(tiny: Table) -> None:
    tuned, learner = (kind(network=SMALL["network"], **ONLINE) for kind in (Finetune, MIR))
    for each in (tuned, learner):
        each.learn(halves(tiny)[0])
    assert same(tuned, learner)


@holds("cl-in-neural-networks", 5)
def test_chosen_replay_is_as_good_as_random_replay_and_both_beat_fine_tuning(
    digits: Any, take: Callable[..., Any]
) -> None:
    stages = class_stream(digits.train, digits.test, base=2, increment=2)
    network = {"name": "MLP", "hidden": [100, 100]}
    chosen, at_random, lost = finals(
        take,
        stages,
        MIR(network=network, buffer=100, epochs=3),
        MIR(network=network, buffer=100, epochs=3, candidates=10),
        Finetune(network=network, **{**ONLINE, "epochs": 3}),
    )
    assert chosen > at_random - 0.01
    assert min(chosen, at_random) > lost + 0.2


def test_a_copy_goes_on_learning_the_same(tiny: Table) -> None:
    learner = MIR.tiny()
    first, second = halves(tiny)
    learner.learn(first)
    twin = fork(learner)
    for each in (learner, twin):
        each.learn(second)
    assert same(learner, twin) and not same(learner, learnt(MIR.tiny(), tiny, Run(seed=1)))
