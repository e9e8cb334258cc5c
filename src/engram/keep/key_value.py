"""Discrete key-value bottleneck: what is learnt of a row lies in the few cells that the row selects.

Träuble, Goyal, Rahaman, Mozer, Kawaguchi, Bengio, Schölkopf: Discrete Key-Value Bottleneck. ICML 2023, arXiv
2207.11240. Its use for unlearning: Shah and others: Unlearning via Sparse Representations. arXiv 2311.15268 (2023).

1. Features of a frozen encoder are projected into C heads z_c = f P_c, P random with columns of length 1.
2. In each of C codebooks, M keys are placed by exponential moving averages of the heads of unlabelled rows, better
   those of other data than the task's. From then on encoder, projections and keys are frozen.
3. The values V [C, M, classes] start at 0. A row reads V at its nearest key of each codebook; the logits are the
   mean. Trained is V alone, by cross-entropy with label smoothing and plain SGD: what a row does not select, it does
   not move. Keys that no row has selected in training do not answer in prediction.
4. To forget, cells are masked: their keys are infinitely far, so that the next nearest answer. Masks act on access,
   and can be taken off; zeroing the values is final.

The loss is convex in V, with a curvature of at most 1 / (2 C), and its gradient is never longer than √(2 / C): rates
up to 4 C descend, and the published clip at 1 acts only where C = 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.core.frozen import FrozenLearner
from engram.core.needs import Need, Needs, needs
from engram.core.request import Classes, Request
from engram.core.trace import Seen, State
from engram.data.readers import read
from engram.data.table import Batch, Ids, Table
from engram.data.task import Task
from engram.engine.fit import fit
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer
from engram.engine.predict import hits
from engram.engine.run import Run
from engram.errors import EngramError
from engram.models.key_value import KeyValueHead
from engram.models.predictor import Predictor
from engram.stats.kmeans import ema_codebook

EMPTY = -1  # a cell that was wiped since the record went in
SGD = Optimizer("sgd", lr=30.0, momentum=0.0, clip=1.0)


class CellIndex:
    """A trace: which records touched which cells. The label of every record, and its cell in each codebook.

    Records leave by their ids; every cell that they touched is wiped, for all records. What of a record may still
    stand elsewhere passed on through shared cells, so records from which a chain of these leads to a record that
    stays are residue; so are those of which a cell was wiped before. Memory: C + 1 numbers a record.
    """

    def __init__(self, codebooks: int, keys: int) -> None:
        self.codebooks, self.keys = codebooks, keys
        self.rows: dict[str, int] = {}
        self.labels = torch.zeros(0, dtype=torch.int64)
        self.cells = torch.zeros(0, codebooks, dtype=torch.int32)

    def add(self, ids: Ids, labels: Tensor, cells: Tensor) -> None:
        """Note records with labels [n] and cells [n, C]."""
        self.rows.update(zip(ids, range(len(self.rows), len(self.rows) + len(ids)), strict=True))
        self.labels = torch.cat([self.labels, labels])
        self.cells = torch.cat([self.cells, cells.int()])

    def ids_of(self, labels: Iterable[int]) -> Ids:
        """The records of these classes."""
        wanted = torch.isin(self.labels, torch.tensor(sorted(labels), dtype=torch.int64)).tolist()
        return tuple(id for id, row in self.rows.items() if wanted[row])

    def counts(self, ids: Iterable[str] | None = None) -> Tensor:
        """How many of the records (all, if left out) stand behind each cell: [C, M]."""
        cells = self.cells if ids is None else self.cells[[self.rows[id] for id in ids]]
        flat = (cells + torch.arange(self.codebooks) * self.keys)[cells != EMPTY]
        return torch.bincount(flat.long(), minlength=self.codebooks * self.keys).reshape(self.codebooks, self.keys)

    def inside(self, cells: Tensor) -> Tensor:
        """Which touches of each record lie in a set of cells [C, M]: mask [n, C]."""
        found = cells[torch.arange(self.codebooks), self.cells.long().clamp(min=0)]
        return found & (self.cells != EMPTY)

    def wipe(self, cells: Tensor) -> None:
        """No record stands behind these cells [C, M] any more."""
        self.cells = self.cells.masked_fill(self.inside(cells), EMPTY)

    def holds(self, ids: Iterable[str]) -> Ids:
        return tuple(id for id in ids if id in self.rows)

    def drop(self, rows: Table) -> Ids:
        gone = self.holds(rows.ids)
        residue = self._passed_on(gone)
        self.wipe(self.counts(gone) > 0)
        self._keep([id for id in self.rows if id not in set(gone)])
        return residue

    def state_dict(self) -> State:
        return {"ids": list(self.rows), "labels": self.labels, "cells": self.cells}

    def load_state_dict(self, state: State) -> None:
        self.rows = {id: row for row, id in enumerate(state["ids"])}
        self.labels, self.cells = state["labels"], state["cells"]

    def _passed_on(self, gone: Ids) -> Ids:
        """Those of the records that may have left something with records that stay."""
        places = [self.rows[id] for id in gone]
        reached, found = self.counts() > self.counts(gone), (self.cells[places] == EMPTY).any(1)
        while True:
            more = found | self.inside(reached)[places].any(1)
            passed = tuple(id for id, hit in zip(gone, more.tolist(), strict=True) if hit)
            if torch.equal(more, found):
                return passed
            reached, found = reached | (self.counts(passed) > 0), more

    def _keep(self, ids: list[str]) -> None:
        places = [self.rows[id] for id in ids]
        self.labels, self.cells = self.labels[places], self.cells[places]
        self.rows = {id: row for row, id in enumerate(ids)}


@dataclass(kw_only=True, eq=False)
class KeyValueBottleneck(FrozenLearner):
    """Frozen keys and trained values; class after class touches cells of its own. No task boundaries are needed.

    `codebooks`: C, `keys`: M in each, `dim`: d_k, the numbers of a key (published: 256, 4096, 14; on a CPU 16 to 32,
    128 to 256, 8). `projection`: "random", or "chunks" of the features, of which `dim` is d / C. `key_rows`: the
    source of unlabelled rows that place the keys, as `data.readers.read` takes it, or hand a table to `prepare`;
    without either, the rows of the first task do, whose ids are then residue for good. Rows of a far domain leave
    most keys unused and the rest crowded, which costs accuracy, and makes forgetting dear. `key_epochs`,
    `key_batch_size`, `decay`, `revive`: see `stats.kmeans.ema_codebook`. `classes_total`: how many classes there
    will be, all of which take part in the softmax from the start, as published; 0: those seen so far.
    `optimizer`: keep the rate below 4 C; momentum and weight decay would move cells that no row of the batch selects.
    Published are lr 0.3 and up to 2000 epochs for each task at C = 256; the rate here needs as many times fewer.

    Forgetting does NOT equal retraining, and no certificate comes with it. `mask` is reversible: no bit of the
    values moves, and `unmask` restores every output. `forget` and `wipe` are final: the values of all cells that the
    records touched are zero. Two things stay. Values of cells that the forgotten records never touched were trained
    beside theirs, so what they taught passed on to records that shared a cell with them (forgotten records that did are
    the residue). And records that share the wiped cells lose them too; what that costs each class that stays is
    kept in `lost`, from the index alone, and measured by `trial` where rows are at hand.

    Cost: O(C M d_k) for each row once, then O(C classes) for each row and epoch and O(C M classes) for each step;
    memory C M (classes + d_k), and C numbers for each record in the index.
    """

    codebooks: int = 32
    keys: int = 256
    dim: int = 8
    projection: str = "random"
    key_rows: str | None = None
    key_epochs: int = 10
    key_batch_size: int = 256
    decay: float = 0.95
    revive: float = 0.1
    classes_total: int = 0
    optimizer: Optimizer = field(default=SGD)
    label_smoothing: float = 0.1
    epochs: int = 20
    batch_size: int = 256

    growth: ClassVar[str] = "per row"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.index: CellIndex = self.trace("cells", CellIndex(self.codebooks, self.keys))
        self.sources: Seen = self.trace("keys", Seen())
        self.lost: dict[int, float] = {}

    @classmethod
    def tiny(cls) -> KeyValueBottleneck:
        plan = Optimizer("sgd", lr=8.0, momentum=0.0, clip=1.0)
        return cls(codebooks=8, keys=16, dim=4, key_batch_size=16, optimizer=plan, epochs=5, classes_total=10)

    @property
    def needs(self) -> Needs:
        other = {Need.GENERAL_ROWS} if self.key_rows is not None else set()
        return needs({*super().needs[0], *other})

    def prepare(self, rows: Table, run: Run | None = None) -> None:
        """Place the keys on rows [n], whose labels are not read, before the first task. EngramError after it."""
        if self.started:
            raise EngramError("the keys are placed and frozen; prepare a fresh learner, before its first task")
        run = run or Run()
        with run.scope("prepare"):
            encoder = self.encoder(Task(rows), run).eval().requires_grad_(False)
            with run.seeded("projection"):
                self.model = Predictor(encoder, self.new_head(int(encoder.width)))  # type: ignore[arg-type]
            self._place(rows, run)

    def learn(self, task: Task, run: Run | None = None) -> None:
        run = run or Run()
        twice = self.index.holds(task.train.ids)
        if twice:
            raise EngramError(f"the record {twice[0]!r} was learnt before; forget it first to learn it anew")
        if self.started and self.head.masked.all(1).any():
            raise EngramError("every key of a codebook is masked, so it cannot learn; unmask some first")
        with run.scope("learn"):
            first = not self.started
            with run.seeded("projection"):
                self.begin(task, run)
            if first:
                self._place(task.train if self.key_rows is None else read(self.key_rows), run)
            self.head.reserve(range(self.classes_total))
            assert task.train.labels is not None
            cells = self.head.nearest(self.features(task.train, run).to(self.device), ~self.head.masked).cpu()
            self.fit(cells, task.train.labels, run)
            self.index.add(task.train.ids, task.train.labels, cells)
            self.solve(run)

    def fit(self, cells: Tensor, labels: Tensor, run: Run) -> None:
        """Train the values at cells [n, C] towards labels [n]."""
        head: KeyValueHead = self.head
        rows = Table({"cells": cells}, head.places(labels))
        fit(
            self.loss,
            lambda epoch: rows.batches(self.batch_size, seed=run.number("order"), epoch=epoch, shard=run.shard),
            model=head,
            optimizer=self.optimizer,
            epochs=self.epochs,
            run=run,
            steps=-(-len(rows) // self.batch_size),
        )

    def loss(self, batch: Batch) -> Mean:
        """Cross-entropy with label smoothing over all columns, of cells [B, C] and column numbers [B]."""
        assert batch.labels is not None
        logits = self.head.read(batch.inputs["cells"])
        return Mean.of(F.cross_entropy(logits, batch.labels, reduction="none", label_smoothing=self.label_smoothing))

    def solve(self, run: Run) -> None:
        """Empty the cells that no record stands behind; retire the classes of which no record is left."""
        live = self.head.live.nonzero()[:, 0].cpu()
        self.head.settle(self.index.counts())
        self.head.retire(live[~torch.isin(live, self.index.labels)])

    # --- forgetting

    def touched(self, request: Request) -> Tensor:
        """The cells [C, M] that a request's records touched while they were learnt, by the index: no rows needed."""
        return self.index.counts(self.index.holds(self._named(request))) > 0

    def activated(self, rows: Table, most: int | None = None, run: Run | None = None) -> Tensor:
        """The cells [C, M] that rows select now, learnt or not: all, or the `most` often selected."""
        head: KeyValueHead = self.head
        cells = head.nearest(self.features(rows, run).to(self.device), head.usable)
        often = torch.bincount(head.flat(cells).flatten(), minlength=head.count.numel())
        often *= head.usable.flatten()
        if most is not None:
            kept = often.argsort(descending=True, stable=True)[:most]
            often = torch.zeros_like(often).index_copy(0, kept, often[kept])
        return (often > 0).reshape(head.count.shape).cpu()

    def mask(self, cells: Tensor) -> None:
        """Bar cells [C, M] from answering, until `unmask`. What is learnt meanwhile avoids them."""
        self.head.masked |= cells.to(self.device)

    def unmask(self) -> None:
        """Take all masks off: outputs are to the bit what they were before, if nothing was learnt meanwhile."""
        self.head.masked.zero_()

    def wipe(self, cells: Tensor, run: Run | None = None) -> None:
        """Zero the values of cells [C, M] and free them, for good; records stay in the index."""
        self.lost = self.cost(cells)
        self.index.wipe(cells)
        self.refresh(run)

    def forget(self, request: Request, run: Run | None = None) -> Ids:
        """Zero the values of all cells that the request's records touched, by the index; the residue.

        Neither rows nor labels have to be at hand. EngramError, and nothing changed, if a record was never learnt.
        """
        ids = self._named(request)
        stranger = set(ids) - set(self.index.holds(ids))
        if stranger or not ids:
            name = f"the record {min(stranger)!r}" if stranger else "what the request names"
            raise EngramError(f"{name} was never learnt, or is forgotten already; leave it out")
        self.lost = self.cost(self.touched(request), ids)
        residue = self.drop(Table({}, ids=ids))
        self.refresh(run)
        return residue

    def cost(self, cells: Tensor, gone: Ids = ()) -> dict[int, float]:
        """For each class, the share in [0, 1] of its records' touches that lie in cells [C, M], without those of
        the records `gone`. From the index alone; 1 would leave nothing of what the class has stored."""
        stays = torch.ones(len(self.index.labels), dtype=torch.bool)
        stays[[self.index.rows[id] for id in gone]] = False
        inside, labels = self.index.inside(cells)[stays], self.index.labels[stays]
        stored = (self.index.cells != EMPTY)[stays]
        found = {c: labels == c for c in labels.unique().tolist()}
        return {c: float(inside[of].sum() / stored[of].sum().clamp(min=1)) for c, of in found.items()}

    def trial(self, cells: Tensor, rows: Table, run: Run | None = None) -> dict[int, tuple[float, float]]:
        """For each class of labelled rows, its accuracy before and after masking cells [C, M]. Masks are put back."""
        kept = self.head.masked.clone()
        before = hits(self.model, rows, run=run)
        try:
            self.mask(cells)
            after = hits(self.model, rows, run=run)
        finally:
            self.head.masked.copy_(kept)
        assert rows.labels is not None
        of = {c: rows.labels == c for c in rows.classes}
        return {c: (float(before[at].double().mean()), float(after[at].double().mean())) for c, at in of.items()}

    # --- parts

    @property
    def device(self) -> torch.device:
        """Where the head is."""
        return self.head.masked.device

    def new_head(self, width: int) -> nn.Module:
        return KeyValueHead(width, self.codebooks, self.keys, self.dim, self.projection)

    def extra_state(self) -> State:
        return {"lost": [[c, share] for c, share in self.lost.items()]}

    def load_extra_state(self, state: State) -> None:
        self.lost = {int(c): share for c, share in state["lost"]}

    def _named(self, request: Request) -> Ids:
        """The ids of a request; those of a class are known from the index."""
        of_class = self.index.ids_of(request.what.labels) if isinstance(request.what, Classes) else ()
        return tuple(dict.fromkeys((*request.ids, *of_class)))

    def _place(self, rows: Table, run: Run) -> None:
        """Place the keys on the heads of rows, and freeze them."""
        heads = self.head.project(self.features(rows, run).to(self.device)).cpu()
        self.head.codebook.copy_(run.phase("keys", lambda: self._codebook(heads, run.generator("keys"))))
        self.sources.add(rows.ids)

    def _codebook(self, heads: Tensor, draws: torch.Generator) -> Tensor:
        """Keys [C, M, d_k] from heads [C, n, d_k], in float64, from a normal start; they count as if just revived."""
        keys = torch.randn(self.codebooks, self.keys, heads.shape[-1], generator=draws, dtype=torch.float64)
        floor = self.revive * min(self.key_batch_size, heads.shape[1]) / self.keys
        counts, sums = torch.full(keys.shape[:2], floor, dtype=torch.float64), floor * keys
        for _ in range(self.key_epochs):
            for rows in torch.randperm(heads.shape[1], generator=draws).split(self.key_batch_size):
                batch = heads[:, rows]
                ema_codebook(batch, keys, counts, sums, decay=self.decay, revive=self.revive, generator=draws)
        return keys
