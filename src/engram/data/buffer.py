"""A buffer: the rows that a learner keeps of what it saw."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram.data.table import Column, Ids, Table, Target
from engram.errors import EngramError, unknown
from engram.stats.seeds import derive

Rule = Callable[[Table, Tensor, int], Tensor]


class Buffer:
    """At most `size` raw rows (never augmented ones), in order of arrival; a trace, from which rows go
    without residue.

    `rule`, what stays when there are too many: "reservoir": a uniform sample of all rows offered (the aim of
    Vitter 1985, algorithm R). Every id has a random key, a function of (seed, id), and the lowest keys stay:
    so neither the order of rows, nor how they are cut into pieces, nor a second epoch matters. "fifo": the
    latest rows. "per_class": size // classes rows of each class held, again those with the lowest keys (the
    quota of iCaRL, Rebuffi et al. 2017, without its herding).

    A row that is held already is passed over when it is offered again. After `drop`, the next rows offered
    fill the room. Memory O(size); an offer of b rows costs O(size + b).
    """

    def __init__(self, size: int, rule: str = "reservoir", seed: int = 0) -> None:
        if rule not in RULES:
            raise unknown("rule of a buffer", rule, RULES)
        if size < 1:
            raise EngramError(f"a buffer of size {size} holds nothing; give 1 or more")
        self.size, self.rule, self.seed = size, rule, seed
        self._table = Table({})
        self._keys = torch.empty(0, dtype=torch.long)

    @property
    def table(self) -> Table:
        """The rows held now; an empty table without columns before the first offer."""
        return self._table

    def __len__(self) -> int:
        return len(self._table)

    def offer(self, rows: Table) -> None:
        """Show rows to the buffer, which keeps some. EngramError for columns that differ from those held."""
        fresh = [row for row, id in enumerate(rows.ids) if id not in self._table.positions]
        new = rows if len(fresh) == len(rows) else rows.take(fresh)
        if not len(new):
            return
        together = self._table.concat(new)
        keys = torch.cat([self._keys, self._keys_of(new.ids)])
        stay = RULES[self.rule](together, keys, self.size)
        self._table = together if len(stay) == len(together) else together.take(stay)
        self._keys = keys[stay]

    def draw(self, n: int, generator: torch.Generator, exclude: Collection[str] = ()) -> Table:
        """`n` different rows at random, none with an id in `exclude`; fewer if there are no more."""
        outside = set(exclude)
        rows = torch.tensor([row for row, id in enumerate(self._table.ids) if id not in outside], dtype=torch.long)
        return self._table.take(rows[torch.randperm(len(rows), generator=generator)[:n]])

    def holds(self, ids: Iterable[str]) -> Ids:
        """Those of the ids whose rows are here."""
        return tuple(id for id in ids if id in self._table.positions)

    def drop(self, rows: Table) -> Ids:
        """Remove rows; the residue is always empty."""
        gone = set(rows.ids)
        stay = torch.tensor([id not in gone for id in self._table.ids], dtype=torch.bool)
        self._table, self._keys = self._table.take(stay), self._keys[stay]
        return ()

    def state_dict(self) -> dict[str, Any]:
        """The rows; keys follow from the ids and the seed."""
        return {"rows": _state(self._table)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold the rows that `state_dict` described, in a buffer of the same settings."""
        self._table = _table(state["rows"])
        self._keys = self._keys_of(self._table.ids)

    def _keys_of(self, ids: Ids) -> Tensor:
        return torch.tensor([derive("buffer", self.seed, id) for id in ids], dtype=torch.long)


def _reservoir(rows: Table, keys: Tensor, size: int) -> Tensor:
    return keys.argsort(stable=True)[:size].sort().values


def _fifo(rows: Table, keys: Tensor, size: int) -> Tensor:
    return torch.arange(len(rows))[-size:]


def _per_class(rows: Table, keys: Tensor, size: int) -> Tensor:
    if rows.target != Target.CLASSES or rows.labels is None:
        raise EngramError(f"a buffer with the rule 'per_class' needs class labels; these rows have {rows.target}")
    classes, counts = torch.unique(rows.labels, return_counts=True)
    if len(classes) > size:
        raise EngramError(
            f"a buffer of size {size} cannot hold a row of each of {len(classes)} classes; make it larger"
        )
    order = torch.from_numpy(np.lexsort((keys.numpy(), rows.labels.numpy())))
    rank = torch.arange(len(rows)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return order[rank < size // len(classes)].sort().values


RULES: dict[str, Rule] = {"reservoir": _reservoir, "fifo": _fifo, "per_class": _per_class}


def _state(table: Table) -> dict[str, Any]:
    """A table as tensors, lists and strings."""
    return {
        "inputs": dict(table.inputs),
        "labels": table.labels,
        "ids": list(table.ids),
        "extra": {name: column if isinstance(column, Tensor) else list(column) for name, column in table.extra.items()},
        "names": {str(id): name for id, name in table.names.items()},
    }


def _table(state: dict[str, Any]) -> Table:
    names = {int(id): name for id, name in state["names"].items()}
    extra: dict[str, Column] = state["extra"]
    return Table(state["inputs"], state["labels"], tuple(state["ids"]), extra, names)
