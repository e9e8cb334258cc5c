"""A forget event: the model, then every trace, then what was derived from them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from engram.core.forgetter import Forgetter
from engram.core.learner import Forgetful, Learner
from engram.core.request import Request
from engram.core.settings import name_of
from engram.data.table import Ids
from engram.engine.run import Run
from engram.errors import EngramError


@dataclass(frozen=True)
class Done:
    """How a request was carried out. `residue`: ids of which some trace still holds something."""

    method: str
    exact: bool
    residue: Ids


def forget(learner: Learner, request: Request, method: Forgetter | None = None, run: Run | None = None) -> Done:
    """Carry out a request on a learner, in place.

    Without a method, the learner's own forgetting is used. With one, the method makes a new model, the rows are dropped
    from every trace, and derived parts are refreshed. EngramError, and nothing changed, if neither is possible.
    """
    run = run or Run()
    if method is None and not isinstance(learner, Forgetful):
        raise EngramError(f"{name_of(learner)} cannot forget by itself; name a forgetter")
    if method is None:
        assert isinstance(learner, Forgetful)
        residue = learner.forget(request, run)
        learner.refresh(run)
        return Done(name_of(learner), type(learner).exact, residue)
    model: nn.Module = method.forget(learner.model, request, run)
    learner.model = model
    residue = learner.drop(request.forget) if request.forget is not None else learner.holds(request.ids)
    learner.refresh(run)
    return Done(name_of(method), type(method).exact, residue)
