"""Fast and slow weights: the fast ones keep the tasks of few rows, the slow ones keep learning to learn from few rows.

Wang, Li, Zhong, Zhu: Few-shot Continual Learning: a Brain-inspired Approach. arXiv 2104.09034 (2021); also known as
TSC, two-step consolidation.

A reconstruction. Of the paper only the abstract could be had, and no code: a pair of fast and slow weights with
interdependent updates; a first step that consolidates into the fast ones without forgetting, a second into the slow
ones without over-fitting. All equations and settings below are ours, made so that they do what the abstract says.

theta_f and theta_s are the weights of one encoder; g(x) are its features of unit length, and p_c the mean of g over the
rows of class c, of unit length too.

0. The first task trains by cross-entropy over scale · cos(g, w_c), then on episodes: prototypes of a few rows, and
   other rows to be told. theta_f = theta_s; the importances Omega are 0.
1. Fast. theta_f starts from theta_s and its own offset, that is, from where it was plus what the slow episodes of the
   last task added to theta_s, over 1 + eta · Omega; new classes start from their prototypes. The loss is cross-entropy
   over all classes so far, the prototypes of old ones fixed, + strength · sum of Omega (theta_f - its start)²
   + tie · ||theta_f - theta_s||². Each weight moves by its optimiser's step over 1 + eta · Omega. Then prototypes of
   the task's classes are taken under theta_f, and Omega grows by the Fisher diagonal of the task's rows: its largest
   entries cut off (`clip`), over its maximum, not below `floor`.
2. Slow. (a) theta_s moves by rho / (1 + eta · Omega) of the way to theta_f. (b) Episodes of the task's own rows in
   random views: queries, and old prototypes with normal noise, are told by scale · cos with the prototypes of the
   episode and the old ones; + distillation · ||g(x; theta_s) - g(x; theta_s before)||². Rows that were set apart tell
   whether the task is told worse than before: then all is done again with half of rho, and in the end left undone.

`model` predicts by the prototypes under theta_f. For classes that are new, `few_shot` takes prototypes under theta_s.
For features and prototypes of unit length a cosine is a squared distance but for a constant. The pull is to where a
task starts, and so a larger Omega never makes the first step larger.

Where all classes compete, those of the first task are hardly told any more after a few tasks of few rows: no importance
holds them, and such a task draws all features to its own prototypes. Importances of the first task did not mend it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.core.learner import require_labels
from engram.core.trace import State
from engram.data.augment import Augment
from engram.data.episodes import Episode, episodes
from engram.data.table import Batch, Ids, Table
from engram.data.task import Task
from engram.engine.fit import fit
from engram.engine.importance import Importance, importance
from engram.engine.losses import Mean, by_target
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.engine.teacher import frozen
from engram.errors import EngramError
from engram.keep.consolidation import Consolidation, pulled
from engram.models.head import Head
from engram.models.heads import CosineHead
from engram.models.io import pack, unpack
from engram.models.norms import batch_norms
from engram.models.output import Output
from engram.models.predictor import Predictor
from engram.stats.moments import ClassMeans


@dataclass(kw_only=True, eq=False)
class FastSlow(Consolidation):
    """Fast weights for the classes of a stream, slow ones for classes to come; a reconstruction from the abstract.

    `strength`, `tie`: what holds the fast weights, by importance and near the slow ones. `rho`: how far the slow follow
    the fast. `eta`: how much stiffer important weights are in both. `slow_episodes`, `base_episodes`: updates of the
    slow weights after each task and after the first; `ways`, `shots`: their classes, and rows of each for prototypes
    and as queries, at most half of what there is. `scale`: of cosines. `clip`: the share of importances not cut
    off; `floor`: the least, of the largest. `distillation`: what holds slow features. `halvings`: of rho, before
    a task is left out of the slow weights; None takes all, without setting rows apart. `views`: of rows in
    episodes; None for rows as they are.

    Batch statistics are frozen after the first task. A class that comes again gets the prototype of its new rows. When
    rows are dropped, the slow weights become a copy of the model, which shall have forgotten by then. EngramError for a
    network that is not an encoder with a class head, and rows without classes. Cost: that of MAS and, for each task,
    up to halvings + 1 times the slow episodes. Memory: four times the weights of the model.
    """

    strength: float = 100.0
    tie: float = 0.1
    rho: float = 0.2
    eta: float = 3.0
    distillation: float = 10.0
    epochs: int = 20
    slow_episodes: int = 10
    base_episodes: int = 100
    ways: int = 5
    shots: int = 5
    scale: float = 16.0
    clip: float = 0.9
    floor: float = 0.01
    halvings: int | None = 3
    slow_optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-4))
    views: Augment | None = field(default_factory=Augment)

    holds_head: ClassVar[bool] = False
    processes: ClassVar[str] = "one"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.slow: Predictor | None = None
        self.moved: dict[str, Tensor] = {}  # what slow episodes added to theta_s, and theta_f does not have yet
        self.spread = 0.0  # deviation of g(x) from its prototype, per coordinate

    @classmethod
    def tiny(cls) -> FastSlow:
        small = {"name": "MLP", "hidden": [32]}
        plan, slow = Optimizer(lr=1e-2), Optimizer(lr=1e-3)
        return cls(
            network=small,
            epochs=3,
            batch_size=32,
            optimizer=plan,
            slow_optimizer=slow,
            slow_episodes=3,
            base_episodes=3,
        )

    @property
    def slow_model(self) -> Predictor:
        """The predictor with the slow weights, and prototypes under them. EngramError before the first task."""
        if self.slow is None:
            raise EngramError("FastSlow has no slow weights yet; call learn(task) first")
        return self.slow

    def few_shot(self, support: Table, run: Run | None = None) -> Predictor:
        """A predictor of the classes of a few rows alone, by their prototypes under the slow weights, which stay as
        they are. Cost O(rows)."""
        model: Predictor = frozen(self.slow_model)  # type: ignore[assignment]
        model.head = CosineHead(int(model.head.width), scale=self.scale)  # type: ignore[arg-type]
        imprint(model, support.of_classes(support.classes), run or Run())
        return model

    def learn(self, task: Task, run: Run | None = None) -> None:
        """Take a task in by both steps."""
        require_labels(task)
        rows = task.train.of_classes(task.train.classes)
        super().learn(Task(rows, classes=rows.classes), run)

    def first_model(self, task: Task, run: Run) -> nn.Module:
        model = super().first_model(task, run)
        if not (isinstance(model, Predictor) and isinstance(model.head, Head)):
            raise EngramError("FastSlow wants an encoder with a class head, such as network='MLP', for its prototypes")
        model.head = CosineHead(model.head.width, scale=self.scale)
        return model

    # --- step 1

    def start(self, task: Task, run: Run) -> None:
        self.model.to(run.device)
        if self.slow is not None:
            self.slow.to(run.device)
            self._follow()
            imprint(self.model, task.train, run)
        super().start(task, run)
        self.rates = {} if self.slow is None else {**self.plasticity(), "head.weight": self._newborn(task)}
        self.near = {} if self.slow is None or not self.tie else _body(self.slow)

    @torch.no_grad()
    def _follow(self) -> None:
        """Let theta_f start from theta_s and its own offset; what mattered follows less."""
        fast, rates = _body(self.model), self.plasticity()
        for name, by in self.moved.items():
            fast[name].add_((rates.get(name, 1.0) * by).to(fast[name]))

    def plasticity(self) -> dict[str, Tensor]:
        """1 / (1 + eta Omega) of every weight that has an importance, float64: what its steps are multiplied by."""
        return {name: 1 / (1 + self.eta * omega) for name, omega in self.importances.values.items()}

    def _newborn(self, task: Task) -> Tensor:
        """1 for the head's rows of the task's classes, 0 for the others, which are prototypes: [born, 1]."""
        born = self.model.head.classes  # type: ignore[union-attr]
        return torch.isin(born, torch.tensor(task.classes).to(born)).double()[:, None]  # type: ignore[arg-type]

    def batches(self, task: Task, epoch: int, run: Run) -> Iterable[Batch]:
        if self.slow is not None:
            _steady(self.model)
        return super().batches(task, epoch, run)

    def step(self, batch: Batch, task: Task) -> Mean:
        parameters = dict(self.model.named_parameters())
        self.before = {name: parameters[name].detach().clone() for name in self.rates}
        return self.terms(batch, self.model(**batch.inputs))

    def terms(self, batch: Batch, output: Output) -> Mean:
        loss = super().terms(batch, output)
        if not self.near:
            return loss
        weight = torch.full((), self.tie, device=output.logits.device)  # type: ignore[union-attr]
        return loss + Mean.of(pulled(self.model, self.near, dict.fromkeys(self.near, weight)))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        parameters = dict(self.model.named_parameters())
        for name, old in self.before.items():
            p = parameters[name]
            p.copy_(torch.lerp(old, p, self.rates[name].to(p).expand_as(p)))

    def end(self, task: Task, run: Run) -> None:
        if self.slow is None:
            self._begin(task.train, run)
            return
        imprint(self.model, task.train, run)
        found = importance(self.model, task.train, run=run)
        self.consolidate(normalised(found, self.clip, self.floor), task.train.ids)
        self._consolidate_slow(task, run)
        imprint(self.slow, task.train, run)

    # --- step 2

    def _begin(self, rows: Table, run: Run) -> None:
        """Episodes of the first task, by the fast optimiser; both kinds of weights are one then."""
        model = self.model
        assert isinstance(model, Predictor)
        self._practise(model, rows, self.optimizer, self.base_episodes, run, "base episodes")
        imprint(model, rows, run)
        self.spread = spread(model, rows, run)
        self.slow = copy.deepcopy(model)

    def _consolidate_slow(self, task: Task, run: Run) -> None:
        """Both halves of step 2, with less and less of rho until the rows that were set apart are told no worse."""
        slow, self.moved = self.slow_model, {}
        before: Predictor = frozen(slow)  # type: ignore[assignment]
        others = self._others(task)
        judged = self.halvings is not None and self.slow_episodes > 0
        rows, apart = divided(task.train, run) if judged else (task.train, task.train)
        bar = self._loss(before, rows, apart, others, run) if judged else float("inf")
        for k in range(1 + (self.halvings or 0)):
            self.interpolate(before, self.rho / 2**k)
            middle = {name: p.detach().clone() for name, p in _body(slow).items()}
            self._practise(slow, rows, self.slow_optimizer, self.slow_episodes, run, f"slow {k}", before, others)
            if not judged or self._loss(slow, rows, apart, others, run) <= bar:
                self.moved = {name: p.detach() - middle[name] for name, p in _body(slow).items()}
                return
        self.interpolate(before, 0.0)

    @torch.no_grad()
    def interpolate(self, before: Predictor, rho: float) -> None:
        """Set the slow weights to those before, moved by rho / (1 + eta Omega) of the way to the fast ones."""
        old, fast, rates = _body(before), _body(self.model), self.plasticity()
        for name, p in _body(self.slow_model).items():
            weight = (rho * rates[name]).to(p) if name in rates else torch.full_like(p, rho)
            p.copy_(torch.lerp(old[name], fast[name], weight))

    def _others(self, task: Task) -> Tensor:
        """Prototypes under the slow weights of the classes that the task does not bring: [k, d]."""
        head = self.slow_model.head
        assert isinstance(head, CosineHead)
        there = head.live[head.classes] & ~torch.isin(head.classes, torch.tensor(task.classes).to(head.classes))
        return F.normalize(head.weight[there].detach(), dim=1)

    def _practise(
        self,
        model: Predictor,
        rows: Table,
        plan: Optimizer,
        count: int,
        run: Run,
        name: str,
        before: Predictor | None = None,
        others: Tensor | None = None,
    ) -> None:
        """Train on episodes; none leave the model as it is."""
        if not count:
            return
        others = torch.zeros(0, int(model.head.width), device=run.device) if others is None else others  # type: ignore[arg-type]
        draws = run.generator(name, "noise")
        fit(
            lambda batch: self.episode_loss(model, batch, before, others, draws),
            lambda epoch: self._episodes(rows, count, run),
            model=_steady(model.train()),
            optimizer=plan,
            epochs=1,
            run=run,
            name=name,
            steps=count,
        )
        model.eval()

    def _episodes(self, rows: Table, count: int, run: Run) -> Iterator[Batch]:
        """Episodes as batches, the support first; of a class with one row, another view of it is the query."""
        least = min(torch.as_tensor(rows.labels).unique(return_counts=True)[1].tolist())
        rows = rows if least > 1 else rows.concat(rows)
        shots = min(self.shots, max(least, 2) // 2)
        ways = min(self.ways, len(rows.classes))
        drawn = episodes(rows, ways=ways, shots=shots, queries=shots, count=count, seed=run.number("episodes"))
        return map(partial(self._viewed, draws=run.generator("views")), drawn)

    def _viewed(self, one: Episode, draws: torch.Generator) -> Batch:
        together = one.supports[0].concat(one.queries)
        batch = together.batch(torch.arange(len(together)))
        return batch if self.views is None else replace(batch, inputs=self.views(batch.inputs, draws))

    def episode_loss(
        self, model: Predictor, batch: Batch, before: Predictor | None, others: Tensor, draws: torch.Generator
    ) -> Mean:
        """Cross-entropy of the second half of a batch and of noisy old prototypes `others` [k, d] against the
        prototypes of the first half and the old ones; with `before`, its features hold those of the model."""
        assert batch.labels is not None
        u, half = _unit(model, batch), len(batch) // 2
        own = F.normalize(F.one_hot(batch.labels[:half]).to(u).T @ u[:half], dim=1)
        noise = torch.randn(others.shape, generator=draws).to(others)
        asked = torch.cat([u[half:], F.normalize(others + self.spread * noise, dim=1)])
        labels = torch.cat([batch.labels[half:], len(own) + torch.arange(len(others), device=u.device)])
        loss = by_target(self.scale * asked @ torch.cat([own, others]).T, labels)
        if before is None:
            return loss
        with torch.no_grad():
            target = _unit(before, batch)
        return loss + self.distillation * Mean.of((u - target).square().sum(1))

    def _loss(self, model: Predictor, rows: Table, apart: Table, others: Tensor, run: Run) -> float:
        """Cross-entropy of rows that were set apart, against prototypes of the others and the old ones."""
        means = _means(model, rows, run)
        prototypes = torch.cat([F.normalize(means.mean, dim=1), others.cpu().double()])
        logits = self.scale * _features(model, apart, run) @ prototypes.T
        return float(F.cross_entropy(logits, torch.searchsorted(means.classes, torch.as_tensor(apart.labels))))

    # --- traces

    def drop(self, rows: Table) -> Ids:
        """Take rows out: the slow weights become a copy of the model."""
        if self.slow is not None and self.holds(rows.ids):
            self.slow, self.moved = copy.deepcopy(self.model), {}  # type: ignore[assignment]
        return super().drop(rows)

    def refresh(self, run: Run | None = None) -> None:
        """Retire the classes from the slow predictor that the model let go of."""
        if self.slow is not None:
            live = [set(m.head.live.nonzero()[:, 0].tolist()) for m in (self.slow, self.model)]  # type: ignore[union-attr,operator]
            self.slow.head.retire(live[0] - live[1])  # type: ignore[operator]

    def extra_state(self) -> State:
        slow = None if self.slow is None else list(pack(self.slow))
        return {"slow": slow, "moved": dict(self.moved), "spread": self.spread}

    def load_extra_state(self, state: State) -> None:
        self.slow = None if state["slow"] is None else unpack(*state["slow"])  # type: ignore[assignment]
        self.moved, self.spread = dict(state["moved"]), state["spread"]


def normalised(found: Importance, clip: float, floor: float) -> Importance:
    """Importances of the encoder, those above the share `clip` of all cut off, over the largest; none below `floor`.

    A Fisher diagonal of a few rows is mostly zeros by chance, and has a few entries that dwarf all others.
    """
    found = {name: value for name, value in found.items() if not name.startswith("head.")}
    if not found:
        return found
    every = torch.cat([value.flatten() for value in found.values()])
    top = float(every.kthvalue(max(1, round(clip * len(every)))).values) or float(every.max()) or 1.0
    return {name: (value / top).clamp(floor, 1.0) for name, value in found.items()}


def divided(table: Table, run: Run) -> tuple[Table, Table]:
    """The rows, and a fifth of every class that has three or more, set apart; if no class has, all rows twice."""
    labels = torch.as_tensor(table.labels)
    apart: list[int] = []
    for c in table.classes:
        own = (labels == c).nonzero()[:, 0]
        count = max(1, len(own) // 5) if len(own) > 2 else 0
        apart += own[torch.randperm(len(own), generator=run.generator("apart", c))[:count]].tolist()
    if not apart:
        return table, table
    rest = sorted(set(range(len(table))) - set(apart))
    return table.take(rest), table.take(sorted(apart))


def imprint(model: nn.Module, table: Table, run: Run) -> None:
    """Set the head's rows of a table's classes to the means of their features, of unit length."""
    means, head = _means(model, table, run), model.head
    assert isinstance(head, CosineHead)
    head.set(means.classes, F.normalize(means.mean, dim=1))


def spread(model: nn.Module, table: Table, run: Run) -> float:
    """Root mean square, over rows and coordinates, of the distance of features of unit length from their class mean."""
    means, u = _means(model, table, run), _features(model, table, run)
    own = means.mean[torch.searchsorted(means.classes, torch.as_tensor(table.labels))]
    return float((u - own).square().mean().sqrt())


def _means(model: nn.Module, table: Table, run: Run) -> ClassMeans:
    """Means of the features of unit length of every class."""
    u = _features(model, table, run)
    means = ClassMeans(u.shape[1])
    means.add(u, torch.as_tensor(table.labels))
    return means


def _features(model: nn.Module, table: Table, run: Run) -> Tensor:
    """Features of unit length, [n, d], float64."""
    return F.normalize(predict(model, table, "pooler_output", run=run).double(), dim=1, eps=1e-12)


def _unit(model: Predictor, batch: Batch) -> Tensor:
    return F.normalize(model.features(**batch.inputs), dim=1)


def _body(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the encoder."""
    return {n: p for n, p in model.named_parameters() if n.startswith("encoder.")}


def _steady(model: nn.Module) -> nn.Module:
    """The model with its batch statistics as they are."""
    for norm in batch_norms(model):
        norm.eval()
    return model
