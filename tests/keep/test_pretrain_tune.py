"""PretrainTune: full-batch steps with a rate for each layer and step, and replay of the last support sets."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from engram.core.learner import fork
from engram.data.episodes import Episode, episodes
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.predict import hits
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.pretrain_tune import SET, PretrainTune, layers
from engram.stats.seeds import generator
from engram.testing import fingerprint, holds

BASE, NOVEL = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)
SMALL: dict[str, Any] = {"network": {"name": "MLP", "hidden": [32]}, "epochs": 2, "batch_size": 64}


def pretrained(digits: Any, **settings: Any) -> PretrainTune:
    given = {"network": {"name": "MLP", "hidden": [48, 32]}, "epochs": 4, "batch_size": 32, **settings}
    learner = PretrainTune(**given)
    learner.learn(Task(digits.train.of_classes(BASE)), Run())
    return learner


def after(learner: PretrainTune, episode: Episode) -> PretrainTune:
    """A copy that has learnt the support sets, with labels from 10 on."""
    twin = fork(learner)
    assert isinstance(twin, PretrainTune)
    run = Run()
    for k, rows in enumerate(episode.supports):
        twin.learn(Task(rows.with_labels(rows.labels + 10), index=k + 1), run)  # type: ignore[operator]
    return twin


def by_set(learner: PretrainTune, drawn: list[Episode]) -> list[float]:
    """Accuracy on the rows of each of ten sets of two instances, mean over episodes."""
    found = []
    for one in drawn:
        asked = one.queries.with_labels(one.queries.labels + 10)  # type: ignore[operator]
        right = hits(after(learner, one).model, asked, classes=tuple(range(10, 30)))
        found.append(right.double().reshape(10, 2).mean(1))
    return torch.stack(found).mean(0).tolist()


@holds("cfsl-instances", 3)
def test_the_last_of_ten_sets_is_known_best_and_replay_narrows_the_gap(digits: Any) -> None:
    shape: dict[str, Any] = {"ways": 1, "shots": 2, "queries": 1, "sets": 10, "instances": True}
    drawn = list(episodes(digits.test, count=4, seed=1, **shape))
    plain, replay = (by_set(pretrained(digits, steps=20, rate=0.05, sets=sets, replayed=8), drawn) for sets in (0, 10))
    assert plain[-1] - plain[0] > 0.3
    assert replay[-1] - replay[0] < plain[-1] - plain[0] - 0.1
    assert sum(replay) > sum(plain) + 1


@holds("cfsl-instances", 3)
@pytest.mark.parametrize("off", [{"sets": 0, "replayed": 6}, {"sets": 3, "replayed": 0}])
def test_no_sets_or_no_replayed_rows_is_tuning_without_replay_bit_by_bit(digits: Any, off: dict[str, int]) -> None:
    one = next(episodes(digits.test, ways=2, shots=2, queries=1, sets=4, count=1, seed=0))
    learners = [after(pretrained(digits, **settings), one) for settings in (off, {"sets": 0, "replayed": 10})]
    assert fingerprint(learners[0].model.state_dict()) == fingerprint(learners[1].model.state_dict())
    other = after(pretrained(digits, sets=3, replayed=6), one)
    assert fingerprint(other.model.state_dict()) != fingerprint(learners[0].model.state_dict())


def test_steps_of_plain_descent_with_a_rate_for_each_layer_and_step(digits: Any) -> None:
    learner = pretrained(digits, steps=3)
    learner.rates = torch.rand(3, 3, generator=generator("rates")) / 10
    rows = digits.test.of_classes(NOVEL).take(range(12))
    learner_after = fork(learner)
    learner_after.learn(Task(rows), Run())
    model = copy.deepcopy(learner.model)
    run = Run()
    with run.scope("learn"):
        model.head.grow(rows.classes, run.generator("head"))  # type: ignore[union-attr,operator]
    x, y = rows.inputs["pixel_values"], rows.labels - 5
    for step in range(3):
        model.zero_grad()
        F.cross_entropy(model(pixel_values=x).logits[:, 5:], y).backward()
        with torch.no_grad():
            for k, params in enumerate(layers(model)):
                for p in params:
                    p -= learner.rates[k, step] * p.grad
    found, wanted = dict(learner_after.model.named_parameters()), dict(model.named_parameters())
    assert found.keys() == wanted.keys() and len(layers(model)) == 3
    for name, p in wanted.items():
        assert torch.allclose(found[name], p, atol=1e-6), name


def test_the_pretraining_head_stays_and_all_else_is_tuned(digits: Any) -> None:
    learner = pretrained(digits)
    twin = fork(learner)
    twin.learn(Task(digits.test.of_classes(NOVEL).take(range(10))), Run())
    before, now = learner.model.state_dict(), twin.model.state_dict()
    for name in ("head.weight", "head.bias"):
        assert torch.equal(now[name][:5], before[name])
    assert all(not torch.equal(now[name], p) for name, p in before.items() if name.startswith("encoder"))


def test_a_class_of_the_base_that_comes_again_is_tuned(digits: Any) -> None:
    learner = pretrained(digits)
    before = learner.model.state_dict()["head.weight"].clone()
    learner.learn(Task(digits.test.of_classes([2, 7]).take(range(20))), Run())
    changed = (learner.model.state_dict()["head.weight"][:5] != before).any(1)
    assert changed.tolist() == [False, False, True, False, False] and learner.base == (0, 1, 3, 4)


def test_the_last_sets_are_kept_and_none_is_replayed_to_itself(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = pretrained(digits, sets=2, replayed=5, steps=4)
    rows = digits.test.of_classes(NOVEL)
    sets = [rows.take(range(10 * k, 10 * k + 3 + k)) for k in range(4)]
    seen: list[Table] = []
    whole = Table.concat

    def noted(self: Table, *others: Table) -> Table:
        seen.extend(others)
        return whole(self, *others)

    for k, part in enumerate(sets):
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Table, "concat", noted)
            learner.learn(Task(part), Run(seed=k))
        earlier = {id for one in sets[max(0, k - 2) : k] for id in one.ids}
        drawn = [table for table in seen[:4] if len(table)]
        assert all(set(table.ids) <= earlier and len(table) == min(5, len(earlier)) for table in drawn)
        assert len(drawn) == (4 if k else 0)
        assert set(learner.kept.table.ids) == earlier - set(sets[max(0, k - 2)].ids if k > 1 else ()) | set(part.ids)
    assert torch.as_tensor(learner.kept.table.extra[SET]).unique().tolist() == [2, 3]


def test_one_step_has_the_slope_of_its_rates(digits: Any) -> None:
    learner = pretrained(digits, steps=1)
    one = next(episodes(digits.train.of_classes(BASE), ways=3, shots=2, queries=3, count=1, seed=0))
    rates = torch.full((3, 1), 0.05, dtype=torch.float64, requires_grad=True)
    learner.model.double()
    one = Episode(tuple(map(_double, one.supports)), _double(one.queries), one.classes)

    def loss(rates: torch.Tensor) -> torch.Tensor:
        return learner._after_steps(one, rates, generator("rates"))

    (slopes,) = torch.autograd.grad(loss(rates), rates)
    for k in range(3):
        step = torch.zeros(3, 1, dtype=torch.float64)
        step[k] = 1e-5
        change = float((loss(rates + step) - loss(rates - step)).detach()) / 2e-5
        assert float(slopes[k, 0]) == pytest.approx(change, rel=1e-5, abs=1e-9)


def _double(rows: Table) -> Table:
    return Table({"pixel_values": rows.inputs["pixel_values"].double()}, rows.labels, rows.ids)


def test_learnt_rates_tell_more_of_an_episode_than_the_first_ones(digits: Any) -> None:
    first, learnt = (pretrained(digits, meta=meta, meta_rate=0.02) for meta in (0, 25))
    assert first.rates is not None and learnt.rates is not None
    assert torch.equal(first.rates, torch.full((3, 5), 0.01)) and bool((learnt.rates > 0.02).any())
    drawn = list(episodes(digits.train.of_classes(BASE), ways=5, shots=1, queries=5, count=10, seed=7))
    losses = [
        sum(float(first._after_steps(one, rates, generator("head", k)).detach()) for k, one in enumerate(drawn))
        for rates in (first.rates.requires_grad_(), learnt.rates.requires_grad_())
    ]
    assert losses[1] < losses[0]


def test_an_interrupted_tuning_goes_on_where_it_was(digits: Any, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("engram.engine.fit.CHECKPOINT_EVERY", 0.0)
    sets = [digits.test.of_classes(NOVEL).take(range(8 * k, 8 * k + 8)) for k in range(3)]

    def through(run: Run, dies: bool = False) -> PretrainTune:
        learner = PretrainTune(**{**SMALL, "steps": 6, "sets": 2, "replayed": 4})
        if dies:
            whole = learner._whole
            monkeypatch.setattr(learner, "_whole", lambda t, s, *r: whole(t, s, *r) if s < 4 else 1 / 0)
        learner.learn(Task(digits.train.of_classes(BASE)), run)
        for rows in sets:
            learner.learn(Task(rows), run)
        return learner

    calm = through(Run())
    with pytest.raises(ZeroDivisionError):
        through(Run(tmp_path / "run"), dies=True)
    resumed = through(Run(tmp_path / "run"))
    assert fingerprint(calm.state_dict()) == fingerprint(resumed.state_dict())


def test_a_network_without_class_head_is_refused(digits: Any) -> None:
    numbers = digits.train.with_labels(torch.rand(len(digits.train), 1, generator=generator("numbers")))
    with pytest.raises(EngramError, match="PretrainTune wants an encoder with a class head"):
        PretrainTune.tiny().learn(Task(numbers), Run())
