from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests.keep.halves import OLD, SMALL, halves, learnt, same, weights
from torch import Tensor, nn

from engram.core.erasure import forget
from engram.core.learner import Forgetful, fork
from engram.core.needs import Need
from engram.core.persist import load_learner, save_learner
from engram.core.request import Request
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.fit import fit
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.predict import features, predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.forget.gradient_difference import GradientDifference
from engram.keep.finetune import Finetune
from engram.keep.one_prompt import OnePrompt
from engram.keep.virtual_outliers import VirtualOutliers, distance
from engram.models import digest, load
from engram.reproduce import ovor
from engram.reproduce.digits import curve
from engram.stats.scores import energy, restricted
from engram.testing import holds

HOST: dict[str, Any] = {"name": "Finetune", **SMALL}
PHASE: dict[str, Any] = {"select": 5, "offsets": 10, "neighbours": 5, "per_class": 4, "epochs": 3, "batch_size": 16}


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompted() -> dict[str, Any]:
    own = OnePrompt.tiny()
    return {
        "name": "keep.OnePrompt", "network": own.network, "lengths": list(own.lengths), "epochs": 2, "batch_size": 32,
    }  # fmt: skip


@holds("ovor", 3)
def test_the_cost_of_energies_by_hand() -> None:
    learner = VirtualOutliers()
    own, outlier = torch.tensor([-14.0]), torch.tensor([-5.0])
    nothing = torch.zeros(0)
    assert learner.regulariser(own, nothing).value.item() == 0.5
    assert learner.regulariser(nothing, outlier).value.item() == 1.5
    assert learner.regulariser(own, outlier).value.item() == 2.0
    squares = VirtualOutliers(loss="mse")
    assert squares.regulariser(own, outlier).value.item() == 1.0 + 4.0


@holds("ovor", 3)
def test_within_the_limits_the_gradient_is_zero() -> None:
    learner = VirtualOutliers(tau_in=-2.0, tau_out=-1.0)
    own, outliers = torch.full((3, 2), 2.0, requires_grad=True), torch.full((4, 2), -2.0, requires_grad=True)
    cost = learner.regulariser(energy(own), energy(outliers)).value
    found = torch.autograd.grad(cost, (own, outliers))
    assert cost.item() == 0 and all(bool((grad == 0).all()) for grad in found)
    beyond = learner.regulariser(energy(own - 3), energy(outliers + 3)).value
    assert all(bool((grad != 0).all()) for grad in torch.autograd.grad(beyond, (own, outliers)))


@given(st.lists(st.floats(-30, 10), min_size=1, max_size=6), st.lists(st.floats(-30, 10), min_size=1, max_size=6))
def test_the_cost_is_the_mean_of_hubers(own: list[float], outliers: list[float]) -> None:
    def huber(x: float) -> float:
        return 0.5 * x * x if x < 1 else x - 0.5

    wanted = sum(huber(max(e + 15, 0)) for e in own) / len(own) + sum(huber(max(-3 - e, 0)) for e in outliers) / len(
        outliers
    )
    found = VirtualOutliers().regulariser(*(torch.tensor(e, dtype=torch.float64) for e in (own, outliers)))
    assert found.value.item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@holds("ovor", 3)
@pytest.mark.parametrize("silent", [{"weight": 0.0}, {"tau_in": math.inf, "tau_out": -math.inf}])
def test_without_weight_the_phase_is_cross_entropy_of_the_head_bit_by_bit(
    tiny: Table, silent: dict[str, float]
) -> None:
    """Weight 0 draws no outliers; limits that nothing passes leave the whole machinery at work, at gradient 0."""
    task, _ = halves(tiny)
    learner = VirtualOutliers(host=HOST, **PHASE, **silent)
    learner.learn(task)
    host = Finetune(**SMALL)
    host.learn(task)
    rows, run = Table({"values": features(host.model, task.train)}, task.train.labels), Run()
    with run.scope("virtual outliers"):

        def step(batch: Any) -> Mean:
            losses = F.cross_entropy(host.model.head(batch.inputs["values"])[:, :5], batch.labels, reduction="sum")
            return Mean.over(losses, len(batch))

        batches = lambda epoch: rows.batches(16, seed=run.number("order"), epoch=epoch)  # noqa: E731
        fit(step, batches, model=host.model.head, optimizer=learner.optimizer, epochs=3, run=run, steps=2)
    assert same(learner, host)


@holds("ovor", 4)
def test_the_phase_trains_the_head_alone_and_the_tasks_columns_of_it(tiny: Table) -> None:
    learner = VirtualOutliers(host=prompted(), **PHASE)
    first, second = halves(tiny)
    learner.learn(first)
    learner.inner.learn(second)
    body, before = digest(learner.model.encoder), weights(learner)
    with torch.no_grad():
        learner.model.encoder.prompts["0"].grad = torch.ones_like(learner.model.encoder.prompts["0"])  # left over
    learner.tune(second.train, Run())
    assert digest(learner.model.encoder) == body
    after = weights(learner)
    for name in ("head.weight", "head.bias"):
        assert torch.equal(after[name][:5], before[name][:5])
        assert bool((after[name][5:] != before[name][5:]).reshape(5, -1).any(1).all())


