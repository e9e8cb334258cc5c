"""On a chronological stream learners are judged by error against all that they cost; a start from what was learnt pays.

On scikit-learn's sets (the stream "sklearn": three tables, and digits as they are, turned, inverted, in pairs, and
again), with perceptrons: the paper's tasks, networks and figures are far larger, and its table was not at hand, so that
bands are of order and of bookkeeping. The narrow hidden layer makes features worth having: of a wide one, untrained
features tell digits by their neighbours as well as trained ones do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engram.core.chronicle import Record, follow, mean_error
from engram.data.chronological import Dated
from engram.data.streams import chronological
from engram.engine.run import Run
from engram.keep.dynamic import Dynamic
from engram.keep.independent import Independent
from engram.keep.per_task import Choice, PerTask
from engram.keep.previous import Previous
from engram.reproduce.claims import Claim

NETWORK = {"name": "MLP", "hidden": [16]}
RECURRING = ("turned digits", "digits", "turned digits", "digits again")
OWN = 1  # the place of the first digits
STEPS, EPOCHS = 20, 8


def claims(seeds: Iterable[int], epochs: int = 3, trials: int = 2) -> list[Claim]:
    """Errors on test rows, and operations of all trials, 2 per multiply-add."""
    stream = chronological("sklearn")
    few = chronological("sklearn", variant="columns")
    found: dict[str, list[float]] = {name: [] for name in ("own", "lead", "dynamic", "previous", "order", "double")}
    for seed in seeds:
        dynamic, independent = recurrence(Dynamic, seed), recurrence(Independent, seed)
        found["own"].append(float(dynamic[0].parent == OWN))
        found["lead"].append(independent[1] - dynamic[1])
        errors = {cls: mean_error(along(cls, stream, seed, epochs, trials)) for cls in (Independent, Previous, Dynamic)}
        found["previous"].append(errors[Independent] - errors[Previous])
        found["dynamic"].append(errors[Independent] - errors[Dynamic])
        forth, back, twice = (
            along(Independent, events, seed, epochs, count)[-1].flops
            for events, count in ((few, trials), (few[::-1], trials), (few, 2 * trials))
        )
        found["order"].append(back / forth - 1)
        found["double"].append(twice / forth)
    return [
        Claim(
            "share of seeds at which Dynamic starts a task that comes back from its own first state, two tasks later",
            "a recurring data set should be recognised (0.25 by chance, of four candidates)",
            (1.0, 1.0),
            tuple(found["own"]),
        ),
        Claim(
            f"error of the task that comes back after {STEPS} updates, Independent's less Dynamic's",
            "fine-tuning from related knowledge is better at equal training operations (curves, no figure)",
            (0.2, 0.9),
            tuple(found["lead"]),
        ),
        Claim(
            "mean error along the stream, Independent's less Dynamic's, equal trials",
            "dynamic fine-tuning has lower error than independent training (curves, no figure)",
            (0.0, 0.15),
            tuple(found["dynamic"]),
        ),
        Claim(
            "mean error along the stream, Independent's less Previous's, equal trials",
            "the previous state is a better start than none, on the mean (curves, no figure)",
            (0.0, 0.15),
            tuple(found["previous"]),
        ),
        Claim(
            "total cost of Independent in the opposite order, over that in the given one, less 1",
            "0: independent totals know no order",
            (0.0, 0.0),
            tuple(found["order"]),
        ),
        Claim(
            "total cost of twice as many trials, over that of the trials",
            "2: every trial is paid for",
            (1.98, 2.02),
            tuple(found["double"]),
        ),
    ]


def along(cls: type[PerTask], events: Sequence[Dated], seed: int, epochs: int, trials: int) -> list[Record]:
    """A learner's course, judged on test rows."""
    learner = cls(network=NETWORK, epochs=epochs, trials=trials, batch_size=32, lr=(1e-2, 1e-1), validate_every=25)
    return follow(learner, events, Run(seed=seed), on="test")


def recurrence(cls: type[PerTask], seed: int) -> tuple[Choice, float]:
    """Turned digits, digits, turned ones with time enough, then the digits again with little: how the last network
    came to be, and its error."""
    by_name = {event.name: event for event in chronological("sklearn", variant="images", kinds=("classes",))}
    events, run = [by_name[name] for name in RECURRING], Run(seed=seed)
    learner, hasty = (made(cls, 50_000), made(cls, STEPS))
    follow(learner, events[:-1], run)
    hasty.load_state_dict(learner.state_dict())
    records = follow(hasty, events[-1:], run, on="test")
    return hasty.choices[-1], records[0].error


def made(cls: type[PerTask], most: int) -> PerTask:
    """A learner with one trial of a fixed setting."""
    fixed = {"lr": (0.1, 0.1), "smoothing": (0.1, 0.1), "trials": 1, "batch_size": 32, "validate_every": 50}
    return cls(network=NETWORK, epochs=EPOCHS, max_steps=most, **fixed)  # type: ignore[arg-type]
