"""Gradient-based sample selection: a buffer of rows whose gradients point in different directions.

Aljundi, Lin, Goujaud, Bengio: Gradient based sample selection for online continual learning. NeurIPS 2019, arXiv
1903.08671, algorithm 2 (greedy) and its quadratic program; chapter of Aljundi: Continual Learning in Neural Networks,
arXiv 1910.02718.

1. For every batch, some times over: an update on the batch, and one on rows drawn from the buffer.
2. The batch is offered. Its rows' scores are their largest cosine to the gradients of a few random batches of
   the buffer (0.1 while that is empty). While there is room, rows are appended.
3. Into a full buffer the batch comes only if its own gradient points away from all of these (largest cosine
   below 0). For each row one held row i is drawn, by how alike the scores say it is; the new row takes its place
   with probability (C_i + 1) / ((c + 1) + (C_i + 1)), c its own score.

The quadratic rule computes the gradients of all rows held and offered anew, and keeps those among which the sum of all
cosines is least. Where the paper has a solver of integer programs, this goes to a local minimum: rows go one by one,
always the one most like the rest, and then change places with those left out while that lowers the sum.

As in the authors' code gradients are taken in eval mode, scores of drawn rows are brought to [0, 1] with 0.01
added to their range, and held scores are never computed anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engram.core.learning import GradientLearner
from engram.data.buffer import Buffer
from engram.data.table import Batch, Table
from engram.data.task import Task
from engram.engine.curvature import flat, mean_gradient
from engram.engine.losses import per_row
from engram.engine.optimizer import Optimizer
from engram.engine.persample import CHUNK, gradients
from engram.engine.predict import evaluating
from engram.engine.run import Run
from engram.errors import unknown
from engram.keep.replay import share

SCORE = "score"  # the buffer's column of the largest cosine that a row had when it came
RULES = ("greedy", "quadratic")
FIRST = 0.1  # the score of rows that find an empty buffer


@dataclass(kw_only=True, eq=False)
class GSS(GradientLearner):
    """Replay from a buffer that is spread out in gradients.

    `buffer`: rows kept. `replayed`: rows in each draw, also in the batches that rows are compared with, of which
    there are `compared`. `iterations`: pairs of updates for a batch. `rule`: "greedy" or "quadratic". Rows are
    offered in the first epoch.

    Cost: for each batch `iterations` pairs of updates, `compared` backward passes, and a gradient of every new row:
    batch_size times the parameters in memory. The quadratic rule takes a gradient of every row held as well: buffer
    times the parameters in memory.
    """

    optimizer: Optimizer = field(default=Optimizer("sgd", lr=0.05, momentum=0.0))
    epochs: int = 1
    batch_size: int = 10
    buffer: int = 300
    replayed: int = 10
    compared: int = 10
    iterations: int = 3
    rule: str = "greedy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule not in RULES:
            raise unknown("rule", self.rule, RULES)
        self.kept: Buffer = self.trace("buffer", Buffer(self.buffer, rule="fifo"))

    @classmethod
    def tiny(cls) -> GSS:
        small = {"name": "MLP", "hidden": [16]}
        return cls(network=small, buffer=20, replayed=5, compared=3, iterations=2)

    def changing(self) -> Mapping[str, Any]:
        return {"buffer": self.kept}

    def batches(self, task: Task, epoch: int, run: Run) -> Iterable[Batch]:
        draws = run.generator("replay", epoch)
        for batch in task.train.batches(self.batch_size, seed=run.number("order"), epoch=epoch):
            rows = task.train.take(batch.rows)
            for _ in range(self.iterations):
                yield share(rows, run)
                if len(self.kept):
                    yield share(self.kept.draw(self.replayed, draws), run)
            if epoch == 0:
                self.offer(rows, draws, run)

    def offer(self, rows: Table, draws: torch.Generator, run: Run) -> None:
        """Show rows to the buffer."""
        rows = rows.without(self.kept.holds(rows.ids))
        if not len(rows):
            return
        room = self.buffer - len(self.kept)
        if self.rule == "quadratic":
            return self._solve(rows, run)
        held = self._held_gradients(draws, run)
        if room > 0:
            rows = rows.take(range(min(room, len(rows))))
            self.kept.offer(rows.with_column(SCORE, self.scores(rows, held, run)))
        elif self._cosines(self._mean_gradient(rows, run)[None], held) < 0:
            self._replace(rows.with_column(SCORE, self.scores(rows, held, run)), draws)

    def scores(self, rows: Table, held: Tensor, run: Run) -> Tensor:
        """The largest cosine of each row's gradient to those of the buffer [k, P]: [n]."""
        if not len(held):
            return torch.full((len(rows),), FIRST, dtype=torch.float64)
        return self._cosines(self._row_gradients(rows, run), held)

    def _row_gradients(self, rows: Table, run: Run) -> Tensor:
        """The gradient of every row, [n, P], float64."""
        parts = []
        with evaluating(self.model):
            for batch in rows.batches(CHUNK, shuffle=False):
                found = gradients(self.model, batch.to(run.device), per_row)  # type: ignore[arg-type]
                parts.append(torch.cat([g.flatten(1) for g in found.values()], 1).double().cpu())
        return torch.cat(parts)

    def _solve(self, rows: Table, run: Run) -> None:
        """Keep those of the held rows and new ones that are most spread out together."""
        together = self.kept.table.concat(rows)
        if len(together) > self.buffer:
            unit = F.normalize(self._row_gradients(together, run), dim=1)
            together = together.take(most_spread(unit @ unit.T, self.buffer))
        self.kept.drop(self.kept.table.without(together.ids))
        self.kept.offer(together)

    def _replace(self, rows: Table, draws: torch.Generator) -> None:
        """Let new rows with scores take the places of held ones, by chance."""
        table = self.kept.table
        old, new = torch.as_tensor(table.extra[SCORE]), torch.as_tensor(rows.extra[SCORE])
        alike = (old - old.min()) / (old.max() - old.min() + 0.01)
        chosen = min(len(rows), len(old))
        places = torch.multinomial(alike + 1e-12, chosen, generator=draws)  # the least alike, where no other is left
        new = new[: len(places)]
        chance = (old[places] + 1) / ((new + 1) + (old[places] + 1)).clamp(min=1e-12)
        wins = torch.rand(len(places), generator=draws, dtype=torch.float64) < chance
        self.kept.drop(table.take(places[wins]))
        self.kept.offer(rows.take(wins.nonzero()[:, 0]))

    def _held_gradients(self, draws: torch.Generator, run: Run) -> Tensor:
        """The gradients of up to `compared` different random batches of the buffer, [k, P]."""
        order = torch.randperm(len(self.kept), generator=draws).split(self.replayed) if len(self.kept) else ()
        found = [self._mean_gradient(self.kept.table.take(part), run) for part in order[: self.compared]]
        return torch.stack(found) if found else torch.zeros(0, 0)

    def _mean_gradient(self, rows: Table, run: Run) -> Tensor:
        with evaluating(self.model), torch.enable_grad():
            return flat(mean_gradient(self.model, rows, run=run)).cpu()

    def _cosines(self, gradients: Tensor, held: Tensor) -> Tensor:
        """The largest cosine of each of [n, P] to any of [k, P]: [n]."""
        return (F.normalize(gradients, dim=1) @ F.normalize(held, dim=1).T).amax(1)


