"""A hypernetwork: one small vector for each task, from which all weights of that task's network are generated.

What `keep.ChunkedHypernetwork` and `keep.DependencyPreservingHypernetwork` train. von Oswald, Henning, Grewe,
Sacramento: Continual learning with hypernetworks. ICLR 2020, arXiv 1906.00695; Chandra, Varshney, Srijith, Gupta:
Continual Learning with Dependency Preserving Hypernetworks. WACV 2023, arXiv 2209.07712.

The weights of the target network, from its input to its output, are cut into N chunks of S numbers. With e_t the vector
of a task and c_k that of a chunk, a generator gives

    chunked      w_k = V g([e_t; c_k]) + b, g fully connected: each chunk by itself
    recurrent    w_k = V h_k + b, h_k = LSTM([e_t; c_k], h_{k-1}): each chunk follows from those before

V is scaled so that the first task's numbers have variance 1; a weight is its number times sqrt(2 / fan-in) of its
layer, so that generated layers have He's variance wherever chunks are cut. Scales of normalisation layers are generated
around 1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from engram.errors import EngramError
from engram.models.config import Configured
from engram.models.encoders import Encoder
from engram.models.heads import LinearHead
from engram.models.output import Output
from engram.models.predictor import Predictor, supervised_loss
from engram.models.task_inference import joined, normalised_entropies

NORM_SPREAD = 0.1  # of the generated scales and shifts of normalisation layers

Range = tuple[str, torch.Size, float, float]  # of a parameter: name, shape, mean, deviation


class WeightGenerator(Configured, nn.Module):
    """Base of the generators: task vectors [T, d_e] in, T times N chunks of S numbers out, [T, N S].

    chunks   [N, d_c] the vectors of the chunks, common to all tasks
    out      hidden units -> S: V and b

    Initial weights are drawn from torch's global generator (for use under `seeded`).
    """

    def __init__(self, task_width: int, chunk_width: int, hidden: int, size: int, count: int = 0) -> None:
        super().__init__()
        self.task_width, self.size = task_width, size
        self.chunks = nn.Parameter(torch.randn(count, chunk_width))
        self.out = nn.Linear(hidden, size)
        nn.init.normal_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @property
    def hidden(self) -> int:
        """The number of hidden units now."""
        return self.out.in_features

    def describe(self) -> dict[str, Any]:
        """As it is now."""
        return {**super().describe(), "hidden": self.hidden, "count": len(self.chunks)}

    def generated(self, inputs: Tensor) -> Tensor:
        """Chunks [T, N, S] of task and chunk vectors [T, N, d_e + d_c]."""
        raise NotImplementedError

    def forward(self, tasks: Tensor) -> Tensor:
        """All tasks in one pass: [T, d_e] -> [T, N S]."""
        count = len(self.chunks)
        each = tasks[:, None].expand(-1, count, -1), self.chunks[None].expand(len(tasks), -1, -1)
        return self.generated(torch.cat(each, 2)).flatten(1)

    def lengthen(self, count: int) -> None:
        """At least so many chunks; those that are there stay as they are."""
        more = torch.randn(max(0, count - len(self.chunks)), self.chunks.shape[1]).to(self.chunks)
        if len(more):
            self.chunks = nn.Parameter(torch.cat([self.chunks.detach(), more]))

    @torch.no_grad()
    def calibrate(self, tasks: Tensor) -> None:
        """Scale V so that the numbers of these tasks have variance 1."""
        self.out.weight /= self(tasks).std().clamp(min=1e-12)


class ChunkedGenerator(WeightGenerator):
    """Each chunk by itself, by a network of two hidden layers."""

    def __init__(self, task_width: int, chunk_width: int, hidden: int, size: int, count: int = 0) -> None:
        super().__init__(task_width, chunk_width, hidden, size, count)
        first, second = nn.Linear(task_width + chunk_width, hidden), nn.Linear(hidden, hidden)
        self.layers = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())

    def generated(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.out(self.layers(inputs))
        return found


class RecurrentGenerator(WeightGenerator):
    """Each chunk from those before, by an LSTM. `feedback`: the numbers of the chunk before are an input as well,
    projected onto so many; 0: the state alone carries what was generated.

    weight_x [4 H, d_e + d_c + feedback], weight_h [4 H, H], bias [4 H], the gates in torch's order: input, forget,
    cell, output.
    """

    def __init__(
        self, task_width: int, chunk_width: int, hidden: int, size: int, count: int = 0, feedback: int = 0
    ) -> None:
        super().__init__(task_width, chunk_width, hidden, size, count)
        self.weight_x = nn.Parameter(_uniform(hidden, 4 * hidden, task_width + chunk_width + feedback))
        self.weight_h = nn.Parameter(_uniform(hidden, 4 * hidden, hidden))
        self.bias = nn.Parameter(_uniform(hidden, 4 * hidden))
        self.back = nn.Parameter(torch.randn(feedback, size) / math.sqrt(size)) if feedback else None

    def generated(self, inputs: Tensor) -> Tensor:
        zero = inputs.new_zeros(1, len(inputs), self.hidden)
        state = zero, zero
        if self.back is None:
            return self._steps(inputs, state)[0]
        found: list[Tensor] = []
        before = inputs.new_zeros(len(inputs), self.size)
        for x in inputs.unbind(1):
            chunk, state = self._steps(torch.cat([x, before @ self.back.T], 1)[:, None], state)
            before = chunk[:, 0]
            found.append(before)
        return torch.stack(found, 1)

    @torch.no_grad()
    def grow(self, units: int) -> None:
        """More hidden units, of which nothing old depends: new units do not feed the old ones, and V has zeros for
        them, so that every task keeps its numbers (up to rounding) until training goes on."""
        old, new = self.hidden, self.hidden + units
        self.weight_x = nn.Parameter(_taller(self.weight_x, old, new))
        self.weight_h = nn.Parameter(_taller(F.pad(self.weight_h, (0, units)), old, new))
        self.bias = nn.Parameter(_taller(self.bias, old, new))
        self.out.weight = nn.Parameter(F.pad(self.out.weight, (0, units)))
        self.out.in_features = new

    def _steps(self, inputs: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Chunks [T, n, S] of n steps, and the state after them."""
        weights = [self.weight_x, self.weight_h, self.bias, torch.zeros_like(self.bias)]
        found, h, c = torch.lstm(inputs, state, weights, True, 1, 0.0, False, False, True)
        return self.out(found), (h, c)


