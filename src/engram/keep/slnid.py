"""Selfless sequential learning: neurons that inhibit their neighbours leave room for tasks to come.

Aljundi, Rohrbach, Tuytelaars: Selfless Sequential Learning. ICLR 2019, arXiv 1806.05421 (sparse coding through local
neural inhibition and discounting, SLNID); chapter of Aljundi: Continual Learning in Neural Networks, arXiv 1910.02718.

For a hidden layer with the activations H of M rows and N units, the loss has the further term

    sparsity * R,   R = 1/M * sum over i != j of g_ij e_ij sum over rows of |h_i h_j|.

g_ij = exp(-(i - j)² / (2 s²)) lets near units inhibit each other, s = N / 6. e_ij = exp(-(a_i + a_j)) leaves alone
those that matter to earlier tasks: a_i is the sum over these of the mean over rows of |d ||F||² / d h_i|, F the logits;
in the first task e is 1. A penalty holds the parameters, by `MAS` or by the Fisher diagonal (EWC).

Published code has min(exp(-a_i), exp(-a_j)) for e_ij; here it is as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from engram.core.trace import Derived
from engram.data.table import Batch, Table
from engram.data.task import Task
from engram.engine.hooks import capture
from engram.engine.importance import importance
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.predict import evaluating
from engram.engine.run import Run
from engram.errors import EngramError, unknown
from engram.keep.consolidation import Consolidation

IMPORTANCES = ("mas", "ewc")


@dataclass(kw_only=True, eq=False)
class SLNID(Consolidation):
    """A penalty on parameters, and one on neurons that are active together.

    `sparsity`: weight of R; with 0 it is the penalty alone. `scale`: s as a share of a layer's units; infinite lets all
    inhibit all alike. `layers`: names of the layers whose outputs [B, N] are inhibited; left out, all ReLUs of vectors.
    `strength`, `importance`: of the penalty, "mas" or "ewc" (the Fisher diagonal of the true labels). Importances of
    neurons are a trace, as those of parameters are.

    EngramError for a network without such a layer. Cost: for each batch O(M N²) more; two backward passes over a task's
    rows besides the training.
    """

    strength: float = 0.1
    sparsity: float = 1e-3
    scale: float = 1 / 6
    layers: tuple[str, ...] = ()
    importance: str = "mas"

    holds_head: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance not in IMPORTANCES:
            raise unknown("importance", self.importance, IMPORTANCES)
        self.neurons: Derived = self.trace("neurons", Derived())

    @classmethod
    def tiny(cls) -> SLNID:
        small, plan = {"name": "MLP", "hidden": [32]}, Optimizer(lr=1e-2)
        return cls(network=small, epochs=3, batch_size=32, optimizer=plan, strength=1.0, sparsity=1e-2)

    def start(self, task: Task, run: Run) -> None:
        super().start(task, run)
        self.names = self.inhibited()
        self.mutual: dict[str, Tensor] = {}

    def inhibited(self) -> list[str]:
        """The names of the layers that may be inhibited: those given, or all ReLUs."""
        return list(self.layers) or [name for name, part in self.model.named_modules() if isinstance(part, nn.ReLU)]

    def step(self, batch: Batch, task: Task) -> Mean:
        with capture(self.model, self.names) as seen:
            loss = self.terms(batch, self.model(**batch.inputs))
        for name, active in vectors(seen).items() if self.sparsity else ():
            loss = loss + self.sparsity * inhibition(active, self._mutual(name, active))
        return loss

    def end(self, task: Task, run: Run) -> None:
        kind = {"mas": {"loss": "norm", "power": 1}, "ewc": {"loss": "ce", "power": 2}}[self.importance]
        self.consolidate(importance(self.model, task.train, run=run, **kind), task.train.ids)  # type: ignore[arg-type]
        if self.sparsity:
            found, old = sensitivity(self.model, task.train, self.names, run), self.neurons.values
            self.neurons.values = {name: value + old.get(name, 0.0) for name, value in found.items()}
            self.neurons.add(task.train.ids)

    def _mutual(self, name: str, active: Tensor) -> Tensor:
        """g e of a layer, [N, N], made once a task."""
        if name not in self.mutual:
            units = active.shape[1]
            weights = locality(units, self.scale * units)
            if name in self.neurons.values:
                weights = weights * discount(self.neurons.values[name].cpu())
            self.mutual[name] = weights.to(active)
        return self.mutual[name]


def locality(units: int, s: float) -> Tensor:
    """g of a layer: exp(-(i - j)² / (2 s²)), [N, N], float64, 0 where i = j."""
    apart = torch.arange(units, dtype=torch.float64)
    near = torch.ones(units, units, dtype=torch.float64)
    if math.isfinite(s):
        near = torch.exp(-(apart[:, None] - apart).square() / (2 * s**2))
    return near.fill_diagonal_(0.0)


def discount(importances: Tensor) -> Tensor:
    """e of a layer: exp(-(a_i + a_j)) of importances [N]: [N, N]."""
    return torch.exp(-(importances[:, None] + importances))


def inhibition(active: Tensor, weights: Tensor) -> Mean:
    """R: the mean over rows of the weighted sum over pairs of |h_i h_j|; activations [M, N], weights [N, N]."""
    size = active.abs()
    return Mean.over(((size @ weights.to(size)) * size).sum(), float(len(active)))


def vectors(seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the layers that give one vector a row. EngramError for none."""
    found = {name: active for name, active in seen.items() if active.ndim == 2}
    if not found:
        given = ", ".join(f"{name} {list(active.shape)}" for name, active in seen.items()) or "no ReLU"
        raise EngramError(f"no layer gives a vector [B, N] to be inhibited; there is {given}; name some in `layers`")
    return found


def sensitivity(model: nn.Module, table: Table, names: list[str], run: Run) -> dict[str, Tensor]:
    """The mean over rows of |d ||logits||² / d unit| for each unit of layers, [N] by layer, float64.

    The model is in eval mode. Cost: one forward and backward pass.
    """
    total: dict[str, Tensor] = {}
    with evaluating(model.to(run.device)), torch.enable_grad(), capture(model, names) as seen:
        for batch in table.batches(256, shuffle=False):
            logits = model(**batch.to(run.device).inputs).logits
            layers = vectors(seen)
            norm = torch.where(torch.isfinite(logits), logits, 0.0).square().sum()
            slopes = torch.autograd.grad(norm, list(layers.values()))
            for name, slope in zip(layers, slopes, strict=True):
                total[name] = total.get(name, 0.0) + slope.abs().double().sum(0).cpu()
    run.cost.rows += len(table)
    return {name: value / len(table) for name, value in total.items()}
