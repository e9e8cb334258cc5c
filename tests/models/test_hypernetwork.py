"""Hypernetworks: what depends on what, how much they weigh, what growth leaves alone, and He's variance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from engram.errors import EngramError
from engram.models import load, save
from engram.models.encoders import MLP, ConvNet, Encoder
from engram.models.hypernetwork import ChunkedGenerator, Hypernetwork, HyperTask, RecurrentGenerator
from engram.models.seeding import seeded
from engram.testing import holds


def made(kind: str = "recurrent", images: bool = False, tasks: Any = ((0, 1), (2, 3)), **options: Any) -> Hypernetwork:
    cls = {"recurrent": RecurrentGenerator, "chunked": ChunkedGenerator}[kind]
    with seeded(torch.Generator().manual_seed(0)):
        given = {"task_width": 12, "chunk_width": 12, "hidden": 12, "size": 1000, **options}
        target: Encoder = ConvNet(1, (8, 8)) if images else MLP(64, (100, 100))
        model = Hypernetwork(target, cls(**given))
        for classes in tasks:
            model.add(classes)
    return model.eval()


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def everything(model: Hypernetwork) -> Tensor:
    return model.weights(range(len(model.tasks))).detach()


def rows(n: int = 5, d: int = 64) -> Tensor:
    return torch.rand(n, d, generator=torch.Generator().manual_seed(1))


@holds("dependency-preserving-hypernetworks", 1)
def test_the_generator_is_no_larger_than_its_target_and_a_task_adds_its_vector() -> None:
    one, two = made(tasks=[(0, 1)]), made()
    target = 64 * 100 + 100 + 100 * 100 + 100 + 100 * 2 + 2
    assert one.size == target and len(one.generator.chunks) == 17
    assert count(one) <= target
    assert count(two) - count(one) == 12
    assert count(one.concrete(0)) == target


@holds("dependency-preserving-hypernetworks", 2)
@pytest.mark.parametrize(("kind", "feedback"), [("recurrent", 0), ("recurrent", 3), ("chunked", 0)])
def test_later_chunks_follow_from_earlier_ones_in_the_recurrent_form_alone(kind: str, feedback: int) -> None:
    model = made(kind, **({"feedback": feedback} if feedback else {}))
    chunks = model.generator(model.embeddings([0])).view(17, -1)
    (of_last,) = torch.autograd.grad(chunks[-1].sum(), model.generator.chunks, retain_graph=True)
    (of_first,) = torch.autograd.grad(chunks[0].sum(), model.generator.chunks)
    assert bool(of_last[0].any()) == (kind == "recurrent")
    assert bool(of_first[0].any()) and not bool(of_first[1:].any())


def test_the_recurrence_is_torchs_lstm() -> None:
    generator = made().generator
    with seeded(torch.Generator()):
        lstm = torch.nn.LSTM(24, 12, batch_first=True)
    given = (generator.weight_x, generator.weight_h, generator.bias, torch.zeros(48))
    lstm.load_state_dict(dict(zip(lstm.state_dict(), given, strict=True)))  # type: ignore[arg-type]
    task = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    inputs = torch.stack([torch.cat([task, c.expand(3, -1)], 1) for c in generator.chunks], 1)
    torch.testing.assert_close(generator(task), generator.out(lstm(inputs)[0]).flatten(1))
    each = torch.cat([generator(one[None]) for one in task])
    torch.testing.assert_close(generator(task), each)


@holds("dependency-preserving-hypernetworks", 4)
@pytest.mark.parametrize("feedback", [0, 3])
def test_growth_leaves_what_is_generated_for_every_task(feedback: int) -> None:
    model = made(feedback=feedback)
    before, size = everything(model), count(model)
    with seeded(torch.Generator()):
        model.generator.grow(5)  # type: ignore[operator]
    assert float((everything(model) - before).abs().max()) < 1e-6
    assert model.generator.hidden == 17 and count(model) > size
    model.generator(model.embeddings([0])).square().sum().backward()
    assert bool(model.generator.out.weight.grad[:, 12:].any())  # the new units have a say as soon as it is trained


def test_room_for_a_larger_task_leaves_smaller_ones_alone() -> None:
    model, x = made(), rows()
    before = model(values=x, task=torch.zeros(5, dtype=torch.long)).logits
    with seeded(torch.Generator()):
        model.add(range(4, 16))
    assert model.outputs == 12 and len(model.generator.chunks) == 18
    after = model(values=x, task=torch.zeros(5, dtype=torch.long)).logits
    torch.testing.assert_close(after[:, :2], before[:, :2], rtol=1e-5, atol=1e-6)
    assert bool(after[:, 2:].isneginf().all())


@pytest.mark.parametrize("kind", ["recurrent", "chunked"])
def test_generated_layers_have_hes_variance(kind: str) -> None:
    model = made(kind, tasks=[(0, 1)])
    found = model.named(model.weights([0])[0])
    for name, fan in (("layers.0.0.weight", 64), ("layers.1.0.weight", 100)):
        assert 0.6 < float(found[name].detach().var()) * fan / 2 < 1.6


def test_norms_are_generated_around_one_and_keep_statistics_for_each_task() -> None:
    model = made(images=True, size=100)
    found = model.named(model.weights([0])[0])
    assert abs(float(found["stages.0.1.weight"].mean()) - 1) < 0.2
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in model.statistics(0).items()}
    model.train().local(1, model.weights([1])[0], {"pixel_values": x})
    assert all(torch.equal(model.statistics(0)[name], value) for name, value in before.items())
    assert bool((model.statistics(1)["stages.0.1.running_mean"] != 0).any())
    model.eval()
    alone = model.concrete(1).eval()(pixel_values=x).logits[:, 2:]
    torch.testing.assert_close(model.local(1, model.weights([1])[0], {"pixel_values": x}), alone)


def test_a_row_goes_to_the_surest_network_or_to_the_one_it_is_told() -> None:
    model, x = made(tasks=[(0, 1), (2, 5, 3)]), rows()
    with torch.no_grad():
        alone = [model.concrete(t).eval()(values=x).logits for t in (0, 1)]
        found = model(values=x)
        for t, wanted in enumerate(alone):
            told = model(values=x, task=torch.full((5,), t)).logits
            own = list(model.task(t).classes)
            torch.testing.assert_close(told[:, own], wanted[:, own])
    p = [logits[:, own].softmax(1) for logits, own in zip(alone, ([0, 1], [2, 3, 5]), strict=True)]
    entropies = torch.stack([-(q * q.log()).sum(1) / math.log(q.shape[1]) for q in p], 1)
    chosen = torch.isin(found.logits.argmax(1), torch.tensor([2, 3, 5])).long()
    assert torch.equal(chosen, entropies.argmin(1))
    with pytest.raises(EngramError, match="numbered 0 to 1"):
        model(values=x, task=torch.full((5,), 2))


def test_retired_classes_are_told_no_more() -> None:
    model, x = made(), rows()
    model.retire([1, 2])
    logits = model(values=x).logits
    assert bool(logits[:, [1, 2]].isneginf().all()) and bool(logits[:, [0, 3]].isfinite().all())


def test_saves_and_loads_after_growth(tmp_path: Any) -> None:
    model = made(tasks=[(0, 1), (2, 3, 4)], feedback=2)
    with seeded(torch.Generator()):
        model.generator.grow(3)  # type: ignore[operator]
    save(model, tmp_path / "model")
    twin = load(tmp_path / "model")
    assert torch.equal(twin(values=rows()).logits, model(values=rows()).logits)
    assert not any(name.startswith("target") for name, _ in twin.named_parameters())
    assert isinstance(twin.task(1), HyperTask)
