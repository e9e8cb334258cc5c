"""Training: one loop for every method that follows a gradient.

A method hands over `step`, which turns a batch into a loss; batches, devices, precision, processes, micro-batches,
progress and checkpoints are looked after here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from engram.data.table import Batch
from engram.engine.cost import Cost
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.norms import batch_norms

Update = tuple[Mean, torch.optim.Optimizer]
Step = Callable[[Any], Mean | Generator[Update, None, None]]
CHECKPOINT_EVERY = 20.0  # seconds
WORTH_KEEPING = 2.0  # seconds: a training this short is done again instead


@dataclass
class History:
    """The mean loss of every epoch, as the optimiser saw it."""

    losses: list[float] = field(default_factory=list)


def fit(
    step: Step,
    batches: Callable[[int], Iterable[Any]],
    *,
    model: nn.Module,
    optimizer: Optimizer | Mapping[str, torch.optim.Optimizer],
    epochs: int,
    run: Run,
    name: str = "fit",
    steps: int | None = None,
    state: Mapping[str, Any] | None = None,
    after_step: Callable[[int], None] | None = None,
    micro: int | None = None,
) -> History:
    """Train `model` in place.

    `step(batch)` returns a `Mean`: one update. Or it yields `(Mean, optimizer)` any number of times: one update each,
    done before the step goes on; then `optimizer` is the mapping of these optimisers by name. `batches(epoch)`: the
    batches of an epoch, already this process's share (`run.shard`); a batch may be a tuple of batches. `steps`: how
    many batches an epoch has, for schedules that move within it. `state`: further things with `state_dict` that the
    training changes (averages, memories). `after_step(k)`: called after the k-th update (averaged copies, clamps,
    closed-form layers). `micro`: at most so many rows at once; gradients are summed, and the update is the same.

    The loss of given rows does not depend on the number of processes or micro-batches: sums are divided by the count
    over all of them. Dropout and other draws come from a generator of this training's own. A training that is
    interrupted goes on from the last checkpointed epoch of a run with a directory. EngramError, naming the epoch, for a
    loss that is no number: that epoch is not checkpointed.
    """
    with run.scope(name):
        loop = _Loop(step, model, optimizer, run, epochs, steps, dict(state or {}), after_step, micro)
        with run.cost.clock(), run.progress(name, epochs) as advance:
            loop.resume()
            advance(loop.epoch)
            while loop.epoch < epochs:
                with run.seeded("epoch", loop.epoch):
                    loop.run_epoch(batches(loop.epoch))
                advance(1)
        return loop.history


class _Loop:
    def __init__(
        self,
        step: Step,
        model: nn.Module,
        optimizer: Optimizer | Mapping[str, torch.optim.Optimizer],
        run: Run,
        epochs: int,
        steps: int | None,
        state: dict[str, Any],
        after_step: Callable[[int], None] | None,
        micro: int | None,
    ) -> None:
        self.step, self.model, self.run, self.after_step, self.micro = step, model, run, after_step, micro
        self.epochs, self.steps = epochs, steps
        model.to(run.device)
        self.spec = optimizer if isinstance(optimizer, Optimizer) else None
        self.optimizers = (
            {"": optimizer.build(model.parameters())} if isinstance(optimizer, Optimizer) else dict(optimizer)
        )
        self.main = self.optimizers.get("")
        self.state = {"model": model, **{f"optimizer {k}": v for k, v in self.optimizers.items()}, **state}
        self.history = History()
        self.epoch = 0
        self.updates = 0
        self.started = self.saved = time.monotonic()
        self.before = run.cost.copy()  # seconds of this training are added at its end

    def run_epoch(self, batches: Iterable[Any]) -> None:
        total, rows = torch.zeros((), device=self.run.device), torch.zeros((), dtype=torch.int64)
        count = 0
        for index, batch in enumerate(batches):
            self._set_rate(index)
            for loss in self._updates(_to(batch, self.run.device)):
                total += loss
                count += 1
            rows += _rows(batch)
        total, rows = _summed([total, rows.to(self.run.device)])
        lost = "the loss is" if not bool(torch.isfinite(total)) else "weights are" if self._broken() else None
        if lost is not None:
            where = "/".join(self.run.path)
            raise EngramError(
                f"{lost} no number any more in epoch {self.epoch + 1} of {where}: lower the learning rate or clip "
                "the gradient; what was there before this training is unchanged"
            )
        self.run.cost.rows += int(rows)
        self.history.losses.append(float(total) / max(count, 1))
        self.epoch += 1
        if self.run.watch is not None:
            self.run.watch(self.run.path, self.epoch, self.model)
        self._checkpoint()

    def _broken(self) -> bool:
        """Whether the last update left a weight that is not finite, which no loss has told of yet."""
        return not all(bool(torch.isfinite(p.detach()).all()) for p in self.model.parameters() if p.requires_grad)

    def _updates(self, batch: Any) -> Iterable[Tensor]:
        """Do the batch's updates; the loss of each, detached (this process's share of it)."""
        with self.run.autocast():
            if self.micro is not None and _rows(batch) > self.micro:
                yield self._micro_update(batch)
                return
            result = self.step(batch)
            if isinstance(result, Mean):
                yield self._update(result, self._main())
                return
            for mean, optimizer in result:
                yield self._update(mean, optimizer)

    def _update(self, mean: Mean, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = _globally(mean).value
        if loss.requires_grad:
            loss.backward()
        self._apply(optimizer)
        return loss.detach()

    def _micro_update(self, batch: Any) -> Tensor:
        """The gradient of every term's sum over the micro-batches, divided by the term's count at the end."""
        params = [p for p in self.model.parameters() if p.requires_grad]
        grads: list[list[Tensor | None]] = []
        totals: list[tuple[Tensor, float]] = []
        for piece in _cut(batch, self.micro or 1):
            mean = self.step(piece)
            if not isinstance(mean, Mean):
                raise EngramError("micro-batches need a step that returns one loss; leave out micro-batches")
            for k, (total, size) in enumerate(mean.terms):
                found = _gradients(total, params)
                if k == len(grads):
                    grads.append(found)
                    totals.append((total.detach(), float(size)))
                else:
                    grads[k] = [_added(a, b) for a, b in zip(grads[k], found, strict=True)]
                    totals[k] = (totals[k][0] + total.detach(), totals[k][1] + float(size))
        mean = _globally(Mean(tuple(totals)))
        sizes = [max(float(size), 1e-12) for _, size in mean.terms]
        for p, *parts in zip(params, *grads, strict=True):
            used = [g / size for g, size in zip(parts, sizes, strict=True) if g is not None]
            p.grad = torch.stack(used).sum(0) if used else None
        self._apply(self._main())
        return mean.value

    def _apply(self, optimizer: torch.optim.Optimizer) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if self.run.shard[1] > 1:
            _sum_gradients(params)
            _average_statistics(self.model, self.run.shard[1])
        if self.spec is not None and self.spec.clip is not None:
            nn.utils.clip_grad_norm_(params, self.spec.clip)
        optimizer.step()
        self.updates += 1
        self.run.cost.steps += 1
        if self.after_step is not None:
            self.after_step(self.updates)

    def _main(self) -> torch.optim.Optimizer:
        if self.main is None:
            raise EngramError("a step that returns one loss needs an Optimizer, not a mapping of optimisers")
        return self.main

    def _set_rate(self, index: int) -> None:
        if self.spec is not None:
            inner = index / self.steps if self.steps else 0.0
            self.spec.set_rate(self._main(), (self.epoch + inner) / max(self.epochs, 1))

    def resume(self) -> None:
        found = self.run.journal.load(self.run.path) if self.run.directory else None
        if found is None:
            return
        value, cost = found
        self.run.cost.add(Cost.of(cost))
        self.epoch, self.updates, self.history = value["epoch"], value["updates"], History(value["losses"])
        for name, part in self.state.items():
            part.load_state_dict(value["state"][name])

    def _checkpoint(self) -> None:
        now, last = time.monotonic(), self.epoch >= self.epochs
        due = now - self.saved > CHECKPOINT_EVERY or (last and now - self.started > WORTH_KEEPING)
        if self.run.directory is None or not due or self.run.shard[0] > 0:
            return
        state = {name: dict(part.state_dict()) for name, part in self.state.items()}
        value = {"epoch": self.epoch, "updates": self.updates, "losses": self.history.losses, "state": state}
        cost = self.run.cost.since(self.before)
        cost.seconds += now - self.started
        self.run.journal.store(self.run.path, value, asdict(cost))
        self.saved = now


def _gradients(total: Tensor, params: list[nn.Parameter]) -> list[Tensor | None]:
    """The gradient of a sum; None for a parameter that it does not depend on."""
    if not total.requires_grad:
        return [None] * len(params)
    return list(torch.autograd.grad(total, params, retain_graph=True, allow_unused=True))


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _sum_gradients(params: list[nn.Parameter]) -> None:
    """Sum over the processes; a parameter that no process used keeps no gradient, as in one process."""
    used = torch.tensor([p.grad is not None for p in params], dtype=torch.float32, device=params[0].device)
    for p, count in zip(params, _summed([used])[0].tolist(), strict=True):
        if count and p.grad is None:
            p.grad = torch.zeros_like(p)
    _summed([p.grad for p in params if p.grad is not None])


def _average_statistics(model: nn.Module, processes: int) -> None:
    """Running statistics of a batch's shares become their mean, so that all processes hold one model."""
    norms = [norm for norm in batch_norms(model) if norm.training]
    found = [value for m in norms for value in (m.running_mean, m.running_var) if value is not None]
    for value in _summed(found):
        value /= processes


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Batch):
        return batch.to(device)
    return tuple(_to(part, device) for part in batch) if isinstance(batch, tuple) else batch


