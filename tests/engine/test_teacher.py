"""Teachers: copies that learn nothing, averages that follow, and outputs that stand by their rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engram.data.table import Table
from engram.engine.journal import flatten, unflatten
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.engine.teacher import EMA, RowCache, cached, frozen
from engram.models.build import build
from engram.stats.seeds import generator


def rows(n: int = 12) -> Table:
    x = torch.randn(n, 6, generator=generator("rows"))
    return Table({"values": x}, x[:, :3].argmax(1))


def network(seed: int = 0) -> Any:
    """In training mode, with batch statistics."""
    spec = {"name": "MLP", "hidden": [8], "norm": "batch"}
    return build(spec, inputs={"values": (6,)}, classes=(0, 1, 2), generator=generator("weights", seed)).train()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def train(model: nn.Module) -> None:
    """A step of training, which also moves the running statistics."""
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model(**rows().batch(torch.arange(12)).inputs).logits[:, 0].sum().backward()
    optimizer.step()
    optimizer.zero_grad()


# --- frozen copies


def test_a_frozen_copy_is_in_eval_mode_and_takes_no_gradient() -> None:
    model = network()
    teacher = frozen(model)
    assert equal(state(teacher), state(model)) and not any(module.training for module in teacher.modules())
    logits = teacher(**rows().batch(torch.arange(4)).inputs).logits
    assert not logits.requires_grad and not any(p.requires_grad for p in teacher.parameters())
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_a_frozen_copy_stays_while_the_model_trains_and_shares_no_memory() -> None:
    model = network()
    teacher = frozen(model)
    before = state(teacher)
    train(model)
    assert equal(state(teacher), before)
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items() if "weight" in name)


def test_a_gradient_passes_through_a_teacher_to_what_it_is_given() -> None:
    x = rows().inputs["values"].clone().requires_grad_()
    frozen(network())(values=x).logits.sum().backward()
    assert x.grad is not None and x.grad.any()


# --- averages


@pytest.mark.parametrize("decay", [0.0, 0.25, 1.0])
def test_an_average_moves_by_its_decay(decay: float) -> None:
    model = network()
    average, first = EMA(model, decay), state(network())
    train(model)
    average.update(model)
    new = dict(model.named_parameters())
    for name, value in average.model.named_parameters():
        assert torch.allclose(value, decay * first[name] + (1 - decay) * new[name], atol=1e-6)
        assert not value.requires_grad
    assert average.updates == 1 and not average.model.training and model.training


def test_a_decay_may_depend_on_the_number_of_updates() -> None:
    model, asked = network(), []

    def decay(updates: int) -> float:
        asked.append(updates)
        return updates / (updates + 1)

    average = EMA(model, decay)
    seen = []
    for _ in range(3):
        train(model)
        seen.append(model.head.weight.detach().clone())
        average.update(model)
    assert asked == [0, 1, 2]
    assert torch.allclose(average.model.head.weight, torch.stack(seen).mean(0), atol=1e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize(("buffers", "follows"), [("copy", True), ("own", False)])
def test_buffers_follow_the_model_or_stay(buffers: str, follows: bool) -> None:
    model = network()
    average = EMA(model, 0.5, buffers=buffers)
    before = dict(state(average.model))
    train(model)
    average.update(model)
    wanted = model.state_dict() if follows else before
    names = [name for name, _ in model.named_buffers()]
    moved = [name for name in names if not torch.equal(model.state_dict()[name], before[name])]
    assert {name.rpartition(".")[2] for name in moved} == {"running_mean", "running_var", "num_batches_tracked"}
    assert all(torch.equal(average.model.state_dict()[name], wanted[name]) for name in names)


def test_an_average_goes_on_from_its_state() -> None:
    def follow(average: EMA, model: nn.Module, steps: int) -> EMA:
        for _ in range(steps):
            train(model)
            average.update(model)
        return average

    def decay(updates: int) -> float:
        return 1 - 1 / (updates + 2)

    model = network()
    whole = follow(EMA(network(), decay), network(), 4)
    half = follow(EMA(model, decay), model, 2)
    tensors: dict[str, Tensor] = {}
    tree = json.loads(json.dumps(flatten(half.state_dict(), tensors)))  # as a checkpoint keeps it
    again = EMA(network(seed=1), decay)
    again.load_state_dict(unflatten(tree, tensors))
    follow(again, model, 2)
    assert again.updates == 4 and equal(state(again.model), state(whole.model))


# --- outputs by row


def test_outputs_are_found_by_the_numbers_of_rows_in_any_order() -> None:
    values = torch.arange(24.0).reshape(12, 2)
    for batch in rows().batches(5, seed=1):
        assert torch.equal(RowCache(values)(batch), values[batch.rows])
    assert RowCache(values)(rows().batch(torch.tensor([], dtype=torch.long))).shape == (0, 2)


def test_outputs_come_to_the_device_of_the_batch() -> None:
    batch = rows().batch(torch.tensor([3, 1])).to("meta")
    assert RowCache(torch.ones(12, 2))(batch).device.type == "meta"


@pytest.mark.parametrize(
    "output", ["logits", "loss", lambda output, batch: output.logits[:, :2]], ids=["logits", "loss", "function"]
)
def test_cached_outputs_are_the_models_before_it_went_on(output: Any) -> None:
    model, run = network(), Run()
    wanted = predict(model, rows(), output)
    found = cached(model, rows(), output, run, "teacher")
    train(model)
    batch = rows().batch(torch.tensor([7, 0, 11]))
    assert torch.equal(found(batch), wanted[[7, 0, 11]]) and not found.values.requires_grad
    assert not torch.equal(predict(model, rows(), output), wanted) and run.cost.rows == 12


def test_cached_outputs_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(calls: list[int]) -> Callable[..., None]:
        return lambda *_: calls.append(1)

    first = cached(network(), rows(), "logits", Run(tmp_path), "teacher")
    model, calls = network(seed=1), []
    model.register_forward_hook(forward(calls))
    again = cached(model, rows(), "logits", Run(tmp_path), "teacher")
    assert torch.equal(again.values, first.values) and not calls
    cached(model, rows(), "logits", Run(tmp_path), "another")
    assert calls
