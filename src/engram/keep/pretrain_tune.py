"""Pretrain and tune: a few gradient steps on every small support set, with or without replay of the last sets.

Kowadlo, Ahmed, Mayan, Rawlinson: Expanding continual few-shot learning benchmarks to include recognition of specific
instances. PLOS ONE 2024, arXiv 2209.07863; learners 1 and 3 there, on the benchmark of Antoniou et al. 2020 (arXiv
2004.11967).

1. The first task pretrains: cross-entropy over its classes, in mini-batches.
2. Every further task is a support set, on which `steps` steps of plain gradient descent are taken, each with all of its
   rows: cross-entropy over the classes that came after the first task. Everything is tuned but the columns of the
   first task's classes, the pretraining head. Each layer has a rate of its own for each step.
3. Replay: the last `sets` support sets are kept, and `replayed` random rows of them join every step, with their true
   labels. A set is kept once it was learnt, so its own rows are not replayed to it.

The published rates start at 0.01 and can be learnt, but pretraining does not touch them. Here `meta` episodes of the
first task's classes do, if wanted: the query loss after the steps is differentiated by the rates, where the gradients
along the way count as constants (first order).

Pretraining takes shuffled batches; the published code takes the images of an episode as a batch. Tuning and prediction
use the batch statistics of pretraining: published predictions use those of all targets together, by which targets help
one another. A class of the first task that comes again is tuned like a new one. With replay the published settings
take many more steps (30 to 120) than without (5): compare at equal `steps`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from engram.core.learner import require_labels
from engram.core.learning import GradientLearner
from engram.core.needs import Need, Needs, needs, require_processes
from engram.core.settings import name_of
from engram.core.trace import State
from engram.data.buffer import Buffer
from engram.data.episodes import Episode, episodes, feasible
from engram.data.table import Batch, Table
from engram.data.task import Task
from engram.engine.fit import fit
from engram.engine.losses import Mean, by_target
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.replay import share
from engram.models.head import Head
from engram.models.predictor import Predictor

SET = "support set"  # the buffer's column that says with which set a row came
ENDLESS = 10**9  # rows: the number of sets limits the buffer
MICRO = 1024  # rows of a support set that go through the network at once


@dataclass(kw_only=True, eq=False)
class PretrainTune(GradientLearner):
    """Pretraining on the first task, then `steps` full-batch steps on every further one.

    `rate`: the initial rate of every layer and step. `sets`, `replayed`: support sets kept, and rows of them in every
    step; 0 of either is the learner without replay, bit by bit. `meta`: episodes in which the rates are learnt after
    pretraining, of up to `ways` classes and `shots` and `queries` rows of each, by Adam with rate `meta_rate`.
    `optimizer`, `epochs` and `batch_size` are those of pretraining. EngramError for a network that is not an encoder
    with a class head. Cost: as fine-tuning on the first task, then `steps` passes over rows and replayed rows.
    """

    optimizer: Optimizer = field(default_factory=lambda: Optimizer("adamw", lr=1e-3, weight_decay=1e-4))
    steps: int = 5
    rate: float = 0.01
    sets: int = 0
    replayed: int = 10
    meta: int = 0
    meta_rate: float = 1e-3
    ways: int = 5
    shots: int = 1
    queries: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kept: Buffer = self.trace("support sets", Buffer(ENDLESS, rule="fifo"))
        self.base: tuple[int, ...] = ()  # the classes of the pretraining head
        self.rates: Tensor | None = None  # [layers, steps]

    @classmethod
    def tiny(cls) -> PretrainTune:
        small: dict[str, Any] = {"name": "MLP", "hidden": [128, 64]}
        return cls(network=small, epochs=3, batch_size=32, steps=3, sets=2, replayed=4, meta=2)

    @property
    def needs(self) -> Needs:
        return needs({Need.BOUNDARIES})

    def learn(self, task: Task, run: Run | None = None) -> None:
        """Pretrain if this is the first task, else tune on the task's rows and on replayed ones."""
        run = run or Run()
        if self.started:
            return self._tune(task, run)
        super().learn(task, run)
        assert isinstance(self.model.head, Head)
        self.base = tuple(self.model.head.live.nonzero()[:, 0].tolist())
        self.rates = torch.full((len(layers(self.model)), self.steps), self.rate)
        return self._learn_rates(task, run)

    def first_model(self, task: Task, run: Run) -> nn.Module:
        model = super().first_model(task, run)
        if not (isinstance(model, Predictor) and isinstance(model.head, Head)):
            raise EngramError("PretrainTune wants an encoder with a class head, such as network='MLP'")
        return model

    def terms(self, batch: Batch, output: Any) -> Mean:
        assert batch.labels is not None
        return by_target(self._episodic(output.logits), batch.labels)

    def extra_state(self) -> State:
        return {"base": list(self.base), "rates": self.rates}

    def load_extra_state(self, state: State) -> None:
        self.base, self.rates = tuple(state["base"]), state["rates"]

    def _tune(self, task: Task, run: Run) -> None:
        require_processes(name_of(self), self.processes)
        require_labels(task)
        with run.scope("learn"):
            self._prepare(task, run)
            self.base = tuple(c for c in self.base if c not in task.train.classes)
            groups = [{"params": params, "lr": self.rate} for params in layers(self.model)]
            plan = torch.optim.SGD(groups, lr=self.rate)
            fit(
                lambda batch: self.step(batch, task),
                lambda step: self._whole(task, step, plan, run),
                model=self.model.eval(),
                optimizer={"": plan},
                epochs=self.steps,
                run=run,
                name="tune",
                micro=MICRO,
            )
            self.seen.add(task.train.ids)
            self._keep(task.train)

    def _whole(self, task: Task, step: int, plan: torch.optim.Optimizer, run: Run) -> Iterator[Batch]:
        """The one batch of a step, and the step's rates."""
        assert self.rates is not None
        for group, rate in zip(plan.param_groups, self.rates[:, step].tolist(), strict=True):
            group["lr"] = rate
        yield share(task.train.concat(self.kept.draw(self.replayed, run.generator("replay", step))), run)

    def _keep(self, rows: Table) -> None:
        """Keep a support set, and let go of the oldest ones."""
        number = 1 + max(self._numbers(), default=-1)
        self.kept.offer(rows.with_column(SET, torch.full((len(rows),), number)))
        old = [n <= number - self.sets for n in self._numbers()]
        self.kept.drop(self.kept.table.take(old))

    def _numbers(self) -> list[int]:
        """The set with which each row of the buffer came."""
        return torch.as_tensor(self.kept.table.extra[SET]).tolist() if len(self.kept) else []

    def _episodic(self, logits: Tensor) -> Tensor:
        """Logits without those of the pretraining head; all of them while it is trained."""
        return logits.index_fill(1, torch.tensor(self.base, device=logits.device), -torch.inf) if self.base else logits

    def _learn_rates(self, task: Task, run: Run) -> None:
        ways, shots, queries = feasible(task.train, self.ways, self.shots, self.queries)
        if not (self.meta and ways):
            return
        assert self.rates is not None
        rates = self.rates.clone().requires_grad_()
        adam = torch.optim.Adam([rates], self.meta_rate)
        sizes: dict[str, Any] = {"ways": ways, "shots": shots, "queries": queries, "count": self.meta}
        for k, episode in enumerate(episodes(task.train, seed=run.number("rates"), **sizes)):
            adam.zero_grad()
            self._after_steps(episode, rates, run.generator("rates", k)).backward()
            adam.step()
            with torch.no_grad():
                rates.clamp_(min=0)
        self.rates = rates.detach()

    def _after_steps(self, episode: Episode, rates: Tensor, draws: torch.Generator) -> Tensor:
        """The query loss of an episode after all steps, to be differentiated by the rates [layers, steps]."""
        first = 1 + max(self.base)
        model = copy.deepcopy(self.model)
        assert isinstance(model.head, Head)
        model.head.grow(range(first, first + len(episode.classes)), draws)
        device = next(model.parameters()).device
        support, asked = (_moved(rows, first, device) for rows in (episode.supports[0], episode.queries))
        names = [name for name, _ in model.named_parameters()]
        place = {id(p): k for k, params in enumerate(layers(model)) for p in params}
        own = [place[id(p)] for p in model.parameters()]
        weights = [p.detach().requires_grad_() for p in model.parameters()]

        def loss(weights: list[Tensor], rows: Batch) -> Tensor:
            output = functional_call(model, dict(zip(names, weights, strict=True)), (), rows.inputs)
            return F.cross_entropy(self._episodic(output.logits), rows.labels)  # type: ignore[arg-type]

        for step in range(self.steps):
            slopes = torch.autograd.grad(loss(weights, support), weights)
            weights = [w - rates[k, step] * g for w, g, k in zip(weights, slopes, own, strict=True)]
        return loss(weights, asked)


def layers(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters, module by module."""
    found = (list(module.parameters(recurse=False)) for module in model.modules())
    return [params for params in found if params]


def _moved(rows: Table, first: int, device: torch.device) -> Batch:
    """All rows as one batch whose labels begin at `first`."""
    assert rows.labels is not None
    return replace(rows, labels=rows.labels + first).batch(torch.arange(len(rows))).to(device)