def _rows(batch: Any) -> int:
    if isinstance(batch, Batch):
        return len(batch)
    return sum(_rows(part) for part in batch) if isinstance(batch, tuple) else 0


def _cut(batch: Any, size: int) -> Iterable[Any]:
    """Pieces of at most `size` rows; the parts of a tuple are cut alike."""
    parts: Sequence[Batch | None] = batch if isinstance(batch, tuple) else (batch,)
    pieces = -(-_rows(batch) // size)
    while sum(-(-len(part) // pieces) for part in parts if part is not None) > size and pieces < _rows(batch):
        pieces += 1
    for k in range(pieces):
        cut = tuple(None if part is None else _slice(part, _share(len(part), k, pieces)) for part in parts)
        yield cut if isinstance(batch, tuple) else cut[0]


def _share(n: int, k: int, pieces: int) -> Tensor:
    """The k-th of so many pieces of n row numbers."""
    return torch.arange(n).tensor_split(pieces)[k]


def _slice(batch: Batch, rows: Tensor) -> Batch:
    return Batch(
        {name: value[rows] for name, value in batch.inputs.items()},
        None if batch.labels is None else batch.labels[rows],
        batch.rows[rows],
        {name: value[rows] for name, value in batch.extra.items()},
    )


def _globally(mean: Mean) -> Mean:
    """The loss with its counts taken over all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return mean
    device = mean.terms[0][0].device
    counts = torch.stack([torch.as_tensor(count, dtype=torch.float64, device=device) for _, count in mean.terms])
    dist.all_reduce(counts)
    return Mean(tuple((total, count) for (total, _), count in zip(mean.terms, counts, strict=True)))


def _summed(tensors: list[Tensor]) -> list[Tensor]:
    """Sum tensors over the processes, in place; one message for all of a kind."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensors
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        together = torch.cat([tensor.detach().reshape(-1) for tensor in alike])
        dist.all_reduce(together)
        for tensor, total in zip(alike, together.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.detach().copy_(total.view_as(tensor))
    return tensors
