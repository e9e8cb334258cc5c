"""iCaRL: chosen exemplars of every class, distillation with sigmoids, and the nearest mean of exemplars.

Rebuffi, Kolesnikov, Sperl, Lampert: iCaRL: Incremental Classifier and Representation Learning. CVPR 2017, arXiv
1611.07725. phi are the features of unit length, g the sigmoid outputs.

1. The rows of a task and all exemplars are trained on together, with one sigmoid a class: labels for the
   classes that the task brings, the outputs g of the model before the task for the old ones (algorithm 3).
2. Each of C classes has room for buffer / C exemplars. Older classes keep the first of theirs (algorithm 5); a
   class of the task takes those that bring the mean of phi over the first k exemplars nearest to the mean of
   the class, one after the other (herding, algorithm 4).
3. A row belongs to the class whose mean of phi over exemplars, brought to unit length again, is nearest to its
   phi (algorithm 1): the model's head at test. The sigmoid outputs serve training alone.

The loss is summed over classes, as written in the paper; published code averages over them too. As in published
code the means of herding are not brought to unit length, no row is chosen twice, and mirrored images are not
averaged in here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.core.learner import require_labels
from engram.core.learning import GradientLearner
from engram.core.needs import Need, Needs, needs
from engram.core.trace import State
from engram.data.buffer import Buffer
from engram.data.table import Batch, Table
from engram.data.task import Task
from engram.engine.losses import Mean, binary_by_class
from engram.engine.optimizer import Optimizer
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.engine.teacher import RowCache, cached
from engram.errors import EngramError
from engram.models.head import Head
from engram.models.heads import NearestMeanHead
from engram.models.io import pack, unpack
from engram.models.output import Output
from engram.models.predictor import Predictor
from engram.stats.moments import ClassMeans

RANK = "rank"  # the buffer's column that says which of its class's exemplars a row is, counted from 0


@dataclass(kw_only=True, eq=False)
class ICaRL(GradientLearner):
    """Exemplars and the nearest of their means.

    `buffer`: K, exemplars of all classes together. The trained head is kept aside between tasks. EngramError for a
    network that is not an encoder with a class head, and for more classes than exemplars.

    Cost: as fine-tuning on rows and exemplars; O(n d K / C) to choose among the n rows of a class.
    """

    buffer: int = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kept: Buffer = self.trace("exemplars", Buffer(self.buffer, rule="fifo"))
        self.trained: Head | None = None
        self.brought: tuple[int, ...] = ()

    @classmethod
    def tiny(cls) -> ICaRL:
        small = {"name": "MLP", "hidden": [32]}
        return cls(network=small, epochs=3, batch_size=32, optimizer=Optimizer(lr=1e-2), buffer=40)

    @property
    def needs(self) -> Needs:
        return needs({Need.BOUNDARIES})

    def learn(self, task: Task, run: Run | None = None) -> None:
        """Train on the task's rows and the exemplars; choose new ones."""
        require_labels(task)
        self.brought = task.train.classes
        rows = task.train.of_classes(self.brought).concat(self.kept.table.without(task.train.ids))
        if self.trained is not None:
            self.model.head = self.trained
        super().learn(Task(rows, classes=tuple(sorted({*task.classes, *self.brought}))), run)

    def first_model(self, task: Task, run: Run) -> nn.Module:
        model = super().first_model(task, run)
        if not (isinstance(model, Predictor) and isinstance(model.head, Head)):
            raise EngramError("iCaRL wants an encoder with a class head, such as network='MLP', for its nearest means")
        return model

    def start(self, task: Task, run: Run) -> None:
        self._quota(len(_live(self.model.head)))  # before work starts
        self.old = [c for c in self.known if c not in self.brought]
        self.teacher: RowCache | None = cached(self.model, task.train, "logits", run, "teacher") if self.old else None

    def terms(self, batch: Batch, output: Output) -> Mean:
        assert batch.labels is not None and output.logits is not None
        logits = output.logits
        targets = F.one_hot(batch.labels, logits.shape[1]).float()
        if self.teacher is not None:
            targets[:, self.old] = torch.sigmoid(self.teacher(batch)[:, self.old])
        live = torch.isfinite(logits).all(0)
        return binary_by_class(logits[:, live], targets[:, live])

    def end(self, task: Task, run: Run) -> None:
        head = self.model.head
        assert isinstance(head, Head)
        self._choose(task.train, self._quota(len(_live(head))), run)
        self.trained = head
        self.refresh(run)

    def refresh(self, run: Run | None = None) -> None:
        """Set the head that predicts: the means of the exemplars, by the encoder as it is. Both heads let go of classes
        without exemplars."""
        if self.trained is None:
            return
        head = NearestMeanHead(self.trained.width, classes_total=len(self.trained.live))
        if len(self.kept):
            sums = ClassMeans(self.trained.width)
            sums.add(self._phi(self.kept.table, run), torch.as_tensor(self.kept.table.labels))
            head.set(sums.classes, F.normalize(sums.mean, dim=1, eps=1e-12))
        self.trained.retire(set(_live(self.trained)) - set(_live(head)))
        self.model.head = head.eval()

    def extra_state(self) -> State:
        return {"trained": None if self.trained is None else list(pack(self.trained))}

    def load_extra_state(self, state: State) -> None:
        trained = None if state["trained"] is None else unpack(*state["trained"])
        assert trained is None or isinstance(trained, Head)
        self.trained = trained

    def _quota(self, classes: int) -> int:
        if classes > self.buffer:
            raise EngramError(f"a buffer of size {self.buffer} cannot hold an exemplar of each of {classes} classes")
        return self.buffer // classes

    def _choose(self, rows: Table, quota: int, run: Run) -> None:
        """Let older classes go down to the quota, and choose exemplars of those that the task brought."""
        if len(self.kept):
            table = self.kept.table
            over = torch.as_tensor(table.extra[RANK]) >= quota
            self.kept.drop(table.take(over | torch.isin(torch.as_tensor(table.labels), torch.tensor(self.brought))))
        for c in self.brought:
            own = rows.of_classes([c])
            chosen = own.take(herding(self._phi(own, run), quota))
            self.kept.offer(chosen.with_column(RANK, torch.arange(len(chosen))))

    def _phi(self, table: Table, run: Run | None) -> Tensor:
        """Features of unit length, [n, d], float64."""
        return F.normalize(predict(self.model, table, "pooler_output", run=run).double(), dim=1, eps=1e-12)


def herding(features: Tensor, count: int) -> Tensor:
    """Up to `count` row numbers of features [n, d] in the order of choice.

    The k-th is the row with which the mean of the first k is nearest to the mean of all. O(count n d).
    """
    goal, total = features.mean(0), torch.zeros_like(features[0])
    free = torch.ones(len(features), dtype=torch.bool, device=features.device)
    chosen: list[int] = []
    for k in range(1, min(count, len(features)) + 1):
        distances = ((total + features) / k - goal).norm(dim=1)
        chosen.append(int(distances.masked_fill(~free, torch.inf).argmin()))
        free[chosen[-1]] = False
        total = total + features[chosen[-1]]
    return torch.tensor(chosen, dtype=torch.long)


def _live(head: object) -> list[int]:
    """The classes that a head can tell."""
    assert isinstance(head, Head)
    return head.live.nonzero()[:, 0].tolist()
