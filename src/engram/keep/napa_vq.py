"""NAPA-VQ: classes are coding vectors, and a graph of which of them are neighbours says what to push apart.

Malepathirana, Senanayake, Halgamuge: NAPA-VQ: Neighborhood Aware Prototype Augmentation with Vector Quantization for
Continual Learning. ICCV 2023, arXiv 2308.09297.

phi are the features of a row, v_j the coding vectors, D_j = ||phi - v_j||, mu_c the stored mean of phi over class c,
and E the graph: E[i, j] > 0 makes i and j neighbours. The loss of a batch of rows of classes y is the sum of

1. the cross-entropy of softmax(-D / temperature) over all coding vectors so far;
2. NA-VQ: max(0, D_y² - sum over neighbours j of y of w_j D_j²), w proportional to exp(-sharpness D_j²), constants for
   the gradient: a row shall be nearer to its own coding vector than to those that compete for it;
3. NA-PA, from the second task on: for old classes i, drawn at random, p = g mu_i + (1 - g) mu_j with a random
   neighbour j (i itself among them) and g uniform in [own, 1] stands in for a row of i; 1 with its weight, and 2;
4. distillation of features: the norm of phi - phi' over the whole batch, neither squared nor averaged, phi' those of
   the model as it is when the task comes.

The graph grows as a neural gas: a row makes its nearest coding vector and the k nearest ones neighbours; edges of the
nearest to all others fade by 0.9, and are cut when they were missed 11 times in a row. It is brought up to date with
each batch before term 2 is computed, and made symmetric then. As published code has it, a batch counts at once: for
each pair, the misses are the rows that i won less those that had j among their k nearest.

Coding vectors of old classes do not move, and p are constants; so term 3 moves coding vectors of new classes alone,
away from where old ones lie. Rows are judged by the nearest coding vector after both were brought to unit length,
which they are not in training; that is the published asymmetry.

Constants other than k = 15 are those of published code. It takes means over augmented rows in whole batches alone; here
all rows count, as they are. Whether it updates the graph before the loss or after could not be told from the paper.
Published images are flipped and cropped at random too; here they are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from engram.core.learning import GradientLearner
from engram.core.needs import Need, Needs, needs
from engram.core.trace import Derived
from engram.data.table import Batch, Table
from engram.data.task import Task
from engram.engine.losses import Mean, by_target
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.engine.teacher import RowCache
from engram.errors import EngramError
from engram.models.coding import CodingHead
from engram.models.head import Head
from engram.models.predictor import Predictor

FADE = 0.9
FAINT = FADE**10.5  # cut below: after 10 misses in a row an edge is above, after 11 below, whatever is rounded
ENCODER = Optimizer(lr=1e-3, weight_decay=2e-4, schedule="steps", milestones=(0.45, 0.9))
CODING = Optimizer("sgd", lr=0.5, momentum=0.0, schedule="steps", milestones=(0.2, 0.4, 0.6, 0.8))
Drawn = tuple[Batch, torch.Generator]


@dataclass(kw_only=True, eq=False)
class NAPAVQ(GradientLearner):
    """Coding vectors, their graph, and pseudo-features between the means of neighbours.

    `optimizer`: of the encoder, `coding`: of the coding vectors, both times `later` after the first task; each may clip
    its own gradient. `neighbours`: k. Weights: `repulsion` (NA-VQ), `augmentation` (the cross-entropy of
    pseudo-features), `feature` (distillation; it goes with the square root of the batch size). `pseudo`: how many
    pseudo-features a batch has; `own`: the least share of a class's own mean in them, 1 leaves neighbours out.
    `sharpness`: of the weights of neighbours. `rotate`: square images are learnt in four rotations, each of which has a
    coding vector of its own; it is published so for photographs, and costs four times as much.

    Published for a ResNet-18 with 512 features: 100 epochs, rotations, and 5 as the rate of coding vectors, ten times
    the default here, which is made for small networks: with more, they swing about the features and never settle. They
    start far from all features, and want some hundred updates a task to arrive.

    A class of which a task brings rows is not old, even if it was known. Means and the graph are a trace: rows leave
    residue in them; classes that were retired leave them wholly. Losses are of whole batches, so it works in one
    process. EngramError for a network that is not an encoder with a class head, which is replaced.

    Cost: as fine-tuning, with O(B C d) for distances; memory O(C d + C²), and while a task is learnt the features of
    its rows.
    """

    growth: ClassVar[str] = "per class pair"
    processes: ClassVar[str] = "one"

    optimizer: Optimizer = field(default=ENCODER)
    coding: Optimizer = field(default=CODING)
    later: float = 0.1
    neighbours: int = 15
    temperature: float = 0.1
    sharpness: float = 1e-3
    repulsion: float = 1.0
    augmentation: float = 10.0
    feature: float = 10.0
    pseudo: int = 64
    own: float = 0.5
    rotate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.neighbours, self.pseudo) < 1:
            raise EngramError(f"neighbours={self.neighbours} and pseudo={self.pseudo} have to be 1 or more")
        if not 0 <= self.own <= 1 or self.temperature <= 0:
            raise EngramError(f"own={self.own} has to be in [0, 1], and temperature={self.temperature} above 0")
        self.memory: Derived = self.trace("memory", Derived())

    @classmethod
    def tiny(cls) -> NAPAVQ:
        small = {"name": "MLP", "hidden": [32]}
        return cls(
            network=small, epochs=3, batch_size=32, optimizer=Optimizer(lr=1e-2), neighbours=3, pseudo=16, rotate=True
        )

    @property
    def needs(self) -> Needs:
        return needs({Need.BOUNDARIES})

    @property
    def views(self) -> int:
        """Coding vectors a class: four with rotations."""
        return 4 if self.rotate else 1

    @property
    def head(self) -> CodingHead:
        """The coding vectors. EngramError where a forgetter put another head in their place."""
        head = getattr(self.model, "head", None)
        if not isinstance(head, CodingHead):
            raise EngramError("NAPAVQ goes on from a model with its coding vectors, and this one has other outputs")
        return head

    @property
    def graph(self) -> Tensor:
        """E, [n, n] over coding vectors: those of a class one after the other, classes in order of birth."""
        return self.memory.values["graph"]

    @property
    def means(self) -> Tensor:
        """mu, [n, d]; zeros for what was never learnt."""
        return self.memory.values["means"]

    def learn(self, task: Task, run: Run | None = None) -> None:
        """Train on the task's labelled rows."""
        rows = task.train.of_classes(task.train.classes)
        if self.rotate:
            _square(rows)
        super().learn(Task(rows, index=task.index, classes=task.classes), run)

    def first_model(self, task: Task, run: Run) -> nn.Module:
        model = super().first_model(task, run)
        if not (isinstance(model, Predictor) and isinstance(model.head, Head)):
            raise EngramError("NAPAVQ wants an encoder with a class head, such as network='MLP', for its features")
        model.head = CodingHead(model.head.width, views=self.views, temperature=self.temperature)
        return model

    def start(self, task: Task, run: Run) -> None:
        brought = task.train.classes
        self._make_room(self.known)
        self.live = self._columns(self.head.live.nonzero()[:, 0].tolist())
        self.old = self._columns([c for c in self.known if c not in brought]) & self._has_mean()
        self.taught = self._teacher(task.train, run) if self.known else None
        if self.taught is not None:
            self._take_means(self.taught.values, task.train)
        self.held = self.head.weight.detach().clone().to(run.device)
        self._place = torch.full((len(self.head.live),), -1)
        self._place[self.head.classes.cpu()] = torch.arange(len(self.head.classes))

    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        factor = self.later if self.known else 1.0
        encoder = list(self.model.encoder.parameters())  # type: ignore[union-attr]
        groups = [(self.optimizer.scaled(factor), encoder), (self.coding.scaled(factor), [self.head.weight])]
        self.together = Together(groups)
        return {"": self.together}

    def changing(self) -> Mapping[str, Any]:
        return {"memory": self.memory}

    def batches(self, task: Task, epoch: int, run: Run) -> Iterable[Drawn]:
        self.together.set_rates(epoch / self.epochs)
        draws = run.generator("pseudo-features", epoch)
        return ((batch, draws) for batch in task.train.batches(self.batch_size, seed=run.number("order"), epoch=epoch))

    def step(self, drawn: Drawn, task: Task) -> Mean:
        batch, draws = drawn
        phi = self.model.features(**_all_rotations(batch.inputs, self.views))  # type: ignore[operator]
        cross, apart = self.classify(phi, self.labels(batch))
        loss = cross + self.repulsion * apart
        if self.taught is not None:
            loss = loss + self.feature * drift(phi, self.taught(batch).transpose(0, 1).flatten(0, 1))
        return loss + self.replay(draws) if bool(self.old.any()) else loss

    def labels(self, batch: Batch) -> Tensor:
        """The coding vector of every row and rotation, [views * B], a rotation of all rows after the other."""
        assert batch.labels is not None
        first = self._place.to(batch.labels.device)[batch.labels] * self.views
        return torch.cat([first + k for k in range(self.views)])

    def classify(self, phi: Tensor, labels: Tensor) -> tuple[Mean, Mean]:
        """Terms 1 and 2 for features [B, d] of these coding vectors [B]; the graph is brought up to date."""
        distances = self.distances(phi)
        graph = updated(self.graph.to(phi.device), distances.detach(), self.neighbours)
        self.memory.values["graph"] = graph
        return (
            by_target(-distances / self.temperature, labels),
            Mean.of(overlap(distances.square(), labels, graph, self.sharpness)),
        )

    def distances(self, phi: Tensor) -> Tensor:
        """D [B, n]; infinite to coding vectors that are not live. Those of old classes get no gradient."""
        weight = self.head.weight.flatten(0, 1)
        vectors = torch.where(self.old.to(weight.device)[:, None], weight.detach(), weight)
        found = torch.cdist(phi.float(), vectors, compute_mode="donot_use_mm_for_euclid_dist")
        return found.masked_fill(~self.live.to(phi.device), torch.inf)

    def replay(self, draws: torch.Generator) -> Mean:
        """Term 3."""
        p, labels = self.pseudo_features(draws)
        weight = self.head.weight
        cross, apart = self.classify(p.to(weight), labels.to(weight.device))
        return self.augmentation * cross + self.repulsion * apart

    def pseudo_features(self, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """NA-PA: p [m, d] and the coding vectors [m] of their classes, all not rotated."""
        firsts = self.old.clone()
        firsts.view(-1, self.views)[:, 1:] = False
        choices = firsts.nonzero()[:, 0]
        i = choices[torch.randint(len(choices), (self.pseudo,), generator=draws)]
        near = (self.graph.cpu()[i] > 0) & self._has_mean()
        j = torch.multinomial(near.double(), 1, generator=draws)[:, 0]
        g = self.own + (1 - self.own) * torch.rand(self.pseudo, 1, generator=draws, dtype=torch.float64)
        means = self.means.cpu()
        return means[i] + (1 - g) * (means[j] - means[i]), i

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Coding vectors of old classes stay, bit by bit, whatever momentum or weight decay did to them."""
        fixed = self.old.to(self.held.device)
        self.head.weight.flatten(0, 1)[fixed] = self.held.flatten(0, 1)[fixed]

    def end(self, task: Task, run: Run) -> None:
        self._take_means(self._features(task.train, run), task.train)
        self.memory.add(task.train.ids)

    def refresh(self, run: Run | None = None) -> None:
        """Let go of the means and edges of classes that the model no longer tells."""
        if self.started:
            self._make_room(self.head.live.nonzero()[:, 0].tolist())

    def _teacher(self, rows: Table, run: Run) -> RowCache:
        return RowCache(run.phase("teacher", lambda: self._features(rows, run)))

    def _features(self, rows: Table, run: Run) -> Tensor:
        """phi of all rotations, [n, views, d]."""
        turned = (replace(rows, inputs=_rotated(rows.inputs, k)) for k in range(self.views))
        return torch.stack([predict(self.model, table, "pooler_output", run=run).flatten(1) for table in turned], 1)

    def _take_means(self, phi: Tensor, rows: Table) -> None:
        """Means of the rows' classes, from their features [n, views, d]."""
        assert rows.labels is not None
        for place, c in zip(self.head.columns(rows.classes).tolist(), rows.classes, strict=True):
            own = phi[rows.labels == c].double().mean(0)
            self.means[place * self.views : (place + 1) * self.views] = own.to(self.means)

    def _make_room(self, keep: Sequence[int]) -> None:
        """Graph and means for all coding vectors there are; afresh but for those of the classes to keep."""
        n = self.head.weight.shape[:2].numel()
        graph, means = torch.eye(n, dtype=torch.float64), torch.zeros(n, self.head.width, dtype=torch.float64)
        if self.memory.values:
            kept = self._columns(keep)[: len(self.graph)].nonzero()[:, 0]
            graph[kept[:, None], kept] = self.graph.cpu()[kept[:, None], kept]
            means[kept] = self.means.cpu()[kept]
        self.memory.values = {"graph": graph, "means": means}

    def _columns(self, classes: Sequence[int]) -> Tensor:
        """Mask [n] of the coding vectors of classes."""
        found = torch.isin(self.head.classes.cpu(), torch.tensor(classes, dtype=torch.long))
        return found.repeat_interleave(self.views)

    def _has_mean(self) -> Tensor:
        """Mask [n] of the coding vectors of whose classes rows were seen."""
        return (self.means.cpu() != 0).any(1)


class Together(torch.optim.Optimizer):
    """Optimisers that step as one: each has its own plan, and clips the gradient of its own parameters alone."""

    def __init__(self, groups: Sequence[tuple[Optimizer, Sequence[nn.Parameter]]]) -> None:
        filled = [(plan, params) for plan, params in groups if any(p.requires_grad for p in params)]
        super().__init__([p for _, params in filled for p in params], {})
        self.plans = [plan for plan, _ in filled]
        self.parts = [plan.build(params) for plan, params in filled]

    def set_rates(self, progress: float) -> None:
        """Put the learning rates of a share of the training into effect."""
        for plan, part in zip(self.plans, self.parts, strict=True):
            plan.set_rate(part, progress)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for plan, part in zip(self.plans, self.parts, strict=True):
            if plan.clip is not None:
                nn.utils.clip_grad_norm_([p for group in part.param_groups for p in group["params"]], plan.clip)
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)


