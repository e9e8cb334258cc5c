"""How a model is trained, as plain data: what retraining, oracles and shadow models are made with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from engram.data.table import Batch, Table, Target
from engram.engine.fit import fit
from engram.engine.losses import Mean, by_target
from engram.engine.optimizer import Optimizer
from engram.engine.run import Run
from engram.errors import EngramError, at_least
from engram.models.build import build


class Trainer(Protocol):
    """Anything that trains a model from rows: a `Recipe`, or a learner's history replayed."""

    def __call__(self, table: Table, seed: int, run: Run | None = None) -> nn.Module:
        """A model trained on these rows; equal arguments give equal weights."""


@dataclass(frozen=True)
class Recipe:
    """`network`: a name, a mapping {"name": …}, a model directory, or a module to start from. `classes`: the classes
    that the head has, whether or not the rows hold them all."""

    network: Any = "MLP"
    optimizer: Optimizer = field(default_factory=Optimizer)
    epochs: int = 20
    batch_size: int = 64
    classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        at_least("epochs of a recipe", self.epochs, 0)
        at_least("batch_size of a recipe", self.batch_size, 1)

    def __call__(self, table: Table, seed: int, run: Run | None = None) -> nn.Module:
        """Train on the table; draws follow from `seed` and the table's row order alone. EngramError for no rows, and
        for rows without labels."""
        self.check(table)
        outer = run or Run()
        with outer.scope("recipe"):  # a training's checkpoints stand beside those of others of the same run and seed
            return self._train(table, outer.with_seed(seed))

    def _train(self, table: Table, run: Run) -> nn.Module:
        model = self.start(table, run)

        def step(batch: Batch) -> Mean:
            batch = batch.trimmed()
            assert batch.labels is not None
            return by_target(model(**batch.inputs).logits, batch.labels)

        order = self.order(run)
        fit(
            step,
            lambda epoch: table.batches(self.batch_size, seed=order, epoch=epoch, shard=run.shard),
            model=model,
            optimizer=self.optimizer,
            epochs=self.epochs,
            steps=-(-len(table) // self.batch_size),
            run=run,
            name="train",
        )
        return model.eval()

    def check(self, table: Table) -> None:
        """EngramError for a table that nothing can be learnt from."""
        if not len(table):
            raise EngramError("a model cannot be trained on no rows")
        if table.labels is None or (table.target == Target.CLASSES and not table.classes):
            raise EngramError(f"a recipe trains on labelled rows, and none of these {len(table)} has a label")

    def order(self, run: Run) -> int:
        """The seed of the order of the rows."""
        return run.number("order")

    def start(self, table: Table, run: Run) -> nn.Module:
        """The untrained model that the rows ask for."""
        outputs = table.labels.shape[1] if table.target == Target.NUMBERS and table.labels is not None else None
        return build(
            self.network,
            inputs=table.shapes,
            classes=self.classes or table.classes,
            outputs=outputs,
            generator=run.generator("weights"),
        )
