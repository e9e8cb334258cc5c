"""Deep streaming linear discriminant analysis: class means and one covariance of frozen features.

Hayes, Kanan: Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis. CVPR 2020 workshops,
arXiv 1909.01520.

Kept are the sum of the features z of each class, their number, and the sum of all z zᵀ. From these follow the
means mu and the covariance S within classes, and the head:

    Lambda = ((1 - shrinkage) S + shrinkage I)⁻¹,  score of class c = mu_c Lambda z - mu_c Lambda mu_c / 2.

Classes are not weighed by how often they came.

Published code updates S row by row, weighing the deviation from a class's mean by t / (t + 1), t the rows of
all classes, and that of a first row from 0; its S depends on the order of rows and only tends to the
covariance. Sums give the covariance itself, in whatever order, and let rows go again exactly. It may also
estimate S on the first task by another shrinkage (OAS), which is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from engram.core.frozen import FrozenLearner, SummedRows
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.heads import MatrixHead
from engram.stats.moments import ClassMeans


@dataclass(kw_only=True, eq=False)
class SLDA(FrozenLearner):
    """Linear discriminant analysis; exact forgetting by subtraction.

    `backbone`: the frozen encoder; None takes rows as features. `shrinkage`: in (0, 1]; 1 is the nearest mean.

    Exact up to rounding: an error of the features that are computed anew to be subtracted (1e-7 of a float32
    backbone, none of the rows themselves) is enlarged by at most 1 / shrinkage. What is exact is the head. Cost:
    O(n d²) for n rows learnt or forgotten, O(d³ + C d²) to solve; memory d² + C d doubles. EngramError for a
    shrinkage outside.
    """

    shrinkage: float = 1e-4

    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.shrinkage <= 1:
            raise EngramError(f"shrinkage={self.shrinkage} is no share of the identity; give one in (0, 1]")
        self.moments: SummedRows = self.trace("moments", SummedRows(self._sums, self._encode))

    @classmethod
    def tiny(cls) -> SLDA:
        return cls()

    def learn(self, task: Task, run: Run | None = None) -> None:
        run = run or Run()
        self.begin(task, run)
        self.moments.add(task.train)
        self.solve(run)

    def solve(self, run: Run) -> None:
        sums: ClassMeans = self.moments.sums
        if not len(sums.classes):
            return self.retire_all_but(sums.classes)
        means, spread = sums.mean, sums.covariance()
        spread = (1 - self.shrinkage) * spread + self.shrinkage * torch.eye(len(spread)).to(spread)
        weight = torch.cholesky_solve(means.T, torch.linalg.cholesky(spread))
        self.put(sums.classes, weight, -0.5 * (means.T * weight).sum(0))

    def new_head(self, width: int) -> nn.Module:
        return MatrixHead(width, bias=True)

    def _sums(self, width: int) -> ClassMeans:
        return ClassMeans(width, scatter="shared")

    def _encode(self, table: Table) -> tuple[Tensor, Tensor]:
        assert table.labels is not None
        return self.features(table).double(), table.labels
