"""What methods are checked with, and how what they make is compared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from engram.core.forgetter import Forgetter
from engram.core.learner import Learner
from engram.core.needs import Need
from engram.core.probe import Probe, Subject
from engram.core.protector import Protector
from engram.core.request import Request
from engram.core.settings import make, name_of, settings
from engram.data.table import Ids, Table
from engram.data.task import Task
from engram.engine.journal import flatten
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.models import io


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """Two tasks, test rows, and a recipe for models on the rows of both."""

    tasks: tuple[Task, Task]
    test: Table
    recipe: Recipe

    @cached_property
    def train(self) -> Table:
        """The rows of both tasks."""
        return self.tasks[0].train.concat(self.tasks[1].train)

    @property
    def gone(self) -> Ids:
        """The records that shall be forgotten: every fifth row of the first task."""
        return self.tasks[0].train.ids[::5]

    @cached_property
    def request(self) -> Request:
        """To forget these records, with everything at hand."""
        return Request.of_records(self.train, self.gone).but(general=self.test, at_hand={Need.RECIPE: self.recipe})

    def model(self) -> nn.Module:
        """A model of all training rows."""
        return self.recipe(self.train, 0)

    @cached_property
    def oracles(self) -> list[nn.Module]:
        """Two models of the retained rows."""
        retain = self.train.without(self.gone)
        return [self.recipe(retain, seed) for seed in (1, 2)]

    @cached_property
    def learner(self) -> Learner:
        """A learner that has taken in both tasks."""
        return learnt(make("keep.NMC"), self.tasks, Run())

    def subject(self) -> Subject:
        """This model, untouched by the request, with everything that a probe may ask for."""
        request, model = self.request, self.model()
        assert request.forget is not None and request.retain is not None
        rows = {"forget": request.forget, "retain": request.retain, "test": self.test}
        forgetter = make({"name": "forget.Finetune", "epochs": 1})
        given: dict[str, Any] = {"recipe": self.recipe, "forgetter": forgetter, "learner": self.learner}
        return Subject(model, before=model, request=request, rows=rows, **given)


@cache
def digits() -> Material:
    """Six training rows and three test rows of each of scikit-learn's handwritten digits; tasks of five classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.tensor(data.images[:, None] / 16, dtype=torch.float32)
    ids = tuple(f"record {row}" for row in range(len(pixels)))
    table = Table({"pixel_values": pixels}, torch.tensor(data.target), ids)
    places = [np.flatnonzero(data.target == c) for c in range(10)]
    parts = slice(6), slice(6, 9)
    train, test = (table.take(sorted(int(row) for p in places for row in p[part])) for part in parts)
    halves = (tuple(range(5)), tuple(range(5, 10)))
    first, second = (Task(train.of_classes(half), None, k, half) for k, half in enumerate(halves))
    network = {"name": "MLP", "hidden": [16]}
    return Material((first, second), test, Recipe(network, Optimizer(lr=1e-2), 4, 16, tuple(range(10))))


def fingerprint(value: Any) -> str:
    """SHA-256 over plain data, tensors and modules, bit by bit."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(flatten(value, tensors), sort_keys=True)
    return hashlib.sha256(tree.encode() + save_bytes(tensors)).hexdigest()


def contents(table: Table) -> dict[str, Any]:
    """All that stands in a table, as plain data and tensors."""
    extra = {name: value if isinstance(value, Tensor) else list(value) for name, value in table.extra.items()}
    return {"inputs": dict(table.inputs), "labels": table.labels, "ids": list(table.ids), "extra": extra}


def condition(model: nn.Module) -> str:
    """Everything about a model that must not change unasked: weights, buffers, modes, what is trainable, gradients."""
    modes = [module.training for module in model.modules()]
    trainable = [[p.requires_grad, p.grad is None] for p in model.parameters()]
    return fingerprint([io.digest(model), modes, trainable])


def fresh(method: Any) -> Any:
    """Another instance with the same settings."""
    return type(method)(**settings(method))


def learnt(learner: Learner, tasks: Sequence[Task], run: Run) -> Learner:
    """A fresh learner of the same settings that has taken in these tasks."""
    twin: Learner = fresh(learner)
    for task in tasks:
        twin.learn(task, run)
    twin.refresh(run)
    return twin


def outcome(method: Any, material: Material, run: Run) -> str:
    """The fingerprint of what a fresh instance makes of the material, from beginning to end."""
    if isinstance(method, Learner):
        return fingerprint(learnt(method, material.tasks, run).state_dict())
    if isinstance(method, Forgetter):
        return fingerprint(fresh(method).forget(material.model(), complete(method, material), run))
    if isinstance(method, Probe):
        return fingerprint([finding.as_dict() for finding in fresh(method).examine(material.subject(), run)])
    assert isinstance(method, Protector), f"{name_of(method)} is no learner, forgetter, probe or protector"
    return fingerprint(contents(fresh(method).protect(material.train, run)))


def complete(method: Forgetter, material: Material) -> Request:
    """The request, with the statistics that the method stores if it can."""
    return material.request.but(at_hand=supplies(method, material))


def supplies(method: Forgetter, material: Material) -> dict[Need, Any]:
    """What the material can put at hand for a forgetter: a recipe, oracles, the statistics that it stores."""
    prepare = getattr(method, "prepare", None)
    stored = {} if prepare is None else {Need.STATISTICS: prepare(material.model(), material.train, Run())}
    return {Need.RECIPE: material.recipe, Need.ORACLES: material.oracles, **stored}


def ensure(condition: bool, sentence: str) -> None:
    """AssertionError with this sentence unless the condition holds."""
    if not condition:
        raise AssertionError(sentence)


def check_row_alone(name: str, model: nn.Module, rows: Table) -> None:
    """A model tells a row alone the same as in a batch with others."""
    together, alone = predict(model, rows), predict(model, rows, batch_size=1)
    ensure(close(together, alone, 1e-5), f"what {name}'s model says of a row depends on the other rows of the batch")


def close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Equal within a tolerance, relative above 1; infinite and missing values in the same places."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
