"""Nearest mean of frozen features: the baseline that a continual learner has to beat.

Janson, Zhang, Aljundi, Elhoseiny: A Simple Baseline that Questions the Use of Pretrained-Models in Continual
Learning. arXiv 2210.04428 (2022).

Keep, for each class, the sum of the normalised features u = f(x) / ||f(x)|| of its rows and their number;
predict the class whose mean is nearest to u. The means are not normalised again. Nothing is trained, the
order of rows is of no matter, and a row leaves by subtraction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from engram.core.frozen import FrozenLearner, SummedRows
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.run import Run
from engram.models.heads import NearestMeanHead
from engram.stats.moments import ClassMeans


@dataclass(kw_only=True, eq=False)
class NMC(FrozenLearner):
    """Nearest mean classifier. No hyper-parameter of its own; exact forgetting by subtraction.

    `backbone`: the frozen encoder; None takes rows as features. `normalise`: features to unit length, as
    published. Cost: O(d) per row learnt or forgotten, O(C d) per prediction; memory C (d + 1).
    """

    normalise: bool = True

    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.means: SummedRows = self.trace("means", SummedRows(ClassMeans, self._encode))

    @classmethod
    def tiny(cls) -> NMC:
        return cls()

    def learn(self, task: Task, run: Run | None = None) -> None:
        run = run or Run()
        self.begin(task, run)
        self.means.add(task.train)
        self.solve(run)

    def solve(self, run: Run) -> None:
        sums: ClassMeans = self.means.sums
        self.put(sums.classes, sums.mean)

    def new_head(self, width: int) -> nn.Module:
        return NearestMeanHead(width, normalise=self.normalise)

    def _encode(self, table: Table) -> tuple[Tensor, Tensor]:
        assert table.labels is not None
        features = self.features(table).double()
        return (F.normalize(features, dim=1, eps=1e-12) if self.normalise else features), table.labels
