from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests.keep.halves import NEW, OLD, SMALL, finals, halves, learnt
from torch import Tensor

from engram.core.erasure import forget
from engram.core.learner import fork
from engram.core.request import Request
from engram.data.streams import class_stream
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.predict import accuracy, predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.forget.finetune import Finetune as Repair
from engram.keep.finetune import Finetune
from engram.keep.icarl import RANK, ICaRL, herding
from engram.models import Identity, LinearHead, NearestMeanHead, Predictor, ValueHead, seeded


def phi(learner: ICaRL, table: Table) -> Tensor:
    return F.normalize(predict(learner.model, table, "pooler_output").double(), dim=1)


def slowly(features: Tensor, count: int) -> list[int]:
    """Herding by the words of the paper: at each k every row is tried."""
    chosen: list[int] = []
    for _ in range(min(count, len(features))):
        tried = {}
        for row in range(len(features)):
            if row not in chosen:
                tried[row] = float((features[[*chosen, row]].mean(0) - features.mean(0)).norm())
        chosen.append(min(tried, key=lambda row: tried[row]))
    return chosen


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 15))
def test_herding_is_what_trying_every_row_finds(seed: int, n: int, count: int) -> None:
    features = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert herding(features, count).tolist() == slowly(features, count)


def test_herding_by_hand() -> None:
    features = torch.tensor([[0.0], [1.0], [2.0], [9.0]], dtype=torch.float64)  # mean 3
    assert herding(features, 4).tolist() == [2, 1, 3, 0]  # 2; then 1.5 beats 5.5 and 1; then 4 beats 1; then the rest
    first = [float((features[list(order)[:1]].mean() - 3).abs()) for order in permutations(range(4))]
    assert min(first) == 1.0


