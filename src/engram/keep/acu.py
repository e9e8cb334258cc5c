"""Analytic continual unlearning: a ridge regression on frozen features, learning and forgetting in closed
form.

Tang, Zhuang, Fang, Li, Han and others: ACU: Analytic Continual Unlearning for Efficient and Exact Forgetting
with Privacy Preservation. arXiv 2505.12239 (2025). The learner is that of ACIL (Zhuang and others, NeurIPS
2022).

1. phi(x) = ReLU(B g(x)): g the frozen backbone, B random and never trained.
2. Learning rows adds PhiᵀPhi to A (which starts as gamma I) and PhiᵀY to Q; forgetting them subtracts the
   same.
3. The head is W = A⁻¹ Q: what ridge regression on the rows that remain gives, whatever was learnt and
   forgotten in between. A class without rows is masked, since its column is zero and could still win.

The paper updates A⁻¹ and W by Woodbury's identity; keeping A and Q and solving by Cholesky is the same result
with less rounding, of which a bound is computed. What is exact is the head: a backbone that was itself
trained on a row keeps what it learnt of it, and A and Q are no private summary of the rows that are in them.
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
from engram.models.frozen import RandomFeatures
from engram.models.heads import MatrixHead
from engram.stats.ridge import Ridge

DRIFT = 1e-14  # of float64 features that are computed anew in another batch


@dataclass(kw_only=True, eq=False)
class ACU(FrozenLearner):
    """Ridge regression on random features; exact forgetting by subtraction, within `error_bound()`.

    `size`: the number m of random features, 0 for the backbone's own (published: 8192 for CIFAR-100, 16384
    for ImageNet; on a CPU 1000 to 2000). `gamma`: the ridge penalty. `drift`: by how much, relatively, the
    features of a row may differ when they are computed again to be subtracted; 1e-5 suits a float32 backbone,
    and enters the bound.

    Forgetting refuses rows that were never learnt, by their ids, and contents that cannot have been learnt,
    by whether A stays positive definite. Cost: O(n m²) for n rows learnt or forgotten, O(m³) to solve; memory
    m² + m C doubles.
    """

    size: int = 2000
    gamma: float = 0.1
    drift: float = DRIFT

    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        sums = SummedRows(self._ridge, self._encode, drift=self.drift)
        self.sums: SummedRows = self.trace("sums", sums)

    @classmethod
    def tiny(cls) -> ACU:
        return cls(size=100)

    def learn(self, task: Task, run: Run | None = None) -> None:
        run = run or Run()
        self.begin(task, run)
        self.sums.add(task.train)
        self.solve(run)

    def solve(self, run: Run) -> None:
        live = self.ridge.count.nonzero()[:, 0]
        self.put(live, self.ridge.weights[:, live])

    @property
    def ridge(self) -> Ridge:
        """A = PhiᵀPhi + gamma I, Q = PhiᵀY, and their solution."""
        return self.sums.sums

    def error_bound(self) -> float:
        """Upper bound of the Frobenius norm of W - W*, W* the exact head of the rows that remain.

        A prediction is certain if its lead is more than √2 |phi(x)| times this.
        """
        return self.ridge.error_bound()

    def residual_bound(self) -> float:
        """Upper bound of |W - W*| / |W*|."""
        return self.ridge.residual_bound()

    def encoder(self, task: Task, run: Run) -> nn.Module:
        backbone = super().encoder(task, run)
        if not self.size:
            return backbone
        with run.seeded("random features"):
            return RandomFeatures(backbone, self.size)

    def new_head(self, width: int) -> nn.Module:
        return MatrixHead(width)

    def _ridge(self, width: int) -> Ridge:
        return Ridge(width, self.gamma)

    def _encode(self, table: Table) -> tuple[Tensor, Tensor]:
        assert table.labels is not None
        return self.features(table), F.one_hot(table.labels)
