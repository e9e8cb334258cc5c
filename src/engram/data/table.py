"""A table: rows with stable ids and a target whose kind follows from the labels themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram.errors import EngramError, unknown
from engram.stats.seeds import generator

Ids = tuple[str, ...]
Column = Tensor | Sequence[str]
MISSING = -1
IGNORED = -100


class Target(StrEnum):
    """What a row's label is. It follows from the labels' type and shape; nobody has to say it."""

    CLASSES = "classes"  # int64 [n]; MISSING = no label
    NUMBERS = "numbers"  # float [n, k]; NaN = no label
    TOKENS = "tokens"  # int64 [n, T]; IGNORED where no token is asked for
    NONE = "none"


@dataclass(frozen=True)
class Batch:
    """Rows on their way through a model: inputs by the names of its arguments, and the row numbers [B]."""

    inputs: dict[str, Tensor]
    labels: Tensor | None
    rows: Tensor
    extra: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def trimmed(self) -> Batch:
        """Rows of tokens without the last columns that none of them uses: padding on the right. Others as they are.

        A causal model says the same of the tokens that stay, in less time.
        """
        if self.labels is None or self.labels.ndim != 2 or self.labels.is_floating_point():
            return self
        used = self.labels != IGNORED
        if "attention_mask" in self.inputs:
            used = used | self.inputs["attention_mask"].bool()
        width = used.shape[1] - int(used.any(0).flip(0).int().argmax())
        inputs = {k: v[:, :width] if v.shape[1:] == self.labels.shape[1:] else v for k, v in self.inputs.items()}
        return Batch(inputs, self.labels[:, :width], self.rows, self.extra)

    def to(self, device: str | torch.device) -> Batch:
        """The same rows on another device; row numbers stay on the CPU."""
        if torch.device(device).type == "cpu":
            return self
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return Batch(inputs, labels, self.rows, self.extra)


@dataclass(frozen=True, eq=False)
class Table:
    """Immutable rows.

    `inputs`: tensors [n, …] by the name of the model's argument (`pixel_values`, `values`, `input_ids`, …);
    uint8 stands for an image and reaches the model as float in [0, 1]. `labels`: see `Target`. `ids`: n
    different strings (made from the row numbers when left out). `extra`: further columns, tensors [n] or
    strings. `names`: class names. Raises EngramError for unequal lengths; `checked` also for duplicate ids
    and NaN among the inputs.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor | None = None
    ids: Ids = ()
    extra: Mapping[str, Column] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {name: len(value) for name, value in {**self.inputs, **self.extra}.items()}
        if self.labels is not None:
            lengths["labels"] = len(self.labels)
            object.__setattr__(self, "labels", _as_labels(self.labels))
        n = len(self.ids) or next(iter(lengths.values()), 0)
        if not self.ids:
            object.__setattr__(self, "ids", tuple(map(str, range(n))))
        wrong = {name: length for name, length in lengths.items() if length != n}
        if wrong:
            raise EngramError(f"a table with {n} ids needs {n} rows in every column, but {wrong}")

    def checked(self) -> Table:
        """The table itself, if its ids are unique and its inputs finite. Readers call it; cost O(cells)."""
        if len(self.positions) != len(self.ids):
            seen: set[str] = set()
            twice = next(id for id in self.ids if id in seen or seen.add(id))  # type: ignore[func-returns-value]
            raise EngramError(f"the id {twice!r} stands in the table more than once; ids must be unique")
        for name, value in self.inputs.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                row = int((~torch.isfinite(value.reshape(len(value), -1))).any(1).nonzero()[0])
                where = f"first in row {self.ids[row]!r}"
                raise EngramError(f"column {name!r} holds NaN or infinity ({where}); fill or drop such rows")
        return self

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def positions(self) -> dict[str, int]:
        """Row number by id."""
        return {id: row for row, id in enumerate(self.ids)}

    @property
    def target(self) -> Target:
        """The kind of the labels."""
        if self.labels is None:
            return Target.NONE
        if self.labels.is_floating_point():
            return Target.NUMBERS
        return Target.CLASSES if self.labels.ndim == 1 else Target.TOKENS

    @property
    def classes(self) -> tuple[int, ...]:
        """The class ids that occur, ascending; empty for other targets."""
        if self.target != Target.CLASSES or self.labels is None:
            return ()
        return tuple(int(c) for c in torch.unique(self.labels).tolist() if c != MISSING)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one row of every input."""
        return {name: tuple(value.shape[1:]) for name, value in self.inputs.items()}

    def take(self, rows: Tensor | Sequence[int] | Sequence[bool]) -> Table:
        """Rows by number, or by a mask [n], in the given order."""
        index = torch.as_tensor(rows)
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.long()
        order = index.tolist()
        # index_select copies a row at a time; [] is ten times as slow on uint8 images
        return Table(
            {name: value.index_select(0, index) for name, value in self.inputs.items()},
            None if self.labels is None else self.labels.index_select(0, index),
            tuple(self.ids[i] for i in order),
            {name: _pick(value, index, order) for name, value in self.extra.items()},
            self.names,
        )

    def rows_of(self, ids: Iterable[str]) -> Tensor:
        """Row numbers [k] of ids; EngramError, with the nearest id, for one that is not here."""
        wanted = list(ids)
        missing = [id for id in wanted if id not in self.positions]
        if missing:
            raise unknown("record id", missing[0], self.ids)
        return torch.tensor([self.positions[id] for id in wanted], dtype=torch.long)

    def select(self, ids: Iterable[str]) -> Table:
        """The rows with these ids, in their order."""
        return self.take(self.rows_of(ids))

    def without(self, ids: Iterable[str]) -> Table:
        """All rows but those with these ids; ids that are not here do not matter."""
        gone = set(ids)
        return self.take([id not in gone for id in self.ids]) if gone & self.positions.keys() else self

    def of_classes(self, classes: Iterable[int]) -> Table:
        """The rows whose label is one of these classes."""
        if self.labels is None or self.target != Target.CLASSES:
            raise EngramError(
                f"these rows have no class labels (target: {self.target}); rows of a class cannot be found"
            )
        return self.take(torch.isin(self.labels, torch.tensor(sorted(classes), dtype=torch.long)))

    def where(self, expression: str) -> Table:
        """Rows for which `column == value` holds (==, !=, <, <=, >, >=); `label` takes class names too."""
        from engram.data.where import matches

        return self.take(matches(self, expression))

    def concat(self, *others: Table) -> Table:
        """This table's rows, then the others'; all need the same columns, shapes and kind of labels.

        Tables without rows do not count; extra columns that one of them lacks are left out. Cost O(cells).
        """
        tables = [table for table in (self, *others) if len(table)] or [self]
        first = tables[0]
        for table in tables[1:]:
            _alike(first, table)
        given = [table.labels for table in tables if table.labels is not None]
        labels = torch.cat(given) if given else None
        shared = [name for name in first.extra if all(name in table.extra for table in tables)]
        extra = {name: _join([table.extra[name] for table in tables]) for name in shared}
        inputs = {name: torch.cat([table.inputs[name] for table in tables]) for name in first.inputs}
        names = {id: name for table in reversed(tables) for id, name in table.names.items()}
        return Table(inputs, labels, tuple(id for table in tables for id in table.ids), extra, names)

    def with_column(self, name: str, values: Column) -> Table:
        """A copy with one more extra column, or another content of it."""
        return replace(self, extra={**self.extra, name: values})

    def with_labels(self, labels: Tensor | None) -> Table:
        """A copy with other labels."""
        return replace(self, labels=labels)

    def unlabelled(self) -> Table:
        """A copy without labels."""
        return self.with_labels(None)

    def batch(self, rows: Tensor) -> Batch:
        """The rows with these numbers as one batch."""
        inputs = {name: _scaled(value.index_select(0, rows)) for name, value in self.inputs.items()}
        kept = {name: value for name, value in self.extra.items() if isinstance(value, Tensor)}
        extra = {name: value.index_select(0, rows) for name, value in kept.items()}
        labels = None if self.labels is None else self.labels.index_select(0, rows)
        return Batch(inputs, labels, rows, extra)

    def batches(
        self,
        size: int,
        *,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = True,
        shard: tuple[int, int] = (0, 1),
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """Batches of `size` rows; the order is a function of (seed, epoch) alone.

        `shard` = (rank, processes): every process takes its share of each batch, so that the union over the
        processes is the batch of one process.
        """
        order = shuffled(len(self), seed, epoch) if shuffle else torch.arange(len(self))
        rank, world = shard
        for rows in order.split(size):
            if drop_last and len(rows) < size:
                return
            yield self.batch(rows if world == 1 else rows[rank::world])

    @cached_property
    def digest(self) -> str:
        """SHA-256 over ids, inputs and labels (hex). It identifies contents: treat it as personal data."""
        hasher = hashlib.sha256("\x1f".join(self.ids).encode())
        for name in sorted(self.inputs):
            hasher.update(f"{name}{tuple(self.inputs[name].shape)}{self.inputs[name].dtype}".encode())
            hasher.update(np.ascontiguousarray(self.inputs[name].cpu().numpy()).tobytes())
        if self.labels is not None:
            hasher.update(np.ascontiguousarray(self.labels.cpu().numpy()).tobytes())
        return hasher.hexdigest()


def shuffled(n: int, seed: int, epoch: int) -> Tensor:
    """The order [n] in which an epoch goes through n rows."""
    return torch.randperm(n, generator=generator("order", seed, epoch))


def _as_labels(labels: Tensor) -> Tensor:
    """int64 [n] or [n, T], or float32 [n, k]: numbers always have a dimension of their own."""
    if labels.is_floating_point():
        return labels.float().reshape(len(labels), -1)
    return labels.long()


def _alike(one: Table, other: Table) -> None:
    """EngramError where rows of two tables cannot stand in one."""
    ours, theirs = ({**table.shapes, "target": table.target.value} for table in (one, other))
    types = [{name: value.dtype for name, value in table.inputs.items()} for table in (one, other)]
    if ours != theirs or types[0] != types[1]:
        raise EngramError(f"tables with different columns cannot be put together: {ours} and {theirs}")


def _scaled(value: Tensor) -> Tensor:
    return value.float().div_(255) if value.dtype == torch.uint8 else value


def _pick(column: Column, index: Tensor, order: list[int]) -> Column:
    return column.index_select(0, index) if isinstance(column, Tensor) else [column[i] for i in order]


def _join(columns: Sequence[Column]) -> Column:
    if isinstance(columns[0], Tensor):
        return torch.cat([torch.as_tensor(column) for column in columns])
    return [value for column in columns for value in column]
