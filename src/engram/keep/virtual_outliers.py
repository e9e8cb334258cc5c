"""Virtual outliers: after each task the head learns where the task's own rows end.

Huang, Chen, Hsu: OVOR: OnePrompt with Virtual Outlier Regularization for Rehearsal-Free Class-Incremental Learning.
ICLR 2024, arXiv 2402.04129 (section 3.1); outliers as in Tao et al. 2023, arXiv 2303.02966.

Heads that are trained task by task give logits that cannot be compared between tasks. So after a host method has learnt
a task, the head alone is trained on with the features z of the task's rows and with made-up points around them:

1. The distance of a point from the task is that to its K-th nearest among the features, all brought to unit length.
2. The `select` rows that are farthest from the rest stand at the border. Each, plus sigma times each of `offsets`
   standard normal vectors, gives candidates; those farthest from the task are kept, `per_class` for each of its
   classes. They are drawn anew in every epoch.
3. With the energy E(z) = -logsumexp of the logits of the task's classes, the loss is the cross-entropy over these
   columns + weight * (mean over rows z of huber(relu(E(z) - tau_in)) + mean over outliers v of huber(relu(tau_out -
   E(v)))).

Published code finds the points at the border and then leaves them out: its outliers are sigma times noise around the
origin (`center` "origin"), and compared without being brought to unit length. It goes on with the host's optimiser and
schedule; here the phase has its own, which falls from about where that schedule stands when the phase begins.

The limits `tau_in` and `tau_out` belong to features as long as those of a large vision transformer: with features of
length 1 no linear head reaches an energy of -15.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.core.learner import Forgetful, Learner, require_labels
from engram.core.needs import Need, Needs
from engram.core.request import Request
from engram.core.settings import make, name_of
from engram.core.trace import Seen, State
from engram.data.table import Batch, Ids, Table, Target
from engram.data.task import Task
from engram.engine.fit import fit
from engram.engine.losses import Mean, by_target
from engram.engine.optimizer import Optimizer
from engram.engine.predict import features
from engram.engine.run import Run
from engram.errors import EngramError, unknown
from engram.models.heads import LinearHead, ValueHead
from engram.models.split import split
from engram.stats.knn import nearest
from engram.stats.scores import energy, restricted

PHASE = "phase of the head"
COUNTS = ("neighbours", "select", "offsets", "per_class")
CENTERS = ("boundary", "origin")
LOSSES: dict[str, Callable[..., Tensor]] = {"huber": F.huber_loss, "mse": F.mse_loss}


@dataclass(kw_only=True, eq=False)
class VirtualOutliers(Learner):
    """A host method, and after each of its tasks a short training of its linear head.

    `host`: a learner by name or {"name": …, setting: value}, whose model ends in a linear head; model, traces, state
    and forgetting are the host's. `weight`: lambda. `tau_in`, `tau_out`: the energies below and above which rows and
    outliers cost nothing. `neighbours` (K), `select`, `offsets` (S), `per_class`, `sigma`, `center`: see above; a task
    of fewer rows takes as many as it has. `loss`: "huber", or "mse".

    The rows of each phase are a trace: a forgotten one leaves residue in the head, unless the host makes its model
    anew.

    EngramError for a host without a linear head, for rows without class labels, and an unknown `center` or `loss`.

    Cost of a task of n rows: a forward pass; in each epoch O(select offsets n d) for neighbours, and the head's own
    training on n rows and per_class outliers a class. Memory between tasks: the host's.
    """

    host: Any = field(default_factory=lambda: {"name": "keep.OnePrompt", "epochs": 16})
    weight: float = 0.1
    tau_in: float = -15.0
    tau_out: float = -3.0
    neighbours: int = 50
    select: int = 50
    offsets: int = 600
    per_class: int = 40
    sigma: float = 0.1
    center: str = "boundary"
    loss: str = "huber"
    epochs: int = 4
    batch_size: int = 128
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=2.5e-4, schedule="cosine"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.center not in CENTERS:
            raise unknown("center of outliers", self.center, CENTERS)
        if self.loss not in LOSSES:
            raise unknown("loss of energies", self.loss, LOSSES)
        small = [name for name in COUNTS if getattr(self, name) < 1]
        if small:
            raise EngramError(f"{small[0]} is {getattr(self, small[0])}; outliers need 1 or more")
        self.inner: Learner = make(self.host, wing="keep")
        self.tuned: Seen = self.trace(PHASE, Seen())
        self.traces.update(self.inner.traces)
        if isinstance(self.inner, Forgetful):
            self.forget = self._forget  # this learner can forget by itself exactly if the host can

    @classmethod
    def tiny(cls) -> VirtualOutliers:
        host = {"name": "keep.Finetune", "network": {"name": "MLP", "hidden": [16]}, "epochs": 2, "batch_size": 32}
        return cls(host=host, select=5, offsets=10, neighbours=5, per_class=4, epochs=2, batch_size=16)

    @property
    def needs(self) -> Needs:
        return tuple(alternative | {Need.BOUNDARIES} for alternative in self.inner.needs)

    @property
    def model(self) -> nn.Module:
        """The host's model."""
        return self.inner.model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self.inner.model = model

    @property
    def started(self) -> bool:
        return self.inner.started

    def learn(self, task: Task, run: Run | None = None) -> None:
        """The host's learning, then the head's phase."""
        if task.train.target != Target.CLASSES:
            raise EngramError(
                f"outliers are drawn around rows with class labels; the target here is {task.train.target}"
            )
        require_labels(task)
        run = run or Run()
        self.inner.learn(task, run)
        with run.scope("virtual outliers"):
            self.tune(task.train, run)

    def refresh(self, run: Run | None = None) -> None:
        self.inner.refresh(run)

    def tune(self, table: Table, run: Run) -> None:
        """Train the head alone on the features of these rows and on outliers."""
        head = _linear_head(self.inner)
        z = features(self.model, table, run=run)
        rows = Table({"values": z}, table.labels, table.ids)
        columns = torch.tensor(table.classes)

        def step(batches: tuple[Batch, Batch]) -> Mean:
            own, outliers = batches
            return self.terms(head(own.inputs["values"]), own.labels, head(outliers.inputs["values"]), columns)

        fit(
            step,
            lambda epoch: self._batches(rows, epoch, run),
            model=head.train(),
            optimizer=self.optimizer,
            epochs=self.epochs,
            run=run,
            steps=-(-len(rows) // self.batch_size),
        )
        head.eval()
        self.tuned.add(table.ids if self.epochs else ())

    def terms(self, logits: Tensor, labels: Tensor | None, outliers: Tensor, columns: Tensor) -> Mean:
        """The loss of rows, given their logits [B, W] and those of outliers [V, W]."""
        assert labels is not None
        loss = by_target(restricted(logits, columns), labels)
        if not self.weight:
            return loss
        return loss + self.weight * self.regulariser(energy(logits, columns), energy(outliers, columns))

    def regulariser(self, own: Tensor, outliers: Tensor) -> Mean:
        """What energies of rows [B] above `tau_in`, and of outliers [V] below `tau_out`, cost."""
        excess, lack = (own - self.tau_in).relu(), (self.tau_out - outliers).relu()
        return self._cost(excess) + self._cost(lack)

    def draw(self, z: Tensor, classes: int, generator: torch.Generator) -> Tensor:
        """Outliers [per_class * classes, d] of features z [n, d], or all candidates, if they are fewer."""
        noise = self.sigma * torch.randn(self.offsets, z.shape[1], generator=generator).to(z)
        distances = distance(z, z, self.neighbours)
        border = z[distances.topk(min(self.select, len(z))).indices]
        centers = torch.zeros_like(border) if self.center == "origin" else border
        candidates = (centers[:, None] + noise).flatten(0, 1)
        far = distance(candidates, z, self.neighbours)
        return candidates[far.topk(min(self.per_class * classes, len(far))).indices]

    def _batches(self, rows: Table, epoch: int, run: Run) -> Iterator[tuple[Batch, Batch]]:
        """Batches of rows, each with an equal part of the epoch's outliers; of both, this process's share."""
        z = rows.inputs["values"]
        drawn = z[:0]
        if self.weight:
            drawn = self.draw(z.to(run.device), len(rows.classes), run.generator("outliers", epoch)).cpu()
        outliers, parts = Table({"values": drawn}), -(-len(rows) // self.batch_size)
        rank, world = run.shard
        own = rows.batches(self.batch_size, seed=run.number("order"), epoch=epoch, shard=run.shard)
        for batch, part in zip(own, torch.arange(len(drawn)).tensor_split(parts), strict=True):
            yield batch, outliers.batch(part[rank::world])

    def _cost(self, excess: Tensor) -> Mean:
        return Mean.of(LOSSES[self.loss](excess, torch.zeros_like(excess), reduction="none"))

    # --- what is the host's

    def drop(self, rows: Table) -> Ids:
        left = {*self.inner.drop(rows), *self.tuned.drop(rows)}
        return tuple(id for id in rows.ids if id in left)

    def _forget(self, request: Request, run: Run | None = None) -> Ids:
        """The host's forgetting. The head's phase leaves residue, unless the host is exact and makes its head anew."""
        assert isinstance(self.inner, Forgetful)
        residue = self.inner.forget(request, run)
        tuned = self.tuned.holds(request.ids)
        self.tuned.ids.difference_update(tuned)
        return tuple(dict.fromkeys((*residue, *(() if self.inner.exact else tuned))))

    def state_dict(self) -> State:
        return {**self.inner.state_dict(), "traces": {name: part.state_dict() for name, part in self.traces.items()}}

    def load_state_dict(self, state: State) -> None:
        own = {name: part for name, part in state["traces"].items() if name in self.inner.traces}
        self.inner.load_state_dict({**state, "traces": own})
        self.tuned.load_state_dict(state["traces"][PHASE])


def distance(points: Tensor, z: Tensor, k: int) -> Tensor:
    """How far points [m, d] are from the k-th nearest of the features z [n, d], all brought to unit length: [m]. A
    point of z is its own first neighbour. O(m n d)."""
    likeness, _ = nearest(points, z, min(k, len(z)))
    return (2 - 2 * likeness[:, -1]).clamp(min=0).sqrt()


def _linear_head(host: Learner) -> nn.Module:
    head = split(host.model).head
    linear = isinstance(head, LinearHead | nn.Linear) and not isinstance(head, ValueHead)
    if not (linear and any(p.requires_grad for p in head.parameters())):
        raise EngramError(
            f"virtual outliers train a linear head of classes, and the model of {name_of(host)} ends in a "
            f"{type(head).__name__} that is not trained so; take a host such as OnePrompt, L2P, LwF or Finetune"
        )
    return head
