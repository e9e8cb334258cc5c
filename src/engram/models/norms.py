"""Layers that keep statistics of their batches."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch normalisation layers of a model, of any number of dimensions."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]
