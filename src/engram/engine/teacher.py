"""Teachers: frozen copies, averaged copies, and their outputs kept per row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from engram.data.table import Batch, Table
from engram.engine.predict import Reader, predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.head import Head
from engram.models.seeding import seeded


def frozen(model: nn.Module) -> nn.Module:
    """A copy in eval mode that takes no gradient."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def untrained(model: nn.Module, draws: torch.Generator) -> nn.Module:
    """A frozen copy of the same architecture with initial weights of its own, which knows nothing of the data.

    Layers with `reset_parameters` start as torch starts them, rows of a class head as if newly born; what remains
    (tokens, position embeddings) is drawn normal with deviation 0.02, vectors left alone. What a model learnt into
    other buffers than running statistics stays.
    """
    twin = frozen(model).cpu()
    with seeded(draws), torch.no_grad():
        for module in twin.modules():
            _start_anew(module)
    return twin


def _start_anew(module: nn.Module) -> None:
    """Initial values for a module's own parameters, from the global generator."""
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
        return
    for name, p in module.named_parameters(recurse=False):
        if isinstance(module, Head):
            p.copy_(module.fresh(name, len(p), None))
        elif p.ndim > 1:
            p.normal_(0.0, 0.02)


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


def class_logits(output: Any, batch: Batch) -> Tensor:
    """A reader for `predict` and `cached`: the logits, where their softmax means something. EngramError for rows whose
    labels are numbers."""
    if batch.labels is not None and batch.labels.is_floating_point():
        raise EngramError("a model of numbers has no class probabilities to imitate; use forget.Blindspot")
    return output.logits


def cached(model: nn.Module, table: Table, output: str | Reader, run: Run, name: str) -> RowCache:
    """Compute a model's outputs for a table once: a phase of the run."""
    return RowCache(run.phase(name, lambda: predict(model, table, output, run=run)))
