"""Constructors' arguments as data."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from engram.errors import EngramError
from engram.models import MLP, ConvNet, Identity, LinearHead, Predictor, seeded
from engram.models.config import Configured


class Base(Configured):
    def __init__(self, size: int, rate: float = 0.5, names: tuple[str, ...] = ("a",)) -> None:
        self.size = size


class Derived(Base):
    def __init__(self, depth: int, **rest: Any) -> None:
        super().__init__(size=depth + 1, **rest)


class Holder(Configured, nn.Module):
    def __init__(self, parts: list[nn.Module], kept: bool = True) -> None:
        super().__init__()
        if kept:
            self.parts = nn.ModuleList(parts)


def test_arguments_are_bound_by_name_defaults_included() -> None:
    assert Base(3).config == {"size": 3, "rate": 0.5, "names": ["a"]}
    assert Base(size=3, names=("x", "y")).config == {"size": 3, "rate": 0.5, "names": ["x", "y"]}


def test_a_subclass_is_described_by_its_own_arguments() -> None:
    assert Derived(2, rate=0.1).describe() == {"class": "Derived", "depth": 2, "rate": 0.1}
    assert list(inspect.signature(Derived).parameters) == ["depth", "rest"]


def test_the_config_survives_changes_by_others() -> None:
    names = ["a", "b"]
    thing = Base(1, names=names)  # type: ignore[arg-type]
    names.append("c")
    thing.config["names"].append("d")
    assert thing.config["names"] == ["a", "b"]


def test_nested_modules_are_described_as_they_are_now(predictor: Predictor) -> None:
    inner = {"class": "MLP", "inputs": 5, "hidden": [8], "activation": "relu", "dropout": 0.0, "norm": None}
    head = {"class": "LinearHead", "width": 8, "classes": [4, 1], "bias": True, "classes_total": 6}
    assert predictor.config == {"encoder": inner, "head": head}
    twin = copy.deepcopy(predictor)
    twin.encoder = Identity(8)
    twin.head.retire([4])
    assert twin.config["encoder"] == {"class": "Identity", "width": 8}
    assert twin.config["head"]["classes"] == [1]
    assert predictor.config["head"] == head
    assert json.loads(json.dumps(predictor.config)) == predictor.config


def test_sequences_of_modules(make: Callable[..., Any]) -> None:
    holder = make(lambda: Holder([Identity(2), MLP(2, hidden=())]))
    assert [part["class"] for part in holder.config["parts"]] == ["Identity", "MLP"]


def test_what_no_config_can_hold_is_named(make: Callable[..., Any]) -> None:
    bare = make(lambda: Predictor(nn.Linear(2, 2), LinearHead(2)))
    with pytest.raises(EngramError, match="argument 'encoder' of Predictor is a Linear"):
        bare.config  # noqa: B018
    with pytest.raises(EngramError, match=r"keep it as self\.parts"):
        Holder([Identity(2)], kept=False).describe()


def test_the_config_makes_an_equal_object(make: Callable[..., Any]) -> None:
    net = make(ConvNet, 3, widths=(4, 8), norm="group", seed=5)
    assert make(ConvNet, **net.config, seed=5).config == net.config
    again = make(ConvNet, **net.config, seed=5).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in net.state_dict().items())


def test_seeded_follows_its_generator_only(moved_by: Callable[[Callable[[], object]], list[str]]) -> None:
    def draw(seed: int) -> torch.Tensor:
        with seeded(torch.Generator().manual_seed(seed)):
            return torch.rand(4)

    first, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert moved_by(lambda: draw(3)) == []
    shared = torch.Generator().manual_seed(1)
    with seeded(shared):
        one = torch.rand(4)
    with seeded(shared):
        two = torch.rand(4)
    assert torch.equal(one, first)
    assert not torch.equal(one, two)
