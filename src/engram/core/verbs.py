"""The verbs for one's own model: erase what a request names, and examine what is left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from engram.core import erasure
from engram.core.finding import Finding
from engram.core.forgetter import Forgetter
from engram.core.learner import Forgetful, Learner, fork
from engram.core.needs import Need, satisfied
from engram.core.probe import Probe, Subject
from engram.core.request import Classes, Records, Request
from engram.core.settings import make
from engram.core.stored import read_json
from engram.data.table import Table, Target
from engram.engine.recipe import Trainer
from engram.engine.run import Run
from engram.errors import EngramError

USUAL = ("forget.SSD", "forget.GradientDifference", "forget.Finetune", "forget.GradientAscent")
RANKING = Path(__file__).parents[1] / "configs" / "ranking.json"  # as `engram compare unlearning` wrote it
Erased = TypeVar("Erased", nn.Module, Learner)
PROBES = ("audit.Accuracy", "audit.Membership", "audit.RetrainGap")


def erase(
    model: Erased,
    *,
    forget: Table | None = None,
    retain: Table | None = None,
    classes: Sequence[int] | None = None,
    method: str | Mapping[str, Any] | Forgetter = "auto",
    recipe: Trainer | None = None,
    statistics: Mapping[str, Any] | None = None,
    run: Run | None = None,
) -> Erased:
    """A new model that has forgotten the `forget` rows, or whole `classes` of the rows in `forget`.

    A learner comes back as a new learner: with "auto" it forgets in its own way if it has one, and all its traces let
    go of the rows.

    `retain`: training rows that stay, as far as they are at hand. `method`: a name ("SSD"), {"name": …, setting:
    value}, a forgetter, or "auto": the first in the order of `automatic` that can do with what is given. `recipe`:
    trains one more model of this kind. `statistics`: what a forgetter's `prepare` stored.
    EngramError, before any work, if the method needs what is not given.
    """
    request = request_for(forget, retain, classes, {Need.RECIPE: recipe, Need.STATISTICS: statistics})
    if isinstance(model, Learner):
        twin = fork(model)
        own = method == "auto" and isinstance(model, Forgetful)
        erasure.forget(twin, request, None if own else _chosen(method, request), run)
        return twin  # type: ignore[return-value]
    return _chosen(method, request).forget(model, request, run)


def examine(
    model: nn.Module,
    *,
    before: nn.Module | None = None,
    forget: Table | None = None,
    retain: Table | None = None,
    test: Table | None = None,
    classes: Sequence[int] | None = None,
    oracles: Sequence[nn.Module] = (),
    recipe: Trainer | None = None,
    forgetter: Forgetter | None = None,
    probes: Iterable[str | Mapping[str, Any] | Probe] | None = None,
    run: Run | None = None,
) -> list[Finding]:
    """What probes find in a model. Verdicts need at least five `oracles` (models retrained without the forget rows), or
    a `recipe` to train them with; without, they are unknown. `forgetter`: for probes that make further models forget
    (ULiRA, KLoM). `probes`: None takes Accuracy, Membership and RetrainGap,
    as far as they can do with what is given. EngramError if a probe that was named asks for what is not given."""
    rows = {
        name: table for name, table in (("forget", forget), ("retain", retain), ("test", test)) if table is not None
    }
    if classes is not None and test is not None:
        gone = test.of_classes(classes)
        rows |= {"test-forget": gone, "test": test.without(gone.ids)}
    request = request_for(forget, retain, classes, {}) if forget is not None else None
    subject = Subject(
        model, before=before, request=request, rows=rows, recipe=recipe, oracles=tuple(oracles), forgetter=forgetter
    )
    run = run or Run()
    named = PROBES if probes is None else probes
    asked = [probe if isinstance(probe, Probe) else make(probe, wing="audit") for probe in named]
    if probes is None:
        asked = [probe for probe in asked if _can(probe, subject)]
    for probe in asked:
        probe.check(subject)
    return [finding for probe in asked for finding in probe.examine(subject, run)]


def _can(probe: Probe, subject: Subject) -> bool:
    """Whether the probe can do with this subject."""
    try:
        probe.check(subject)
    except EngramError:
        return False
    return True


def request_for(
    forget: Table | None,
    retain: Table | None,
    classes: Sequence[int] | None,
    at_hand: Mapping[Need, Any],
) -> Request:
    """The request for rows or classes. EngramError if it names nothing."""
    if forget is not None and not len(forget):
        raise EngramError("the forget set is empty; name at least one record or class")
    if classes is not None:
        return Request(Classes(tuple(classes)), forget, retain, at_hand=at_hand)
    if forget is None:
        raise EngramError("say what must be forgotten: rows in forget=, or classes=")
    return Request(Records(forget.ids), forget, retain, at_hand=at_hand)


def automatic(request: Request, ranking: Path | None = None) -> tuple[str, ...]:
    """The order in which "auto" asks which forgetter can be used: retraining first, then as they were ranked by their
    gap to retrained models, which was measured on classes; for other targets a usual order. `ranking`: the file that a
    comparison of one's own wrote, whatever the target. EngramError if it is none."""
    table = request.forget if request.forget is not None else request.retain
    if ranking is None and table is not None and table.target == Target.CLASSES and RANKING.exists():
        ranking = RANKING
    if ranking is not None:
        order = read_json(ranking).get("order")
        if not isinstance(order, list):
            raise EngramError(f"{ranking} is no ranking, as engram compare unlearning writes it")
        return ("forget.Retrain", *order)
    return ("forget.Retrain", *USUAL)


def _chosen(method: str | Mapping[str, Any] | Forgetter, request: Request) -> Forgetter:
    if isinstance(method, Forgetter):
        return method
    if method != "auto":
        return make(method, wing="forget")
    for name in automatic(request):
        forgetter: Forgetter = make(name)
        if satisfied(forgetter.needs, request.have()):
            return forgetter
    raise EngramError(
        f"no forgetter can do with {', '.join(sorted(request.have())) or 'nothing'}; see `engram methods`"
    )
