"""The checks of methods notice planted faults: each culprit breaks one promise, and the check of it says so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from engram import testing
from engram.audit.accuracy import Accuracy
from engram.core.finding import Finding
from engram.core.forgetter import Forgetter
from engram.core.learner import fork
from engram.core.needs import Need, Needs, needs
from engram.core.probe import Subject
from engram.core.protector import Protector
from engram.core.request import Request
from engram.core.trace import State
from engram.data.table import Ids, Table
from engram.data.task import Task
from engram.engine.run import Run
from engram.forget.gradient_ascent import GradientAscent
from engram.forget.gradient_difference import GradientDifference
from engram.keep.finetune import Finetune
from engram.keep.nmc import NMC
from engram.testing import Check, Material, check_row, digits
from engram.testing.learners import go_on

MLP = {"name": "MLP", "hidden": [16]}


@dataclass(kw_only=True, eq=False)
class Short(Finetune):
    """Fine-tuning that is quick: what the culprits among learners are made of."""

    network: Any = "MLP"
    epochs: int = 1


class DrawsGlobally(Short):
    def end(self, task: Task, run: Run) -> None:
        with torch.no_grad():
            next(self.model.parameters()).add_(torch.randn(()))


class IgnoresTheSeed(Short):
    def learn(self, task: Task, run: Run | None = None) -> None:
        run = run or Run()
        run.number("drawn in vain")
        super().learn(task, Run())


class ChangesItsRows(Short):
    def end(self, task: Task, run: Run) -> None:
        task.train.inputs["pixel_values"].mul_(1.0 + 1e-3)


class SavesTooLittle(Short):
    """What it adds to the weights grows with every task, and is not in its state."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.count = 0

    def end(self, task: Task, run: Run) -> None:
        self.count += 1
        with torch.no_grad():
            next(self.model.parameters()).add_(self.count)


class CannotResume(Short):
    """Two trainings of one name: after a fault the second takes the first one's checkpoint."""

    def learn(self, task: Task, run: Run | None = None) -> None:
        super().learn(task, (run or Run()).with_seed(7))


class BatchModel(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Any) -> Any:
        output = self.inner(**inputs)
        return replace(output, logits=output.logits - output.logits.mean(0))


class LooksAtTheBatch(Short):
    def refresh(self, run: Run | None = None) -> None:
        self.model = BatchModel(self.model)


class CountsLooks(Short):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.looks = 0

    def holds(self, ids: Iterable[str]) -> Ids:
        self.looks += 1
        return super().holds(ids)

    def extra_state(self) -> State:
        return {"looks": self.looks}


class AsksForTheTask(Short):
    def start(self, task: Task, run: Run) -> None:
        self.at = task.index