def test_exemplars_are_herded_and_older_classes_keep_their_first(tiny: Table) -> None:
    learner, run = ICaRL(**SMALL, buffer=23), Run()
    first, second = halves(tiny)
    learner.learn(first, run)
    kept = learner.kept.table
    for c in OLD:
        own = first.train.of_classes([c])
        wanted = [own.ids[row] for row in slowly(phi(learner, own), 23 // 5)]
        assert kept.of_classes([c]).ids == tuple(wanted)
    learner.learn(second, run)
    for c in (*OLD, *NEW):
        now = learner.kept.table.of_classes([c])
        assert torch.as_tensor(now.extra[RANK]).tolist() == [0, 1]
        if c in OLD:
            assert now.ids == kept.of_classes([c]).ids[:2]
    assert len(learner.kept) <= 23


def test_the_model_tells_the_nearest_mean_of_exemplars(tiny: Table) -> None:
    learner = learnt(ICaRL(**SMALL, buffer=30), tiny)
    assert isinstance(learner.model.head, NearestMeanHead)
    exemplars, units = learner.kept.table, phi(learner, learner.kept.table)
    means = torch.stack([units[exemplars.labels == c].mean(0) for c in range(10)])
    means = means / means.norm(dim=1, keepdim=True)
    distances = (phi(learner, tiny)[:, None] - means).norm(dim=2)
    assert torch.equal(predict(learner.model, tiny).argmax(1), distances.argmin(1))


def test_the_loss_written_down(tiny: Table) -> None:
    learner, run = ICaRL(**SMALL, buffer=20), Run()
    first, second = halves(tiny)
    learner.learn(first, run)
    old = fork(learner)
    seen: list[Any] = []
    terms = learner.terms
    learner.terms = lambda batch, output: seen.append((batch, output.logits.detach().double())) or terms(batch, output)  # type: ignore[method-assign, func-returns-value]
    losses: list[float] = []
    step = learner.step
    learner.step = lambda batch, task: losses.append(found := step(batch, task)) or found  # type: ignore[method-assign, arg-type, func-returns-value]
    learner.learn(second, run)
    assert old.trained is not None
    rows = sum(len(batch) for batch, _ in seen[:2])
    assert rows == 30 + 20  # the task's rows and all exemplars
    for (batch, z), loss in zip(seen, losses, strict=True):
        features = old.model.encoder(**batch.inputs).pooler_output  # type: ignore[operator]
        q = torch.sigmoid(old.trained(features)).detach().double()
        targets = F.one_hot(batch.labels, 10).double()
        targets[:, :5] = q[:, :5]
        p = torch.sigmoid(z)
        wanted = -(targets * p.log() + (1 - targets) * (1 - p).log()).sum(1).mean()
        assert loss.value.item() == pytest.approx(wanted.item(), rel=1e-4)  # type: ignore[attr-defined]


def test_the_first_task_is_one_sigmoid_a_class(tiny: Table) -> None:
    learner = ICaRL(**SMALL)
    learner.learn(halves(tiny)[0])
    assert learner.teacher is None and isinstance(learner.trained, LinearHead)
    assert learner.trained.live.tolist() == [True] * 5


def test_a_class_that_comes_again_is_herded_from_old_and_new_rows(tiny: Table) -> None:
    learner, run = ICaRL(**SMALL, buffer=8), Run()
    rows = tiny.of_classes((0, 1))
    learner.learn(Task(rows.take(range(0, 12, 2)), classes=(0, 1)), run)
    before = learner.kept.table
    learner.learn(Task(rows.take(range(1, 12, 2)), index=1), run)
    assert learner.old == []
    pool = rows.take(range(1, 12, 2)).concat(before)
    for c in (0, 1):
        own = pool.of_classes([c])
        assert learner.kept.table.of_classes([c]).ids == tuple(own.ids[i] for i in slowly(phi(learner, own), 4))


def test_forgotten_exemplars_leave_the_means_and_a_class_without_any_leaves_both_heads(tiny: Table) -> None:
    learner, run = ICaRL(**SMALL, buffer=20), Run()
    first, second = halves(tiny)
    learner.learn(first, run)
    done = forget(learner, Request.of_classes(first.train, (2,)), Repair(epochs=1), run)
    assert set(done.residue) == set(first.train.of_classes((2,)).ids)
    assert learner.trained is not None and not learner.trained.live[2]
    assert torch.isneginf(predict(learner.model, tiny)[:, 2]).all()
    learner.learn(second, run)
    assert 2 not in learner.old
    learner.learn(Task(first.train.of_classes((2,)), index=2), run)
    assert accuracy(learner.model, tiny.of_classes((2,))) > 0.4


def test_more_classes_than_exemplars_and_networks_without_a_class_head_are_refused(tiny: Table) -> None:
    with pytest.raises(EngramError, match="of size 4 cannot hold an exemplar of each of 5"):
        ICaRL(**SMALL, buffer=4).learn(halves(tiny)[0])
    with pytest.raises(EngramError, match="no class labels"):
        ICaRL(**SMALL).learn(Task(Table({"values": torch.eye(3)}, torch.ones(3, 1))))
    with seeded(torch.Generator().manual_seed(0)):
        numbers = Predictor(Identity(3), ValueHead(3, 2))
    with pytest.raises(EngramError, match="class head"):
        ICaRL(network=numbers).learn(Task(Table({"values": torch.eye(3)}, torch.tensor([0, 1, 1]))))


def test_exemplars_keep_what_fine_tuning_loses(digits: Any, take: Callable[..., Any]) -> None:
    stages = class_stream(digits.train, digits.test, base=2, increment=2)
    kept, lost = finals(take, stages, ICaRL(buffer=100), Finetune())
    assert kept > lost + 0.4


def test_a_copy_goes_on_learning_the_same(tiny: Table) -> None:
    learner = ICaRL.tiny()
    first, second = halves(tiny)
    learner.learn(first)
    twin = fork(learner)
    for each in (learner, twin):
        each.learn(second)
    assert torch.equal(predict(learner.model, tiny), predict(twin.model, tiny))
    assert learner.kept.table.ids == twin.kept.table.ids
