from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from tests.keep.halves import NEW, SMALL, begun, halves, learnt, same
from torch import Tensor

from engram.core.learner import fork
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.hooks import capture
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.mas import MAS
from engram.keep.online_ewc import OnlineEWC
from engram.keep.slnid import SLNID, discount, inhibition, locality, sensitivity
from engram.testing import holds

LAYER = "encoder.layers.0.2"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hidden(learner: Any, table: Table) -> Tensor:
    """Activations of the hidden layer, [n, N]."""
    with torch.no_grad(), capture(learner.model.eval(), [LAYER]) as seen:
        learner.model(**table.batch(torch.arange(len(table))).inputs)
    return seen[LAYER]


def by_hand(active: Tensor, s: float, importances: Tensor) -> float:
    """R, pair by pair and row by row."""
    rows, units = active.shape
    total = 0.0
    for i in range(units):
        for j in range(units):
            if i != j:
                near = math.exp(-((i - j) ** 2) / (2 * s**2))
                spared = math.exp(-float(importances[i] + importances[j]))
                total += near * spared * sum(abs(float(row[i] * row[j])) for row in active)
    return total / rows


@holds("cl-in-neural-networks", 2)
@given(some.integers(0, 2**30), some.integers(1, 5), some.integers(2, 7), some.floats(0.3, 20))
def test_the_term_is_the_sum_over_pairs(seed: int, rows: int, units: int, s: float) -> None:
    active, importances = normal(rows, units, seed=seed).relu(), normal(units, seed=seed + 1).abs()
    found = inhibition(active, locality(units, s) * discount(importances)).value
    assert found.item() == pytest.approx(by_hand(active, s, importances), rel=1e-9, abs=1e-12)


@holds("cl-in-neural-networks", 2)
def test_units_that_are_never_active_together_cost_nothing() -> None:
    assert inhibition(torch.diag(normal(6).abs() + 1), locality(6, 1.0)).value.item() == 0
    assert inhibition(normal(4, 1), locality(1, 1.0)).value.item() == 0


@holds("cl-in-neural-networks", 2)
def test_a_batch_twice_costs_the_same() -> None:
    active, weights = normal(5, 6), locality(6, 1.0)
    once, twice = (inhibition(x, weights).value for x in (active, torch.cat([active, active])))
    torch.testing.assert_close(once, twice, rtol=1e-12, atol=0)


@holds("cl-in-neural-networks", 2)
def test_a_scale_without_end_gives_the_plain_sum_over_pairs() -> None:
    active = normal(5, 6)
    products = active.abs().T @ active.abs() / 5
    wanted = products.sum() - products.diagonal().sum()
    for s, tolerance in ((math.inf, 1e-12), (1e5, 1e-8)):
        torch.testing.assert_close(inhibition(active, locality(6, s)).value, wanted, rtol=tolerance, atol=0)
    assert inhibition(active, locality(6, 1.0)).value < 0.7 * wanted


@holds("cl-in-neural-networks", 2)
def test_activations_get_sparser(digits: Any) -> None:
    shares = []
    for sparsity in (0.0, 1e-3):
        found = []
        for seed in range(2):
            learner = SLNID(network={"name": "MLP", "hidden": [128]}, epochs=5, sparsity=sparsity)
            learner.learn(Task(digits.train), Run(seed=seed))
            found.append((hidden(learner, digits.test) == 0).double().mean())
        shares.append(torch.stack(found).mean())
    assert shares[1] > shares[0] + 0.1


