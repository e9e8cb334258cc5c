"""Oracle matching: fine-tune towards what retrained models say. The ceiling of datamodel matching.

Georgiev, Rinberg, Park, Garg, Ilyas, Madry, Neel: Attribute-to-Delete: Machine Unlearning via Datamodel Matching.
ICLR 2025, arXiv 2410.23232.

As datamodel matching, with the mean of the logits (for "ce", of the probabilities) of models that were truly retrained
without the forget rows in the place of their prediction. Whoever has those models need not forget: it says how much of
the distance to retraining is due to matching on few rows, and how much to the prediction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engram.core.forgetter import at_hand, rows
from engram.core.needs import Need, Needs, needs
from engram.core.request import Request
from engram.data.table import Table
from engram.engine.attribution import centred, with_classes
from engram.engine.lm import live_classes
from engram.engine.many import fit_many
from engram.engine.predict import predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.forget.matching import Matching


@dataclass(kw_only=True, eq=False)
class OracleMatching(Matching):
    """`oracles`: so many retrained models at most, those at hand or trained by the recipe. Matching: see `Matching`.

    Cost: `oracles` trainings unless they are at hand; then epochs times (1 + retain_ratio) times the forget rows,
    forward and backward.
    """

    oracles: int = 10

    @classmethod
    def tiny(cls) -> OracleMatching:
        """A setting for checks on a handful of rows."""
        return cls(oracles=2, epochs=2, batch_size=16, proximity=0.1)

    @property
    def needs(self) -> Needs:
        held = {Need.FORGET_ROWS, Need.ORACLES} | ({Need.RETAIN_ROWS} if self.retain_weight else set())
        return needs(held, {Need.FORGET_ROWS, Need.RETAIN_ROWS, Need.RETAIN_LABELS, Need.RECIPE})

    def aims(self, model: nn.Module, request: Request, table: Table, run: Run) -> Tensor:
        return run.phase("oracles", lambda: self._mean(self._retrained(model, request, table, run), table, run))

    def _mean(self, oracles: list[nn.Module], table: Table, run: Run) -> Tensor:
        """The mean of what they say of the rows, [m, C]; -inf in columns that are dead in one of them."""
        told = torch.stack([predict(oracle, table, run=run) for oracle in oracles])
        if self.numbers:
            return told.mean(0)
        dead = torch.isneginf(told).any(0)
        if self.loss_kind == "ce":
            return told.softmax(2).mean(0)
        return centred(told.masked_fill(dead, -torch.inf)).mean(0).masked_fill(dead, -torch.inf)

    def _retrained(self, model: nn.Module, request: Request, table: Table, run: Run) -> list[nn.Module]:
        held = at_hand(request, Need.ORACLES)
        if self.oracles < 1 or (held is not None and not len(held)):
            raise EngramError("there is no oracle to match; give one at least, and set oracles to 1 or more")
        if held is not None:
            return list(held)[: self.oracles]
        retain = rows(request.retain)
        seeds = [run.number("oracle", k) for k in range(self.oracles)]
        everything = [torch.arange(len(retain))] * len(seeds)
        recipe = with_classes(at_hand(request, Need.RECIPE), live_classes(model, table).tolist())
        return fit_many(recipe, retain, everything, seeds, run)
