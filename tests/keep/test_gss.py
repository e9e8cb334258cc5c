from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.keep.halves import SMALL, finals, halves, same
from torch import Tensor

from engram.core.learner import fork
from engram.data.buffer import Buffer
from engram.data.streams import class_stream
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.curvature import flat, mean_gradient
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.finetune import Finetune
from engram.keep.gss import FIRST, GSS, SCORE, most_spread
from engram.testing import holds


def unit_gradients(learner: Any, rows: Table) -> Tensor:
    """The gradient of every row, one by one, of unit length: [n, P]."""
    found = [flat(mean_gradient(learner.model.eval(), rows.take([row]))) for row in range(len(rows))]
    return F.normalize(torch.stack(found), dim=1)


def begun(table: Table, **settings: Any) -> GSS:
    learner = GSS(network=SMALL["network"], **settings)
    learner.learn(Task(table))
    return learner


def test_scores_are_the_largest_cosines(tiny: Table) -> None:
    learner = begun(tiny)
    held = torch.stack([flat(mean_gradient(learner.model, tiny.take(part))) for part in ([0, 1], [5, 9], [20])])
    wanted = (unit_gradients(learner, tiny) @ F.normalize(held, dim=1).T).amax(1)
    assert torch.allclose(learner.scores(tiny, held, Run()), wanted, atol=1e-5)


def test_rows_are_appended_while_there_is_room(tiny: Table) -> None:
    learner, draws = GSS(network=SMALL["network"], epochs=0, buffer=15), torch.Generator().manual_seed(0)
    learner.learn(halves(tiny)[0])
    for part in (range(10), range(5, 20)):
        learner.offer(tiny.take(part), draws, Run())
    table = learner.kept.table
    assert table.ids == tiny.take(range(15)).ids
    scores = torch.as_tensor(table.extra[SCORE])
    assert (scores[:10] == FIRST).all() and (scores[10:] != FIRST).all()