def test_importances_of_neurons_by_moving_them(tiny: Table) -> None:
    """The slope of ||logits||² along each unit of a layer, by differences, row by row."""
    learner = SLNID(**SMALL)
    learner.learn(Task(tiny))
    model, rows = learner.model.double(), Table({"pixel_values": tiny.inputs["pixel_values"].double()[::9]})
    active, head = hidden(learner, rows), learner.model.head
    wanted = torch.zeros(active.shape[1], dtype=torch.float64)
    for row in active:
        for unit in range(len(row)):
            moved = torch.stack([row, row])
            moved[:, unit] += torch.tensor([1e-4, -1e-4], dtype=torch.float64)
            norms = head(moved).detach().square().sum(1)  # type: ignore[operator]
            wanted[unit] += ((norms[0] - norms[1]) / 2e-4).abs() / len(active)
    found = sensitivity(model, rows, [LAYER], Run())[LAYER]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
    assert (found > 0).any()


def test_importances_of_tasks_are_added_and_spare_neurons(tiny: Table) -> None:
    learner, run = SLNID(**SMALL), Run()
    first, second = halves(tiny)
    learner.learn(first, run)
    assert torch.equal(learner.mutual[LAYER].double(), locality(32, 32 / 6).float().double())  # e is 1 at first
    one = learner.neurons.values[LAYER].clone()
    learner.learn(second, run)
    two = sensitivity(learner.model, second.train, [LAYER], run)[LAYER]
    torch.testing.assert_close(learner.neurons.values[LAYER], one + two)
    torch.testing.assert_close(learner.mutual[LAYER].double(), locality(32, 32 / 6) * discount(one), rtol=1e-6, atol=0)


def test_the_loss_written_down(tiny: Table) -> None:
    learner = begun(SLNID(**SMALL, sparsity=0.3), tiny)
    rows = tiny.of_classes(NEW)
    batch = rows.batch(torch.arange(len(rows)))
    plain = learner.terms(batch, learner.model(**batch.inputs)).value
    wanted = by_hand(hidden(learner, rows), 32 / 6, learner.neurons.values[LAYER])
    assert learner.step(batch, halves(tiny)[1]).value.item() == pytest.approx(plain.item() + 0.3 * wanted, rel=1e-4)


def test_without_sparsity_it_is_the_penalty_of_mas(tiny: Table) -> None:
    found = learnt(SLNID(**SMALL, strength=0.5, sparsity=0.0), tiny)
    assert same(found, learnt(MAS(**SMALL, strength=0.5), tiny)) and not found.neurons.values


def test_the_penalty_can_be_that_of_the_fisher_diagonal(tiny: Table) -> None:
    learner, ewc = SLNID(**SMALL, importance="ewc", strength=0.5, sparsity=0.0), OnlineEWC(**SMALL, strength=1.0)
    begun(learner, tiny), begun(ewc, tiny)
    assert all(torch.equal(ewc.importances.values[name], omega) for name, omega in learner.importances.values.items())
    assert set(learner.pull) == {name for name in ewc.pull if not name.startswith("head.")}
    assert all(torch.equal(ewc.pull[name], weight) for name, weight in learner.pull.items())


def test_only_the_layers_that_are_named_are_inhibited(tiny: Table) -> None:
    network = {"name": "MLP", "hidden": [8, 8]}
    learner = SLNID(network=network, epochs=1, layers=("encoder.layers.1.2",))
    learner.learn(Task(tiny))
    assert set(learner.neurons.values) == {"encoder.layers.1.2"}


@pytest.mark.parametrize("network", [{"name": "MLP", "hidden": [8], "activation": "tanh"}, "ConvNet"])
def test_a_network_without_a_layer_to_inhibit_is_refused(tiny: Table, network: Any) -> None:
    with pytest.raises(EngramError, match="no layer gives a vector"):
        SLNID(network=network, epochs=1).learn(Task(tiny))


def test_an_unknown_importance_is_named() -> None:
    with pytest.raises(EngramError, match="unknown importance 'mass'; did you mean 'mas'"):
        SLNID(importance="mass")


def test_a_copy_goes_on_learning_the_same(tiny: Table) -> None:
    learner = SLNID.tiny()
    first, second = halves(tiny)
    learner.learn(first)
    twin = fork(learner)
    for each in (learner, twin):
        each.learn(second)
    assert same(learner, twin)
