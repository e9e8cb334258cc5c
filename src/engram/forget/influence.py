"""Influence unlearning: one step to where the optimum would be if the forget rows weighed nothing.

Koh, Liang: Understanding Black-box Predictions via Influence Functions. ICML 2017, arXiv 1703.04730; Izzo, Smart,
Chaudhuri, Zou: Approximate Data Deletion from Machine Learning Models. AISTATS 2021, arXiv 2002.10077; as a forgetter
of deep networks: Jia et al.: Model Sparsity Can Simplify Machine Unlearning. NeurIPS 2023, arXiv 2304.04934 ("IU").

With L the mean loss of all n rows, L_r that of the retain rows, n_f forget rows, and C a curvature of L_r:

    theta_new = theta + strength * (C + damping I)⁻¹ (∇L - ∇L_r),    ∇L - ∇L_r = n_f / n * (∇L_f - ∇L_r)

If theta minimises L + damping/2 |theta|², and C is the Hessian, this is the Newton step on the retain rows' objective:
exact for least squares with a ridge penalty (L_f, L_r means over rows), off by the third derivative elsewhere. Taking
the difference of gradients leaves alone what training left undone. Published code inverts the empirical Fisher matrix
of single retain rows by the WoodFisher recursion, and tunes the strength.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engram.core.forgetter import Forgetter, rows
from engram.core.needs import Need, Needs, needs
from engram.core.request import Request
from engram.data.table import Table
from engram.engine.curvature import KINDS, Curvature, flat, mean_gradient, shaped, trainable
from engram.engine.importance import importance
from engram.engine.run import Run
from engram.errors import EngramError, unknown
from engram.stats.solve import cg


@dataclass(kw_only=True, eq=False)
class Influence(Forgetter):
    """`curvature`: "gauss-newton" or "hessian" of the retain rows, inverted by conjugate gradients (`tol`, `iters`), or
    "fisher", the diagonal of the empirical Fisher matrix. The Hessian of a network has negative eigenvalues:
    `damping` has to be above them, or conjugate gradients end early. `strength`: the paper's alpha.

    EngramError where the damped curvature is not positive along the very first direction. Cost: one forward and
    backward pass over all rows, and for each iteration one over the retain rows with two or three backward passes.
    """

    curvature: str = "gauss-newton"
    damping: float = 0.01
    strength: float = 1.0
    tol: float = 1e-4
    iters: int = 50
    batch_size: int = 256

    @classmethod
    def tiny(cls) -> Influence:
        """A setting for checks on a handful of rows."""
        return cls(damping=0.1, iters=5)

    @property
    def needs(self) -> Needs:
        return needs({Need.FORGET_ROWS, Need.FORGET_LABELS, Need.RETAIN_ROWS, Need.RETAIN_LABELS})

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        self.check(request)
        if self.curvature not in (*KINDS, "fisher"):
            raise unknown("curvature", self.curvature, (*KINDS, "fisher"))
        run = run or Run()
        new = copy.deepcopy(model).to(run.device).eval()
        with run.scope("forget"), run.cost.clock():
            move = run.phase("influence", lambda: self.step(new, rows(request.forget), rows(request.retain), run))
        params = trainable(new)
        with torch.no_grad():
            for name, change in shaped(self.strength * move, params).items():
                params[name].add_(change)
        return new

    def step(self, model: nn.Module, forget: Table, retain: Table, run: Run) -> Tensor:
        """(C + damping I)⁻¹ (∇L - ∇L_r) for a model in eval mode: [P], float64, on the CPU."""
        cut: dict[str, Any] = {"batch_size": self.batch_size, "run": run}
        of_forget, of_retain = (flat(mean_gradient(model, table, **cut)) for table in (forget, retain))
        pull = len(forget) / (len(forget) + len(retain)) * (of_forget - of_retain)
        if self.curvature == "fisher":
            found = pull / (flat(importance(model, retain, run=run)) + self.damping)
        else:
            found = self._solved(Curvature(model, retain, self.curvature, **cut), pull)
        return found.cpu()

    def _solved(self, curvature: Curvature, pull: Tensor) -> Tensor:
        def damped(x: Tensor) -> Tensor:
            return (curvature(x[0]) + self.damping * x[0])[None]

        found = cg(damped, pull[None], tol=self.tol, iters=self.iters)[0]
        if bool(pull.any()) and not bool(found.any()):
            raise EngramError(f"the curvature is negative with damping {self.damping}; raise damping")
        return found
