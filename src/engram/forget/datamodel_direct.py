"""The prediction itself as the answer: logits of a retrained model, predicted by data attribution; no weight changes.

Georgiev, Rinberg, Park, Garg, Ilyas, Madry, Neel: Attribute-to-Delete: Machine Unlearning via Datamodel Matching.
ICLR 2025, arXiv 2410.23232 ("DM-Direct").

    f_hat(x) = f(x; theta_0) - multiplier * sum over the forget rows of beta_i(x)

There is a prediction for those x only for which scores were computed: forget, retain and general rows that are at hand,
known by their exact contents. Any other row is answered as before. The weights, and the stored shifts, still hold what
the rows did: this hides, and does not erase.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from engram.core.forgetter import rows, statistics_of
from engram.core.needs import Need, Needs
from engram.core.request import Request
from engram.data.table import Table
from engram.engine.optimizer import Optimizer
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.forget.predicted import KIND, Predicted, read
from engram.models.shifted import ShiftedLogits


@dataclass(kw_only=True, eq=False)
class DatamodelDirect(Predicted):
    """Settings: see `Predicted`. General rows are predicted too where they are at hand, with stored statistics if these
    know them.

    Cost: `models` trainings, or what `prepare` stored; then a number per row and class.
    """

    @classmethod
    def tiny(cls) -> DatamodelDirect:
        """A setting for checks on a handful of rows."""
        recipe = Recipe({"name": "MLP", "hidden": [8]}, Optimizer(lr=1e-2), epochs=2, batch_size=32)
        return cls(models=8, ridge=1.0, recipe=recipe)

    @property
    def needs(self) -> Needs:
        return (*super().needs, *(one | {Need.GENERAL_ROWS} for one in super().needs))

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        self.check(request)
        run = run or Run()
        queries = self._queries(request)
        with run.scope("forget"):
            shift = run.phase("attribution", lambda: self.shift(model, request, queries, run))
        inputs = queries.batch(torch.arange(len(queries))).inputs
        new = ShiftedLogits(copy.deepcopy(model), sorted(inputs), *shift.shape)
        new.put(inputs, self.multiplier * shift)
        return new.to(run.device)

    def _queries(self, request: Request) -> Table:
        """The rows that an answer is predicted for."""
        parts = [rows(request.forget), rows(request.retain)]
        if request.general is not None:
            stored = statistics_of(request, KIND) if self.attribution == "datamodels" else None
            known = request.general.ids if stored is None else set(read(stored["ids"]))
            parts.append(request.general.select(id for id in request.general.ids if id in known))
        first, *others = [part.unlabelled() for part in parts]
        return first.concat(*others)
