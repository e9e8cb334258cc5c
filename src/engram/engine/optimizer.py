"""Optimisers as plain data: what a recipe or a method's config says, built when the parameters exist."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from engram.errors import at_least, unknown

SCHEDULES = ("constant", "cosine", "linear", "steps")
KINDS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@dataclass(frozen=True)
class Optimizer:
    """`name`: sgd, adam or adamw. `schedule`: constant, cosine (to 0), linear (to 0), or steps (times `gamma` at each
    of `milestones`, shares of the training). `warmup`: share of the training with a linear rise. `clip`: the largest
    norm of the gradient, or None. EngramError for an unknown name or schedule, and for numbers that make no sense."""

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

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise unknown("optimizer", self.name, KINDS)
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        for name in ("lr", "momentum", "weight_decay", "warmup"):
            at_least(f"{name} of the optimizer", getattr(self, name), 0)
        if self.clip is not None:
            at_least("clip of the optimizer", self.clip, 0)

    def build(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser over those of the parameters that can be trained."""
        own = {"momentum": self.momentum, "nesterov": self.nesterov} if self.name == "sgd" else {}
        params = [p for p in params if p.requires_grad]
        return KINDS[self.name](params, lr=self.lr, weight_decay=self.weight_decay, **own)

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


class Pull:
    """Holds parameters near targets by the implicit step of b (theta - target)², taken after each update of the loss.

    theta becomes (theta + 2 r b target) / (1 + 2 r b), r = the plan's learning rate at that update, over 1 - momentum
    for SGD: no b is too large for the step, theta moves on a line to its target, and SGD rests where the gradients of
    the loss and of b (theta - target)² cancel. Adam's steps do not grow with the gradient, so for it b is no weight of
    a loss, but a decoupled decay (as AdamW's). Hand it to `fit` as `after_step`. `held`: (parameter, target, b), 0 <= b
    < inf. `updates`: of the whole training, for the schedule.
    """

    def __init__(self, plan: Optimizer, held: Sequence[tuple[nn.Parameter, Tensor, float]], updates: int) -> None:
        self.plan, self.held, self.updates = plan, [one for one in held if one[2] > 0], updates

    def rate(self, update: int) -> float:
        """r at the k-th update, counted from 1."""
        inertia = 1 - self.plan.momentum if self.plan.name == "sgd" else 1.0
        return self.plan.lr * self.plan.factor(min((update - 1) / self.updates, 1.0)) / inertia

    @torch.no_grad()
    def __call__(self, update: int) -> None:
        """The step that follows the k-th update."""
        for p, target, b in self.held:
            strength = 2 * self.rate(update) * b
            p.lerp_(target.to(p), strength / (1 + strength))
