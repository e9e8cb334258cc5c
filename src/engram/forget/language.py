"""What forgetters of language models share: low-rank adapters, a term on the retained rows, refusals.

Everything here serves classifiers too: a class is an answer of one token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engram.core.forgetter import rows
from engram.core.needs import Need, Needs, needs
from engram.core.request import Request
from engram.core.unlearning import GradientForgetter, usual_loss
from engram.data.table import Batch, Table, Target
from engram.engine import lm
from engram.engine.losses import Mean
from engram.engine.run import Run
from engram.engine.teacher import RowCache, cached
from engram.errors import unknown

RETAIN_TERMS = ("loss", "kl")


@dataclass(kw_only=True, eq=False)
class Adapted(GradientForgetter):
    """`lora`: the rank of LoRA adapters (peft), which are then trained alone and merged at the end; 0 trains all
    weights. The model that comes out is a plain one either way."""

    lora: int = 0

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        self.check(request)
        run = run or Run()
        if not self.lora:
            return super().forget(model, request, run)
        with run.seeded("adapters"):
            start = lm.adapted(model, self.lora)
        return lm.merged(super().forget(start, request, run))

    def params(self, model: nn.Module) -> Iterable[nn.Parameter]:
        return lm.adapter_weights(model) if self.lora else model.parameters()


@dataclass(kw_only=True, eq=False)
class Retaining(Adapted):
    """`retain_term`: what holds the model on the retain rows, times `retain_weight`: the usual "loss", or the "kl" from
    the model before forgetting, which needs no labels.

    For "kl", the old model's log-probabilities are computed once and kept, [n_retain, C] or [n_retain, T, V] numbers;
    with `lora`, nothing is kept: the same weights tell them, with the adapters off, at one more forward pass per batch.
    """

    retain_term: str = "loss"

    @property
    def needs(self) -> Needs:
        if self.retain_term not in RETAIN_TERMS:
            raise unknown("retain_term", self.retain_term, RETAIN_TERMS)
        own = {Need.FORGET_ROWS, Need.FORGET_LABELS}
        if not self.retain_weight:
            return needs(own)
        return needs(own | {Need.RETAIN_ROWS} | ({Need.RETAIN_LABELS} if self.retain_term == "loss" else set()))

    def targets(self, model: nn.Module, request: Request, run: Run) -> None:
        if self._keeps_reference:
            retain = rows(request.retain).unlabelled()
            self.before: RowCache = cached(model, retain, lm.log_probs, run, "reference on retain rows")

    def with_retain(self, loss: Mean, model: nn.Module, retain: Batch | None) -> Mean:
        """The loss, and the term on the retain rows."""
        if retain is None:
            return loss
        term = usual_loss if self.retain_term == "loss" else self.divergence
        return loss + self.retain_weight * term(model, retain)

    def divergence(self, model: nn.Module, batch: Batch) -> Mean:
        """KL(model before || model), mean over rows and, for tokens, all positions."""
        reference = self.before(batch) if self._keeps_reference else _without_adapters(model, batch)
        return lm.kl_to(reference, model(**batch.inputs).logits)

    @property
    def _keeps_reference(self) -> bool:
        return bool(self.retain_weight) and self.retain_term == "kl" and not self.lora


def reference_logp(model: nn.Module, table: Table, run: Run, name: str) -> RowCache:
    """log p(answer) of every row under the model before forgetting, sum over tokens: computed once."""
    return cached(model, table, lm.summed_logp, run, name)


def refusals_for(model: nn.Module, table: Table, refusals: lm.Answers, run: Run) -> Table:
    """The forget rows with an "I don't know" each, drawn once. A classifier that is given none guesses: any class that
    it can tell, with equal chances."""
    if not refusals and table.target == Target.CLASSES:
        refusals = [[c] for c in lm.live_classes(model, table).tolist()]
    return lm.other_answers(table, refusals, run.generator("refusals"))


def of_same_rows(table: Table, batch: Batch) -> Batch:
    """The rows of a batch as they stand in another table of the same rows, on the batch's device."""
    return table.batch(batch.rows).to(next(iter(batch.inputs.values())).device)


@torch.no_grad()
def _without_adapters(model: Any, batch: Batch) -> Tensor:
    with lm.adapters_off(model):
        return lm.log_probs(model(**batch.inputs), batch)