@holds("ovor", 4)
def test_rows_of_other_columns_have_gradient_zero(tiny: Table) -> None:
    learner = learnt(VirtualOutliers(host=HOST, **PHASE), tiny)
    head, rows = learner.model.head, tiny.of_classes(OLD)
    z = features(learner.model, rows)
    head.zero_grad()
    learner.terms(head(z), rows.labels, head(3 * normal(20, 32)), torch.tensor(OLD)).value.backward()
    assert bool((head.weight.grad[5:] == 0).all()) and bool((head.bias.grad[5:] == 0).all())
    assert head.weight.grad[:5].abs().min(1).values.max() > 0


def slow_outliers(learner: VirtualOutliers, z: Tensor, classes: int, noise: Tensor) -> set[tuple[float, ...]]:
    """Points by the description of the method, one at a time, rounded to be compared."""

    def from_the_task(point: Tensor) -> float:
        return sorted(float((point / point.norm() - row / row.norm()).norm()) for row in z)[learner.neighbours - 1]

    border = sorted(z, key=from_the_task, reverse=True)[: learner.select]
    centers = border if learner.center == "boundary" else [torch.zeros_like(point) for point in border]
    points = [center + learner.sigma * offset for center in centers for offset in noise]
    kept = sorted(points, key=from_the_task, reverse=True)[: learner.per_class * classes]
    return {tuple(round(v, 4) for v in point.tolist()) for point in kept}


@pytest.mark.parametrize("center", ["boundary", "origin"])
def test_outliers_by_an_independent_slow_way(center: str) -> None:
    z = normal(20, 6).double() + 1
    learner = VirtualOutliers(select=3, offsets=5, neighbours=4, per_class=3, sigma=0.5, center=center)
    noise = torch.randn(5, 6, generator=torch.Generator().manual_seed(7)).double()
    found = learner.draw(z, 2, torch.Generator().manual_seed(7))
    assert found.shape == (6, 6)
    assert {tuple(round(v, 4) for v in point.tolist()) for point in found} == slow_outliers(learner, z, 2, noise)


@holds("ovor", 5)
@pytest.mark.parametrize("center", ["boundary", "origin"])
def test_outliers_are_farther_from_the_task_than_its_rows(center: str) -> None:
    table = ovor.stages(0)[0].task.train
    z = table.inputs["values"]
    learner = VirtualOutliers(center=center, sigma=1.0, neighbours=20, offsets=30)
    outliers = learner.draw(z, 2, torch.Generator().manual_seed(0))
    assert outliers.shape == (80, 256)
    assert distance(outliers, z, 20).mean() > distance(z, z, 20).mean() + 0.1
    assert distance(outliers, z, 20).min() > distance(z, z, 20).max()


def test_a_task_of_few_rows_takes_as_many_neighbours_as_it_has() -> None:
    for rows in (1, 2):
        found = VirtualOutliers(offsets=3).draw(normal(rows, 4), 1, torch.Generator().manual_seed(0))
        assert found.shape == (3 * rows, 4) and bool(found.isfinite().all())


def test_each_batch_has_an_equal_part_of_the_outliers_which_are_drawn_anew(tiny: Table) -> None:
    learner = learnt(VirtualOutliers(host=HOST, **PHASE), tiny)
    rows = Table({"values": normal(60, 32)}, tiny.labels)
    epochs = [list(learner._batches(rows, epoch, Run())) for epoch in (0, 1)]
    assert [(len(own), len(outliers)) for own, outliers in epochs[0]] == [(16, 10)] * 3 + [(12, 10)]
    drawn = [torch.cat([outliers.inputs["values"] for _, outliers in epoch]) for epoch in epochs]
    assert len(torch.cat(drawn).unique(dim=0)) == 80


@holds("ovor", 6)
def test_virtual_outliers_lift_the_final_accuracy() -> None:
    """20 + 8 epochs, that the test be quick; `engram reproduce ovor` has 40 + 10."""
    gains = [curve(ovor.regularised(20, 8), ovor.stages(seed), seed)[-1] - ovor.alone(seed, 28) for seed in range(3)]
    assert sum(gains) / 3 >= 0.08


# --- what is the host's


def test_no_epochs_leave_the_host(tiny: Table) -> None:
    assert same(learnt(VirtualOutliers(host=HOST, epochs=0), tiny), learnt(Finetune(**SMALL), tiny))
    assert not same(learnt(VirtualOutliers(host=HOST, **PHASE), tiny), learnt(Finetune(**SMALL), tiny))


