"""Joint training: keep every row, and train anew on all of them whenever some come or go. The upper bound.

`Joint` trains a whole network, `JointHead` a linear classifier on frozen features (the joint linear probe).
Neither keeps to the rules of continual learning. Both forget exactly, by training again without the row. A
row that comes again is held once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from engram.core.frozen import FrozenLearner
from engram.core.learner import Learner, require_labels
from engram.core.request import Request
from engram.data.buffer import Buffer
from engram.data.table import Ids, Table
from engram.data.task import Task
from engram.engine.optimizer import Optimizer
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.heads import MatrixHead
from engram.stats.linear import CLASSIFIERS

EVERYTHING = 2**31 - 1  # rows of a buffer that never overflows


@dataclass(kw_only=True, eq=False)
class Joint(Learner):
    """The network trained from scratch on all rows seen so far, by the settings of a `Recipe`.

    The model is a function of the rows, their order and the run's seed alone. Cost: a training on everything
    for each task and each request; memory: all rows.
    """

    network: Any = "MLP"
    optimizer: Optimizer = field(default_factory=Optimizer)
    epochs: int = 20
    batch_size: int = 64

    exact: ClassVar[bool] = True
    growth: ClassVar[str] = "per row"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rows: Buffer = self.trace("rows", Buffer(EVERYTHING, rule="fifo"))

    @classmethod
    def tiny(cls) -> Joint:
        return cls(network={"name": "MLP", "hidden": [32]}, epochs=3, batch_size=32)

    def learn(self, task: Task, run: Run | None = None) -> None:
        if len(task.train):  # without rows, it trains on those that it has
            require_labels(task)
        self.rows.offer(task.train)
        self._train(run or Run())

    def forget(self, request: Request, run: Run | None = None) -> Ids:
        """Train anew without the rows that the request names; they need not be at hand."""
        stranger = set(request.ids) - set(self.rows.holds(request.ids))
        if stranger:
            raise EngramError(f"the record {min(stranger)!r} was never learnt, or is forgotten already; leave it out")
        self.rows.drop(self.rows.table.select(request.ids))
        self._train(run or Run())
        return ()

    def _train(self, run: Run) -> None:
        recipe = Recipe(self.network, self.optimizer, self.epochs, self.batch_size)
        rows = self.rows.table
        self.model = recipe(rows, run.seed, run) if len(rows) else recipe.start(rows, run.with_seed(run.seed)).eval()


@dataclass(kw_only=True, eq=False)
class JointHead(FrozenLearner):
    """A linear classifier on the frozen features of all rows seen so far.

    `classifier`: "logistic", "svc" or "ridge", with `C`, its inverse penalty. `normalise`: features to unit
    length. Cost: the classifier on all rows, for each task and request; memory: all features.
    """

    classifier: str = "logistic"
    C: float = 10.0
    normalise: bool = True

    exact: ClassVar[bool] = True
    growth: ClassVar[str] = "per row"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rows: Buffer = self.trace("features", Buffer(EVERYTHING, rule="fifo"))

    @classmethod
    def tiny(cls) -> JointHead:
        return cls()

    def learn(self, task: Task, run: Run | None = None) -> None:
        run = run or Run()
        if len(task.train):  # without rows, it is fitted on those that it has
            self.begin(task, run)
            self.rows.offer(Table({"values": self.features(task.train, run)}, task.train.labels, task.train.ids))
        self.solve(run)

    def solve(self, run: Run) -> None:
        table = self.rows.table
        assert table.labels is not None
        self.put(*CLASSIFIERS[self.classifier](self._scaled(table.inputs["values"]), table.labels, C=self.C))

    def new_head(self, width: int) -> nn.Module:
        return MatrixHead(width, normalise=self.normalise, bias=True)

    def _scaled(self, features: Tensor) -> Tensor:
        features = features.double()
        return F.normalize(features, dim=1, eps=1e-12) if self.normalise else features
