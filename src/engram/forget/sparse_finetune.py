"""Sparse fine-tuning: train on with the retain rows, under an L1 penalty that fades.

Jia, Liu, Ram, Yao, Liu, Liu, Sharma, Liu: Model Sparsity Can Simplify Machine Unlearning. NeurIPS 2023,
arXiv 2304.04934 ("l1-sparse MU", sparsity-aware unlearning).

    L = loss(retain) + gamma_t * sum over all weights |theta|,    gamma_t = (1 - t / T) gamma in epoch t of T

Small weights carry what the retain rows do not hold up. A subgradient makes them small, not exactly zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engram.core.request import Request
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.forget.finetune import Finetune


@dataclass(kw_only=True, eq=False)
class SparseFinetune(Finetune):
    """`gamma`: the weight of the penalty in the first epoch, a sum over all parameters (biases and normalisation too,
    as in published code); 0 is `Finetune`. An epoch is one pass over the retain rows, and all that is needed.

    Cost: epochs times the retain rows, forward and backward.
    """

    optimizer: Optimizer = field(default_factory=lambda: Optimizer("sgd", lr=0.01, weight_decay=5e-4))
    epochs: int = 10
    batch_size: int = 256
    gamma: float = 5e-4

    @classmethod
    def tiny(cls) -> SparseFinetune:
        """A setting for checks on a handful of rows."""
        return cls(epochs=2, batch_size=16)

    def batches(self, request: Request, epoch: int, run: Run) -> Iterator[Any]:
        """Each batch with the weight that the penalty has in this epoch."""
        weight = self.gamma * (1 - epoch / self.epochs)
        return ((batch, weight) for batch in super().batches(request, epoch, run))

    def loss(self, model: nn.Module, batch: Any) -> Mean:
        kept, weight = batch
        return super().loss(model, kept) + weight * Mean.of(l1(model))


def l1(model: nn.Module) -> Tensor:
    """The sum of the absolute values of all parameters, a scalar with gradient."""
    return torch.stack([p.abs().sum() for p in model.parameters()]).sum()
