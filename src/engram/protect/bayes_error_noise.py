"""Bayes error noise: a small change of images that makes their classes overlap, so that even the best classifier errs.

Zhang, Sun, Lim, Zhang: Towards Provably Unlearnable Examples via Bayes Error Optimisation. AAAI 2026, arXiv 2511.08191.

With z_i the features of image i, s_ij = exp(-||z_i - z_j||^2 / (2 sigma^2)) and s_ii = 0, the posterior of a class c at
z_i is averaged over the other images, and the Bayes error is what the best answer leaves:

    p_i(c) = sum over j of class c of s_ij / sum over j of s_ij,      BE = 1/n sum over i of (1 - max over c of p_i(c))

With c_i the class of that maximum and A_ij = (1[y_j = c_i] - p_i(c_i)) s_ij / (sigma^2 sum over k of s_ik),

    d BE / d z = 1/n (diag(A 1 + A' 1) - A - A') z

Every few steps a fresh network is trained on the images as they are; its features, divided by the largest of their
absolute values, are z. The images climb BE through it; after each step they are put back within eps of what they were,
and within [0, 1]. The gradient does not follow the divisor: an outlier that grows would bring all others together.

Published code gives the gradient of the sum of the n errors beside their mean, n times too large, and adds 1e-8 to
the denominator of p, so that rows far from all others count as errors; here the gradient is that of the mean, and p is
computed in logarithms. It updates the images with AdamW, whose decay pulls them to 0; here it is Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engram.core.needs import require_processes
from engram.core.protector import Protector
from engram.core.settings import name_of
from engram.data.table import MISSING, Table, Target, shuffled
from engram.engine.ascend import ascend, ball
from engram.engine.optimizer import Optimizer
from engram.engine.predict import features
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.split import split

PIXELS = "pixel_values"
RESNET18 = {"name": "ResNet", "blocks": 2, "widths": [64, 128, 256, 512]}


def _recipe() -> Recipe:
    return Recipe(RESNET18, Optimizer("sgd", lr=0.1, weight_decay=5e-4, schedule="cosine"), epochs=30, batch_size=128)


@dataclass(kw_only=True, eq=False)
class BayesErrorNoise(Protector):
    """`eps`: the largest change of a pixel, of a range of 1; `sigma`: the width of the kernel; `optimizer` and `steps`
    of the images; `recipe`: how a network is trained on them, anew before each `refresh` steps. `chunk`: so many images
    pass through the network at once, and so many rows of the n x n similarities are held.

    The defaults are those for CIFAR-10. `refresh` above 1 saves trainings and lets the change fit one network's
    features for longer. For images `pixel_values`, uint8 or float32 in [0, 1], with a class each (EngramError
    otherwise). The bound holds for the table as it is stored: uint8 images change by whole levels.

    Cost: steps / refresh trainings; steps times a forward and backward pass of all n images, and O(n^2 (d + classes))
    for features of width d. Memory n d and chunk n.
    """

    eps: float = 8 / 255
    sigma: float = 0.3
    optimizer: Optimizer = field(default_factory=Optimizer)
    steps: int = 200
    refresh: int = 1
    recipe: Recipe = field(default_factory=_recipe)
    chunk: int = 128

    processes: ClassVar[str] = "one"

    @classmethod
    def tiny(cls) -> BayesErrorNoise:
        """A setting for checks on a handful of rows."""
        recipe = Recipe({"name": "MLP", "hidden": [8]}, Optimizer(lr=1e-2), epochs=2, batch_size=32)
        return cls(eps=0.1, optimizer=Optimizer(lr=0.05), steps=3, refresh=2, recipe=recipe, chunk=32)

    def protect(self, table: Table, run: Run | None = None) -> Table:
        """The same ids, labels and other columns, with images that change by at most `eps`."""
        require_processes(name_of(self), self.processes)
        _check(table)
        run = run or Run()
        with run.scope("protect"):
            climb = _Climb(self, table, run)
            moved = ascend(
                table.batch(torch.arange(len(table))).inputs[PIXELS],
                climb.error,
                project=ball(self.eps, 0.0, 1.0),
                steps=self.steps,
                optimizer=self.optimizer,
                renew=climb.renew,
                every=self.refresh,
                run=run,
            )
        return _with_pixels(table, stored(moved.cpu(), table.inputs[PIXELS], self.eps))

    def estimate(self, table: Table, run: Run | None = None, model: nn.Module | None = None) -> float:
        """The Bayes error of a table in the features of a model; left out, of a network that `recipe` trains on it."""
        _check(table)
        run = run or Run()
        with run.scope("estimate"):
            model = model or self.recipe(table, run.number("network"), run)
            z = features(model, table, batch_size=self.chunk, run=run)
        return float(bayes_error(_scaled(z), _labels(table), self.sigma, chunk=self.chunk))


class _Climb:
    """What the images climb: their Bayes error in the features of a network that is trained on them anew at times."""

    def __init__(self, method: BayesErrorNoise, table: Table, run: Run) -> None:
        self.method, self.table, self.run = method, table, run
        self.labels = _labels(table).to(run.device)
        self.features: Callable[..., Tensor]

    def renew(self, x: Tensor, k: int) -> None:
        with self.run.scope("network", k):
            model = self.method.recipe(_with_pixels(self.table, x.cpu()), self.run.number("network"), self.run)
        self.features = split(model.requires_grad_(False)).features

    def error(self, x: Tensor) -> Tensor:
        self.run.cost.rows += len(x)
        z = torch.cat([self._through(part) for part in x.split(self.method.chunk)])
        return bayes_error(_scaled(z), self.labels, self.method.sigma, chunk=self.method.chunk)

    def _through(self, x: Tensor) -> Tensor:
        """Features of images, whose intermediate values are computed anew for the gradient."""

        def through(pixels: Tensor) -> Tensor:
            return self.features(pixel_values=pixels)

        return checkpoint(through, x, use_reentrant=False, preserve_rng_state=False)


def bayes_error(z: Tensor, labels: Tensor, sigma: float = 0.3, *, chunk: int = 1024) -> Tensor:
    """The Bayes error [], float64, of points z [n, d] with classes [n]: from 0 to 1 - 1 / classes.

    Each point's posterior is that of the others (the equations of this module). Differentiable in z, with the
    posterior's largest class held fixed. EngramError for fewer than two points, or a sigma that is not above 0.
    O(n^2 (d + classes)); memory chunk n.
    """
    if len(z) < 2 or not sigma > 0:
        raise EngramError(f"the Bayes error of {len(z)} points at sigma={sigma}: give at least 2 points and sigma > 0")
    return _BayesError.apply(z, labels, sigma, chunk)


class _BayesError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, labels: Tensor, sigma: float, chunk: int) -> Tensor:
        value, gradient = _error_and_gradient(z.double(), labels, sigma, chunk)
        ctx.save_for_backward(gradient.to(z.dtype))
        return value

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return upstream[0].to(gradient.dtype) * gradient, None, None, None


def _error_and_gradient(z: Tensor, labels: Tensor, sigma: float, chunk: int) -> tuple[Tensor, Tensor]:
    """The error [] and its gradient [n, d], by blocks of rows."""
    z = z - z.mean(0)  # distances stay, and lose fewer digits
    members = nn.functional.one_hot(torch.unique(labels, return_inverse=True)[1]).to(z)
    error, gradient = z.new_zeros(()), torch.zeros_like(z)
    for rows in torch.arange(len(z), device=z.device).split(chunk):
        weights = _weights(z, rows, sigma)
        best, winner = (weights @ members).max(1)
        error += (1 - best).sum()
        pull = (members.T[winner] - best[:, None]) * weights / sigma**2
        gradient[rows] += pull.sum(1, keepdim=True) * z[rows] - pull @ z
        gradient += pull.sum(0)[:, None] * z - pull.T @ z[rows]
    return error / len(z), gradient / len(z)


def _weights(z: Tensor, rows: Tensor, sigma: float) -> Tensor:
    """s_ij / sum over k of s_ik for these rows i, [rows, n]."""
    norms = z.square().sum(1)
    squares = (norms[rows, None] + norms - 2 * z[rows] @ z.T).clamp(min=0)
    logs = squares / (-2 * sigma**2)
    logs[torch.arange(len(rows), device=z.device), rows] = -math.inf
    return logs.softmax(1)


def stored(moved: Tensor, pixels: Tensor, eps: float) -> Tensor:
    """Moved images [n, c, h, w] in [0, 1] as what `pixels` are, uint8 or float: within `eps` of them after rounding."""
    if pixels.dtype == torch.uint8:
        levels, most = (moved * 255).round().long(), math.floor(eps * 255 + 1e-6)
        origin = pixels.long()
        return torch.minimum(torch.maximum(levels, origin - most), origin + most).clamp(0, 255).to(torch.uint8)
    found = moved.to(pixels.dtype)
    beyond = (found.double() - pixels.double()).abs() > eps
    return torch.where(beyond, torch.nextafter(found, pixels), found)


def mixed(clean: Table, protected: Table, share: float, seed: int = 0) -> Table:
    """The clean table with a `share` of its rows, drawn at random, as they are in the protected one; rows go by id.

    EngramError for a share outside [0, 1], or an id that the protected table lacks.
    """
    if not 0 <= share <= 1:
        raise EngramError(f"a share of {share} cannot be protected; give a number from 0 to 1")
    rows = shuffled(len(clean), seed, 0)[: round(share * len(clean))]
    others = protected.select(clean.ids[row] for row in rows.tolist())
    inputs = {
        name: value.index_copy(0, rows, others.inputs[name].to(value.dtype)) for name, value in clean.inputs.items()
    }
    return replace(clean, inputs=inputs)


def _check(table: Table) -> None:
    pixels = table.inputs.get(PIXELS)
    if pixels is None or table.target != Target.CLASSES or len(table.inputs) > 1:
        held = ", ".join(table.inputs) or "no inputs"
        raise EngramError(f"Bayes error noise is for images {PIXELS} with class labels, not {held} ({table.target})")
    if bool((_labels(table) == MISSING).any()):
        raise EngramError("Bayes error noise needs the class of every row; leave rows without a label out")
    if pixels.dtype not in (torch.uint8, torch.float32):
        raise EngramError(f"images of {pixels.dtype} cannot be protected; give uint8, or float32 in [0, 1]")
    if pixels.dtype != torch.uint8 and bool(((pixels < 0) | (pixels > 1)).any()):
        raise EngramError(f"float images have values in [0, 1]; these reach {pixels.min():.3g} to {pixels.max():.3g}")


def _labels(table: Table) -> Tensor:
    assert table.labels is not None
    return table.labels


def _with_pixels(table: Table, pixels: Tensor) -> Table:
    return replace(table, inputs={PIXELS: pixels})


def _scaled(z: Tensor) -> Tensor:
    """Features divided by the largest of their absolute values, which the gradient does not follow."""
    z = z.flatten(1)
    return z / z.detach().abs().max().clamp(min=torch.finfo(z.dtype).tiny)
