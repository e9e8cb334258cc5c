"""ProtoNet: an encoder that was trained on episodes, and one prototype a class, compared by cosine.

Snell, Swersky, Zemel: Prototypical Networks for Few-shot Learning. NeurIPS 2017, arXiv 1703.05175; here in the form
that Kowadlo, Ahmed, Mayan, Rawlinson (PLOS ONE 2024, arXiv 2209.07863) measure as a continual few-shot learner.

1. The first task trains the encoder f on episodes: a few of its classes, a few rows of each as support, others to be
   told. The prototype p_c is the mean of f over the support of class c; the loss is cross-entropy of a softmax over
   scale · cos(f(x), p_c).
2. After that the encoder stays as it is. Every class has one prototype, the mean of f over all rows that came of it,
   and a row belongs to the class with the largest cosine.

So the order of later tasks does not matter, and nothing is forgotten unasked. Prototypes are kept as sums: a row of a
later task leaves by subtraction. A row of the first task leaves its prototype, and stays in the encoder: it is residue.

The published code has no scale (1); batch statistics enter its predictions, and here they never do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.core.frozen import SummedRows
from engram.core.learner import require_labels
from engram.core.learning import GradientLearner
from engram.core.needs import Need, Needs, needs
from engram.core.request import Request
from engram.core.trace import State
from engram.data.episodes import Episode, episodes, feasible
from engram.data.table import Batch, Ids, Table
from engram.data.task import Task
from engram.engine.losses import Mean, by_target
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.head import Head
from engram.models.heads import NearestMeanHead
from engram.models.predictor import Predictor
from engram.stats.moments import ClassMeans

SUPPORT = "support"  # the column that says which rows of an episode make the prototypes


@dataclass(kw_only=True, eq=False)
class ProtoNet(GradientLearner):
    """Episodes on the first task; from then on a mean of features for every class.

    `ways`, `shots`, `queries`: classes of a training episode, and rows of each that make the prototype and that are
    told; fewer where the task has fewer. An epoch has as many episodes as it would have batches. `scale`: of the
    cosine in training. The model's logits are the cosine less 1/2. EngramError for a network that is not an encoder
    with a class head. Cost: epochs · ⌈n / batch_size⌉ episodes; later O(1) forward passes per row. Memory C · (d + 1).
    """

    ways: int = 5
    shots: int = 1
    queries: int = 5
    scale: float = 10.0

    processes: ClassVar[str] = "one"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.means: SummedRows = self.trace("means", SummedRows(ClassMeans, self._encode))

    @classmethod
    def tiny(cls) -> ProtoNet:
        return cls(network={"name": "MLP", "hidden": [32]}, epochs=3, batch_size=16, queries=3)

    @property
    def needs(self) -> Needs:
        return needs({Need.BOUNDARIES})

    def learn(self, task: Task, run: Run | None = None) -> None:
        """Train the encoder if this is the first task; take the rows into the prototypes."""
        require_labels(task)
        run = run or Run()
        if not self.started:
            super().learn(task, run)
            self.model.requires_grad_(False)
        self.means.add(task.train.of_classes(task.train.classes))
        self.refresh(run)

    def first_model(self, task: Task, run: Run) -> nn.Module:
        model = super().first_model(task, run)
        if not (isinstance(model, Predictor) and isinstance(model.head, Head)):
            raise EngramError("ProtoNet wants an encoder with a class head, such as network='MLP', for its prototypes")
        model.head = NearestMeanHead(model.head.width)
        return model

    def batches(self, task: Task, epoch: int, run: Run) -> Iterable[Batch]:
        ways, shots, queries = feasible(task.train, self.ways, self.shots, self.queries)
        if not ways:
            return ()
        sizes: dict[str, Any] = {"ways": ways, "shots": shots, "queries": queries}
        count = -(-len(task.train) // self.batch_size)
        return map(_batch, episodes(task.train, count=count, seed=run.number("episodes", epoch), **sizes))

    def terms(self, batch: Batch, output: Any) -> Mean:
        assert batch.labels is not None
        support = batch.extra[SUPPORT].to(batch.labels.device)
        logits = self.scale * cosines(output.pooler_output, batch.labels, support)
        return by_target(logits, batch.labels[~support])

    def refresh(self, run: Run | None = None) -> None:
        """Set the prototypes from the sums; a class without rows goes."""
        if not self.started or self.means.sums is None:
            return
        head, sums = self.model.head, self.means.sums
        assert isinstance(head, NearestMeanHead)
        head.retire(set(head.classes.tolist()) - set(sums.classes.tolist()))
        head.set(sums.classes, F.normalize(sums.mean, dim=1, eps=1e-12))

    def forget(self, request: Request, run: Run | None = None) -> Ids:
        """Take the request's rows out of the prototypes; the residue is the rows that the encoder was trained on.

        EngramError, and nothing changed, if the forget rows are not at hand or one of them was never learnt.
        """
        if request.forget is None:
            raise EngramError("ProtoNet forgets by subtracting rows, and the forget rows are not at hand")
        stranger = set(request.forget.ids) - set(self.holds(request.forget.ids))
        if stranger:
            raise EngramError(f"the record {min(stranger)!r} was never learnt, or is forgotten already; leave it out")
        residue = self.drop(request.forget)
        self.refresh(run)
        return residue

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        if self.started:
            self.model.requires_grad_(False)

    def _encode(self, table: Table) -> tuple[Tensor, Tensor]:
        assert table.labels is not None
        encoder = self.model.encoder
        assert isinstance(encoder, nn.Module)
        return predict(encoder, table, "pooler_output").flatten(1).double(), table.labels


def cosines(features: Tensor, labels: Tensor, support: Tensor) -> Tensor:
    """Cosine [q, C] of the other rows' features with the means over support rows of each class 0..C-1.

    features [B, d], labels [B], support [B] bool; every class has a support row.
    """
    own = F.one_hot(labels[support]).to(features)
    prototypes = own.T @ features[support] / own.sum(0)[:, None]
    return F.normalize(features[~support], dim=1) @ F.normalize(prototypes, dim=1).T


def _batch(episode: Episode) -> Batch:
    """An episode of one support set as a batch, with local labels."""
    (support,) = episode.supports
    rows = Table(support.inputs, support.labels).concat(Table(episode.queries.inputs, episode.queries.labels))
    numbers = torch.arange(len(rows))
    return rows.with_column(SUPPORT, numbers < len(support)).batch(numbers)
