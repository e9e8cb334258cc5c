"""Synaptic intelligence: a parameter matters by how much of the fall of the loss its movement brought about.

Zenke, Poole, Ganguli: Continual Learning Through Synaptic Intelligence. ICML 2017, arXiv 1703.04200.

1. With every update, omega grows by -g * (change of theta), g the gradient of the task's loss without the
   penalty (eq. 3): the path integral of the gradient along the training.
2. After a task: Omega grows by omega / (Delta² + xi), Delta how far theta has come during the task (eq. 5).
3. While a task is learnt: its loss + strength * sum of Omega (theta - theta')² (eq. 4).

Omega is cut off at 0, as in the authors' code: below, a parameter would be driven away. Mammoth takes
lr * gradient² for the product, penalty included, which is only right for plain SGD and the first task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engram.core.trace import State
from engram.data.task import Task
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.consolidation import Consolidation


class PathIntegral:
    """The sum over updates of -gradient * change, by parameter, in float64."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters())
        self.before = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in self.before.items()}

    @torch.no_grad()
    def move(self, penalty: Mapping[str, Tensor]) -> None:
        """After an update; `penalty`: the part of each gradient that is not to count."""
        for name, p in self.parameters.items():
            before = self.before[name].to(p)
            if p.grad is not None:
                slope = p.grad - penalty[name] if name in penalty else p.grad
                self.sums[name] = self.sums[name].to(p.device) - slope.double() * (p - before).double()
            self.before[name] = p.detach().clone()

    def state_dict(self) -> State:
        return {"before": dict(self.before), "sums": dict(self.sums)}

    def load_state_dict(self, state: State) -> None:
        self.before, self.sums = dict(state["before"]), dict(state["sums"])


@dataclass(kw_only=True, eq=False)
class SI(Consolidation):
    """The penalty with importances from the path of the training itself; no further pass over rows.

    `strength`: c. `xi`: the damping of parameters that have hardly moved, in squared units of theta; rounding
    errors are divided by it too. The values are those of split MNIST; for permuted MNIST the paper has 0.1 for
    both. A clipped gradient would no longer be that of the loss, and is refused with an EngramError. Cost: two
    numbers per parameter while training, one afterwards.
    """

    strength: float = 1.0
    xi: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer.clip is not None:
            raise EngramError("SI sums up the gradients of the loss, and clipping changes them; set clip to none")

    @classmethod
    def tiny(cls) -> SI:
        small = {"name": "MLP", "hidden": [32]}
        return cls(network=small, epochs=3, batch_size=32, optimizer=Optimizer(lr=1e-2), xi=0.1)

    def start(self, task: Task, run: Run) -> None:
        super().start(task, run)
        self.path = PathIntegral(self.model)

    def changing(self) -> Mapping[str, Any]:
        return {"path": self.path}

    def after_step(self, step: int) -> None:
        slopes = {name: 2 * k * (self.path.before[name] - self.anchor[name]) for name, k in self.pull.items()}
        self.path.move(slopes)

    def end(self, task: Task, run: Run) -> None:
        moved = {name: p.detach().double() - self.anchor[name].double() for name, p in self.path.parameters.items()}
        found = {name: self.path.sums[name] / (far.square() + self.xi) for name, far in moved.items()}
        self.consolidate(found, task.train.ids)
        self.importances.values = {name: value.clamp(min=0) for name, value in self.importances.values.items()}
