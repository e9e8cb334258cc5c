"""The protocol of forgetters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from engram.core.needs import NOTHING, Need, Needs, require, require_processes
from engram.core.request import Request
from engram.core.settings import name_of
from engram.data.table import Table
from engram.engine.run import Run
from engram.errors import EngramError

Statistics = dict[str, Tensor]


@dataclass(kw_only=True, eq=False)
class Forgetter:
    """Takes a model and a request, returns a NEW model; the argument is untouched.

    A subclass is a dataclass whose fields are its hyper-parameters, and implements `forget`, which starts with
    `self.check(request)`. One that can store today what lets one forget later also implements `prepare`.
    """

    exact: ClassVar[bool] = False
    processes: ClassVar[str] = "exact"  # exact, statistical or one: what two processes give

    @property
    def needs(self) -> Needs:
        """Alternatives of what it cannot do without; a property of the instance."""
        return NOTHING

    def check(self, request: Request) -> None:
        """EngramError, with the methods that could do it, if the request lacks what this one needs; for an approximate
        method that is asked to forget all of the data, which only an exact one can; and for more processes than it can
        work in."""
        require_processes(name_of(self), self.processes)
        if not self.exact and request.forget is not None and request.retain is not None and not len(request.retain):
            raise EngramError(
                f"the forget set is all of the data: {name_of(self)} is approximate and would leave a ruin that still "
                "holds something; use an exact method (keep.ACU, keep.NMC), or delete the model"
            )
        require(name_of(self), self.needs, request.have())

    def forget(self, model: nn.Module, request: Request, run: Run | None = None) -> nn.Module:
        """A new model that has forgotten what the request names."""
        raise NotImplementedError


def at_hand(request: Request, need: Need) -> Any:
    """What the request holds for a need, or None."""
    return request.at_hand.get(need)


def statistics_of(request: Request, kind: str) -> Mapping[str, Tensor] | None:
    """The stored statistics of a kind (as `prepare` named it), or None."""
    stored = at_hand(request, Need.STATISTICS)
    return stored.get(kind) if stored else None


def rows(table: Table | None) -> Table:
    """A table that `check` has found to be there."""
    assert table is not None
    return table
