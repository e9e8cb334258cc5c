"""One transformer for many tasks: small convolutions re-weight its attention, and entropy over views says for which.

What `keep.ConTraCon` trains; Roy et al., ICCV 2023, arXiv 2308.11357. A task t after the first has, for each head h of
each query, key and value matrix W of its parent, a k x k kernel K, a number b and a gate a:

    W_t[h] = K * W[h] + b + sigmoid(a) W[h],

W[h] [width / heads, width] being taken as an image, with padding so that its size stays. Besides it has norms, a
pooling and a head of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from engram.data.augment import apply_steps, steps_of_policy
from engram.data.table import Table
from engram.errors import EngramError
from engram.models.cct import CompactTransformer
from engram.models.config import Configured
from engram.models.heads import LinearHead
from engram.models.output import Output
from engram.models.predictor import supervised_loss
from engram.models.task_inference import joined, normalised_entropies
from engram.stats.seeds import generator

Weights = dict[str, Tensor]
PARENTLESS = -1


class TaskPart(Configured, nn.Module):
    """What a task has of its own.

    own      a copy of the encoder's norms and pooling, whose shapes are given, in its order
    head     a LinearHead of `width` features
    kernels  [matrices, heads, k, k], `shifts` and `gates` [matrices, heads]; none for a task without a parent

    Kernels and shifts start as torch's convolutions do, gates at 1. EngramError for an even kernel.
    """

    def __init__(
        self, shapes: Sequence[Sequence[int]], width: int, matrices: int, heads: int, kernel: int, parent: int
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise EngramError(f"a kernel with a middle has an odd size; got {kernel}.")
        self.parent = parent
        self.own = nn.ParameterList([nn.Parameter(torch.zeros(*shape)) for shape in shapes])
        self.head = LinearHead(width)
        if parent == PARENTLESS:
            return
        self.kernels = nn.Parameter(torch.empty(matrices, heads, kernel, kernel).uniform_(-1 / kernel, 1 / kernel))
        self.shifts = nn.Parameter(torch.empty(matrices, heads).uniform_(-1 / kernel, 1 / kernel))
        self.gates = nn.Parameter(torch.ones(matrices, heads))

    def reweighted(self, weights: Tensor) -> Tensor:
        """The parent's matrices [matrices, width, width], out x in, as this task has them; without a parent as they
        are. Cost O(matrices width² k²)."""
        if self.parent == PARENTLESS:
            return weights
        return convolved(weights, self.kernels, self.shifts, self.gates)


def begun(encoder: CompactTransformer, classes: Iterable[int], kernel: int, parent: int) -> TaskPart:
    """A task's part to train: norms and pooling as the encoder began with, the head and the kernels drawn from torch's
    global generator (for use under `seeded`)."""
    parameters = dict(encoder.named_parameters())
    start = [parameters[name].detach() for name in encoder.tuned]
    shapes, matrices = [list(p.shape) for p in start], len(encoder.attention_weights)
    part = TaskPart(shapes, encoder.width, matrices, encoder.heads, kernel, parent)
    with torch.no_grad():
        for own, value in zip(part.own, start, strict=True):
            own.copy_(value)
    part.head.grow(sorted(set(classes)), None)
    return part


def convolved(weights: Tensor, kernels: Tensor, shifts: Tensor, gates: Tensor) -> Tensor:
    """Matrices [m, d, d'] of H heads each, cut by rows: every head's own convolution, and its gate times itself.

    kernels [m, H, k, k], shifts and gates [m, H]. All heads of all matrices are the groups of one convolution.
    """
    m, heads, k, _ = kernels.shape
    rows = weights.reshape(1, m * heads, -1, weights.shape[2])
    moved = F.conv2d(rows, kernels.reshape(-1, 1, k, k), shifts.flatten(), padding=k // 2, groups=m * heads)
    return (moved + torch.sigmoid(gates).reshape(1, -1, 1, 1) * rows).view_as(weights)


class ConvolvedTransformer(Configured, nn.Module):
    """The whole predictor: an encoder, a part for each task, and the views by which a row's task is inferred.

    `pixel_values` are standardised by `mean` and `deviation` [C]. The views of a row are `plain` times itself and
    `augmented` changed copies: grey images get normal noise of deviation `noise` after standardisation, others an
    AutoAugment sub-policy on the range `low` to `high`. What is done in a view follows from `seed` and is the same for
    all rows, so that what is said of a row depends on nothing else.
    """

    mean: Tensor
    deviation: Tensor
    low: Tensor
    high: Tensor
    disturbance: Tensor

    def __init__(
        self,
        encoder: CompactTransformer,
        parts: Sequence[TaskPart],
        channels: int = 3,
        plain: int = 6,
        augmented: int = 10,
        noise: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if plain < 1 or augmented < 0:
            raise EngramError(f"there are 1 or more plain views and 0 or more others; got {plain} and {augmented}.")
        self.encoder, self.parts, self.plain = encoder, nn.ModuleList(parts), plain
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.ones(()))
        draws = generator("views", seed)
        grey, side = channels == 1, encoder.image_size
        drawn = torch.randn(augmented if grey else 0, channels, side, side, generator=draws)
        self.register_buffer("disturbance", noise * drawn, persistent=False)
        self.steps = [] if grey else [steps_of_policy(draws) for _ in range(augmented)]

    def standardise(self, table: Table) -> None:
        """Take mean, deviation and range from the images of a table."""
        pixels = [batch.inputs["pixel_values"].double() for batch in table.batches(1024, shuffle=False)]
        count = sum(x.numel() / x.shape[1] for x in pixels)
        mean = torch.stack([x.sum((0, 2, 3)) for x in pixels]).sum(0) / count
        spread = torch.stack([(x - mean[:, None, None]).square().sum((0, 2, 3)) for x in pixels]).sum(0) / count
        self.mean.copy_(mean)
        self.deviation.copy_(spread.sqrt().clamp(min=1e-6))
        self.low.fill_(min(float(x.min()) for x in pixels))
        self.high.fill_(max(float(x.max()) for x in pixels))

    def retire(self, classes: Iterable[int]) -> None:
        """No task answers with these classes any more."""
        gone = set(classes)
        for head in (self.part(t).head for t in range(len(self.parts))):
            head.retire(gone & set(head.classes.tolist()))

    def part(self, task: int) -> TaskPart:
        """What a task has of its own; a negative number counts from the newest."""
        found = self.parts[task]
        assert isinstance(found, TaskPart)
        return found

    def attention(self, task: int) -> Tensor:
        """The query, key and value matrices of a task, layer by layer: [3 depth, width, width], out x in."""
        part = self.part(task)
        if part.parent != PARENTLESS:
            return part.reweighted(self.attention(part.parent))
        parameters = dict(self.encoder.named_parameters())
        return torch.stack([parameters[name] for name in self.encoder.attention_weights])

    def weights(self, task: int) -> Weights:
        """The parameters of the encoder that differ between tasks, by name, as a task has them."""
        found = zip(self.encoder.attention_weights, self.attention(task), strict=True)
        return {**dict(found), **dict(zip(self.encoder.tuned, self.part(task).own, strict=True))}

    def features(self, task: int, pixel_values: Tensor) -> Tensor:
        """What a task's head sees: [B, width]."""
        return self._features(self.weights(task), self.encoder.tokens(self._standard(pixel_values)))

    def forward(self, pixel_values: Tensor, *, labels: Tensor | None = None, task: Tensor | None = None) -> Output:
        """Logits [B, W] over class ids: those of the given `task` [B], else of all tasks, joined.

        Joined, each task's logits are shifted so that the largest is minus its entropy: the largest of all is that of
        the task with the least entropy, and among a task's own classes nothing changes. `extra["entropies"]` [B, T].
        Cost: the blocks for each task and view, of which the plain ones are one; tokens are computed once a view, and
        W_t once a task and call, which is a hundredth of the whole.
        """
        x = self._standard(pixel_values)
        weights = [self.weights(t) for t in range(len(self.parts))]
        every = self._every(weights, x)
        if task is not None:
            logits = every.gather(1, task[:, None, None].expand(-1, 1, every.shape[2]))[:, 0]
            return Output(loss=None if labels is None else supervised_loss(logits, labels), logits=logits)
        with torch.no_grad():
            views = [self._every(weights, view) for view in self._views(pixel_values, x)]
            mean = torch.stack([self.plain * every, *views]).sum(0) / (self.plain + len(views))
            entropies = normalised_entropies(mean)
        logits = joined(every, entropies)
        loss = None if labels is None else supervised_loss(logits, labels)
        return Output(loss=loss, logits=logits, extra={"entropies": entropies})

    def _every(self, weights: Sequence[Weights], x: Tensor) -> Tensor:
        """What each task says of standardised images: [B, T, W]."""
        tokens = self.encoder.tokens(x)
        said = [self.part(t).head(self._features(own, tokens)) for t, own in enumerate(weights)]
        width = max(one.shape[1] for one in said)
        return torch.stack([F.pad(one, (0, width - one.shape[1]), value=-math.inf) for one in said], 1)

    def _features(self, weights: Weights, tokens: Tensor) -> Tensor:
        found: Output = functional_call(self.encoder, weights, (), {"tokens": tokens})
        assert found.pooler_output is not None
        return found.pooler_output

    def _standard(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != len(self.mean):
            raise EngramError(
                f"the model was built for images [B, {len(self.mean)}, h, w]; got {list(pixel_values.shape)}."
            )
        return (pixel_values - self.mean[:, None, None]) / self.deviation[:, None, None]

    def _views(self, pixel_values: Tensor, x: Tensor) -> Iterable[Tensor]:
        """The changed copies, standardised, one by one."""
        yield from (x + one for one in self.disturbance)
        reach = (self.high - self.low).clamp(min=1e-12)
        unit = ((pixel_values - self.low) / reach).clamp(0, 1) if self.steps else x
        yield from (self._standard(self.low + reach * apply_steps(unit, steps)) for steps in self.steps)
