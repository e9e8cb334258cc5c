"""SalUn: random labels, learnt by those weights alone that matter most to the forget rows.

Fan, Liu, Zhang, Wong, Wei, Liu: SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image
Classification and Generation. ICLR 2024, arXiv 2310.12508.

1. Saliency: m = 1 for the share of all scalar weights with the largest |gradient of the loss of the forget
   rows|, 0 for the others; the threshold of the paper is the median, a share of 0.5.
2. theta = m * moving + (1 - m) * theta_before
3. Random labelling: cross-entropy of the forget rows with random other labels, plus alpha times that of
   the retain rows. Here, as in published code, all rows weigh alike: alpha is their number over that of the forget
   rows.

Published code adds up the gradients of batch means, draws new labels in every epoch, the true one among them, and
trains with batch statistics.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from engram.core.forgetter import rows
from engram.core.request import Request
from engram.core.unlearning import usual_loss
from engram.data.table import Batch
from engram.engine.curvature import Weights, mean_gradient
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.engine.select import Selection, top
from engram.forget.amnesiac import Amnesiac


@dataclass(kw_only=True, eq=False)
class SalUn(Amnesiac):
    """`share`: how many of the weights may move; 1 is plain random labelling (`Amnesiac`), 0 moves none. All others
    keep their bits, weight decay or not.

    Cost: as `Amnesiac`, and one forward and backward pass over the forget rows.
    """

    optimizer: Optimizer = field(default_factory=lambda: Optimizer("sgd", lr=0.013, weight_decay=5e-4))
    epochs: int = 10
    batch_size: int = 256
    share: float = 0.5

    @classmethod
    def tiny(cls) -> SalUn:
        """A setting for checks on a handful of rows."""
        return cls(epochs=2, batch_size=16)

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        new = super().forget(model, request, run)
        self.salient.settle(new)
        return new

    def targets(self, model: nn.Module, request: Request, run: Run) -> None:
        super().targets(model, request, run)
        scores = run.phase("saliency", lambda: self.saliency(model, request, run))
        self.salient = Selection(model, top(scores, self.share))

    def saliency(self, model: nn.Module, request: Request, run: Run) -> Weights:
        """|gradient of the mean loss of the forget rows|, by parameter, float64."""
        twin = copy.deepcopy(model).to(run.device).eval()
        found = mean_gradient(twin, rows(request.forget), run=run)
        return {name: value.abs().cpu() for name, value in found.items()}

    def loss(self, model: nn.Module, batch: Any) -> Mean:
        assert isinstance(batch, Batch)
        return usual_loss(self.salient.view(model), batch)
