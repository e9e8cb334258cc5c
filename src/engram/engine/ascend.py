"""Projected ascent: inputs that move, step by step, to where an objective is larger, and stay in an allowed set.

Maximising over inputs is what protecting data, adversarial prompts and adversarial audits have in common. The set is
given by its projection: `ball` for a bounded change of a tensor, or any function of (moved, start).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from engram.engine.fit import fit
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.errors import EngramError

Project = Callable[[Tensor, Tensor], Tensor]


def ascend(
    x: Tensor,
    objective: Callable[[Tensor], Tensor],
    *,
    project: Project,
    steps: int,
    optimizer: Optimizer | None = None,
    renew: Callable[[Tensor, int], None] | None = None,
    every: int = 1,
    run: Run | None = None,
) -> Tensor:
    """Where `objective(x)`, a scalar, is larger: [...], shaped as `x`, which stays as it is, and on its device.

    `project(moved, start)` gives the nearest allowed point; it is applied before the first step and after each one.
    `optimizer`: left out, Adam. `renew(x, k)` is called with the point as it is before steps 0, every, 2 every, ...;
    k counts the calls. It is for what the objective holds fixed in between, such as a network trained on the point.

    Draws from torch's global generator inside the objective follow the run's seed. A run with a directory goes on from
    a renewal after an interruption. EngramError for an `every` below 1. Cost: `steps` forward and backward passes of
    the objective.
    """
    if every < 1:
        raise EngramError(f"every={every}: a renewal comes before each so many steps, at least 1")
    run = run or Run()
    start = x.detach().to(run.device)
    point = _Point(project(start, start))

    def renewals(epoch: int) -> Iterator[int]:
        if renew is not None:
            renew(point.x.detach().clone(), epoch)
        yield from range(epoch * every, min((epoch + 1) * every, steps))

    def project_back(_: int) -> None:
        point.x.data.copy_(project(point.x.detach(), start))

    fit(
        lambda _: -Mean.of(objective(point.x)),
        renewals,
        model=point,
        optimizer=optimizer or Optimizer(),
        epochs=-(-steps // every),
        steps=every,
        run=run,
        name="ascend",
        after_step=project_back,
    )
    return point.x.detach().to(x.device)


def ball(eps: float, low: float | None = None, high: float | None = None) -> Project:
    """The projection onto all points that differ from the start by at most `eps` in every coordinate, within
    [low, high] where these are given. EngramError for a negative eps, or bounds that leave nothing between them.
    """
    if not eps >= 0:
        raise EngramError(f"eps={eps}: the largest change of a coordinate cannot be below 0")
    if low is not None and high is not None and low > high:
        raise EngramError(f"nothing lies between the bounds {low} and {high}")

    def project(moved: Tensor, start: Tensor) -> Tensor:
        near = torch.minimum(torch.maximum(moved, start - eps), start + eps)
        return near if low is None and high is None else near.clamp(low, high)

    return project


class _Point(nn.Module):
    """What moves, as the one parameter of a model."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x.detach().clone())
