"""A search over learning rate and label smoothing, in which every trial counts.

Trials are drawn at random (Bergstra & Bengio 2012); the k-th is a function of the seed and k alone, so a longer search
begins as the shorter one does. Each keeps the state at which it was best on the dev rows, and the trial whose best is
best wins: the error of a trial's last step says more of when it ended than of its setting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engram.engine.run import Run
from engram.errors import EngramError

Span = tuple[float, float]


@dataclass(frozen=True)
class Setting:
    """One trial: a learning rate and the share of label smoothing."""

    lr: float
    smoothing: float


def drawn(index: int, lr: Span, smoothing: Span, run: Run) -> Setting:
    """The setting of a trial: lr log-uniform, smoothing uniform between the ends. EngramError for ends out of order."""
    if not (0 < lr[0] <= lr[1] and 0 <= smoothing[0] <= smoothing[1] < 1):
        raise EngramError(
            f"a search needs 0 < low <= high for lr, 0 <= low <= high < 1 for smoothing; {lr}, {smoothing}"
        )
    u, v = torch.rand(2, generator=run.generator("trial", index), dtype=torch.float64).tolist()
    return Setting(math.exp(_between(math.log(lr[0]), math.log(lr[1]), u)), _between(*smoothing, v))


def _between(low: float, high: float, u: float) -> float:
    return low + u * (high - low)


class Best:
    """The state of a model at its least error so far, and the step at which that was; the first one among equals."""

    def __init__(self) -> None:
        self.error, self.step = math.inf, 0
        self.weights: dict[str, Tensor] = {}

    def look(self, error: float, model: nn.Module, step: int) -> None:
        """Take the model's weights if it is better now than ever."""
        if error < self.error:
            self.error, self.step = error, step
            self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes back."""
        return {"error": self.error, "step": self.step, "weights": dict(self.weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become what `state_dict` described."""
        self.error, self.step, self.weights = state["error"], state["step"], dict(state["weights"])
