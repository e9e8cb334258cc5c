"""Optimisers as plain data: what a recipe or a method's config says, built when the parameters exist."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from engram.errors import unknown

SCHEDULES = ("constant", "cosine", "linear", "steps")


@dataclass(frozen=True)
class Optimizer:
    """`name`: sgd, adam or adamw. `schedule`: constant, cosine (to 0), linear (to 0), or steps (times `gamma` at each
    of `milestones`, shares of the training). `warmup`: share of the training with a linear rise. `clip`: the largest
    norm of the gradient, or None."""

    name: str = "adam"
    lr: float = 1e-3
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup: float = 0.0
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    clip: float | None = None

    def build(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser over these parameters; EngramError for an unknown name or schedule."""
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        params = [p for p in params if p.requires_grad]
        if self.name == "sgd":
            return torch.optim.SGD(
                params, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
            )
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        if self.name not in kinds:
            raise unknown("optimizer", self.name, ["sgd", *kinds])
        return kinds[self.name](params, self.lr, weight_decay=self.weight_decay)

    def factor(self, progress: float) -> float:
        """What the learning rate is multiplied by, at a share of the training in [0, 1)."""
        if progress < self.warmup:
            return progress / self.warmup
        if self.schedule == "steps":
            return self.gamma ** sum(progress >= milestone for milestone in self.milestones)
        if self.schedule == "constant":
            return 1.0
        rest = (progress - self.warmup) / (1 - self.warmup) if self.warmup < 1 else 0.0
        return 1 - rest if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * rest))

    def set_rate(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        """Put the learning rate of a share of the training into effect."""
        if self.schedule == "constant" and not self.warmup:
            return
        for group in optimizer.param_groups:
            group["lr"] = self.lr * self.factor(min(progress, 1.0))

    def scaled(self, factor: float) -> Optimizer:
        """The same with another learning rate."""
        return replace(self, lr=self.lr * factor)
