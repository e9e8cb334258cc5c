"""Teachers: frozen copies, averaged copies, and their outputs kept per row."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from engram.data.table import Batch, Table
from engram.engine.predict import Reader, predict
from engram.engine.run import Run


def frozen(model: nn.Module) -> nn.Module:
    """A copy in eval mode that takes no gradient."""
    return copy.deepcopy(model).eval().requires_grad_(False)


class EMA:
    """An averaged copy: after `update`, parameters are decay * average + (1 - decay) * model.

    `decay`: a number or a function of the number of updates so far. `buffers`: "copy" takes the model's buffers
    (running statistics) as they are; "own" leaves the copy its own.
    """

    def __init__(self, model: nn.Module, decay: float | Callable[[int], float], buffers: str = "copy") -> None:
        self.model = frozen(model)
        self.decay, self.buffers, self.updates = decay, buffers, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model."""
        keep = self.decay(self.updates) if callable(self.decay) else self.decay
        for average, value in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(value, 1 - keep)
        if self.buffers == "copy":
            for own, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
                own.copy_(buffer)
        self.updates += 1

    def state_dict(self) -> dict[str, object]:
        return {"model": dict(self.model.state_dict()), "updates": self.updates}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.model.load_state_dict(state["model"])  # type: ignore[arg-type]
        self.updates = int(state["updates"])  # type: ignore[call-overload]


class RowCache:
    """A teacher's outputs for the rows of one table, looked up by a batch's row numbers."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __call__(self, batch: Batch) -> Tensor:
        """The outputs [B, …] for a batch of the table that they were computed for, on the batch's device."""
        device = next(iter(batch.inputs.values())).device
        return self.values[batch.rows].to(device)


def cached(model: nn.Module, table: Table, output: str | Reader, run: Run, name: str) -> RowCache:
    """Compute a model's outputs for a table once: a phase of the run."""
    return RowCache(run.phase(name, lambda: predict(model, table, output, run=run)))
