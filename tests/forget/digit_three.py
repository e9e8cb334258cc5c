"""A network that knows the digits, and how it does on the three and on the others."""

from __future__ import annotations

from torch import Tensor, cat, nn

from engram.data.table import Table
from engram.engine.optimizer import Optimizer
from engram.engine.predict import accuracy
from engram.engine.recipe import Recipe

Split = tuple[Table, Table]
RECIPE = Recipe({"name": "MLP", "hidden": [32]}, Optimizer(lr=3e-3), epochs=12)


def scores(model: nn.Module, split: Split) -> tuple[float, float]:
    """Test accuracy on the class that went, and on the others."""
    gone = split[1].of_classes([3])
    return accuracy(model, gone), accuracy(model, split[1].without(gone.ids))


def weights(model: nn.Module) -> Tensor:
    """All parameters in one vector."""
    return cat([p.detach().flatten() for p in model.parameters()])
