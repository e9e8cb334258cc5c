"""Episodes: a few small support sets in order, then queries about all of them.

The sampler of continual few-shot learning: Antoniou et al. 2020 (arXiv 2004.11967), with the instance test of Kowadlo
et al. 2024 (arXiv 2209.07863), in which every image is a class of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engram.data.table import Table, Target
from engram.errors import EngramError
from engram.stats.seeds import generator


@dataclass(frozen=True)
class Episode:
    """Support sets in the order in which they are shown, and the rows that are asked about at the end.

    Labels are local, 0..N-1 over the whole episode; ids stay those of the table. `classes`: the original class ids ->
    the local ones; in the instance test, where labels count images, -> their place in the order of drawing.
    """

    supports: tuple[Table, ...]
    queries: Table
    classes: dict[int, int]

    @property
    def labels(self) -> tuple[int, ...]:
        """The local labels that occur, 0..N-1."""
        return tuple(sorted({label for support in self.supports for label in support.classes}))


def episodes(
    table: Table,
    *,
    ways: int,
    shots: int,
    queries: int,
    sets: int = 1,
    change: int = 1,
    instances: bool = False,
    count: int,
    seed: int,
) -> Iterator[Episode]:
    """`count` episodes; the i-th is a function of (seed, i) and the table alone.

    Class test: every `change` support sets, `ways` new classes come, all different ones, and keep their labels for
    those sets; each set shows `shots` rows of each of its classes, and `queries` more are asked about for every set.
    No row occurs twice. There are ways · sets / change labels. Instance test (`instances`): `ways` classes are drawn
    once, every set shows `shots` new rows of each, each row is a label of its own, in order, and the queries are these
    very rows (`queries` and `change` do not matter); ways · shots · sets labels. Classes with too few rows do not take
    part. EngramError at once if there are no class labels, a number is below 1, `change` does not divide `sets`, or
    too few classes have rows enough. Cost O(cells of the rows drawn).
    """
    numbers = {"ways": ways, "shots": shots, "queries": queries, "sets": sets, "change": change, "count": count}
    for name, number in numbers.items():
        if number < 1:
            raise EngramError(f"{name} of episodes must be 1 or more, not {number}")
    if not instances and sets % change:
        raise EngramError(f"{sets} support sets cannot change classes every {change} sets; give a divisor")
    blocks = 1 if instances else sets // change
    each = shots * sets if instances else change * (shots + queries)
    rows = _by_class(table, each, blocks * ways)
    draw = _instances if instances else _classes
    shape = (blocks, ways, sets // blocks, shots)
    return (draw(table, rows, shape, each, generator("episode", seed, i)) for i in range(count))


def _by_class(table: Table, each: int, wanted: int) -> dict[int, Tensor]:
    """Row numbers of every class that has at least `each`."""
    if table.target != Target.CLASSES or table.labels is None:
        raise EngramError(f"episodes need class labels; this table's target is {table.target}")
    found = {c: (table.labels == c).nonzero()[:, 0] for c in table.classes}
    able = {c: rows for c, rows in found.items() if len(rows) >= each}
    if len(able) < wanted:
        raise EngramError(
            f"an episode needs {wanted} classes with {each} rows each, and {len(able)} of {len(found)} have so many"
        )
    return able


Shape = tuple[int, int, int, int]  # blocks, ways, sets of a block, shots


def _drawn(rows: dict[int, Tensor], shape: Shape, each: int, draws: torch.Generator) -> tuple[list[int], Tensor]:
    """Different classes, and row numbers [blocks, ways, sets, each / sets] of them."""
    blocks, ways, sets, _ = shape
    names = sorted(rows)
    chosen = [names[i] for i in torch.randperm(len(names), generator=draws)[: blocks * ways].tolist()]
    picked = [rows[c][torch.randperm(len(rows[c]), generator=draws)[:each]] for c in chosen]
    return chosen, torch.stack(picked).reshape(blocks, ways, sets, -1)


def _classes(table: Table, rows: dict[int, Tensor], shape: Shape, each: int, draws: torch.Generator) -> Episode:
    blocks, ways, sets, shots = shape
    chosen, numbers = _drawn(rows, shape, each, draws)
    labels = torch.arange(blocks * ways).reshape(blocks, ways, 1, 1).expand_as(numbers)
    local = {c: place for place, c in enumerate(chosen)}
    names = {place: table.names[c] for c, place in local.items() if c in table.names}
    supports = [
        _local(table, numbers[b, :, s, :shots], labels[b, :, s, :shots], names)
        for b in range(blocks)
        for s in range(sets)
    ]
    asked = numbers[..., shots:].transpose(1, 2), labels[..., shots:].transpose(1, 2)
    return Episode(tuple(supports), _local(table, *asked, names), local)


def _instances(table: Table, rows: dict[int, Tensor], shape: Shape, each: int, draws: torch.Generator) -> Episode:
    chosen, numbers = _drawn(rows, shape, each, draws)
    in_order = numbers[0].transpose(0, 1)  # [sets, ways, shots]
    labels = torch.arange(in_order.numel()).reshape(in_order.shape)
    supports = tuple(_local(table, n, k, {}) for n, k in zip(in_order, labels, strict=True))
    return Episode(supports, _local(table, in_order, labels, {}), {c: place for place, c in enumerate(chosen)})


def _local(table: Table, numbers: Tensor, labels: Tensor, names: dict[int, str]) -> Table:
    """The rows with these numbers under their local labels."""
    return replace(table.take(numbers.flatten()), labels=labels.flatten().clone(), names=names)


def feasible(table: Table, ways: int, shots: int, queries: int) -> tuple[int, int, int]:
    """Ways, shots and queries no larger than asked for, of which one support set can be drawn from a table.

    (0, 0, 0) if no class has two rows.
    """
    labels = torch.as_tensor(table.labels)
    counts = sorted((int((labels == c).sum()) for c in table.classes), reverse=True)
    ways = min(ways, sum(count > 1 for count in counts))
    if not ways:
        return 0, 0, 0
    each = min(shots + queries, counts[ways - 1])
    shots = min(shots, each - 1)
    return ways, shots, each - shots
