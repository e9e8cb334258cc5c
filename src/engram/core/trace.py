"""Traces: state that keeps rows, or what was computed from them. Forgetting has to reach all of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from engram.data.table import Ids, Table

State = dict[str, Any]


@runtime_checkable
class Trace(Protocol):
    """What a learner registers for each piece of state that rows went into."""

    def holds(self, ids: Iterable[str]) -> Ids:
        """Those of the ids that went into this state."""

    def drop(self, rows: Table) -> Ids:
        """Take rows out again; the ids that could not be removed exactly (the residue)."""

    def state_dict(self) -> State:
        """Tensors, numbers, strings, and lists and dicts of them."""

    def load_state_dict(self, state: State) -> None:
        """Become what `state_dict` described."""


class Seen:
    """The ids that went into a model's weights or a derived quantity, from which nothing can be taken out again.

    `drop` takes the ids off the list and reports them as residue: the state may still carry what it learnt of them.
    """

    def __init__(self) -> None:
        self.ids: set[str] = set()

    def add(self, ids: Iterable[str]) -> None:
        """Note that rows with these ids went in."""
        self.ids.update(ids)

    def holds(self, ids: Iterable[str]) -> Ids:
        return tuple(id for id in ids if id in self.ids)

    def drop(self, rows: Table) -> Ids:
        residue = self.holds(rows.ids)
        self.ids.difference_update(residue)
        return residue

    def state_dict(self) -> State:
        return {"ids": sorted(self.ids)}

    def load_state_dict(self, state: State) -> None:
        self.ids = set(state["ids"])


class Derived(Seen):
    """Tensors by name that were computed from rows (importances, anchors) and cannot be recomputed without them."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Any] = {}

    def state_dict(self) -> State:
        return {**super().state_dict(), "values": dict(self.values)}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self.values = dict(state["values"])
