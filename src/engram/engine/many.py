"""Many small models at once: oracles, shadow models, datamodels.

K trainings of one recipe on K subsets of the rows differ in nothing but their draws and rows, so small models are
stacked: one batched product does the work of K small ones. Large models gain nothing from that and are trained each by
itself. Either way the work is dealt out to processes of one thread where it is long enough to pay for them.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from engram.data.table import IGNORED, MISSING, Table, Target, shuffled
from engram.engine.cost import Cost
from engram.engine.losses import by_target
from engram.engine.recipe import Recipe, Trainer
from engram.engine.run import Run
from engram.errors import EngramError, unknown
from engram.models.predictor import Predictor

How = Literal["auto", "stacked", "alone"]
STACK = 32  # models; more of them at once were not faster
SMALL = 100_000  # multiply-adds per row, up to which stacking was faster
LONG = 20.0  # seconds, as estimated, from which processes pay
ROUND = 5.0  # seconds, as estimated, of a process before its models are journaled
RATE, STEP = 2e10, 4e-4  # of one thread: flops per second, and seconds per step besides
_NO_LABEL = {Target.CLASSES: MISSING, Target.TOKENS: IGNORED, Target.NUMBERS: float("nan")}

Plan = tuple[list[tuple[list[int], bool]], int]  # which models, whether stacked; and the number of processes


class Job(NamedTuple):
    """Row numbers and a seed of every model, and whether they are trained as one."""

    models: list[tuple[Tensor, int]]
    stacked: bool


def fit_many(
    recipe: Trainer,
    table: Table,
    subsets: Sequence[Tensor] | Tensor,
    seeds: Sequence[int],
    run: Run | None = None,
    *,
    how: How = "auto",
    workers: int | None = None,
) -> list[nn.Module]:
    """K models, the k-th as `recipe(table.take(subsets[k]), seeds[k])` trains it: equal to 1e-5, on the same batches
    (but where rounding decides: in parameters whose gradient is rounding alone, which Adam makes large, as the bias of
    attention's keys; and from where a unit stands on the edge of its ReLU, which is rare, and grows in long trainings).

    `subsets`: [K, n] bool, or K lists of row numbers in the order in which the rows are to stand. `how`: "stacked"
    trains up to 32 models as one; "alone" each by itself; "auto" stacks recipes of small models (by multiply-adds per
    row) without batch statistics, dropout or generators of their own. `workers`: processes of one thread each; left
    out, as many as there are cores if the work is long, else none. The run says which, and journals it; a resumed run
    goes on from the last finished round of stacks. EngramError: "stacked" for models that cannot be, an empty subset.
    """
    run = run or Run()
    rows = [_numbers(subset, len(table)) for subset in subsets]
    if len(rows) != len(seeds):
        raise EngramError(f"there are {len(rows)} subsets and {len(seeds)} seeds; every model has one of each")
    if not all(len(chosen) for chosen in rows):
        raise EngramError("a model cannot be trained on no rows: a subset is empty")
    if rows and isinstance(recipe, Recipe):
        recipe.check(table)
    with run.scope("many"):
        jobs, workers = run.phase("plan", lambda: _plan(recipe, table, rows, seeds, run, how, workers))
        run.report.say(_sentence(jobs, workers))
        made: dict[int, nn.Module] = {}
        with run.progress(f"train {len(rows)} models", len(rows)) as advance:
            for first in range(0, len(jobs), workers):
                dealt = jobs[first : first + workers]
                work = [Job([(rows[k], seeds[k]) for k in which], stacked) for which, stacked in dealt]
                models = run.phase(f"round {first // workers}", partial(_round, recipe, table, work, run))
                made.update(zip([k for which, _ in dealt for k in which], models, strict=True))
                advance(len(models))
        return [made[k] for k in range(len(rows))]


def _numbers(subset: Tensor, n: int) -> Tensor:
    subset = torch.as_tensor(subset)
    if subset.dtype == torch.bool:
        if len(subset) != n:
            raise EngramError(f"a subset says which of {len(subset)} rows; the table has {n}")
        return subset.nonzero().flatten()
    return subset.long()


def _sentence(jobs: list[tuple[list[int], bool]], workers: int) -> str:
    count, stacked = (sum(len(which) for which, one in jobs if one or not only) for only in (False, True))
    where = "in this process" if workers == 1 else f"in {workers} processes"
    return f"{count} models of one recipe: {stacked} in stacks, {count - stacked} each by itself, {where}"


def _plan(
    recipe: Trainer, table: Table, rows: list[Tensor], seeds: Sequence[int], run: Run, how: How, workers: int | None
) -> Plan:
    """Which models train together, and in how many processes."""
    if how not in get_args(How):
        raise unknown("way to train many models", how, get_args(How))
    groups: dict[Any, list[int]] = defaultdict(list)
    prices: dict[str, float] = {}
    seconds = 0.0
    for k, (chosen, seed) in enumerate(zip(rows, seeds, strict=True)):
        model = recipe.start(table.take(chosen), run.with_seed(seed)) if isinstance(recipe, Recipe) else None
        obstacle = _obstacle(model)
        if how == "stacked" and obstacle:
            raise EngramError(f'these models cannot be stacked ({obstacle}); use how="alone"')
        if model is None or not isinstance(recipe, Recipe):
            groups[None].append(k)
            continue
        shape = _shape(model)
        if shape not in prices:
            prices[shape] = _multiply_adds(model, table)
        price = prices[shape]
        steps = -(-len(chosen) // recipe.batch_size)
        together = not obstacle and (how == "stacked" or (how == "auto" and price <= SMALL))
        groups[(steps, shape) if together else None].append(k)
        seconds += recipe.epochs * (6 * price * len(chosen) / RATE + steps * STEP)
    if workers is None:
        workers = 1 if seconds < LONG or run.device.type != "cpu" or run.shard[1] > 1 else _cores()
    share = -(-len(rows) // workers)
    some = 1 if workers == 1 else max(1, min(share, int(ROUND * len(rows) / max(seconds, ROUND))))
    jobs = []
    for key, group in groups.items():
        size = some if key is None else min(STACK, share)
        jobs += [(group[i : i + size], key is not None and size > 1) for i in range(0, len(group), size)]
    return jobs, workers


def _multiply_adds(model: nn.Module, table: Table) -> float:
    """Multiply-adds of one row in the layers with weights, forward."""
    count = 0.0

    def add(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal count
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim > 1 and isinstance(output, Tensor):
            count += weight.numel() * output.numel() / len(weight)

    twin = copy.deepcopy(model).cpu().eval()
    for module in twin.modules():
        module.register_forward_hook(add)
    with torch.no_grad():
        twin(**table.batch(torch.zeros(1, dtype=torch.int64)).inputs)
    return count


def _obstacle(model: nn.Module | None) -> str:
    """Why models of this kind cannot be stacked; empty if they can."""
    if model is None:
        return "they come from no Recipe"
    if not isinstance(model, Predictor):
        return f"{type(model).__name__} is none of engram's own models, so what it does in a batch is not known"
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"{type(module).__name__} keeps statistics of its batches"
        rates = (getattr(module, name, 0.0) for name in ("p", "dropout"))
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            return f"{type(module).__name__} draws what to drop"
    return ""


def _shape(model: nn.Module) -> str:
    """Equal for models that differ in the values of parameters alone."""
    params = [(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()]
    return repr((params, [(name, b.tolist()) for name, b in model.named_buffers()]))


def _cores() -> int:
    import joblib

    return int(joblib.cpu_count())


def _round(recipe: Trainer, table: Table, jobs: list[Job], run: Run) -> list[nn.Module]:
    """The models of some jobs; several jobs go to a process each."""
    if len(jobs) == 1:
        return _job(recipe, table, jobs[0], run)
    from joblib import Parallel, delayed

    here = _Shipped.of(table), str(run.device), run.precision
    with run.cost.clock():
        found = Parallel(n_jobs=len(jobs), mmap_mode="c")(delayed(_elsewhere)(recipe, job, *here) for job in jobs)
    for _, cost in found:
        run.cost.add(Cost(0.0, cost.steps, cost.rows, cost.flops))  # the seconds passed side by side
    return [model for models, _ in found for model in models]


@dataclass(frozen=True)
class _Shipped:
    """A table whose large columns travel to processes as one memory map."""

    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None
    rest: dict[str, Any]

    @classmethod
    def of(cls, table: Table) -> _Shipped:
        rest = {"ids": table.ids, "extra": dict(table.extra), "names": dict(table.names)}
        inputs = {name: value.numpy() for name, value in table.inputs.items()}
        return cls(inputs, None if table.labels is None else table.labels.numpy(), rest)

    def table(self) -> Table:
        labels = None if self.labels is None else torch.from_numpy(self.labels)
        return Table({name: torch.from_numpy(value) for name, value in self.inputs.items()}, labels, **self.rest)


def _elsewhere(
    recipe: Trainer, job: Job, shipped: _Shipped, device: str, precision: str
) -> tuple[list[nn.Module], Cost]:
    torch.set_num_threads(1)
    run = Run(device=device, precision=precision)
    return _job(recipe, shipped.table(), job, run), run.cost


def _job(recipe: Trainer, table: Table, job: Job, run: Run) -> list[nn.Module]:
    if job.stacked:
        assert isinstance(recipe, Recipe)
        return _Stack(recipe, table, job, run).train()
    return [recipe(table.take(rows), seed, run) for rows, seed in job.models]


class _Stack:
    """Models of one shape, trained as one: every parameter has a leading dimension [K, …].

    Their batches are as many; shorter ones are filled up with rows that have no label, so that a loss is that of its
    own rows.
    """

    def __init__(self, recipe: Recipe, table: Table, job: Job, run: Run) -> None:
        self.recipe, self.table, self.run = recipe, table, run
        self.rows = [rows for rows, _ in job.models]
        runs = [run.with_seed(seed) for _, seed in job.models]
        self.models = [
            recipe.start(table.take(rows), own).to(run.device).train()
            for rows, own in zip(self.rows, runs, strict=True)
        ]
        self.orders = [recipe.order(own) for own in runs]
        self.params = self._stacked()

    def train(self) -> list[nn.Module]:
        """The trained models."""
        plan, epochs = self.recipe.optimizer, self.recipe.epochs
        optimizer = plan.build(self.params.values())
        steps = -(-max(map(len, self.rows)) // self.recipe.batch_size)
        with self.run.cost.clock(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no batching rule
            for epoch in range(epochs):
                for index, batch in enumerate(self._batches(epoch)):
                    plan.set_rate(optimizer, (epoch + index / steps) / epochs)
                    self._update(batch, optimizer)
        return self._apart()

    def _stacked(self) -> dict[str, nn.Parameter]:
        named = [dict(model.named_parameters()) for model in self.models]
        first = named[0]
        return {
            name: nn.Parameter(torch.stack([own[name].detach() for own in named]), first[name].requires_grad)
            for name in first
        }

    def _batches(self, epoch: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Inputs [K, B, …] and labels [K, B, …] of every step."""
        size = self.recipe.batch_size
        cuts = [
            rows[shuffled(len(rows), order, epoch)].split(size)
            for rows, order in zip(self.rows, self.orders, strict=True)
        ]
        for parts in zip(*cuts, strict=True):
            longest = max(map(len, parts))
            chosen = pad_sequence(list(parts), batch_first=True)
            spare = torch.arange(longest) >= torch.tensor([len(part) for part in parts]).unsqueeze(1)
            batch = self.table.batch(chosen.flatten()).to(self.run.device)
            assert batch.labels is not None
            labels = batch.labels.unflatten(0, chosen.shape).clone()
            labels[spare.to(labels.device)] = _NO_LABEL[self.table.target]
            yield {name: value.unflatten(0, chosen.shape) for name, value in batch.inputs.items()}, labels
            self.run.cost.rows += sum(map(len, parts))
            self.run.cost.steps += len(parts)

    def _update(self, batch: tuple[dict[str, Tensor], Tensor], optimizer: torch.optim.Optimizer) -> None:
        base = self.models[0]

        def loss(params: dict[str, Tensor], inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
            return by_target(functional_call(base, params, (), inputs).logits, labels).value

        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.run.device.type, torch.bfloat16, enabled=self.run.precision == "bfloat16"):
            total = vmap(loss)(dict(self.params), *batch).sum()
        total.backward()
        if self.recipe.optimizer.clip is not None:
            self._clip(self.recipe.optimizer.clip)
        optimizer.step()

    def _clip(self, most: float) -> None:
        """Every model's gradient by its own norm, as `clip_grad_norm_` does."""
        grads = [p.grad for p in self.params.values() if p.grad is not None]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)
        factor = (most / (norms + 1e-6)).clamp(max=1.0)
        for g in grads:
            g.mul_(factor.view(-1, *[1] * (g.ndim - 1)))

    @torch.no_grad()
    def _apart(self) -> list[nn.Module]:
        for k, model in enumerate(self.models):
            for name, own in model.named_parameters():
                own.copy_(self.params[name][k])
        return [model.eval() for model in self.models]
