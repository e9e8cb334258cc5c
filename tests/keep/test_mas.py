from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.keep.halves import NEW, SMALL, begun, halves, learnt, same, spent, weights
from torch import nn

from engram.core.learner import fork
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.predict import accuracy, features
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.finetune import Finetune
from engram.keep.mas import MAS
from engram.models import Identity, LinearHead, Predictor, seeded
from engram.testing import holds


@holds("cl-in-neural-networks", 1)
def test_omega_of_a_linear_model_is_known_and_does_not_depend_on_labels() -> None:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(7, 3, generator=draws)
    with seeded(draws):
        model = Predictor(Identity(3), LinearHead(3, range(3), bias=False))
    W = model.head.weight.detach().double()  # type: ignore[union-attr, operator]
    wanted = torch.zeros_like(W)
    for row in x.double():
        wanted += (2 * (W @ row)[:, None] * row[None, :]).abs() / 7
    for labels in ([0, 1, 2, 0, 1, 2, 0], [2, 2, 1, 1, 0, 0, 1]):
        learner = MAS(network=model, epochs=0)
        learner.learn(Task(Table({"values": x}, torch.tensor(labels)), classes=(0, 1, 2)))
        assert torch.allclose(learner.importances.values["head.weight"], wanted, rtol=0, atol=1e-6)


@holds("cl-in-neural-networks", 1)
def test_strength_zero_is_fine_tuning(tiny: Table) -> None:
    tuned = learnt(Finetune(**SMALL), tiny)
    assert same(learnt(MAS(**SMALL, strength=0.0), tiny), tuned)
    assert not same(learnt(MAS(**SMALL, strength=1.0), tiny), tuned)


@holds("cl-in-neural-networks", 1)
@pytest.mark.parametrize("seed", range(3))
def test_a_large_penalty_freezes_the_trunk_and_never_holds_the_head(digits: Any, seed: int) -> None:
    """Units that a tenth of the first rows wake say what they said, to 1e-4. What no row reaches does not matter,
    and is free: silent units, pixels that are always 0."""
    first, second = halves(digits.train)
    free, held = (kind(**{**SMALL, "epochs": 8}, **more) for kind, more in ((Finetune, {}), (MAS, {"strength": 1e6})))
    for each in (free, held):
        each.learn(first, Run(seed=seed))
    anchor, said = weights(held), features(held.model, first.train)
    awake = (said > 0).double().mean(0) > 0.1
    omega = {name: value for name, value in held.importances.values.items() if not name.startswith("head.")}
    assert same(free, held)
    for each in (free, held):
        each.learn(second, Run(seed=seed))
    for name, value in omega.items():
        matters = value > 0
        moved = [(weights(each)[name] - anchor[name])[matters].abs().max() for each in (held, free)]
        assert matters.double().mean() > 0.7 and moved[0] < 0.01 * moved[1]
    now = [(features(each.model, first.train) - said)[:, awake].norm() / said.norm() for each in (held, free)]
    assert now[0] < 1e-4 and now[1] > 0.5
    assert spent(held, anchor, omega) < 1e-6 * spent(free, anchor, omega)
    assert set(held.pull) == set(omega)
    head = {name: torch.ones_like(p) for name, p in anchor.items() if name.startswith("head.")}
    assert spent(held, anchor, head) > 0.2 * spent(free, anchor, head)
    assert accuracy(held.model, digits.test.of_classes(NEW), classes=NEW) > 0.4


def test_local_importances_are_products_of_connected_activations(tiny: Table) -> None:
    learner = MAS(network={"name": "MLP", "hidden": [8, 6]}, epochs=2, local=True)
    learner.learn(Task(tiny))
    values = {name: p.detach().double() for name, p in learner.model.named_parameters()}
    wanted: dict[str, torch.Tensor] = {}
    for row in tiny.inputs["pixel_values"].flatten(1).double():
        y = row
        for k in range(2):
            name = f"encoder.layers.{k}.0"
            out = (values[f"{name}.weight"] @ y + values[f"{name}.bias"]).relu()
            for part, value in (("weight", torch.outer(out, y)), ("bias", out)):
                wanted[f"{name}.{part}"] = wanted.get(f"{name}.{part}", 0.0) + value / len(tiny)
            y = out
    found = learner.importances.values
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], value, rtol=1e-5, atol=1e-9) for name, value in wanted.items())


def test_local_importances_want_linear_layers(tiny: Table) -> None:
    with pytest.raises(EngramError, match=r"local importances are those of linear layers, and 'encoder\.stages\.0\.0'"):
        MAS(network="ConvNet", epochs=1, local=True).learn(Task(tiny))


def test_omegas_of_tasks_are_added(tiny: Table) -> None:
    learner, run = MAS(**SMALL), Run()
    first, second = halves(tiny)
    learner.learn(first, run)
    one = learner.importances.values["encoder.layers.0.0.weight"].clone()
    learner.learn(second, run)
    alone = MAS(network=learner.model, epochs=0)
    alone.learn(second, run)
    two = alone.importances.values["encoder.layers.0.0.weight"]
    assert torch.allclose(learner.importances.values["encoder.layers.0.0.weight"], one + two, rtol=1e-10)


def test_the_penalty_written_down(tiny: Table) -> None:
    learner = begun(MAS(**SMALL, strength=2.0), tiny)
    with torch.no_grad():
        for p in learner.model.parameters():
            p.add_(0.5)
    omega = {name: value for name, value in learner.importances.values.items() if name.startswith("encoder.")}
    wanted = sum(2.0 * 0.25 * value.sum() for value in omega.values())
    assert learner.penalty().item() == pytest.approx(float(wanted), rel=1e-5)


def test_forgets_less_than_fine_tuning_where_tasks_share_their_classes(digits: Any) -> None:
    kept = [_after_other_pixels(kind, digits) for kind in (MAS, Finetune)]
    assert kept[0] > kept[1] + 0.05


def _after_other_pixels(kind: Any, digits: Any) -> float:
    """Accuracy on digits after digits with permuted pixels, mean of two seeds."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    pixels = digits.train.inputs["pixel_values"].flatten(1)[:, order].reshape(-1, 1, 8, 8)
    other = Table({"pixel_values": pixels}, digits.train.labels, tuple(f"other {id}" for id in digits.train.ids))
    found = []
    for seed in range(2):
        learner, run = kind(), Run(seed=seed)
        for index, table in enumerate((digits.train, other)):
            learner.learn(Task(table, index=index), run)
        found.append(accuracy(learner.model, digits.test))
    return sum(found) / 2


def test_a_copy_goes_on_learning_the_same(tiny: Table) -> None:
    learner = MAS.tiny()
    first, second = halves(tiny)
    learner.learn(first)
    twin = fork(learner)
    for each in (learner, twin):
        each.learn(second)
    assert same(learner, twin) and isinstance(twin.model, nn.Module)