def updated(graph: Tensor, distances: Tensor, k: int) -> Tensor:
    """The graph E [n, n] after a batch whose rows have these distances [B, n], symmetric; infinite ones do not count.

    O(B n log n + n²).
    """
    new = refreshed(graph, distances, k)
    return (new + new.T) / 2


def refreshed(graph: Tensor, distances: Tensor, k: int) -> Tensor:
    """Each row of E [n, n] as the batch's rows that it won leave it: edges to their k nearest are 1, others fade."""
    n = len(graph)
    reach = distances.topk(min(k, n), largest=False)
    winner = reach.indices[:, :1].expand_as(reach.indices)
    counts = reach.values.isfinite().to(graph)
    hits = torch.zeros_like(graph).index_put_((winner, reach.indices), counts, accumulate=True)
    misses = torch.bincount(winner[:, 0], minlength=n).to(graph)[:, None] - hits
    new = torch.where(hits > 0, 1.0, graph) * FADE**misses
    return torch.where(new < FAINT, 0.0, new)


def overlap(squares: Tensor, labels: Tensor, graph: Tensor, sharpness: float) -> Tensor:
    """NA-VQ for every row [B]: D² [B, n] to all coding vectors, the row's own one [B], the graph [n, n]."""
    near = graph[labels] > 0
    near.scatter_(1, labels[:, None], False)
    nearness = (-sharpness * squares.detach()).masked_fill(~near, -torch.inf)
    weights = torch.softmax(nearness, 1).nan_to_num(0.0)  # nothing is near: all of them 0
    others = (weights * squares.masked_fill(~near, 0.0)).sum(1)
    return torch.relu(squares.gather(1, labels[:, None])[:, 0] - others)


def drift(phi: Tensor, before: Tensor) -> Mean:
    """The norm of phi - before over the whole batch, [B, d] each."""
    return Mean.of(torch.linalg.vector_norm(phi - before))


def _rotated(inputs: Mapping[str, Tensor], quarters: int) -> dict[str, Tensor]:
    """The inputs with their images turned by so many quarters."""
    return {k: v.rot90(quarters, (-2, -1)) if k == "pixel_values" else v for k, v in inputs.items()}


def _all_rotations(inputs: Mapping[str, Tensor], views: int) -> dict[str, Tensor]:
    """The inputs in each rotation, one after the other: [views * B, …]."""
    turned = [_rotated(inputs, k) for k in range(views)]
    return {name: torch.cat([one[name] for one in turned]) for name in inputs}


def _square(rows: Table) -> None:
    shape = rows.shapes.get("pixel_values", (0,))
    if len(shape) < 2 or shape[-1] != shape[-2]:
        raise EngramError("rotate=True wants square images in pixel_values; leave it out for other rows")