class HyperTask(Configured, nn.Module):
    """What a task has of its own.

    embedding  [width] its vector e_t
    classes    [k] int64 buffer: the class id of each output of its network; -1 for one that is retired
    """

    classes: Tensor

    def __init__(self, width: int, classes: Sequence[int]) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(width))
        self.register_buffer("classes", torch.tensor(list(classes), dtype=torch.long))


class Hypernetwork(Configured, nn.Module):
    """The whole predictor: a generator, a vector for each task, and the shape of the target network, which has no
    parameters of its own.

    `target`: an encoder; it is emptied of its parameters. Its layers are generated in their order, then the rows of a
    head, [outputs, width + 1] with the bias last; a task of k classes uses the first k rows. `outputs` is as large as
    the largest task, and grows: rows come last, so that a generator that looks back alone leaves all others as they
    are. Running statistics of normalisation layers are kept for each task.

    Without a task, every task's network sees the rows, and the one with the least entropy, as a share of log k, has the
    largest logit (`models.task_inference`). Cost: one pass of the generator for all tasks together, and T
    passes of the target network.
    """

    base: Tensor
    scale: Tensor

    def __init__(
        self, target: Encoder, generator: WeightGenerator, tasks: Sequence[HyperTask] = (), outputs: int = 0
    ) -> None:
        super().__init__()
        self.ranges = _ranges(target)
        self.body = sum(math.prod(shape) for _, shape, _, _ in self.ranges)
        self.target, self.generator, self.outputs = _emptied(target), generator, 0
        self.tasks = nn.ModuleList(tasks)
        self.tracked = list(self.target.state_dict())
        for k, name in enumerate(self.tracked):
            self.register_buffer(f"statistics_{k}", self._fresh(name, len(tasks)))
        for name in ("base", "scale"):
            self.register_buffer(name, torch.zeros(0), persistent=False)
        self._widen(outputs)

    def describe(self) -> dict[str, Any]:
        """As it is now."""
        tasks = [self.task(t).describe() for t in range(len(self.tasks))]
        return {**super().describe(), "tasks": tasks, "outputs": self.outputs}

    @property
    def size(self) -> int:
        """D, the number of weights of a target network."""
        return len(self.scale)

    def add(self, classes: Iterable[int]) -> None:
        """A task with these classes; its vector, and whatever else is new, is drawn from torch's global generator (for
        use under `seeded`). All that was generated before stays, but for a head that has to grow in the chunked form,
        whose old rows stay too."""
        device = self.base.device
        one = HyperTask(self.generator.task_width, sorted(set(classes)))
        self._widen(max(self.outputs, len(one.classes)))
        self.tasks.append(one.to(device))
        for k, name in enumerate(self.tracked):
            own: Tensor = getattr(self, f"statistics_{k}")
            setattr(self, f"statistics_{k}", torch.cat([own, self._fresh(name, 1).to(device)]))
        if len(self.tasks) == 1:
            self.generator.calibrate(self.embeddings([0]))

    def task(self, number: int) -> HyperTask:
        """What a task has of its own."""
        found = self.tasks[number]
        assert isinstance(found, HyperTask)
        return found

    def retire(self, classes: Iterable[int]) -> None:
        """No task answers with these classes any more."""
        gone = torch.tensor(sorted(classes), dtype=torch.long, device=self.base.device)
        for t in range(len(self.tasks)):
            own = self.task(t).classes
            own[torch.isin(own, gone)] = -1

    def embeddings(self, tasks: Sequence[int]) -> Tensor:
        """The vectors of tasks: [T, d_e]."""
        return torch.stack([self.task(t).embedding for t in tasks])

    def weights(self, tasks: Sequence[int], changes: Mapping[str, Tensor] | None = None) -> Tensor:
        """The weights of these tasks' networks, [T, D], all generated in one pass. `changes`: what is added to the
        generator's parameters, by name."""
        given = {name: p + changes[name] for name, p in self.generator.named_parameters()} if changes else {}
        numbers: Tensor = functional_call(self.generator, given, (self.embeddings(tasks),))
        return self.base + self.scale * numbers[:, : self.size]

    def used(self, task: int) -> Tensor:
        """Mask [D]: the weights that a task's answers depend on, which are all but the head rows of other sizes."""
        mask = torch.ones(self.size, dtype=torch.bool, device=self.base.device)
        mask[self.body + len(self.task(task).classes) * (self.target.width + 1) :] = False
        return mask

    def named(self, weights: Tensor) -> dict[str, Tensor]:
        """The parameters of the target by name, of weights [D]."""
        parts = weights[: self.body].split([math.prod(shape) for _, shape, _, _ in self.ranges])
        return {name: part.view(shape) for (name, shape, _, _), part in zip(self.ranges, parts, strict=True)}

    def rows(self, task: int, weights: Tensor) -> Tensor:
        """A task's rows of the head, [k, width + 1], of weights [D]."""
        return weights[self.body :].view(self.outputs, -1)[: len(self.task(task).classes)]

    def local(self, task: int, weights: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """What a task's network says of its own classes, [B, k], with weights [D]."""
        values = {**self.named(weights), **self.statistics(task)}
        features = functional_call(self.target, values, (), dict(inputs)).pooler_output.flatten(1)
        rows = self.rows(task, weights)
        return F.linear(features, rows[:, :-1], rows[:, -1])

    def statistics(self, task: int) -> dict[str, Tensor]:
        """The running statistics of a task, by the names of the target's buffers."""
        return {name: getattr(self, f"statistics_{k}")[task] for k, name in enumerate(self.tracked)}

    def forward(self, *, labels: Tensor | None = None, task: Tensor | None = None, **inputs: Any) -> Output:
        """Logits [B, W] over class ids: those of the given `task` [B], else of all tasks, joined.
        `extra["entropies"]` [B, T], where no task is given. EngramError for a task that there is not."""
        if task is not None and not bool(((task >= 0) & (task < len(self.tasks))).all()):
            raise EngramError(f"tasks are numbered 0 to {len(self.tasks) - 1}; got {sorted(set(task.tolist()))}")
        weights = self.weights(range(len(self.tasks)))
        every = torch.stack([self._dense(t, self.local(t, own, inputs)) for t, own in enumerate(weights)], 1)
        if task is not None:
            chosen, extra = every.gather(1, task[:, None, None].expand(-1, 1, every.shape[2]))[:, 0], {}
        else:
            entropies = normalised_entropies(every.detach())
            chosen, extra = joined(every, entropies), {"entropies": entropies}
        return Output(loss=None if labels is None else supervised_loss(chosen, labels), logits=chosen, extra=extra)

    @torch.no_grad()
    def concrete(self, task: int) -> Predictor:
        """A task's network as one that stands by itself, with parameters of its own."""
        weights = self.weights([task])[0]
        encoder = copy.deepcopy(self.target)
        for name, value in self.named(weights).items():
            place, _, own = name.rpartition(".")
            module = encoder.get_submodule(place)
            delattr(module, own)
            module.register_parameter(own, nn.Parameter(value.clone()))
        encoder.load_state_dict(self.statistics(task), strict=False)
        head, rows, classes = LinearHead(self.target.width), self.rows(task, weights), self.task(task).classes
        alive = classes >= 0
        head.to(rows).set(classes[alive], rows[alive, :-1], rows[alive, -1])
        return Predictor(encoder, head)

    def _dense(self, task: int, scores: Tensor) -> Tensor:
        """Local scores [B, k] over class ids, -inf for those that a task does not have: [B, W]."""
        own = self.task(task).classes
        width = 1 + max(int(self.task(t).classes.max()) for t in range(len(self.tasks)))
        dense = scores.new_full((len(scores), width + 1), -math.inf)
        return dense.index_copy(1, torch.where(own < 0, width, own), scores)[:, :width]

    def _widen(self, outputs: int) -> None:
        """Room for so many rows of the head, and the chunks that they take."""
        if outputs == self.outputs and len(self.scale):
            return
        self.outputs, device = outputs, self.base.device
        rows = outputs * (self.target.width + 1)
        for name, at, of_row in (("base", 2, 0.0), ("scale", 3, math.sqrt(2 / self.target.width))):
            body = [torch.full((math.prod(one[1]),), float(one[at])) for one in self.ranges]  # type: ignore[arg-type]
            setattr(self, name, torch.cat([*body, torch.full((rows,), of_row)]).to(device))
        self.generator.lengthen(-(-self.size // self.generator.size))

    def _fresh(self, name: str, count: int) -> Tensor:
        """The statistics that so many new tasks begin with."""
        start: Tensor = self.target.state_dict()[name]
        return start.expand(count, *start.shape).clone()


def _ranges(target: nn.Module) -> list[Range]:
    """Where each parameter is generated: weights of layers around 0 with He's deviation, biases with that of their
    layer, scales and shifts of normalisation layers around 1 and 0."""
    parameters = dict(target.named_parameters())
    found = []
    for name, p in parameters.items():
        weight = parameters.get(f"{name.rpartition('.')[0]}.weight", p) if p.ndim == 1 else p
        spread = math.sqrt(2 / weight[0].numel()) if weight.ndim > 1 else NORM_SPREAD
        found.append((name, p.shape, float(p is weight and p.ndim == 1), spread))
    return found


def _emptied(target: Encoder) -> Encoder:
    """The module with empty buffers, which are not saved, in the places of its parameters."""
    for module in target.modules():
        for name in [name for name, p in module._parameters.items() if p is not None]:
            delattr(module, name)
            module.register_buffer(name, torch.empty(0), persistent=False)
    return target


def _uniform(hidden: int, *shape: int) -> Tensor:
    """As torch's recurrent layers begin."""
    return torch.empty(shape).uniform_(-1 / math.sqrt(hidden), 1 / math.sqrt(hidden))


def _taller(values: Tensor, old: int, new: int) -> Tensor:
    """Rows of four gates of `old` units, [4 old, ...], with fresh ones behind each gate's: [4 new, ...]."""
    fresh = _uniform(new, 4, new - old, *values.shape[1:]).to(values)
    return torch.cat([values.detach().view(4, old, *values.shape[1:]), fresh], 1).flatten(0, 1)
