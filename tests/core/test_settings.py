"""Methods as plain data and back: what is made, and what is refused with which words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engram.core.settings import describe, load_class, make, name_of, settings
from engram.engine.optimizer import Optimizer
from engram.errors import EngramError
from engram.forget.npo import NPO
from engram.forget.ssd import SSD
from engram.keep.acu import ACU
from engram.keep.finetune import Finetune
from engram.keep.replay import Replay
from engram.models.encoders import MLP
from engram.models.seeding import seeded
from engram.stats.seeds import generator


@pytest.mark.parametrize("name", ["keep.NMC", "NMC", "nmc", "keep.nmc"])
def test_a_name_alone_makes_the_defaults(name: str) -> None:
    made = make(name)
    assert describe(made) == {"name": "keep.NMC", "backbone": None, "normalise": True}


def test_the_wing_tells_methods_of_one_name_apart() -> None:
    assert name_of(make("Finetune", wing="keep")) == "keep.Finetune"
    assert name_of(make("Finetune", wing="forget")) == "forget.Finetune"
    assert name_of(make("keep.Finetune", wing="keep")) == "keep.Finetune"


def test_settings_arrive_with_their_types() -> None:
    made = make({"name": "forget.NPO", "beta": 1, "optimizer": {"name": "sgd", "lr": 0.5, "milestones": [0.5]}})
    assert made.beta == 1.0 and isinstance(made.beta, float)
    assert isinstance(made.optimizer, Optimizer)
    assert (made.optimizer.name, made.optimizer.lr, tuple(made.optimizer.milestones)) == ("sgd", 0.5, (0.5,))
    assert made.epochs == NPO().epochs  # what was not given keeps its default


@pytest.mark.parametrize(
    "method",
    [
        ACU(size=7, gamma=0.25),
        Finetune(network={"name": "MLP", "hidden": [3, 4]}, optimizer=Optimizer("sgd", lr=0.125, clip=2.0)),
        SSD(alpha=1.5, loss="norm", power=1),
        Replay(rule="fifo", buffer=3),
    ],
    ids=name_of,
)
def test_describe_and_make_are_inverse(method: Any) -> None:
    plain = json.loads(json.dumps(describe(method)))
    again = make(plain)
    assert type(again) is type(method) and describe(again) == plain
    assert settings(again).keys() == settings(method).keys()


def test_a_module_is_described_by_its_config() -> None:
    with seeded(generator("a backbone")):
        backbone = MLP(inputs=6, hidden=[5])
    described = describe(ACU(backbone=backbone, size=3))["backbone"]
    assert described["class"] == "MLP" and described["hidden"] == [5]
    json.dumps(described)


def test_what_cannot_stand_in_a_config_is_named() -> None:
    with pytest.raises(EngramError, match="a function cannot stand in a config"):
        describe(ACU(backbone=lambda x: x))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("keep.NCM", r"unknown method 'keep\.NCM'; did you mean 'keep\.NMC'"),
        (
            {"name": "keep.NMC", "normalize": True},
            r"unknown setting of keep\.NMC 'normalize'; did you mean 'normalise'",
        ),
        ({"name": "SSD", "alhpa": 1}, r"did you mean 'alpha'"),
        ({"name": "SSD", "alpha": "much"}, r"SSD: alpha takes float \| Literal\['auto'\], not 'much'"),
        ({"name": "forget.NPO", "epochs": 1.5}, r"NPO: epochs takes int, not 1\.5"),
        ({"name": "forget.NPO", "optimizer": {"lr": "fast"}}, r"NPO: optimizer\.lr takes float, not 'fast'"),
        ({"name": "forget.NPO", "optimizer": {"ls": 1}}, r"unknown setting of optimizer 'ls'; did you mean 'lr'"),
        (3, r"a method is written as a name"),
        ({"alpha": 1}, r"a method is written as a name"),
        ("Finetune", r"several wings"),
        ({"name": "keep.Replay", "epochs": -1}, r"epochs of keep\.Replay is -1; give 0 or more"),
        ({"name": "keep.Replay", "batch_size": 0}, r"batch_size of keep\.Replay is 0; give 1 or more"),
        ({"name": "keep.Replay", "buffer": -3}, r"buffer of keep\.Replay is -3"),
        ({"name": "keep.Replay", "optimizer": {"lr": -1}}, r"lr of the optimizer is -1\.0"),
        ({"name": "keep.Replay", "optimizer": "adam"}, r"optimizer of Replay is 'adam'; give its settings"),
        ({"name": "keep.Replay", "optimizer": 3}, r"optimizer of Replay is 3; give its settings"),
        ({"name": "keep.ConTraCon", "head_lr": -1}, r"head_lr of keep\.ConTraCon is -1"),
        ({"name": "forget.LAF", "repair_epochs": -1}, r"repair_epochs of forget\.LAF is -1"),
        ({"name": "SSD", "alpha": float("nan")}, r"alpha of SSD is nan; give a number"),
        ({"name": "audit.Accuracy", "oracles": -1}, r"oracles of audit\.Accuracy is -1"),
    ],
)
def test_what_is_wrong_is_named_with_what_would_be_right(spec: Any, words: str) -> None:
    with pytest.raises(EngramError, match=words):
        make(spec)


def test_names_of_classes_and_instances() -> None:
    assert name_of(SSD) == name_of(SSD()) == "forget.SSD"
    assert load_class("ssd") is SSD


def test_a_class_of_another_package_keeps_its_full_name() -> None:
    class Own(SSD):
        pass

    assert name_of(Own) == f"{__name__}.Own"