def most_spread(alike: Tensor, size: int) -> Tensor:
    """`size` row numbers, ascending, among which the sum of alikeness [n, n], symmetric, is low: a local minimum under
    changes of one row for another. O(n²) and O(n size) for every change."""
    inside = torch.ones(len(alike), dtype=torch.bool)
    to_rest = alike.sum(1)
    while int(inside.sum()) > size:
        worst = int((2 * to_rest - alike.diagonal()).masked_fill(~inside, -torch.inf).argmax())
        inside[worst] = False
        to_rest = to_rest - alike[worst]
    while (swap := _best_swap(alike, to_rest, inside)) is not None:
        goes, comes = swap
        inside[goes], inside[comes] = False, True
        to_rest = to_rest - alike[goes] + alike[comes]
    return inside.nonzero()[:, 0]


def _best_swap(alike: Tensor, to_rest: Tensor, inside: Tensor) -> tuple[int, int] | None:
    """The row that goes and the one that comes, where this lowers the sum most; None where nothing lowers it."""
    held, free = (mask.nonzero()[:, 0] for mask in (inside, ~inside))
    if not len(free):
        return None
    own = alike.diagonal()
    saved = 2 * to_rest[held] - own[held]
    spent = 2 * to_rest[free] + own[free]
    change = spent - saved[:, None] - 2 * alike[held[:, None], free]
    best = int(change.argmin())
    if change.flatten()[best] > -1e-9:
        return None
    return int(held[best // len(free)]), int(free[best % len(free)])