@pytest.mark.parametrize("turned", [False, True])
def test_a_full_buffer_takes_only_batches_that_point_away(
    tiny: Table, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, draws = begun(tiny, buffer=20), torch.Generator().manual_seed(0)
    before = learner.kept.table.ids
    fresh = tiny.without(before)
    monkeypatch.setattr(learner, "_held_gradients", lambda *_: _opposite(learner, fresh, turned))
    learner.offer(fresh, draws, Run())
    assert len(learner.kept) == 20
    assert (learner.kept.table.ids != before) == turned


def _opposite(learner: GSS, rows: Table, turned: bool) -> Tensor:
    gradient = flat(mean_gradient(learner.model.eval(), rows))
    return (-gradient if turned else gradient)[None]


def test_places_are_taken_with_the_published_chance(tiny: Table) -> None:
    """All held rows but one are least alike and never drawn; a new row of score c takes its place."""
    c, alike, taken, times = 0.5, 0.8, 0, 2000
    for seed in range(times):
        learner = GSS(buffer=5)
        scores = torch.tensor([-0.2, -0.2, alike, -0.2, -0.2], dtype=torch.float64)
        learner.kept.offer(tiny.take(range(5)).with_column(SCORE, scores))
        new = tiny.take([30]).with_column(SCORE, torch.tensor([c], dtype=torch.float64))
        learner._replace(new, torch.Generator().manual_seed(seed))
        ids = set(learner.kept.table.ids)
        assert ids >= set(tiny.take([0, 1, 3, 4]).ids) and len(ids) == 5
        taken += tiny.ids[30] in ids
    chance = (alike + 1) / ((c + 1) + (alike + 1))
    assert abs(taken / times - chance) < 4 * (chance * (1 - chance) / times) ** 0.5


def test_batches_alternate_with_draws_from_the_buffer(tiny: Table) -> None:
    learner, run = begun(tiny, buffer=20, replayed=4, iterations=3), Run()
    second = halves(tiny)[1]
    sizes = [len(batch) for batch in learner.batches(second, 0, run)]
    assert sizes == [10, 4] * 3 * 3
    before = learner.kept.table.ids
    list(learner.batches(second, 1, run))
    assert learner.kept.table.ids == before  # rows are offered in the first epoch


@holds("cl-in-neural-networks", 4)
def test_gradients_of_the_buffer_are_more_spread_out_than_those_of_a_random_one(digits: Any) -> None:
    learner, random = GSS(network=SMALL["network"], buffer=60), Buffer(60)
    learner.learn(Task(digits.train))
    random.offer(digits.train)
    chosen, drawn = (unit_gradients(learner, table) for table in (learner.kept.table, random.table))
    assert float((chosen @ chosen.T).sum()) < 0.7 * float((drawn @ drawn.T).sum())


@holds("cl-in-neural-networks", 4)
@pytest.mark.parametrize("few_first", [False, True])
def test_of_an_unbalanced_stream_it_holds_more_of_the_few(digits: Any, few_first: bool) -> None:
    """Nine rows of a digit for one of another, one digit after the other."""
    tasks = [Task(digits.train.of_classes((c,)).take(range(n))) for c, n in ((0, 108), (1, 12))]
    held, reservoir = [], []
    for seed in range(4):
        learner, random = GSS(network=SMALL["network"], buffer=30), Buffer(30, seed=seed)
        for task in reversed(tasks) if few_first else tasks:
            learner.learn(task, Run(seed=seed))
            random.offer(task.train)
        held.append(len(learner.kept.table.of_classes((1,))))
        reservoir.append(len(random.table.of_classes((1,))))
    assert sum(held) > sum(reservoir) + 8


def alikeness(seed: int, rows: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    unit = F.normalize(torch.randn(rows, 3, generator=draws, dtype=torch.float64), dim=1)
    return unit @ unit.T


def total(alike: Tensor, rows: Any) -> float:
    rows = torch.as_tensor(rows)
    return float(alike[rows[:, None], rows].sum())


@holds("cl-in-neural-networks", 4)
def test_the_quadratic_rule_is_near_the_best_of_all_subsets() -> None:
    """Of all 126 subsets of nine rows: near the best one, against their mean, and never one that a change betters."""
    gaps = []
    for seed in range(20):
        alike = alikeness(seed, 9)
        found = most_spread(alike, 4).tolist()
        sums = {rows: total(alike, rows) for rows in combinations(range(9), 4)}
        best, mean = min(sums.values()), sum(sums.values()) / len(sums)
        gaps.append((total(alike, found) - best) / (mean - best))
        near = [value for rows, value in sums.items() if len({*rows} & {*found}) >= 3]
        assert total(alike, found) == pytest.approx(min(near), abs=1e-9)
    assert max(gaps) < 0.2 and sum(gaps) / len(gaps) < 0.03


def test_the_quadratic_rule_keeps_the_most_spread_of_held_and_new_rows(tiny: Table) -> None:
    learner = begun(tiny, buffer=20, rule="quadratic")
    held, fresh = learner.kept.table, tiny.without(learner.kept.table.ids).take(range(10))
    assert len(held) == 20
    unit = unit_gradients(learner, held.concat(fresh))
    learner.offer(fresh, torch.Generator(), Run())
    wanted = held.concat(fresh).take(most_spread(unit @ unit.T, 20))
    assert set(learner.kept.table.ids) == set(wanted.ids) != set(held.ids)


@holds("cl-in-neural-networks", 4)
def test_the_quadratic_rule_spreads_gradients_more_than_chance(digits: Any) -> None:
    rows = digits.train.take(range(150))
    learner, random = GSS(network=SMALL["network"], buffer=30, rule="quadratic", iterations=1), Buffer(30)
    learner.learn(Task(rows))
    random.offer(rows)
    chosen, drawn = (unit_gradients(learner, table) for table in (learner.kept.table, random.table))
    assert float((chosen @ chosen.T).sum()) < 0.7 * float((drawn @ drawn.T).sum())


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(EngramError, match="unknown rule 'gredy'; did you mean 'greedy'"):
        GSS(rule="gredy")


def test_a_chosen_buffer_keeps_what_fine_tuning_loses(digits: Any, take: Callable[..., Any]) -> None:
    stages = class_stream(digits.train, digits.test, base=2, increment=2)
    online = Finetune(optimizer=Optimizer("sgd", lr=0.05, momentum=0.0), epochs=3, batch_size=10)
    kept, lost = finals(take, stages, GSS(buffer=100, compared=3), online)
    assert kept > lost + 0.3


def test_a_copy_goes_on_learning_the_same(tiny: Table) -> None:
    learner = GSS.tiny()
    first, second = halves(tiny)
    learner.learn(first)
    twin = fork(learner)
    for each in (learner, twin):
        each.learn(second)
    assert same(learner, twin) and learner.kept.table.ids == twin.kept.table.ids  # type: ignore[attr-defined]
