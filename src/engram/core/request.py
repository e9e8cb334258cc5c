"""A request: what must be forgotten, and what is still at hand to do it with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from engram.core.needs import Need
from engram.data.table import MISSING, Ids, Table, Target
from engram.errors import EngramError, unknown


@dataclass(frozen=True)
class Records:
    """Forget these records."""

    ids: Ids


@dataclass(frozen=True)
class Classes:
    """Forget every record of these classes, and the classes with them."""

    labels: tuple[int, ...]


@dataclass(frozen=True)
class Concept:
    """Forget a concept: `text` names it, `anchor` is what may take its place, `prompts` show how it is asked for."""

    text: str
    anchor: str | None = None
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """`what` must go. `forget`, `retain`, `general`: the rows that are still at hand; None = gone.
    `at_hand`: further things by need (statistics, recipe, oracles, history)."""

    what: Records | Classes | Concept
    forget: Table | None = None
    retain: Table | None = None
    general: Table | None = None
    at_hand: Mapping[Need, Any] = field(default_factory=dict)

    @classmethod
    def of_records(cls, table: Table, ids: Ids, **at_hand: Any) -> Request:
        """Forget these rows of a table, the rest of which is at hand. EngramError for no ids or unknown ones."""
        if not ids:
            raise EngramError("the forget set is empty; name at least one record id")
        return cls(Records(tuple(ids)), table.select(ids), table.without(ids), at_hand=_needs(at_hand))

    @classmethod
    def of_classes(cls, table: Table, labels: tuple[int, ...], **at_hand: Any) -> Request:
        """Forget these classes of a table, the rest of which is at hand. EngramError for a class without rows."""
        for label in labels:
            if label not in table.classes:
                raise unknown("class", label, table.classes)
        forget = table.of_classes(labels)
        if not labels:
            raise EngramError("the forget set is empty; name at least one class")
        return cls(Classes(tuple(labels)), forget, table.without(forget.ids), at_hand=_needs(at_hand))

    @property
    def ids(self) -> Ids:
        """The ids that must be forgotten, as far as they are known."""
        if isinstance(self.what, Records):
            return self.what.ids
        return self.forget.ids if self.forget is not None else ()

    def have(self) -> frozenset[Need]:
        """What is at hand, read off the request itself."""
        found = {need for need, thing in self.at_hand.items() if thing is not None}
        for rows, need, labels in (
            (self.forget, Need.FORGET_ROWS, Need.FORGET_LABELS),
            (self.retain, Need.RETAIN_ROWS, Need.RETAIN_LABELS),
        ):
            if rows is not None and len(rows):
                found.add(need)
                if _labelled(rows):
                    found.add(labels)
        if self.general is not None and len(self.general):
            found.add(Need.GENERAL_ROWS)
        if isinstance(self.what, Concept):
            found.add(Need.CONCEPT)
            if self.what.anchor is not None:
                found.add(Need.ANCHOR)
        return frozenset(found)

    def remarks(self) -> list[str]:
        """What is odd about the request, a sentence each: records that are whole classes, one class that is left."""
        forget, retain = self.forget, self.retain
        if forget is None or retain is None or not forget.target == retain.target == Target.CLASSES:
            return []
        found = []
        whole = [c for c in forget.classes if c not in retain.classes]
        if isinstance(self.what, Records) and whole and len(retain):
            named = ", ".join(str(forget.names.get(c, c)) for c in whole)
            found.append(
                f"the records are all that there are of {named}: this is a request for whole classes, which retrained "
                "models cannot tell at all; name them with --classes if that is meant"
            )
        if len(retain.classes) == 1 and len(forget.classes) > 1:
            only = retain.classes[0]
            found.append(f"all rows that stay are of one class ({retain.names.get(only, only)}), so little can be kept")
        return found

    def but(self, **changes: Any) -> Request:
        """A copy with other parts."""
        return replace(self, **changes)


def _needs(at_hand: Mapping[str, Any]) -> dict[Need, Any]:
    return {Need(name.replace("_", "-")): thing for name, thing in at_hand.items()}


def _labelled(rows: Table) -> bool:
    """Every row has a label."""
    if rows.labels is None:
        return False
    if rows.target == Target.NUMBERS:
        return not bool(rows.labels.isnan().any())
    return rows.target == Target.TOKENS or bool((rows.labels != MISSING).all())
