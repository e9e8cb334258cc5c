"""Memory aware synapses: a parameter matters by how much the outputs move with it, whatever the labels.

Aljundi, Babiloni, Elhoseiny, Rohrbach, Tuytelaars: Memory Aware Synapses: Learning what (not) to forget.
ECCV 2018, arXiv 1711.09601; chapter of Aljundi: Continual Learning in Neural Networks, arXiv 1910.02718.

1. After a task: Omega grows by the mean over rows of |d ||F(x)||² / d theta|, F the logits.
2. While a task is learnt: its loss + strength * sum of Omega (theta - theta')², over all parameters but the
   head's.

The local form (`local`) does without the whole network: Omega of the weight between two units is the mean over rows of
y_i y_j, their activations after the ReLU, and of a bias that of y_i; it is that of ||y||² for each layer by itself,
but for a factor of two.

The authors' code takes the absolute value after summing over a batch, so that rows cancel and the result
depends on the batch size; here it is taken per row, as the equation says. Avalanche further halves the
penalty, averages the importances of tasks and takes the norm without its square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from engram.data.table import Table
from engram.data.task import Task
from engram.engine.importance import Importance, importance
from engram.engine.optimizer import Optimizer
from engram.engine.predict import evaluating
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.consolidation import Consolidation


@dataclass(kw_only=True, eq=False)
class MAS(Consolidation):
    """The penalty with the sensitivity of the outputs.

    `strength`: lambda. Made for a head per task: where tasks share one, the features are kept, and the head's rows
    of old classes are not. `local`: Omega by the activations of connected units. EngramError for it where a network has
    other layers than linear ones on vectors. Cost: a backward pass over each task's rows besides the training (local: a
    forward pass), and one number per parameter.
    """

    local: bool = False

    holds_head: ClassVar[bool] = False

    @classmethod
    def tiny(cls) -> MAS:
        return cls(network={"name": "MLP", "hidden": [32]}, epochs=3, batch_size=32, optimizer=Optimizer(lr=1e-2))

    def end(self, task: Task, run: Run) -> None:
        found = (
            hebbian(self.model, task.train, run)
            if self.local
            else importance(self.model, task.train, loss="norm", power=1, run=run)
        )
        self.consolidate(found, task.train.ids)


def hebbian(model: nn.Module, table: Table, run: Run) -> Importance:
    """The mean over rows of |y_i y_j| for the weights of linear layers, y_j their inputs and y_i = ReLU of their
    outputs, and of y_i for their biases; float64. The head is left out. Cost: one forward pass."""
    layers = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    kinds = {name.rpartition(".")[0] for name, _ in model.named_parameters() if not name.startswith("head.")}
    other = sorted(kinds - layers.keys())
    if other:
        raise EngramError(f"local importances are those of linear layers, and {other[0]!r} is none; use local=False")
    total: Importance = {}

    def note(name: str, part: nn.Module, inputs: Tensor, output: Tensor) -> None:
        if inputs.ndim != 2:
            raise EngramError(f"local importances want vectors [B, d] at {name!r}; it is given {list(inputs.shape)}")
        into, out = inputs.abs().double(), output.relu().double()
        for key, value in (("weight", out.T @ into), ("bias", out.sum(0))):
            if getattr(part, key) is not None:
                total[f"{name}.{key}"] = total.get(f"{name}.{key}", torch.zeros_like(value)) + value

    handles = [
        layers[name].register_forward_hook(lambda part, args, output, name=name: note(name, part, args[0], output))
        for name in sorted(kinds)
    ]
    try:
        with evaluating(model.to(run.device)):
            for batch in table.batches(256, shuffle=False):
                model(**batch.to(run.device).inputs)
    finally:
        for handle in handles:
            handle.remove()
    run.cost.rows += len(table)
    return {name: value / len(table) for name, value in total.items()}
