"""The template of learners that hold each parameter back by how much it mattered to earlier tasks.

While a task is learnt, the loss has the term

    strength * sum over parameters of Omega (theta - theta')²,

theta' being the model as it is when the task comes, and Omega the importances of the tasks before. Methods
differ in what Omega is. Published code keeps theta' from the end of the last task, which is the same unless
something was forgotten in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from engram.core.learning import GradientLearner
from engram.core.needs import Need, Needs, needs
from engram.core.trace import Derived
from engram.data.table import Batch
from engram.data.task import Task
from engram.engine.losses import Mean
from engram.engine.run import Run
from engram.models.head import Head
from engram.models.output import Output


@dataclass(kw_only=True, eq=False)
class Consolidation(GradientLearner):
    """Fine-tuning under a penalty; a method computes importances in `end` and hands them to `consolidate`.

    `strength`: weight of the penalty, as the method's own equation has it; 0 is fine-tuning. Rows of the head
    whose classes were not known are never held. Importances are a trace: rows leave residue in them.
    """

    strength: float = 1.0

    holds_head: ClassVar[bool] = True  # is the head held too, where its classes were known?

    def __post_init__(self) -> None:
        super().__post_init__()
        self.importances: Derived = self.trace("importances", Derived())

    @property
    def needs(self) -> Needs:
        return needs({Need.BOUNDARIES})

    @property
    def factor(self) -> float:
        """What stands before the sum."""
        return self.strength

    def start(self, task: Task, run: Run) -> None:
        self.anchor = {name: p.detach().clone() for name, p in self.model.to(run.device).named_parameters()}
        self.pull = self.stiffness() if self.strength else {}

    def terms(self, batch: Batch, output: Output) -> Mean:
        loss = super().terms(batch, output)
        return loss + Mean.of(self.penalty()) if self.pull else loss

    def penalty(self) -> Tensor:
        """The term, []."""
        return pulled(self.model, self.anchor, self.pull)

    def stiffness(self) -> dict[str, Tensor]:
        """What the square of each parameter's movement costs; none before the first task has ended."""
        found = {}
        for name, p in self.model.named_parameters():
            if name in self.importances.values and (self.holds_head or not name.startswith("head.")):
                weight = self.factor * padded(self.importances.values[name].to(p.device), p.shape)
                found[name] = (weight * known_rows(self.model, self.known, name, p)).to(p.dtype)
        return found

    def consolidate(self, found: Mapping[str, Tensor], ids: Iterable[str], keep: float = 1.0) -> None:
        """Omega becomes keep * Omega + `found`, to which the rows with these ids went in."""
        old = self.importances.values
        self.importances.values = {
            name: value + keep * padded(old[name].to(value.device), value.shape) if name in old else value
            for name, value in found.items()
        }
        self.importances.add(ids)


def pulled(model: nn.Module, anchor: Mapping[str, Tensor], pull: Mapping[str, Tensor]) -> Tensor:
    """Sum over parameters of pull (theta - anchor)², []."""
    parameters = dict(model.named_parameters())
    parts = [(weight * (parameters[name] - anchor[name]).square()).sum() for name, weight in pull.items()]
    return torch.stack(parts).sum()


def known_rows(model: nn.Module, known: Iterable[int], name: str, p: Tensor) -> Tensor:
    """1, or 0 in the head's rows of classes that were not known; to be multiplied with the weights of parameter p."""
    head = getattr(model, "head", None)
    if not (isinstance(head, Head) and name.removeprefix("head.") in head.rows and name.startswith("head.")):
        return torch.ones((), device=p.device)
    there = torch.isin(head.classes, torch.tensor(tuple(known), dtype=torch.long, device=head.classes.device))
    return there.view(-1, *[1] * (p.ndim - 1)).to(p.device)


def padded(value: Tensor, shape: torch.Size) -> Tensor:
    """The tensor with zeros behind it, as a head has them that has grown since; float64."""
    new = torch.zeros(shape, dtype=torch.float64, device=value.device)
    new[tuple(slice(n) for n in value.shape)] = value.double()
    return new
