"""FeTrIL: features of new classes, moved to the stored means of old ones, stand in for rows that are gone.

Petit, Popescu, Schindler, Picard, Delezoide: FeTrIL: Feature Translation for Exemplar-Free Class-Incremental
Learning. WACV 2023, arXiv 2211.13131.

1. The encoder is given, or trained on the first task by plain cross-entropy, and frozen for good.
2. Of every class c only its mean mu(c) of raw features is kept.
3. With each task, every past class p takes the features z of the most similar class n of the task,
   translated: z + mu(p) - mu(n). Classes of which the task has rows keep their own features.
4. Real and translated features are normalised, after the translation, and a linear classifier of all classes
   is trained on them from scratch.

Published with a further phase on the first task (AugMix inside Lookahead), which is left out here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.core.frozen import FrozenLearner, SummedRows
from engram.core.needs import Need, Needs, needs
from engram.core.trace import Seen
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.optimizer import Optimizer
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.errors import EngramError, unknown
from engram.models.frozen import frozen_encoder
from engram.models.heads import MatrixHead
from engram.stats.linear import BLOCKWISE, CLASSIFIERS, Linear
from engram.stats.moments import ClassMeans
from engram.stats.svm import Blocks

SELECTIONS = ("euclidean", "cosine", "random")
FC = Optimizer("sgd", lr=0.05, weight_decay=5e-4, schedule="cosine")
BASE = Optimizer("sgd", lr=0.1, weight_decay=1e-4, schedule="steps", milestones=(1 / 3, 2 / 3))


class Translated(NamedTuple):
    """Raw features of every class [k], own or translated: `blocks()` gives (column of the class, rows [n, d])."""

    classes: Tensor
    blocks: Blocks

    def unit(self) -> Iterator[tuple[int, Tensor]]:
        """The blocks, every row at unit length."""
        return ((column, F.normalize(rows, dim=1, eps=1e-12)) for column, rows in self.blocks())

    def together(self) -> tuple[Tensor, Tensor]:
        """Features [N, d] and labels [N] of all classes."""
        found = list(self.blocks())
        labels = [self.classes[column].expand(len(rows)) for column, rows in found]
        return torch.cat([rows for _, rows in found]), torch.cat(labels)


@dataclass(kw_only=True, eq=False)
class FeTrIL(FrozenLearner):
    """Class means, translated features and a linear classifier.

    `backbone`: the frozen encoder. Without one, `network` is trained on the first task (`optimizer`,
    `epochs`, `batch_size`); without either, rows are features. `selection`: how the source of a past class is
    chosen among the classes of the task: nearest mean ("euclidean"), largest "cosine", "random", or a number
    k for the k-th nearest (the farthest, if there are fewer). `classifier`: "svc" as published, one against
    the rest; "fc", a softmax layer on features that are not normalised (`fc_optimizer`, `fc_epochs`, as in
    PyCIL); "logistic" or "ridge". `C`: inverse penalty of all but "fc".

    Forgetting subtracts rows from the means exactly and retires emptied classes. The classifier cannot be
    trained anew before the next task comes, for its rows are gone; until then every forgotten id is residue.
    So are the rows that `network` was trained on, for good.

    Cost of a task of n rows: O(C n d) to translate for all past classes, and the classifier; memory C (d +
    1). "svc" and "ridge" see translated features class by class, as often as they need them; the others hold
    all of them at once.
    """

    selection: str | int = "euclidean"
    classifier: str = "svc"
    C: float = 1.0
    fc_optimizer: Optimizer = FC
    fc_epochs: int = 50
    network: Any = None
    optimizer: Optimizer = field(default=BASE)
    epochs: int = 90
    batch_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.selection, str) and self.selection not in SELECTIONS:
            raise unknown("selection", self.selection, SELECTIONS)
        if isinstance(self.selection, int) and self.selection < 1:
            raise EngramError(f"selection={self.selection} is no rank; the nearest class has rank 1")
        if self.classifier not in (*CLASSIFIERS, "fc"):
            raise unknown("classifier", self.classifier, (*CLASSIFIERS, "fc"))
        self.means: SummedRows = self.trace("means", SummedRows(ClassMeans, self._encode))
        self.base: Seen = self.trace("base", Seen())
        self.fitted: Seen = self.trace("classifier", Seen())

    @classmethod
    def tiny(cls) -> FeTrIL:
        return cls(network={"name": "MLP", "hidden": [32]}, epochs=3, optimizer=Optimizer("adam", lr=1e-2))

    @property
    def needs(self) -> Needs:
        return needs({Need.BOUNDARIES} | ({Need.BACKBONE} if self.backbone is not None else set()))

    def learn(self, task: Task, run: Run | None = None) -> None:
        run = run or Run()
        with run.scope("learn"):
            self.begin(task, run)
            self.means.add(task.train)
            self.put(*self.fit(self.translated(task, run), run))
            self.fitted.ids = set(self.means.labels)

    def pseudo_features(self, task: Task, run: Run) -> tuple[Tensor, Tensor]:
        """Raw features [N, d] and labels [N] of all classes that hold rows: own, or translated from their
        source.
        """
        return self.translated(task, run).together()

    def translated(self, task: Task, run: Run) -> Translated:
        """The same class by class, as often as it is asked for: never together in memory."""
        features, labels = self._encode(task.train)
        here = ClassMeans(features.shape[1])
        here.add(features, labels)
        sums: ClassMeans = self.means.sums
        sources = self.sources(sums.classes, sums.mean, here.classes, here.mean, run)
        shifts = self.shifts(sums.mean, here.mean[sources])
        rows = [(labels == here.classes[source]).nonzero()[:, 0] for source in sources.tolist()]

        def blocks() -> Iterator[tuple[int, Tensor]]:
            return ((k, features[own] + shift) for k, (own, shift) in enumerate(zip(rows, shifts, strict=True)))

        return Translated(sums.classes, blocks)

    def shifts(self, means: Tensor, own: Tensor) -> Tensor:
        """What takes features of a source to a class: mu(p) - mu(n), [C, d]."""
        return means - own

    def sources(self, classes: Tensor, means: Tensor, here: Tensor, own: Tensor, run: Run) -> Tensor:
        """For every class [C], the place [C] of its source among the classes `here` [P] of means `own` [P,
        d].

        A class that is here is its own source.
        """
        own_place = classes[:, None] == here[None, :]
        return torch.where(own_place.any(1), own_place.int().argmax(1), self._nearest(means, own, run))

    def fit(self, rows: Translated, run: Run) -> Linear:
        """The linear classifier on these features."""
        if self.classifier == "fc":
            return self._fit_fc(*rows.together(), run)
        if self.classifier in BLOCKWISE:
            return BLOCKWISE[self.classifier](rows.classes, rows.unit, C=self.C)
        features, labels = rows.together()
        return CLASSIFIERS[self.classifier](F.normalize(features, dim=1, eps=1e-12), labels, C=self.C)

    def solve(self, run: Run) -> None:
        """The classifier of the last task stays, without the classes that have lost all rows."""
        self.retire_all_but(self.means.sums.classes)

    def encoder(self, task: Task, run: Run) -> nn.Module:
        if self.backbone is not None or self.network is None:
            return super().encoder(task, run)
        recipe = Recipe(self.network, self.optimizer, self.epochs, self.batch_size, task.classes)
        model = recipe(task.train, run.number("base"), run)
        self.base.add(task.train.ids)
        return frozen_encoder(model, inputs=task.train.shapes, generator=run.generator("backbone"))

    def new_head(self, width: int) -> nn.Module:
        return MatrixHead(width, normalise=self.classifier != "fc", bias=True)

    def _nearest(self, means: Tensor, own: Tensor, run: Run) -> Tensor:
        if self.selection == "random":
            return torch.randint(len(own), (len(means),), generator=run.generator("sources"))
        if self.selection == "cosine":
            return (F.normalize(means, dim=1) @ F.normalize(own, dim=1).T).argmax(1)
        k = self.selection if isinstance(self.selection, int) else 1
        return _distances(means, own).argsort(dim=1, stable=True)[:, min(k, len(own)) - 1]

    def _fit_fc(self, features: Tensor, labels: Tensor, run: Run) -> Linear:
        recipe = Recipe({"name": "Identity"}, self.fc_optimizer, self.fc_epochs, self.batch_size)
        head: Any = recipe(Table({"values": features.float()}, labels), run.number("fc"), run).head
        return Linear(head.classes, head.weight.detach().double().T, head.bias.detach().double())

    def _encode(self, table: Table) -> tuple[Tensor, Tensor]:
        assert table.labels is not None
        return self.features(table).double(), table.labels


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