@dataclass(kw_only=True, eq=False)
class Hoards(Short):
    """Keeps rows besides its traces."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.hoard: list[torch.Tensor] = []

    def end(self, task: Task, run: Run) -> None:
        self.hoard.append(task.train.inputs["pixel_values"].flatten(1))

    def extra_state(self) -> State:
        return {"hoard": list(self.hoard)}


class Denies(Short):
    def end(self, task: Task, run: Run) -> None:
        self.seen.ids.clear()


class NotExact(NMC):
    """Sets the head, but not after it has forgotten."""

    def refresh(self, run: Run | None = None) -> None:
        pass


class OverwritesTheModel(GradientAscent):
    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        new = super().forget(model, request, run)
        model.load_state_dict(new.state_dict())
        return new


class TakesMore(GradientDifference):
    @property
    def needs(self) -> Needs:
        return needs({Need.FORGET_ROWS, Need.FORGET_LABELS})

    def check(self, request: Request) -> None:
        pass


class RefusesNothing(Forgetter):
    @property
    def needs(self) -> Needs:
        return needs({Need.RETAIN_ROWS})

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        return model


class ClaimsExactness(GradientAscent):
    exact: ClassVar[bool] = True


class FindsNaN(Accuracy):
    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        return [replace(finding, value=float("nan")) for finding in super().examine(subject, run)]


class WantsTestRows(Accuracy):
    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        assert len(subject.rows["test"])
        return super().examine(subject, run)


class Tunes(Accuracy):
    def examine(self, subject: Subject, run: Run | None = None) -> list[Finding]:
        subject.model.train()
        return super().examine(subject, run)


class Moves(Protector):
    """Changes pixels by a part of `eps`, as long as it is not a culprit."""

    eps = 0.1
    by = 0.05

    def protect(self, table: Table, run: Run | None = None) -> Table:
        pixels = table.inputs["pixel_values"]
        whole = 1.0 if pixels.is_floating_point() else 255.0
        moved = (pixels / whole + self.by).clamp(0, 1) * whole
        return replace(table, inputs={"pixel_values": moved.to(pixels.dtype)})


class MovesTooFar(Moves):
    by = 0.11


class DoesNothing(Moves):
    by = 0.0


class SwapsRows(Moves):
    def protect(self, table: Table, run: Run | None = None) -> Table:
        return super().protect(table, run).take(range(len(table))[::-1])


class ForgetsLabels(Moves):
    def protect(self, table: Table, run: Run | None = None) -> Table:
        return super().protect(table, run).unlabelled()


class ForgetsItsKind(Moves):
    def protect(self, table: Table, run: Run | None = None) -> Table:
        found = super().protect(table, run)
        return replace(found, inputs={"pixel_values": found.inputs["pixel_values"].float()})


CULPRITS: list[tuple[Any, Check, str]] = [
    (DrawsGlobally(network=MLP), testing.check_seeded, "moved the global random state of torch"),
    (IgnoresTheSeed(network=MLP), testing.check_seeded, "another seed gave the same bits"),
    (CannotResume(network=MLP), testing.check_resumes, "ended with other bits"),
    (LooksAtTheBatch(network=MLP), testing.check_prediction_is_of_the_row_alone, "depends on the other rows"),
    (CountsLooks(network=MLP), testing.check_looking_changes_nothing, "by being looked at"),
    (AsksForTheTask(network=MLP), testing.check_learner_needs_are_honest, "read 'index' of a task"),
    (Hoards(network=MLP), testing.check_traces_are_complete, "holds the contents of dropped rows"),
    (Denies(network=MLP), testing.check_traces_are_complete, "does not say that it holds them"),
    (NotExact(), testing.check_forgetting_is_exact, "differs from never having learnt"),
    (OverwritesTheModel(epochs=1), testing.check_model_is_untouched, "changed the model that it was given"),
    (RefusesNothing(), testing.check_model_is_untouched, "shares memory with the old one"),
    (TakesMore(epochs=1), testing.check_forgetter_needs_are_honest, "does not declare that it needs them"),
    (RefusesNothing(), testing.check_forgetter_needs_are_honest, "needs retain-rows, and works without"),
    (ClaimsExactness(epochs=1), testing.check_forgetter_is_exact, "depends on the forgotten rows"),
    (FindsNaN(oracles=1), testing.check_findings, "is not finite"),
    (Tunes(oracles=1), testing.check_findings, "changed the model that it examined"),
    (MovesTooFar(), testing.check_protected_rows, "states eps=0.1"),
    (DoesNothing(), testing.check_protected_rows, "changed nothing"),
    (SwapsRows(), testing.check_protected_rows, "changed the ids"),
    (ForgetsLabels(), testing.check_protected_rows, "changed labels"),
    (ForgetsItsKind(), testing.check_protected_rows, "which was torch.uint8"),
]


def test_a_protector_without_a_fault_passes() -> None:
    testing.check_protected_rows(Moves(), digits())


@pytest.mark.parametrize(
    ("culprit", "check", "sentence"), CULPRITS, ids=lambda value: getattr(value, "__name__", type(value).__name__)
)
def test_a_planted_fault_is_noticed(culprit: Any, check: Check, sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check(culprit, digits())


@pytest.mark.parametrize("learner", [Short(network=MLP), SavesTooLittle(network=MLP)], ids=lambda m: type(m).__name__)
def test_state_that_is_not_saved_is_noticed(learner: Short) -> None:
    first, second = digits().tasks
    found = go_on(fork(testing.learnt(learner, [first], Run())), second)
    if isinstance(learner, SavesTooLittle):
        with pytest.raises(AssertionError, match="became another"):
            testing.check_round_trip(learner, digits(), found)
    else:
        testing.check_round_trip(learner, digits(), found)


def test_changed_rows_are_noticed() -> None:
    own = digits()
    rows = [replace(task, train=task.train.take(torch.arange(len(task.train)))) for task in own.tasks]
    material = Material((rows[0], rows[1]), own.test, own.recipe)
    with pytest.raises(AssertionError, match="changed the rows"):
        testing.check_untouched(ChangesItsRows(network=MLP), material)


def test_a_probe_that_needs_what_it_does_not_ask_for() -> None:
    with pytest.raises(KeyError, match="test"):
        testing.check_asks_are_honest(WantsTestRows(oracles=1), digits())


def test_a_row_of_the_catalogue_that_disagrees() -> None:
    from engram.catalogue import find

    row = find("keep.NMC")
    asked = replace(row, needs=(frozenset({"recipe"}),))
    variant = replace(row, variants=(("normalise=false", (frozenset({"backbone"}),)),))
    for wrong in (asked, variant, replace(row, exact=False)):
        with pytest.raises(AssertionError, match=r"the catalogue"):
            check_row(wrong)
