"""What forgetting by predicted outputs shares: what a model retrained without the forget rows would say.

f_hat(x) = f(x; theta_0) - multiplier * sum over forget rows i of beta_i(x),    beta from engine.attribution
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engram.core.forgetter import Forgetter, Statistics, at_hand, rows, statistics_of
from engram.core.needs import Need, Needs, needs
from engram.core.request import Request
from engram.core.settings import name_of
from engram.data.table import Ids, Table
from engram.engine.attribution import SubsetOutputs, subset_outputs, trak_shift, with_classes
from engram.engine.lm import live_classes
from engram.engine.predict import predict
from engram.engine.recipe import Recipe, Trainer
from engram.engine.run import Run
from engram.errors import EngramError, unknown

KIND = "outputs of models trained on random subsets"
ATTRIBUTIONS = ("datamodels", "trak")
LABELLED = frozenset({Need.FORGET_ROWS, Need.FORGET_LABELS, Need.RETAIN_ROWS, Need.RETAIN_LABELS})


@dataclass(kw_only=True, eq=False)
class Predicted(Forgetter):
    """`attribution`: "datamodels" trains `models` models on random subsets, each row in with chance `keep`, and fits by
    ridge regression with penalty `ridge`; "trak" takes the gradients of the model itself, projected to `width`.
    `keep` should be near the share that stays: at half of the data removing a row matters more. `multiplier`: the
    prediction's strength. `recipe` trains the models if the request brings none; `prepare` needs it.
    """

    attribution: str = "datamodels"
    models: int = 600
    keep: float = 0.9
    ridge: float = 0.1
    width: int = 512
    multiplier: float = 1.0
    recipe: Recipe | None = None

    @property
    def needs(self) -> Needs:
        if self.attribution == "trak":
            return needs(LABELLED)
        trains = LABELLED if self.recipe is not None else LABELLED | {Need.RECIPE}
        return needs({Need.FORGET_ROWS, Need.RETAIN_ROWS, Need.STATISTICS}, trains)

    def prepare(self, model: nn.Module, train: Table, run: Run | None = None) -> dict[str, Statistics]:
        """What models of random subsets say of all training rows: it serves every later request for some of them.

        EngramError without a `recipe`, and for TRAK. Cost: `models` trainings, and models * n * C numbers.
        """
        if self.attribution == "trak":
            raise EngramError("TRAK attributes by the rows and the model as they are; there is nothing to prepare")
        if self.recipe is None:
            raise EngramError(f"{name_of(self)} prepares by training models on subsets; give it a recipe")
        run = run or Run()
        with run.scope("prepare"):
            found = self._trained(self.recipe, model, train, train, run)
        return {KIND: {"kept": found.kept, "outputs": found.outputs, "ids": written(train.ids)}}

    def predicted(self, model: nn.Module, request: Request, queries: Table, run: Run) -> Tensor:
        """What a model retrained without the forget rows would say of the queries, as predicted: [q, C]."""
        now = predict(model, queries, run=run)
        shift = run.phase("attribution", lambda: self.shift(model, request, queries, run))
        if shift.shape != now.shape:
            raise EngramError(f"the recipe's models give {shift.shape[1]} outputs, and this model {now.shape[1]}")
        return now - self.multiplier * shift

    def shift(self, model: nn.Module, request: Request, queries: Table, run: Run) -> Tensor:
        """The sum of the scores of the forget rows on the queries, [q, C]; of classes, its mean over them is 0.

        EngramError for rows that the stored statistics do not know.
        """
        if self.attribution not in ATTRIBUTIONS:
            raise unknown("attribution", self.attribution, ATTRIBUTIONS)
        gone = rows(request.forget)
        stored = statistics_of(request, KIND) if self.attribution == "datamodels" else None
        if stored is not None:
            known = read(stored["ids"])
            found = SubsetOutputs(stored["kept"], stored["outputs"][:, numbers(queries.ids, known)])
            return found.shift(numbers(gone.ids, known), self.ridge)
        train, places = gone.concat(rows(request.retain)), torch.arange(len(gone))
        if self.attribution == "trak":
            return trak_shift([model], train, queries, width=self.width, rows=places, run=run)
        recipe = self.recipe or at_hand(request, Need.RECIPE)
        return self._trained(recipe, model, train, queries, run).shift(places, self.ridge)

    def _trained(self, recipe: Trainer, model: nn.Module, train: Table, queries: Table, run: Run) -> SubsetOutputs:
        recipe = with_classes(recipe, live_classes(model, train).tolist())
        return subset_outputs(recipe, train, queries, models=self.models, keep=self.keep, run=run)


def numbers(ids: Iterable[str], known: Ids) -> Tensor:
    """The places of ids among those that were prepared; EngramError for one that was not."""
    places = {id: row for row, id in enumerate(known)}
    wanted = list(ids)
    strangers = [id for id in wanted if id not in places]
    if strangers:
        raise EngramError(
            f"the statistics do not know the record {strangers[0]!r}; prepare them with all training rows"
        )
    return torch.tensor([places[id] for id in wanted], dtype=torch.int64)


def written(ids: Ids) -> Tensor:
    """Ids as a tensor of bytes, since statistics are tensors."""
    return torch.frombuffer(bytearray(json.dumps(list(ids)).encode()), dtype=torch.uint8).clone()


def read(stored: Tensor) -> Ids:
    """The ids that `written` put down."""
    return tuple(json.loads(bytes(stored.tolist())))