@pytest.mark.parametrize("name", ["LwF", "OnlineEWC", "Replay", "DERpp", "keep.RehearsalFree"])
def test_every_host_with_a_linear_head_goes_on_as_it_was(name: str, tiny: Table, tmp_path: Path) -> None:
    small = {"optimizer": {"lr": 1e-2}, **SMALL}
    learner = VirtualOutliers(host={"name": name, **small}, **PHASE)
    first, second = halves(tiny)
    learner.learn(first)
    save_learner(learner, tmp_path / "learner", tasks=1)
    again = load_learner(tmp_path / "learner")[0]
    assert torch.equal(predict(load(tmp_path / "learner" / "model"), tiny), predict(learner.model, tiny))
    for each in (learner, again, fork(again)):
        assert set(each.traces) == {*learner.inner.traces, "phase of the head"}
    for each in (learner, again):
        each.learn(second)
    assert same(learner, again)


def test_forgetting_reaches_the_hosts_traces_and_its_own(tiny: Table) -> None:
    learner = learnt(VirtualOutliers(host={"name": "Replay", **SMALL, "buffer": 30}, **PHASE), tiny)
    request = Request.of_classes(tiny, (3,))
    held = set(learner.inner.kept.table.ids) & set(request.ids)
    done = forget(learner, request, GradientDifference(epochs=1))
    assert held and not set(learner.inner.kept.table.ids) & set(request.ids)
    assert set(done.residue) == set(request.ids) and learner.holds(request.ids) == ()


def test_it_can_forget_by_itself_exactly_if_its_host_can(tiny: Table) -> None:
    assert not isinstance(VirtualOutliers(host=HOST), Forgetful)
    small = {"network": SMALL["network"], "epochs": 3}
    learner = learnt(VirtualOutliers(host={"name": "Joint", **small}, **PHASE), tiny)
    assert isinstance(learner, Forgetful)
    rows = tiny.take(range(10))
    done = forget(learner, Request.of_records(tiny, rows.ids))
    never = learnt(VirtualOutliers(host={"name": "Joint", **small}, epochs=0), tiny.without(rows.ids))
    assert done.residue == () and learner.holds(rows.ids) == ()
    assert predict(learner.model, tiny).shape == predict(never.model, tiny).shape
    assert learner.holds(tiny.ids) == tiny.without(rows.ids).ids


def test_its_needs_are_the_hosts_and_the_borders_of_tasks() -> None:
    assert VirtualOutliers(host="Finetune").needs == (frozenset({Need.BOUNDARIES}),)
    assert VirtualOutliers().needs == (frozenset({Need.BOUNDARIES, Need.BACKBONE}),)


def test_a_transformers_classifier_has_a_linear_head_too(tiny: Table) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    from engram.models import seeded

    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, num_labels=10,
    )  # fmt: skip
    with seeded(torch.Generator().manual_seed(0)):
        network: nn.Module = ViTForImageClassification(config)
    learner = VirtualOutliers(host={"name": "Finetune", "network": network, "epochs": 1}, **PHASE)
    learner.inner.learn(halves(tiny)[0])
    before = weights(learner)
    learner.tune(halves(tiny)[0].train, Run())
    moved = {name for name, p in weights(learner).items() if not p.equal(before[name])}
    assert moved == {"classifier.weight", "classifier.bias"}


def test_bad_input_is_said(tiny: Table) -> None:
    task = halves(tiny)[0]
    with pytest.raises(EngramError, match=r"keep\.ICaRL ends in a NearestMeanHead that is not trained"):
        VirtualOutliers(host={"name": "ICaRL", **SMALL}).learn(task)
    with pytest.raises(EngramError, match="rows with class labels; the target here is none"):
        VirtualOutliers(host=HOST).learn(Task(tiny.unlabelled()))
    with pytest.raises(EngramError, match="unknown center of outliers 'orgin'; did you mean 'origin'"):
        VirtualOutliers(center="orgin")
    with pytest.raises(EngramError, match="neighbours is 0; outliers need 1 or more"):
        VirtualOutliers(neighbours=0)
    with pytest.raises(EngramError, match="unknown loss of energies"):
        VirtualOutliers(loss="l1")
    with pytest.raises(EngramError, match=r"unknown method 'keep\.Finetun'"):
        VirtualOutliers(host="Finetun")


def test_the_loss_leaves_other_columns_out() -> None:
    logits = torch.tensor([[0.5, 2.0, -1.0, 9.0]])
    found = restricted(logits, torch.tensor([0, 2]))
    assert torch.equal(found, torch.tensor([[0.5, -math.inf, -1.0, -math.inf]]))


def test_the_rate_of_the_phase_is_its_own(tiny: Table) -> None:
    slow, fast = (learnt(VirtualOutliers(host=HOST, **PHASE, optimizer=Optimizer(lr=lr)), tiny) for lr in (0.0, 1e-2))
    assert same(slow, learnt(Finetune(**SMALL), tiny)) and not same(slow, fast)
