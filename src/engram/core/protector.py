"""The protocol of protectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from engram.core.needs import NOTHING, Needs
from engram.data.table import Table
from engram.engine.run import Run


@dataclass(kw_only=True, eq=False)
class Protector:
    """Makes a table that is harder to learn from: the same ids and labels, other inputs."""

    processes: ClassVar[str] = "exact"

    @property
    def needs(self) -> Needs:
        """Alternatives of what it cannot do without."""
        return NOTHING

    def protect(self, table: Table, run: Run | None = None) -> Table:
        """The protected table."""
        raise NotImplementedError
