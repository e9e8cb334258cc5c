"""BCT: train a new embedding so that its vectors can be searched for among those that the old one has stored.

Shen, Xiong, Xia, Soatto: Towards Backward-Compatible Representation Learning. CVPR 2020, arXiv 2003.11942. The baseline
of BT² (arXiv 2211.03989), in the form in which that paper compares with it.

z(x) = the new embedding at unit length, phi_o(x) = the old model's, M = a classifier without bias whose row of a class
is the mean of phi_o over the task's rows of that class, not brought to unit length again, and frozen. The loss is

    cross-entropy of W z + pseudo * cross-entropy of M z.

The old model's own rows are not needed: M says on the new rows where the old space has each class. Published BCT takes
the old classifier's rows for classes that this one knew; BT²'s code and this one take the means for all of them.

`extra` > 0 is BCT(+k): z has so many numbers more, and M zeros there, so that these are free. The first task has no old
model, and trains one: an independent model, the upper bound of quality and the lower one of compatibility, is nothing
but a fresh learner. Images are not augmented, and labels are not smoothed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engram.core.learning import GradientLearner
from engram.core.needs import Need, Needs, needs
from engram.core.trace import State
from engram.data.table import Batch, Target
from engram.data.task import Task
from engram.engine.losses import Mean, by_target
from engram.engine.optimizer import Optimizer
from engram.engine.predict import features
from engram.engine.run import Run
from engram.engine.teacher import RowCache, frozen
from engram.errors import EngramError
from engram.models.compatible import Embedding
from engram.models.frozen import frozen_encoder
from engram.models.heads import LinearHead
from engram.models.io import load
from engram.models.predictor import Predictor
from engram.stats.moments import ClassMeans


@dataclass(kw_only=True, eq=False)
class BCT(GradientLearner):
    """Every task is an upgrade: a new network is trained on the task's rows, compatible with the model before it.

    `network` learns the first task, `upgrades` the further ones, the last of them all that are left; none: the same
    network each time, untrained. They need have nothing in common. `old`: a trained model (a directory or a module)
    whose vectors are stored, so that the first task is an upgrade already. `dim`: width of the first embedding; an
    upgrade has that of the old one, and `extra` more. `pseudo`: weight of the old space's classifier, 0 is an
    independent model.

    The model's `pooler_output` is the embedding; the head knows the classes of the task's rows. EngramError for rows
    whose labels are no classes. A network or `old` that is a module is not saved with the learner: give directories.

    Cost: a training from scratch for each task, and a forward pass of the old model over the rows.
    """

    old: Any = None
    upgrades: tuple[Any, ...] = ()
    dim: int = 128
    extra: int = 0
    pseudo: float = 10.0
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=1e-3, schedule="cosine", warmup=0.05))
    epochs: int = 100
    batch_size: int = 128

    growth: ClassVar[str] = "per task"  # by `extra` numbers; flat without

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tasks = 0
        self.recorded: RowCache | None = None  # phi_o of the task's rows
        self.classifier: LinearHead | None = None  # M

    @classmethod
    def tiny(cls) -> BCT:
        return cls(network=SMALL, dim=8, extra=2, epochs=3, batch_size=32, optimizer=Optimizer(lr=1e-2))

    @property
    def needs(self) -> Needs:
        return needs({Need.BOUNDARIES})

    def _prepare(self, task: Task, run: Run) -> None:
        """Record what the old model says of the rows, and put an untrained one into its place."""
        if task.train.target != Target.CLASSES:
            raise EngramError(
                f"compatible embeddings are learnt from classes; these rows' target is {task.train.target}"
            )
        old = self._old()
        vectors = None if old is None else run.phase("old", lambda: unit(features(old, task.train, run=run)))
        self.recorded = None if vectors is None else RowCache(vectors)
        self.classifier = None if vectors is None else class_centres(vectors, task).to(run.device)
        width = self.dim if vectors is None else vectors.shape[1] + self.extra
        self.model = self.untrained(task, run, width) if vectors is None else self.upgrade(task, run, width)

    def terms(self, batch: Batch, output: Any) -> Mean:
        loss = super().terms(batch, output)
        return loss if self.classifier is None else loss + self.compatible(batch, output)

    def compatible(self, batch: Batch, output: Any) -> Mean:
        """What an upgrade adds to the loss of its classes."""
        assert batch.labels is not None and self.classifier is not None
        return self.pseudo * by_target(self.classifier(output.pooler_output[:, : self.classifier.width]), batch.labels)

    def end(self, task: Task, run: Run) -> None:
        self.tasks += 1
        self.recorded = self.classifier = None

    def upgrade(self, task: Task, run: Run, width: int) -> nn.Module:
        """The untrained model that follows an old one; `width`: of the old space, and the extra numbers."""
        return self.untrained(task, run, width)

    def untrained(self, task: Task, run: Run, width: int) -> nn.Module:
        """A new network with an embedding of unit length, and a head without bias on it."""
        inner = self.new_network(task, run)
        with run.seeded("embedding"):
            return Predictor(Embedding(inner, width), LinearHead(width, task.train.classes, bias=False))

    @property
    def current(self) -> Any:
        """The network that the next task is learnt by."""
        return (self.network, *self.upgrades)[min(self.tasks, len(self.upgrades))]

    def new_network(self, task: Task, run: Run) -> nn.Module:
        """The current network without what it ends in; trainable."""
        inner = frozen_encoder(self.current, inputs=task.train.shapes, generator=run.generator("weights"))
        return inner.requires_grad_(True)

    def extra_state(self) -> State:
        return {"tasks": self.tasks}

    def load_extra_state(self, state: State) -> None:
        self.tasks = state["tasks"]

    def _old(self) -> nn.Module | None:
        if self.started:
            return frozen(self.model)
        return None if self.old is None else frozen(given(self.old))


SMALL = {"name": "MLP", "hidden": [16]}


def given(model: Any) -> nn.Module:
    """A model that is trained already: a module or a directory."""
    return model if isinstance(model, nn.Module) else load(model)


def unit(vectors: Tensor) -> Tensor:
    """Rows [n, d] at length 1."""
    return F.normalize(vectors, dim=1)


def class_centres(vectors: Tensor, task: Task) -> LinearHead:
    """M: a frozen head without bias whose row of a class is the mean of vectors [n, d] over its rows of the task."""
    labels = torch.as_tensor(task.train.labels)
    known = labels >= 0
    means = ClassMeans(vectors.shape[1])
    means.add(vectors[known], labels[known])
    head = LinearHead(vectors.shape[1], bias=False)
    head.set(means.classes, means.mean)
    return head.requires_grad_(False)
